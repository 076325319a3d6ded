"""FMES: the most used experts are tuned, the others are absent."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from turns import CLIENTS, assert_same, make_client, make_parts, planned, run, turn

from fedexperts.algorithms import ALGORITHMS
from fedexperts.algorithms.api import Kept
from fedexperts.algorithms.fmes import NUM_TUNED, Fmes
from fedexperts.algorithms.tuned_experts import CHANGED, ROLES, SCORES, names_of_role
from fedexperts.costs.room import room_of
from fedexperts.errors import UserError
from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.undo import undone


@dataclass(frozen=True, kw_only=True)
class StockFmes(Fmes):
    """FMES that sums over experts in the order in which transformers does."""

    order: ClassVar = "stock"


@pytest.mark.slow
def test_all_experts_tuned_is_fedavg_of_all_experts(make_config, tmp_path, quiet, monkeypatch):
    monkeypatch.setitem(ALGORITHMS, "stock_fmes", StockFmes)
    one, expected = run(make_config("fedavg_experts"), tmp_path / "fedavg", quiet)
    options = ("algorithm.lora=true", "algorithm.weighting=examples")
    other, found = run(make_config("stock_fmes", *options), tmp_path / "fmes", quiet)
    assert_same(found, expected)
    assert other["mean"] == one["mean"]


def scored(state, client_id, tokens_LE):
    scores_CLE = state.beside[SCORES].clone()
    scores_CLE[state.position(client_id)] = torch.tensor(tokens_LE, dtype=torch.float64)
    return replace(state, beside=state.beside | {SCORES: scores_CLE})


def test_each_layer_s_most_used_comes_first_then_the_most_used_of_all():
    parts, algorithm = make_parts(), Fmes(num_tuned=3)
    # Shares of the first layer: 0.5, 0.3, 0.2; of the second: 0.19 and less.
    used = [[10, 0, 6, 4, 0, 0], [16, 19, 17, 16, 16, 16]]
    state = scored(planned(algorithm, parts), "b", used)
    role_LE = algorithm.plan_round(state, ("b",), 2).beside[ROLES][1]
    assert role_LE.nonzero().tolist() == [[0, 0], [0, 2], [1, 1]]


def test_first_roles_are_drawn_and_differ():
    roles = planned(Fmes(num_tuned=6), make_parts()).beside[ROLES]
    assert roles.flatten(1).sum(1).tolist() == [6, 6, 6]
    assert not torch.equal(roles[0], roles[1])


def test_tokens_skip_the_experts_that_are_dropped_and_their_choices_count():
    parts, algorithm = make_parts(), Fmes(num_tuned=3)
    state = planned(algorithm, parts, ("a",))
    role_LE = state.beside[ROLES][0]
    with undone(parts.model, parts.layers):
        algorithm.install(make_client(parts), Kept(), algorithm.download(state, "a"))
        slots = [seam.slots_of(layer) for layer in parts.layers]
        assert [slot.plan.num_slots for slot in slots] == role_LE.sum(1).tolist()
        assert (
            sum(len(weight) for layer in parts.layers for weight in seam.fused_weights(layer).values()) == 0
        )
    upload, _ = turn(algorithm, parts, state)
    # Two steps of 48 tokens that choose 2 of 6 experts.
    assert upload.beside["tokens"].sum(1).tolist() == [2 * 48 * 2] * 2
    assert upload.tensors.keys() == set(names_of_role(parts.layers, role_LE))


def test_only_changed_experts_of_the_role_travel_down():
    parts, algorithm = make_parts(), Fmes(num_tuned=3)
    state = planned(algorithm, parts)
    assert algorithm.download(state, "a").tensors == {}
    uploads = [(name, turn(algorithm, parts, state, name)[0]) for name in ("a", "b", "c")]
    state = algorithm.plan_round(algorithm.server_update(state, uploads), ("a", "b", "c"), 2)
    due = (state.beside[CHANGED] > 0) & state.beside[ROLES][0]
    assert due.any()
    assert algorithm.download(state, "a").tensors.keys() == set(names_of_role(parts.layers, due))


@pytest.mark.slow
def test_a_role_has_the_size_that_memory_has_room_for():
    parts, algorithm = make_parts(), Fmes()
    room = room_of(parts.model, parts.layers, parts.largest_batch, parts.training)
    facts = (replace(CLIENTS[0], memory_bytes=room.total(5, 0)), *CLIENTS[1:])
    assert algorithm.init(parts, facts).beside[NUM_TUNED].tolist() == [5, 12, 12]
    facts = (replace(CLIENTS[0], memory_bytes=room.total(1, 0) - 1), *CLIENTS[1:])
    with pytest.raises(UserError, match=r"client a has .* GB \(cohort.memory_gb\), but the smallest model"):
        algorithm.init(parts, facts)


def test_more_experts_than_exist_are_refused():
    with pytest.raises(UserError, match=r"algorithm\.num_tuned is 13, but the model has 12 experts"):
        Fmes(num_tuned=13).init(make_parts(), CLIENTS)
    with pytest.raises(UserError, match="num_tuned must be at least 0, not -1"):
        Fmes(num_tuned=-1)
