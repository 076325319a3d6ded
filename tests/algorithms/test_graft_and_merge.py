"""Graft and merge: the degenerate cases, one pass for everything, and the graft within the memory."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from turns import make_parts, planned, run

from fedexperts.algorithms import ALGORITHMS
from fedexperts.algorithms.api import ClientFacts
from fedexperts.algorithms.flex import CHOSEN
from fedexperts.algorithms.flux import Flux
from fedexperts.algorithms.graft_and_merge import GraftAndMerge
from fedexperts.errors import UserError
from fedexperts.moe.surgery.graft import GraftForm
from fedexperts.run_directory import read_lines
from fedexperts.running.experiment import run_experiment

FEW = ("algorithm.num_tuned=4", "algorithm.merged_per_layer=2")
UNCLIPPED = ("training.gradient_clip=0",)


@dataclass(frozen=True, kw_only=True)
class StockGraftAndMerge(GraftAndMerge):
    """Graft and merge that sums over experts in the order in which transformers does."""

    order: ClassVar = "stock"


def test_room_for_every_expert_is_flex_with_averaged_experts(make_config, tmp_path, quiet, monkeypatch):
    monkeypatch.setitem(ALGORITHMS, "stock", StockGraftAndMerge)
    options = ("algorithm.weighting=examples", "algorithm.own_model=trained")
    flex, flex_state = run(make_config("flex", "algorithm.experts=true"), tmp_path / "flex", quiet)
    both, both_state = run(make_config("stock", *options), tmp_path / "both", quiet)
    assert both_state.keys() == flex_state.keys()
    assert all(torch.equal(both_state[name], flex_state[name]) for name in flex_state)
    assert both["mean"] == flex["mean"]
    for client_id, one in flex["clients"].items():
        own = both["clients"][client_id]["algorithm"]
        assert own["chosen_experts"] == one["algorithm"]["chosen_experts"]


@pytest.mark.slow
def test_a_closed_gate_is_flux(make_config, tmp_path, quiet):
    # Clipping would sum the norms of more gradients, in another order.
    closed = ("algorithm.graft.gate_bias=-200", "algorithm.graft.gate_init=zero", *UNCLIPPED)
    flux, flux_state = run(
        make_config("flux", *FEW, *UNCLIPPED, "algorithm.lora=true"), tmp_path / "flux", quiet
    )
    both, both_state = run(
        make_config("graft_and_merge", *FEW, *closed, "algorithm.own_model=trained"), tmp_path / "both", quiet
    )
    assert all(torch.equal(both_state[name], flux_state[name]) for name in flux_state)
    assert both["mean"] == flux["mean"]


@pytest.mark.slow
def test_one_pass_in_the_first_turn_chooses_the_graft_and_judges_the_merge(make_config, tmp_path, quiet):
    run_experiment(make_config("graft_and_merge", *FEW), tmp_path / "run", progress=quiet)
    lines = read_lines(tmp_path / "run" / "clients.jsonl")
    errors = {(one["round"], one["client"]): one["algorithm"].get("merge_error") for one in lines}
    assert all(
        (error is not None and 0 < error < 2) is (number == 1) for (number, _), error in errors.items()
    )


@pytest.mark.slow
def test_a_received_shared_part_leaves_the_graft_alone_as_trained(make_config, tmp_path, quiet):
    received, _ = run(make_config("graft_and_merge", *FEW), tmp_path / "received", quiet)
    trained, _ = run(
        make_config("graft_and_merge", *FEW, "algorithm.own_model=trained"), tmp_path / "trained", quiet
    )
    for same in ("server_state_sha256", "personal_sha256"):
        assert received[same] == trained[same]
    assert received["mean"]["loss_after"] != trained["mean"]["loss_after"]
    assert received["mean"]["loss_before"] == trained["mean"]["loss_before"]


@pytest.mark.slow
def test_grafts_take_their_share_of_the_memory():
    parts = make_parts()
    flux, both = Flux(num_tuned=12), GraftAndMerge(num_tuned=12)
    rooms = [algorithm.room(parts) for algorithm in (flux, both)]
    weights = 2 * (rooms[0].parameters_each + parts.layers[0].hidden_size + 1)
    assert rooms[1].other_bytes - rooms[0].other_bytes == 16 * weights
    assert rooms[1].activations(4) > rooms[0].activations(4)
    assert [room.tuned_bytes for room in rooms] == [16, 20], "what came is put back after the local steps"
    assert GraftAndMerge(own_model="trained").room(parts).tuned_bytes == 16
    clients = (ClientFacts(client_id="a", num_train=5, memory_bytes=rooms[1].total(6, 8)),)
    assert both.room_for(parts, clients).tolist() == [6]
    assert int(flux.room_for(parts, clients)) > 6


def test_the_graft_is_kept_and_never_sent():
    parts, algorithm = make_parts(), GraftAndMerge(num_tuned=4, merged_per_layer=2)
    state = planned(algorithm, parts)
    expected = algorithm.expected(parts, state, "a")
    assert not [name for name in expected.tensors if "graft" in name]
    assert algorithm.blank(parts).beside[CHOSEN].tolist() == [0, 0]


def test_a_graft_on_a_base_that_moves_is_refused():
    with pytest.raises(UserError, match=r"graft\.lora_rank is 4, but the experts"):
        GraftAndMerge(graft=GraftForm(lora_rank=4))
