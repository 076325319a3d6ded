"""Join a run's parts: data, model, algorithm and the runtime on which clients take turns."""

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from fedexperts.algorithms.api import Algorithm, ClientFacts, ModelParts
from fedexperts.config.load import config_sha256
from fedexperts.config.schema import RunConfig
from fedexperts.costs.devices import Device
from fedexperts.costs.stopwatch import Stopwatch
from fedexperts.data.examples import Question
from fedexperts.data.federated import FederatedData, load_federated_data, load_site_data
from fedexperts.data.prompts import PromptFormat
from fedexperts.errors import UserError
from fedexperts.evaluation.multiple_choice import load_exam
from fedexperts.evaluation.own_metrics import refuse_unknown_metrics
from fedexperts.evaluation.retention import RetentionProbe, load_probe
from fedexperts.federation.calibration import first_texts
from fedexperts.federation.client_processes import ClientProcesses, peak_of
from fedexperts.federation.personal import PersonalStore
from fedexperts.federation.runtime import ClientRuntime, RuntimeSettings, Watcher
from fedexperts.federation.scoring import Scorer
from fedexperts.federation.site_settings import SiteSettings
from fedexperts.federation.workers import WorkerPool, hand_over_by
from fedexperts.models.adapters import add_lora
from fedexperts.models.experts_on_disk import ExpertsOnDisk, bytes_in_memory, load_on_disk
from fedexperts.models.frozen_weights import map_frozen, write_frozen
from fedexperts.models.load import load_model, load_tokenizer
from fedexperts.models.originals import open_originals
from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.undo import Originals
from fedexperts.process_memory import (
    MemoryGuard,
    anonymous_bytes,
    can_be_measured,
    hold_little,
    return_freed_memory,
)
from fedexperts.processes import Tell
from fedexperts.seeds import derive_seed
from fedexperts.shared_file import SharedFile

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Workbench:
    """Everything that a run needs, its progress apart."""

    config: RunConfig
    parts: ModelParts
    format: PromptFormat
    data: FederatedData
    algorithm: Algorithm
    questions: tuple[Question, ...]
    probe: RetentionProbe
    """Questions that models are asked outside the clients' tasks."""
    memory_bytes: Mapping[str, int] = field(default_factory=dict)
    """Memory of the device of each client of the whole data."""
    devices: Mapping[str, Device] = field(default_factory=dict)
    """Device of each client of the whole data, for the clock; empty without one."""

    def scorer(self, store: PersonalStore, watcher: Watcher | None = None) -> Scorer:
        """Return a runtime for the clients of this workbench's data, with what evaluates them."""
        settings = RuntimeSettings(
            seed=self.config.seed,
            num_rounds=self.config.rounds,
            config_sha256=config_sha256(self.config),
            training=self.config.training,
            evaluation=self.config.evaluation,
            memory_bytes=self.memory_bytes,
            devices=self.devices,
            keep_states=self.config.keep_states,
            num_older=2 if self.config.asynchronous else 1,
            privacy=self.config.privacy,
        )
        runtime = ClientRuntime(self.parts, self.format, self.data, self.algorithm, settings, store, watcher)
        return Scorer(runtime, self.questions, self.probe)


def build_parts(config: RunConfig, *, on_disk: bool = False) -> tuple[ModelParts, Any]:
    """Return the model with LoRA at its start, and its tokenizer; also set torch's threads and global seeds.

    The global seeds are for other libraries: nothing of ours draws from them. With ``on_disk`` the model's
    experts stay on disk.
    """
    torch.set_num_threads(config.threads)
    set_seed(derive_seed(config.seed, "global") % 2**32)
    random.seed(derive_seed(config.seed, "global"))
    model, tokenizer, originals = _on_disk(config) if on_disk else _resident(config)
    lora_names = add_lora(model, config.adapter, config.seed)
    parts = ModelParts(
        model=model,
        layers=seam.find_moe_layers(model),
        lora_names=lora_names,
        adapter=config.adapter,
        originals=originals,
        on_disk=on_disk,
        seed=config.seed,
        training=config.training,
        max_tokens=config.data.max_tokens,
    )
    return parts, tokenizer


def _resident(config: RunConfig) -> tuple[Any, Any, Originals | None]:
    loaded = load_model(config.model, config.seed)
    originals = None if config.model.experts_bits else open_originals(config.model)
    return loaded.model, loaded.tokenizer, originals


def _on_disk(config: RunConfig) -> tuple[Any, Any, Originals | None]:
    checkpoint = open_originals(config.model)
    assert checkpoint is not None, "refused before any process is started"
    return load_on_disk(checkpoint), load_tokenizer(config.model), ExpertsOnDisk(checkpoint)


@contextmanager
def open_workbench(
    config: RunConfig, stopwatch: Stopwatch, *, data: FederatedData | None = None, on_disk: bool = False
) -> Iterator[Workbench]:
    """Load the model, and the data unless they are given; the spooled examples are deleted at the end.

    With ``on_disk`` the model's experts stay on disk.
    """
    if data is None:
        refuse_unknown_metrics(config.evaluation)
    with stopwatch.phase("data"):
        data = load_federated_data(config.data, config.seed) if data is None else data
    with data:
        with stopwatch.phase("model"):
            parts, tokenizer = build_parts(config, on_disk=on_disk)
        format = PromptFormat(tokenizer, config.data.template, config.data.max_tokens)
        if data.client_ids:
            _read_public_texts(config, format)
        yield Workbench(
            config=config,
            parts=parts,
            format=format,
            data=data,
            algorithm=config.algorithm,
            questions=tuple(
                load_exam(config.evaluation.exam, data_source=config.data.source, seed=config.seed)
            ),
            probe=load_probe(config.evaluation, config.data, config.seed),
            memory_bytes=_memory_bytes(config, data.client_ids),
            devices=config.clock.devices(data.client_ids, config.seed) if config.clock else {},
        )


