"""Save everything that makes a model differ from the pretrained one, and put it into a fresh model.

A snapshot needs no knowledge of the algorithm that made the model: it asks the model which grafts it has, and
the undo stack which parameters were written or trained.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_safetensors

from fedexperts.algorithms.api import ModelParts
from fedexperts.errors import UserError
from fedexperts.models import prompt_gate
from fedexperts.models.adapters import (
    adapter_names,
    adapter_scales,
    add_adapter,
    lora_parameters,
    scale_adapters,
)
from fedexperts.models.instance_weights import InstanceForm, add_instance_weights, notes_of
from fedexperts.models.routed_lora import add_routed_lora, experts_per_token
from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.graft import GraftedExperts, GraftForm, graft, graft_names, grafts_of
from fedexperts.moe.surgery.seam import MoeLayer
from fedexperts.moe.surgery.slots import full_weights, is_as_loaded
from fedexperts.tensors import Tensors, equal_bits


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One model, as the difference to the pretrained model with LoRA at its start."""

    tensors: Tensors
    """LoRA, parameters and experts by name, and those of grafts."""
    grafts: tuple[Mapping[str, Any], ...] = ()
    """For each grafted layer: ``layer``, the copied ``experts`` (one, or a list), and the ``form``."""
    adapters: tuple[str, ...] = field(default=())
    """Names of LoRA adapters beside the first."""
    scales: Mapping[str, float] = field(default_factory=dict)
    """Factor of each adapter's output by name, the first included."""
    experts_per_token: int = 0
    """Domain experts of routed LoRA that a token uses; 0 for no routed LoRA."""
    instance_weights: Mapping[str, Any] = field(default_factory=dict)
    """Form of adapters' weights by instance; empty for fixed weights."""
    prompt_gate: Mapping[str, Any] = field(default_factory=dict)
    """Form of the gate that looks at prompts; empty for none."""

    def notes(self) -> dict[str, Any]:
        """Return the plain data, for JSON."""
        return {
            "grafts": list(self.grafts),
            "adapters": list(self.adapters),
            "scales": dict(self.scales),
            "experts_per_token": self.experts_per_token,
            "instance_weights": dict(self.instance_weights),
            "prompt_gate": dict(self.prompt_gate),
        }


def snapshot_of(tensors: Tensors, notes: Mapping[str, Any]) -> Snapshot:
    """Return the snapshot whose plain data are ``notes``; other entries of theirs are ignored.

    Raises:
        KeyError: the notes are not of a snapshot of this version.
    """
    return Snapshot(
        tensors=tensors,
        grafts=tuple(notes["grafts"]),
        adapters=tuple(notes["adapters"]),
        scales=notes["scales"],
        experts_per_token=notes["experts_per_token"],
        instance_weights=notes["instance_weights"],
        prompt_gate=notes.get("prompt_gate", {}),  # no snapshot had one at first
    )


def take_snapshot(parts: ModelParts, written: Iterable[str]) -> Snapshot:
    """Return what the model in place differs in; ``written`` names what was written or trained.

    A layer with slots gives every expert what runs for it, so that members of a merged group are copies.
    Experts that are pretrained, bit for bit, are left out where the pretrained ones can be read again.
    """
    model, layers = parts.model, parts.layers
    with_slots = [one for one in layers if seam.slots_of(one) is not None and not is_as_loaded(one)]
    inside = tuple(f"{layer.name}." for layer in with_slots)
    adapters = adapter_names(model)
    names = dict.fromkeys((*lora_parameters(model), *graft_names(layers)))
    for name in written:
        names |= dict.fromkeys(seam.names_in(layers, name))
    tensors = seam.current(
        model, [name for name in names if not name.startswith(inside) or ".graft." in name]
    )
    for layer in with_slots:
        tensors |= _experts_that_run(layer)
    return Snapshot(
        tensors=_without_pretrained(parts, tensors),
        grafts=tuple(_grafts(layers)),
        adapters=adapters[1:],
        scales=adapter_scales(model),
        experts_per_token=experts_per_token(model),
        instance_weights=notes_of(model),
        prompt_gate=prompt_gate.notes_of(model),
    )


def _experts_that_run(layer: MoeLayer) -> Tensors:
    return {
        seam.expert_name(layer, expert, parameter): weight[expert].cpu().contiguous()
        for parameter, weight in full_weights(layer).items()
        for expert in range(layer.num_experts)
    }


def _without_pretrained(parts: ModelParts, tensors: Tensors) -> Tensors:
    """Leave out experts that were written or trained, but are as they were pretrained."""
    if parts.originals is None:
        return tensors
    same = set()
    for layer in parts.layers:
        for expert in range(layer.num_experts):
            names = {seam.expert_name(layer, expert, one): one for one in layer.parameter_names()}
            held = names.keys() & tensors.keys()
            # Every client has its own snapshot: only what there is to compare with is read from the disk.
            pretrained = parts.originals.expert(layer.index, expert) if held else {}
            same |= {name for name in held if equal_bits(tensors[name], pretrained[names[name]])}
    return {name: tensor for name, tensor in tensors.items() if name not in same}


def _grafts(layers: Sequence[MoeLayer]) -> Iterator[dict[str, Any]]:
    for layer in layers:
        grafts = grafts_of(layer)
        if grafts:
            is_list = isinstance(seam.addition_of(layer), GraftedExperts)
            experts = [one.expert for one in grafts] if is_list else grafts[0].expert
            yield {"layer": layer.index, "experts": experts, "form": asdict(grafts[0].form)}


def install_snapshot(parts: ModelParts, snapshot: Snapshot) -> None:
    """Make a model, as it was loaded, the one that ``snapshot`` was taken of.

    Raises:
        UserError: the snapshot is of another model.
    """
    for name in snapshot.adapters:
        add_adapter(parts.model, parts.adapter, 0, name)
    scale_adapters(parts.model, snapshot.scales)
    if snapshot.experts_per_token:
        add_routed_lora(parts.model, snapshot.tensors, parts.adapter, snapshot.experts_per_token)
    if snapshot.instance_weights:
        form = dict(snapshot.instance_weights)
        num_instances = form.pop("num_instances")
        add_instance_weights(parts.model, InstanceForm(**form), num_instances)
    for one in snapshot.grafts:
        if not 0 <= one["layer"] < len(parts.layers):
            raise UserError(f"the snapshot has a graft in MoE layer {one['layer']}, which the model lacks")
        graft([parts.layers[one["layer"]]], [one["experts"]], GraftForm(**one["form"]), 0)
    if snapshot.prompt_gate:
        form_of_gate = prompt_gate.PromptGateForm(**snapshot.prompt_gate)
        prompt_gate.add_prompt_gate(parts.model, parts.layers, form_of_gate)
    seam.load_tensors(parts.model, snapshot.tensors)


def snapshot_bytes(snapshot: Snapshot) -> bytes:
    """Return a snapshot as one safetensors file, its plain data as JSON in the header."""
    return save_safetensors(snapshot.tensors, metadata={_NOTES: json.dumps(snapshot.notes())})


def read_snapshot(path: Path) -> Snapshot:
    """Return what :func:`snapshot_bytes` gave, from ``path``.

    Raises:
        UserError: the file is missing, truncated, or something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            notes = json.loads(file.metadata()[_NOTES])
        return snapshot_of(tensors, notes)
    except (OSError, SafetensorError, TypeError, KeyError, ValueError, RecursionError) as error:
        raise UserError(f"model in {path} cannot be read: {error}") from None


_NOTES = "fedexperts"
