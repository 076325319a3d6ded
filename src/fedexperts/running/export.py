"""A client's personalised model out of a run, and back: generation, export, reload.

An exported folder holds ``fedexperts.json`` (what it is), ``adapter/`` (LoRA as PEFT writes it, which plain
PEFT loads), ``graft.safetensors`` (FLEx's experts and gates) and ``experts.safetensors`` (where experts were
trained).
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch

from fedexperts.algorithms.aggregation import load_tensors
from fedexperts.algorithms.api import ModelParts
from fedexperts.algorithms.flex import CHOSEN, Flex
from fedexperts.config.load import load_config
from fedexperts.config.schema import RunConfig
from fedexperts.data.examples import Example
from fedexperts.data.prompts import PromptFormat
from fedexperts.errors import UserError
from fedexperts.evaluation.generate import generate_greedily
from fedexperts.federation.checkpoint import load_checkpoint
from fedexperts.federation.personal import PersonalStore, read_tensors, write_tensors
from fedexperts.federation.scoring import ADAPTED
from fedexperts.models.adapters import AdapterSettings, add_lora, load_adapter, remove_lora, save_adapter
from fedexperts.models.load import ModelSettings, load_model
from fedexperts.moe.surgery.graft import GraftForm, graft
from fedexperts.moe.surgery.seam import addition_name
from fedexperts.run_directory import RunDirectory, read_json, write_json
from fedexperts.running.workbench import build_parts
from fedexperts.tensors import Tensors

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Version of an exported folder."""

When = Literal["before", "after"]


@dataclass(frozen=True, kw_only=True)
class PersonalisedModel:
    """A client's model, ready to use."""

    model: Any
    tokenizer: Any


@dataclass(frozen=True, kw_only=True)
class _Own:
    """A client's tensors: LoRA and experts by name, grafts by name, and which experts were copied."""

    shared: Tensors
    grafts: Tensors
    chosen: list[int]


def _client_tensors(run: RunDirectory, client_id: str, when: When) -> Tensors:
    """All tensors that make the client's model differ from the pretrained one."""
    clients = sorted(path.name for path in run.client_folders.glob("*") if path.is_dir())
    if client_id not in clients:
        raise UserError(f"client {client_id!r} is not in {run.path}: it must be one of {', '.join(clients)}")
    adapted = run.client_folders / client_id / ADAPTED
    if when == "after":
        if not adapted.exists():
            raise UserError(
                f"run {run.path} is not finished: it has no model of {client_id} after local steps"
            )
        return read_tensors(adapted)
    state = load_checkpoint(run)
    if state is None:
        raise UserError(f"run {run.path} has no finished round")
    personal = PersonalStore(run.client_folders).load(client_id, before_round=state.round + 1)
    if not personal and not state.tensors:
        raise UserError(f"client {client_id} has taken part in no round of {run.path}")
    return state.tensors | {
        name: tensor for name, tensor in personal.items() if not name.startswith("optimizer.")
    }


def _split(tensors: Tensors) -> _Own:
    return _Own(
        shared={n: t for n, t in tensors.items() if ".graft." not in n and n != CHOSEN},
        grafts={n: t for n, t in tensors.items() if ".graft." in n},
        chosen=tensors[CHOSEN].tolist() if CHOSEN in tensors else [],
    )


def _put_in(parts: ModelParts, own: _Own, form: GraftForm, seed: int) -> None:
    names = tuple(own.grafts)
    layers = [layer for layer in parts.layers if any(n.startswith(f"{addition_name(layer)}.") for n in names)]
    graft(layers, own.chosen, form, seed)
    load_tensors(parts.model, own.shared | own.grafts)


def _form(config: RunConfig) -> GraftForm:
    return config.algorithm.graft if isinstance(config.algorithm, Flex) else GraftForm()


def personalised_of_run(
    run_directory: Path, client_id: str, when: When
) -> tuple[PersonalisedModel, RunConfig]:
    """The model of ``client_id`` as the run left it: before, or after, the local steps of the evaluation.

    Raises:
        UserError: no such run or client, or the run has not come that far.
    """
    run = RunDirectory(run_directory)
    if not run.config.exists():
        raise UserError(f"{run_directory} holds no run (no config.toml)")
    config = load_config(run.config)
    own = _split(_client_tensors(run, client_id, when))
    parts, tokenizer = build_parts(config)
    _put_in(parts, own, _form(config), config.seed)
    return PersonalisedModel(model=parts.model, tokenizer=tokenizer), config


