"""Take a model out of a run, and load it again: generation, export, reload.

An exported folder holds ``fedexperts.json`` (a description), ``adapter/`` (LoRA as PEFT writes it, which
plain PEFT loads) and, where there are any, ``experts.safetensors`` (grafts, experts, folded weights, further
adapters).
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from fedexperts.algorithms.api import ModelParts
from fedexperts.client_folder import ClientFolder
from fedexperts.config.load import load_config
from fedexperts.config.schema import RunConfig
from fedexperts.costs.stopwatch import Stopwatch
from fedexperts.data.examples import Example
from fedexperts.data.federated import no_data
from fedexperts.errors import UserError, known_options
from fedexperts.evaluation.generate import generate_greedily
from fedexperts.federation.checkpoint import Checkpoint, load_checkpoint
from fedexperts.federation.personal import read_tensors, write_tensors
from fedexperts.federation.scoring import ADAPTED
from fedexperts.federation.snapshot import (
    Snapshot,
    install_snapshot,
    read_snapshot,
    snapshot_of,
    take_snapshot,
)
from fedexperts.integrity import check_config_of
from fedexperts.messages import Download, Sent, decode_download
from fedexperts.models.adapters import AdapterSettings, add_lora, load_adapter, remove_lora, save_adapter
from fedexperts.models.held_experts import make_dense
from fedexperts.models.load import ModelSettings, load_model
from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.undo import undone
from fedexperts.run_directory import RunDirectory, read_json, refuse_used, write_json
from fedexperts.running.workbench import Workbench, open_workbench, personal_store
from fedexperts.seals import read_sealed_bytes
from fedexperts.site_seals import check_config, is_at_site, read_site_record

logger = logging.getLogger(__name__)

FORMAT_VERSION = 4
"""Version of an exported folder."""

When = Literal["before", "after"]
BASE, SERVER = "base", "server"
"""Models that belong to no client: the pretrained one, and the server's after the last round."""


@dataclass(frozen=True, kw_only=True)
class PersonalisedModel:
    """A client's model, ready to use."""

    model: Any
    tokenizer: Any


def _config_of(run: RunDirectory) -> RunConfig:
    if not run.config.exists():
        raise UserError(f"{run.path} holds no run (no config.toml)")
    if is_at_site(run):
        check_config(run, read_site_record(run))
    else:
        check_config_of(run)
    return load_config(run.config)


def model_of_run(run: RunDirectory, bench: Workbench, who: str, when: When) -> Snapshot:
    """Return a model of a run: of the client ``who``, the server's, or the pretrained one.

    Raises:
        UserError: there is no such client, or the run has not come that far.
    """
    parts, algorithm = bench.parts, bench.algorithm
    if who == BASE:
        return Snapshot(tensors={})
    if who == SERVER:
        with undone(parts.model, parts.layers, parts.originals) as undo:
            algorithm.install_shared(parts, _shared_model(run, bench))
            return take_snapshot(parts, undo.written)
    _refuse_unknown(run, who)
    if when == "before":
        return _before(run, bench, who)
    folder = ClientFolder(run.client_folders / who)
    if not folder.has(ADAPTED):
        raise UserError(
            f"run {run.path} is not finished: it has no model of {who} after local steps (--when before has "
            "the one before them)"
        )
    return read_snapshot(folder.path / ADAPTED)


def _refuse_unknown(run: RunDirectory, client_id: str) -> None:
    clients = sorted(path.name for path in run.client_folders.glob("*") if path.is_dir())
    if client_id not in clients:
        raise UserError(f"client {client_id!r} is not in {run.path}: it must be one of {', '.join(clients)}")


def _state_of(run: RunDirectory) -> Checkpoint:
    reached = load_checkpoint(run)
    if reached is None:
        raise UserError(f"run {run.path} has no finished round")
    return reached


def _shared_model(run: RunDirectory, bench: Workbench) -> Sent:
    """Return what the server's model is made of; at a site, as the site has last received it."""
    if not is_at_site(run):
        return bench.algorithm.server_model(_state_of(run).state)
    client_id = read_site_record(run)["client"]
    download = _received(run, client_id)
    kept = personal_store(run.path).load(client_id, download.kept_round)
    return bench.algorithm.server_view(kept, download.sent)


def _received(run: RunDirectory, client_id: str) -> Download:
    """Return the server's last message to a site."""
    return decode_download(read_sealed_bytes(run.received(client_id)))


def _sent_and_kept_round(run: RunDirectory, bench: Workbench, client_id: str) -> tuple[Sent, int]:
    """Return what the server would send (at a site: has sent last) and the round that is gone on from."""
    if is_at_site(run):
        download = _received(run, client_id)
        return download.sent, download.kept_round
    reached = _state_of(run)
    kept_round = reached.kept_rounds.get(client_id, 0)
    if not kept_round:
        raise UserError(f"client {client_id} has taken part in no round of {run.path}")
    planned = bench.algorithm.plan_round(reached.state, [client_id], reached.state.round_number + 1)
    return bench.algorithm.download(planned, client_id), kept_round


def _before(run: RunDirectory, bench: Workbench, client_id: str) -> Snapshot:
    """Install what the server would send and what the client keeps; no data is needed."""
    sent, kept_round = _sent_and_kept_round(run, bench, client_id)
    runtime = bench.scorer(personal_store(run.path)).runtime
    kept = runtime.store.load(client_id, kept_round)
    with runtime.installed(client_id, kept, sent) as undo:
        return take_snapshot(bench.parts, undo.written)