def _read_public_texts(config: RunConfig, format: PromptFormat) -> None:
    """Refuse texts that are missing or damaged now, and not in the first client's turn."""
    named = {f"algorithm.{name}": texts for name, texts in config.algorithm.public_texts.items()}
    if config.training.replay:
        named["training.replay"] = (config.training.replay, config.training.replay_texts)
    for key, (source, largest) in named.items():
        first_texts(format, source, largest, key)


@contextmanager
def open_site(config: RunConfig, site: SiteSettings) -> Iterator[Workbench]:
    """Load the model, and the data of this site alone, as its settings name them.

    What it yields has the experiment's own configuration, whose hash the server knows.
    """
    refuse_unknown_metrics(config.evaluation)
    here = replace(config, model=replace(config.model, device=site.device)) if site.device else config
    with open_workbench(here, Stopwatch(), data=load_site_data(site.data(config.data), site.name)) as bench:
        yield replace(bench, config=config, memory_bytes={site.name: round(site.memory_gb * 1e9)})


def _memory_bytes(config: RunConfig, client_ids: Sequence[str]) -> dict[str, int]:
    """Return the memory of each client's device; 0 for no limit."""
    if config.clock and config.clock.limits_memory:
        devices = config.clock.devices(client_ids, config.seed)
        return {client_id: device.memory_bytes for client_id, device in devices.items()}
    return {client_id: config.cohort.memory_bytes(place) for place, client_id in enumerate(client_ids)}


def personal_store(run_directory: Path) -> PersonalStore:
    """Return where a simulated run keeps its clients' own tensors."""
    return PersonalStore(run_directory / "clients")


@contextmanager
def open_worker_pool(
    bench: Workbench, run_directory: Path, clients: tuple[ClientFacts, ...]
) -> Iterator[WorkerPool]:
    """Give workers that take the turns of ``clients`` on ``bench``'s data and its frozen weights.

    With ``transport.clients = "process"`` they hold no frozen weights but those that a turn needs.

    Raises:
        UserError: the model is not in main memory, or its experts cannot be read one by one.
    """
    transport = bench.config.transport
    if transport.clients == "process":
        refuse_processes(bench)
        open_confined = partial(_open_confined, bench.config, bench.data, run_directory)
        with ClientProcesses(transport.workers, open_confined, clients) as processes:
            yield processes
        return
    if bench.parts.layers[0].device().type != "cpu":
        raise UserError(
            f"transport.workers is {transport.workers}, but the model is on a GPU, and workers "
            'share a model in main memory: set model.device to "cpu", or leave transport.workers at 1'
        )
    weights = write_frozen(bench.parts.model, bench.parts.lora_names)
    map_frozen(bench.parts.model, weights)
    open_runtime = partial(_open_runtime, bench.config, bench.data, weights, run_directory)
    with WorkerPool(transport.workers, open_runtime, clients) as pool:
        yield pool


@contextmanager
def _open_runtime(
    config: RunConfig, data: FederatedData, weights: SharedFile, run_directory: Path, tell: Tell
) -> Iterator[ClientRuntime]:
    """Load in a worker what takes clients' turns; its own copy of the frozen weights is freed at once."""
    with open_workbench(config, Stopwatch(), data=data) as bench:
        map_frozen(bench.parts.model, weights)
        runtime = bench.scorer(personal_store(run_directory)).runtime
        runtime.hand_over = hand_over_by(tell, dict)
        yield runtime


def refuse_processes(bench: Workbench) -> None:
    """Raise UserError where ``transport.clients = "process"`` is impossible with the model or the system."""
    key = 'transport.clients is "process"'
    if bench.parts.layers[0].device().type != "cpu":
        raise UserError(f'{key}, but the model is on a GPU: set model.device to "cpu"')
    if not can_be_measured():
        raise UserError(f"{key}, but this system does not tell a process its memory, as Linux does")
    if bench.parts.originals is None:
        raise UserError(
            f'{key}, but the experts of model.name = "{bench.config.model.name}" cannot be read one by one '
            'from a folder of safetensors files: leave it at "resident"'
        )


@contextmanager
def _open_confined(
    config: RunConfig, data: FederatedData, run_directory: Path, tell: Tell
) -> Iterator[ClientRuntime]:
    """Load in a worker what takes clients' turns without the whole model, each within its client's memory."""
    hold_little()
    with open_workbench(config, Stopwatch(), data=data, on_disk=True) as bench:
        runtime = bench.scorer(personal_store(run_directory)).runtime
        return_freed_memory()
        own_bytes = anonymous_bytes() - bytes_in_memory(bench.parts.model)
        runtime.guard = MemoryGuard(own_bytes, bench.memory_bytes)
        runtime.hand_over = hand_over_by(tell, partial(peak_of, runtime.guard))
        yield runtime