def generate_text(
    run_directory: Path, client_id: str, prompt: str, *, when: When = "after", context: str = ""
) -> str:
    """What the personalised model of ``client_id`` answers, greedily."""
    personalised, config = personalised_of_run(run_directory, client_id, when)
    format = PromptFormat(personalised.tokenizer, config.data.template, config.data.max_tokens)
    answer = generate_greedily(
        personalised.model,
        [format.encode_prompt(Example(instruction=prompt, context=context, response=""))],
        max_new_tokens=config.evaluation.max_new_tokens,
        batch_size=1,
        eos_token_id=format.eos_token_id,
        pad_token_id=format.pad_token_id,
    )[0]
    return str(personalised.tokenizer.decode(list(answer.token_ids), skip_special_tokens=True))


def export_client(
    run_directory: Path, client_id: str, to: Path, *, when: When = "after", as_checkpoint: bool = False
) -> Path:
    """Write the personalised model of ``client_id`` to the new folder ``to``.

    Args:
        run_directory: a run.
        client_id: one of its clients.
        to: a folder that does not exist, or is empty.
        when: before or after the local steps of the last evaluation.
        as_checkpoint: write one plain checkpoint that transformers loads alone, LoRA folded in.

    Raises:
        UserError: the folder is in use, or a plain checkpoint cannot express the model: no family has a
            further gated expert that is always on, so a graft stays beside it.
    """
    if to.exists() and any(to.iterdir()):
        raise UserError(f"output folder {to} is already in use")
    run = RunDirectory(run_directory)
    if not run.config.exists():
        raise UserError(f"{run_directory} holds no run (no config.toml)")
    config = load_config(run.config)
    own = _split(_client_tensors(run, client_id, when))
    if as_checkpoint:
        return _export_checkpoint(config, own, client_id, to)
    model_name = config.model.name
    base = str(Path(model_name).resolve()) if Path(model_name).is_dir() else model_name
    lora = {name: tensor for name, tensor in own.shared.items() if ".lora_" in name}
    experts = {name: tensor for name, tensor in own.shared.items() if ".lora_" not in name}
    to.mkdir(parents=True, exist_ok=True)
    save_adapter(to / "adapter", lora, config.adapter, base)
    if own.grafts:
        write_tensors(to / "graft.safetensors", own.grafts)
    if experts:
        write_tensors(to / "experts.safetensors", experts)
    write_json(
        to / "fedexperts.json",
        {
            "format_version": FORMAT_VERSION,
            "client": client_id,
            "when": when,
            "model": asdict(config.model) | {"name": base},
            "adapter": asdict(config.adapter),
            "chosen_experts": own.chosen,
            "graft": asdict(_form(config)) if own.chosen else None,
            "template": config.data.template,
            "max_tokens": config.data.max_tokens,
            "seed": config.seed,
        },
    )
    return to


def _export_checkpoint(config: RunConfig, own: _Own, client_id: str, to: Path) -> Path:
    if own.chosen:
        raise UserError(
            f"the model of {client_id} has grafted experts, which a plain checkpoint of {config.model.name} "
            "cannot express: export it without --checkpoint"
        )
    parts, tokenizer = build_parts(config)
    load_tensors(parts.model, own.shared)
    remove_lora(parts.model, fold=True)
    cast(Any, parts.model).save_pretrained(to)
    tokenizer.save_pretrained(to)
    return to


def load_personalised(directory: str | Path) -> PersonalisedModel:
    """The model that :func:`export_client` wrote to ``directory``: the same logits, bit for bit.

    Raises:
        UserError: the folder is no such export, or is of a newer version.
    """
    directory = Path(directory)
    record = read_json(directory / "fedexperts.json")
    if record.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{directory} has export format {record.get('format_version')}, not {FORMAT_VERSION}")
    adapter = record["adapter"] | {"target_modules": tuple(record["adapter"]["target_modules"])}
    loaded = load_model(ModelSettings(**record["model"]), record["seed"])
    lora_names = add_lora(loaded.model, AdapterSettings(**adapter), record["seed"])
    parts = ModelParts(model=loaded.model, layers=loaded.layers, lora_names=lora_names)
    own = _Own(
        shared=_read_shared(directory),
        grafts=_read_if_there(directory / "graft.safetensors"),
        chosen=record["chosen_experts"],
    )
    with torch.no_grad():
        _put_in(parts, own, GraftForm(**(record["graft"] or {})), record["seed"])
    return PersonalisedModel(model=parts.model, tokenizer=loaded.tokenizer)


def _read_shared(directory: Path) -> Tensors:
    lora = load_adapter(directory / "adapter")
    return lora | _read_if_there(directory / "experts.safetensors")


def _read_if_there(path: Path) -> Tensors:
    return read_tensors(path) if path.exists() else {}