@contextmanager
def opened_model(
    run_directory: Path, who: str, when: When
) -> Iterator[tuple[Workbench, Snapshot, RunConfig]]:
    """Open a run without its data, and the model of ``who``, put into the resident one for the block.

    Raises:
        UserError: no such run or client, or the run has not come that far.
    """
    run = RunDirectory(run_directory)
    config = _config_of(run)
    with open_workbench(config, Stopwatch(), data=no_data()) as bench:
        snapshot = model_of_run(run, bench, who, when)
        install_snapshot(bench.parts, snapshot)
        yield bench, snapshot, config


@known_options
def generate_text(
    run_directory: Path, who: str, prompt: str, *, when: When = "after", context: str = ""
) -> str:
    """Return the greedy answer of a run's model: of the client ``who``, or ``base`` or ``server``."""
    with opened_model(run_directory, who, when) as (bench, _, config):
        format = bench.format
        answer = generate_greedily(
            bench.parts.model,
            [format.encode_prompt(Example(instruction=prompt, context=context, response=""))],
            max_new_tokens=config.evaluation.max_new_tokens,
            batch_size=1,
            eos_token_id=format.eos_token_id,
            pad_token_id=format.pad_token_id,
        )[0]
        return str(format.tokenizer.decode(list(answer.token_ids), skip_special_tokens=True))


@known_options
def export_client(
    run_directory: Path, who: str, to: Path, *, when: When = "after", as_checkpoint: bool = False
) -> Path:
    """Write a model of a run to the new folder ``to``.

    Args:
        run_directory: a run.
        who: one of its clients, or ``base`` or ``server``.
        to: a folder that does not exist, or is empty.
        when: before or after the local steps of the last evaluation.
        as_checkpoint: write one plain checkpoint that transformers loads alone, LoRA folded in; experts in
            few bits are written as they run, rounded, in the model's dtype.

    Raises:
        UserError: the folder is in use, or a plain checkpoint cannot express the model: no family has a
            further gated expert that is always on, so a graft stays beside it; nor has one LoRA that
            depends on the token or the prompt.
    """
    refuse_used(to)
    with opened_model(run_directory, who, when) as (bench, snapshot, config):
        if as_checkpoint:
            return _export_checkpoint(bench, snapshot, who, to)
        name = config.model.name
        base = str(Path(name).resolve()) if Path(name).is_dir() else name
        default = {n: t for n, t in snapshot.tensors.items() if n in bench.parts.lora_names}
        rest = {n: t for n, t in snapshot.tensors.items() if n not in default}
        to.mkdir(parents=True, exist_ok=True)
        save_adapter(
            to / "adapter",
            default or seam.current(bench.parts.model, bench.parts.lora_names),
            config.adapter,
            base,
        )
        if rest:
            write_tensors(to / "experts.safetensors", rest)
        write_json(to / "fedexperts.json", _record(config, snapshot, who, when, base))
    return to


def _record(config: RunConfig, snapshot: Snapshot, who: str, when: When, base: str) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "client": who,
        "when": when,
        "model": asdict(config.model) | {"name": base},
        "adapter": asdict(config.adapter),
        **snapshot.notes(),
        "template": config.data.template,
        "max_tokens": config.data.max_tokens,
        "seed": config.seed,
    }


def _export_checkpoint(bench: Workbench, snapshot: Snapshot, who: str, to: Path) -> Path:
    beyond = {
        "grafted experts": snapshot.grafts,
        "LoRA experts with a router": snapshot.experts_per_token,
        "adapters that are weighed anew for each prompt": snapshot.instance_weights,
    }
    for what, is_there in beyond.items():
        if is_there:
            raise UserError(
                f"the model of {who} has {what}, which a plain checkpoint of {bench.config.model.name} "
                "cannot express: export it without --checkpoint"
            )
    remove_lora(bench.parts.model, fold=True)
    if bench.config.model.experts_bits:
        logger.warning(
            "the run held its experts in %d bits: the checkpoint has these rounded experts in %s",
            bench.config.model.experts_bits,
            bench.config.model.dtype,
        )
    make_dense(bench.parts.layers)
    cast(Any, bench.parts.model).save_pretrained(to)
    bench.format.tokenizer.save_pretrained(to)
    return to


def load_personalised(directory: str | Path) -> PersonalisedModel:
    """Return the model that :func:`export_client` wrote to ``directory``: the same logits, bit for bit.

    Raises:
        UserError: the folder is no such export, or is of another version.
    """
    directory = Path(directory)
    record = read_json(directory / "fedexperts.json")
    if record.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{directory} has export format {record.get('format_version')}, not {FORMAT_VERSION}")
    adapter = AdapterSettings(
        **record["adapter"] | {"target_modules": tuple(record["adapter"]["target_modules"])}
    )
    loaded = load_model(ModelSettings(**record["model"]), record["seed"])
    lora_names = add_lora(loaded.model, adapter, record["seed"])
    parts = ModelParts(model=loaded.model, layers=loaded.layers, lora_names=lora_names, adapter=adapter)
    rest = directory / "experts.safetensors"
    tensors = load_adapter(directory / "adapter") | (read_tensors(rest) if rest.exists() else {})
    install_snapshot(parts, snapshot_of(tensors, record))
    return PersonalisedModel(model=parts.model, tokenizer=loaded.tokenizer)
