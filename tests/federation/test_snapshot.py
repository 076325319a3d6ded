"""A snapshot holds the experts that differ from the pretrained ones, and no others."""

import pytest
import torch

from fedexperts.federation.snapshot import install_snapshot, read_snapshot, snapshot_bytes, take_snapshot
from fedexperts.models.checkpoint import Checkpoint
from fedexperts.moe.surgery import graft as grafting
from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.slots import SlotPlan, full_weights, split_layer
from fedexperts.moe.surgery.undo import undone
from fedexperts.running.workbench import build_parts
from fedexperts.tensors import copy_of, equal_bits, num_bytes

PLAN = SlotPlan(num_experts=6, tuned=(0, 1), kept=(2,), merged=((3, 4), (5,)))
DIFFERENT = {0, 4}
"""Expert 0 is trained, expert 4 runs as expert 3; tuned 1 and merged 3 and 5 are what they were."""


@pytest.fixture(params=["float32", "bfloat16"])
def parts(request, make_config):
    """The parts of a model with a checkpoint."""
    return build_parts(make_config("fedavg", f"model.dtype={request.param}"))[0]


def put_into_slots(parts):
    for layer in parts.layers:
        weights = seam.fused_weights(layer)
        merged = [{name: weight[expert] for name, weight in weights.items()} for expert in (3, 5)]
        split_layer(layer, PLAN, merged=merged)
        seam.load_tensors(
            parts.model,
            {seam.expert_name(layer, 0, name): weight[0].float() + 1 for name, weight in weights.items()},
        )


def weights_that_run(parts):
    return [copy_of(full_weights(layer)) for layer in parts.layers]


def test_slots_come_back_from_the_experts_that_differ(parts, tmp_path):
    with undone(parts.model, parts.layers, parts.originals) as undo:
        put_into_slots(parts)
        due, snapshot = weights_that_run(parts), take_snapshot(parts, undo.written)
    experts = {name for name in snapshot.tensors if ".experts." in name}
    assert experts == {
        seam.expert_name(layer, expert, parameter)
        for layer in parts.layers
        for expert in DIFFERENT
        for parameter in layer.parameter_names()
    }
    (tmp_path / "model.safetensors").write_bytes(snapshot_bytes(snapshot))
    with undone(parts.model, parts.layers, parts.originals):
        install_snapshot(parts, read_snapshot(tmp_path / "model.safetensors"))
        for found, wanted in zip(weights_that_run(parts), due, strict=True):
            assert all(equal_bits(found[name], wanted[name]) for name in wanted)


def test_experts_without_a_checkpoint_are_all_written(parts):
    """Nobody could tell what they were."""
    object.__setattr__(parts, "originals", None)
    with undone(parts.model, parts.layers) as undo:
        put_into_slots(parts)
        snapshot = take_snapshot(parts, undo.written)
    one = sum(num_bytes(layer.expert(0)) for layer in parts.layers)
    written = {name: tensor for name, tensor in snapshot.tensors.items() if ".experts." in name}
    assert num_bytes(written) == 6 * one


def test_trained_experts_that_no_gradient_moved_are_left_out(parts):
    layer = parts.layers[0]
    with undone(parts.model, parts.layers, parts.originals) as undo:
        undo.will_write({f"{layer.name}.{name}": w for name, w in seam.fused_weights(layer).items()})
        with torch.no_grad():
            layer.expert(2)[layer.parameter_names()[0]].zero_()
        snapshot = take_snapshot(parts, undo.written)
    experts = {name for name in snapshot.tensors if ".experts." in name}
    assert experts == {seam.expert_name(layer, 2, layer.parameter_names()[0])}


def test_only_experts_that_were_written_are_read_again(parts, monkeypatch):
    """Every client of a run has a snapshot; a graft, which lies inside a layer, is no reason to read it."""
    read, expert = [], Checkpoint.expert
    monkeypatch.setattr(
        Checkpoint, "expert", lambda self, *place: [read.append(place), expert(self, *place)][1]
    )
    layer = parts.layers[0]
    with undone(parts.model, parts.layers, parts.originals) as undo:
        grafting.graft(parts.layers, [1] * len(parts.layers), grafting.GraftForm(), 0)
        take_snapshot(parts, undo.written)
        assert read == []
        take_snapshot(parts, [seam.expert_name(layer, 2, layer.parameter_names()[0])])
    assert read == [(0, 2)]
