"""Flux: roles, merged others, experts averaged by their tokens, and what a client holds."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from turns import CLIENTS, ExpertsOnly, make_batch, make_client, make_parts, planned, run, turn

from fedexperts.algorithms import ALGORITHMS
from fedexperts.algorithms.api import Kept
from fedexperts.algorithms.flux import (
    EXPLORED,
    FREQUENCY,
    HELD,
    MASTERS,
    NUM_TUNED,
    PARTS,
    PROFILE,
    SLOTS,
    UTILITY,
    VISITS,
    Flux,
)
from fedexperts.algorithms.flux_kept import profile_in, with_profile
from fedexperts.algorithms.tuned_experts import (
    CHANGED,
    ROLE,
    ROLES,
    SCORES,
    TOKENS,
    install_role,
    names_of_role,
)
from fedexperts.data.batches import Batch
from fedexperts.errors import UserError
from fedexperts.messages import Sent, Upload
from fedexperts.moe.compressing.merge import MergeSettings
from fedexperts.moe.observing.low_bit_profile import Profile
from fedexperts.moe.observing.utility import Utility, add_utilities, gradient_utility
from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.slots import SlotPlan, split_layer
from fedexperts.moe.surgery.undo import undone
from fedexperts.run_directory import read_lines
from fedexperts.running.experiment import run_experiment

SMALL = ("algorithm.num_tuned=4", "algorithm.merged_per_layer=2")


@dataclass(frozen=True, kw_only=True)
class StockFlux(Flux):
    """Flux that sums over experts in the order in which transformers does."""

    order: ClassVar = "stock"


def test_a_kept_profile_that_counts_no_token_is_none():
    profile = Profile(tokens_LE=torch.zeros(2, 6, dtype=torch.int64), attention_LE=torch.ones(2, 6))
    assert profile_in(with_profile(Kept(), profile)) is None
    profile.tokens_LE[1, 5] = 1
    found = profile_in(with_profile(Kept(), profile))
    assert (found.tokens_LE is profile.tokens_LE, found.attention_LE is profile.attention_LE) == (True, True)


@pytest.fixture
def registered(monkeypatch):
    """The registry with the two variants above."""
    monkeypatch.setitem(ALGORITHMS, "stock_flux", StockFlux)
    monkeypatch.setitem(ALGORITHMS, "experts_only", ExpertsOnly)


# Degenerate cases


@pytest.mark.parametrize("lora", [pytest.param(False, marks=pytest.mark.slow), True])
def test_room_for_every_expert_is_fedavg_of_all_experts(lora, registered, make_config, tmp_path, quiet):
    options = (f"algorithm.lora={str(lora).lower()}", "algorithm.weighting=examples")
    fedavg, fedavg_state = run(
        make_config("fedavg_experts" if lora else "experts_only", "algorithm.experts=true"),
        tmp_path / "fedavg",
        quiet,
    )
    flux, flux_state = run(make_config("stock_flux", *options), tmp_path / "flux", quiet)
    assert flux_state.keys() == fedavg_state.keys()
    assert all(torch.equal(flux_state[name], fedavg_state[name]) for name in fedavg_state)
    assert flux["mean"] == fedavg["mean"]
    assert flux["exam"]["global"] == fedavg["exam"]["global"]


def test_merging_into_singletons_is_the_base_model():
    parts, algorithm = make_parts(), StockFlux(num_tuned=4, merged_per_layer=6)
    state, batch = planned(algorithm, parts), make_batch()
    base = parts.model(input_ids=batch.input_ids).logits
    with undone(parts.model, parts.layers):
        client, sent = make_client(parts), algorithm.download(state, "a")
        profiled = algorithm.client_update(client, Kept(), sent)[1]
    with undone(parts.model, parts.layers):
        kept = algorithm.install(client, profiled, sent)
        algorithm.prepare_steps(client, kept, sent)
        plans = [seam.slots_of(layer).plan for layer in parts.layers]
        assert all(len(group) == 1 for plan in plans for group in plan.merged)
        assert sum(len(plan.merged) for plan in plans) == 8
        assert torch.equal(parts.model(input_ids=batch.input_ids).logits, base)


def test_one_client_is_local_training_and_other_experts_keep_their_bits():
    parts, algorithm = make_parts(), Flux(num_tuned=5, merged_per_layer=2)
    state = planned(algorithm, parts, ("a",))
    upload, _ = turn(algorithm, parts, state)
    after = algorithm.server_update(state, [("a", upload)])
    tokens = upload.beside[TOKENS]
    moved = 0
    for name, before in state.tensors.items():
        trained = upload.tensors.get(name)
        layer, expert = int(name.split(".")[2]), int(name.split(".")[5])
        if trained is None or not tokens[layer, expert]:
            assert torch.equal(after.tensors[name], before), name
        else:
            assert torch.equal(after.tensors[name], trained), name
            moved += not torch.equal(trained, before)
    assert moved


def test_a_whole_role_measures_nothing_and_merges_nothing():
    parts, algorithm = make_parts(), Flux()
    state = planned(algorithm, parts, ("a",))
    upload, _ = turn(algorithm, parts, state)
    assert int(state.beside[ROLES][0].sum()) == 12
    assert bool((upload.beside[UTILITY] == -1).all())
    after = algorithm.server_update(state, [("a", upload)])
    assert not after.beside[VISITS].any()


# Roles


def test_the_exploited_share_grows_and_the_explored_are_others():
    parts, algorithm = make_parts(), Flux(num_tuned=10)
    state = planned(algorithm, parts)
    counts = []
    for done in range(4):
        state = algorithm.plan_round(replace(state, round_number=done), ("a", "c"), done + 1)
        roles, explored = state.beside[ROLES], state.beside[EXPLORED]
        assert not (roles & explored).any()
        assert (roles | explored).flatten(1).sum(1).tolist() == [10, 0, 10]
        counts.append(int(roles[0].sum()))
    # 0.3 to 0.9 in a third of six rounds.
    assert counts == [3, 6, 9, 9]


def test_a_fixed_share_stays():
    parts, algorithm = make_parts(), Flux(num_tuned=10, exploit_share=0.5, exploit_share_last=0.5)
    state = planned(algorithm, parts)
    for done in (0, 5):
        state = algorithm.plan_round(replace(state, round_number=done), ("a",), done + 1)
        assert int(state.beside[ROLES][0].sum()) == 5


def test_explored_experts_may_be_trained_too():
    parts, algorithm = make_parts(), Flux(num_tuned=10, train_explored=True)
    state = planned(algorithm, parts)
    assert state.beside[ROLES].flatten(1).sum(1).tolist() == [10, 10, 10]
    assert not state.beside[EXPLORED].any()


def answer(algorithm, parts, state, client_id, utility, frequency, tokens=None):
    """A made-up upload with the experts of the role as they are."""
    names = names_of_role(parts.layers, state.beside[ROLES][state.position(client_id)])
    tokens = torch.ones(2, 6, dtype=torch.int64) if tokens is None else tokens
    return Upload(
        tensors={name: state.tensors[name] for name in names},
        weights=dict.fromkeys(names, 1.0),
        beside={TOKENS: tokens, UTILITY: utility, FREQUENCY: frequency},
    )


def test_utilities_decay_grow_unvisited_and_start_from_frequency():
    parts = make_parts()
    algorithm = Flux(num_tuned=2, utility_decay=0.25, unvisited_bonus=0.1)
    state = planned(algorithm, parts, ("a",))
    utility, frequency = torch.full((2, 6), -1.0).double(), torch.full((2, 6), 1 / 8).double()
    utility[0, 0], utility[1, 2] = 4.0, 8.0
    frequency[0, 3] = 0.5
    state = algorithm.server_update(state, [("a", answer(algorithm, parts, state, "a", utility, frequency))])
    assert state.beside[SCORES][0, 0, 0] == 4.0
    assert state.beside[SCORES][0, 1, 2] == 8.0
    assert state.beside[VISITS][0].sum() == 2
    # Two measured utilities of 12 in all over frequencies of 1/4 in all: 48 for a whole share.
    worth = algorithm.worth(state, "a")
    assert worth[0].tolist() == [4.0, 6.0, 6.0, 24.0, 6.0, 6.0]
    assert worth[1].tolist() == [6.0, 6.0, 8.0, 6.0, 6.0, 6.0]

    state = algorithm.plan_round(state, ("a",), 2)
    assert state.beside[ROLES][0, 0].tolist() == [False, False, False, True, False, False]
    again = torch.full((2, 6), -1.0).double()
    again[0, 0] = 8.0
    state = algorithm.server_update(state, [("a", answer(algorithm, parts, state, "a", again, frequency))])
    # 0.25 · 4 + 0.75 · 8; unvisited: 8 and a tenth of the mean measured now, 8.
    assert state.beside[SCORES][0, 0, 0] == 7.0
    assert state.beside[SCORES][0, 1, 2] == 8.8
    assert not state.beside[SCORES][1:].any()


def test_first_roles_differ_between_clients_and_seeds():
    parts, algorithm = make_parts(), Flux(num_tuned=6, exploit_share=0.5)
    state = planned(algorithm, parts)
    roles = state.beside[ROLES]
    assert not torch.equal(roles[0], roles[1])
    other = algorithm.plan_round(replace(state, seed=5), ("a", "b", "c"), 1)
    assert not torch.equal(other.beside[ROLES], roles)


def test_coverage_has_every_expert_tuned_within_its_rounds():
    parts = make_parts()
    algorithm = Flux(num_tuned=4, exploit_share=0.5, exploit_share_last=0.5, coverage=1, coverage_rounds=4)
    state = replace(algorithm.init(parts, CLIENTS), seed=4, num_rounds=9)
    frequency = torch.zeros(2, 6).double()
    frequency[:, 0] = 1.0
    utility = torch.full((2, 6), -1.0).double()
    utility[:, 0] = 5.0
    tuned = []
    for round_number in range(1, 9):
        state = algorithm.plan_round(state, ("a", "b", "c"), round_number)
        tuned.append(state.beside[ROLES].any(dim=0))
        assert state.beside[ROLES].flatten(1).sum(1).max() <= 2
        uploads = [
            (name, answer(algorithm, parts, state, name, utility, frequency)) for name in ("a", "b", "c")
        ]
        state = algorithm.server_update(state, uploads)
    for start in range(5):
        assert torch.stack(tuned[start : start + 4]).any(dim=0).all(), f"rounds {start + 1} to {start + 4}"
    greedy = Flux(num_tuned=4, exploit_share=0.5, exploit_share_last=0.5)
    alone = greedy.plan_round(state, ("a", "b", "c"), 9).beside[ROLES].any(dim=0)
    assert int(alone.sum()) == 2, "without coverage all tune the two most useful"


# Memory


def test_a_role_has_the_size_that_memory_has_room_for():
    parts = make_parts()
    facts = (
        replace(CLIENTS[0], memory_bytes=10**9),
        replace(CLIENTS[1], memory_bytes=0),
        replace(CLIENTS[2], memory_bytes=0),
    )
    algorithm = Flux(merged_per_layer=2)
    assert algorithm.init(parts, facts).beside[NUM_TUNED].tolist() == [12, 12, 12]
    room = algorithm.room(parts)
    for number in (1, 5):
        facts = (replace(CLIENTS[0], memory_bytes=room.total(number, 4)), *CLIENTS[1:])
        assert algorithm.init(parts, facts).beside[NUM_TUNED].tolist() == [number, 12, 12]
    facts = (replace(CLIENTS[0], memory_bytes=room.total(1, 4) - 1), *CLIENTS[1:])
    with pytest.raises(UserError, match=r"client a has .* GB \(cohort.memory_gb\), but the smallest model"):
        algorithm.init(parts, facts)


def test_a_turn_that_sends_changes_holds_what_it_started_from():
    parts = make_parts()
    rooms = [Flux(upload=upload).room(parts) for upload in ("weights", "int8")]
    assert rooms[1].tuned_bytes_each - rooms[0].tuned_bytes_each == 4 * rooms[0].parameters_each
    role_LE = torch.zeros(2, 6, dtype=torch.bool)
    role_LE[0, 2] = role_LE[1, 4] = True
    install_role(parts.layers, role_LE)
    sent = Sent(beside={ROLE: role_LE})
    copies = [Flux(upload=upload).bytes_beside(parts, Kept(), sent) for upload in ("weights", "int8")]
    assert copies[1] - copies[0] == 2 * 4 * rooms[0].parameters_each


def test_more_tuned_experts_than_exist_are_refused():
    with pytest.raises(UserError, match=r"algorithm\.num_tuned is 13, but the model has 12 experts"):
        Flux(num_tuned=13).init(make_parts(), CLIENTS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"others": "merge"}, 'others is "merge"; it must be one of merged, kept, absent'),
        ({"profile_bits": 5}, "profile_bits is 5"),
        ({"exploit_share": 0.95}, "exploit_share_last must be from"),
        ({"others": "kept", "merged_per_layer": 3}, "merged_per_layer is 3, but has no effect"),
        ({"others": "absent", "merge": MergeSettings(budget="uniform")}, "merge is set, but has no effect"),
        ({"probe_pairs": 2}, "probe_pairs is 2, but has no effect"),
        ({"utility": "forward", "utility_per": "token"}, "utility_per is token, but has no effect"),
        ({"coverage_rounds": 3}, "coverage_rounds is 3, but has no effect"),
        ({"exploit_share_last": 0.3, "exploit_growth": 0.5}, "exploit_growth is 0.5, but has no effect"),
        ({"utility_decay": 1.0}, "utility_decay must be from 0 to below 1"),
        ({"merged_per_layer": 0}, "merged_per_layer must be at least 1"),
    ],
)
def test_settings_out_of_range_or_without_effect_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Flux(**settings)


# Traffic and what a client holds


def test_an_expert_is_sent_once_for_each_version():
    parts, algorithm = make_parts(), Flux(num_tuned=3, merged_per_layer=2)
    state = planned(algorithm, parts, ("a",))
    assert algorithm.download(state, "a").tensors == {}
    upload, kept = turn(algorithm, parts, state)
    state = algorithm.server_update(state, [("a", upload)])
    first = {name for name in upload.tensors}
    changed = algorithm.download(state, "a").tensors.keys()
    assert changed
    assert changed <= first
    state = algorithm.plan_round(state, ("a",), 2)
    upload, kept = turn(algorithm, parts, state, kept=kept, round_number=2)
    held = state.beside[CHANGED]
    refused = algorithm.server_update(state, [])
    assert algorithm.download(refused, "a").tensors.keys() == changed, "a refused upload changes nothing"
    state = algorithm.server_update(state, [("a", upload)])
    assert torch.equal(state.beside[HELD][0], held)
    again = algorithm.download(state, "a").tensors.keys()
    newest = state.beside[CHANGED] == 2
    assert again == set(names_of_role(parts.layers, newest))
    assert algorithm.download(state, "b").tensors.keys() == set(
        names_of_role(parts.layers, state.beside[CHANGED] > 0)
    )


def test_what_came_earlier_is_part_of_the_model_later():
    parts, algorithm = make_parts(), Flux(num_tuned=3, merged_per_layer=2)
    state = planned(algorithm, parts, ("a",))
    upload, kept = turn(algorithm, parts, state)
    state = algorithm.plan_round(algorithm.server_update(state, [("a", upload)]), ("a",), 2)
    _, kept = turn(algorithm, parts, state, kept=kept, round_number=2)
    state = algorithm.plan_round(algorithm.server_update(state, []), ("a",), 3)
    state = replace(state, beside=state.beside | {HELD: state.beside[HELD].clone()})
    state.beside[HELD][0] = state.beside[CHANGED]
    sent = algorithm.download(state, "a")
    assert sent.tensors == {}
    with undone(parts.model, parts.layers):
        algorithm.install(make_client(parts, round_number=3), kept, sent)
        found = seam.current(parts.model, state.tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.tensors.items())


def test_on_a_bfloat16_model_an_expert_comes_again_in_float32_to_be_tuned():
    parts, algorithm = make_parts(torch.bfloat16), Flux(num_tuned=2)
    state = planned(algorithm, parts, ("a",))
    upload, _ = turn(algorithm, parts, state)
    state = algorithm.server_update(state, [("a", upload)])
    assert {tensor.dtype for tensor in upload.tensors.values()} == {torch.float32}
    changed = state.beside[CHANGED] > 0
    beside = state.beside | {
        HELD: state.beside[CHANGED].expand(3, -1, -1).clone(),
        ROLES: torch.zeros_like(state.beside[ROLES]),
    }
    state = replace(state, beside=beside)
    assert algorithm.download(state, "a").tensors == {}
    state.beside[ROLES][0], state.beside[EXPLORED][0] = True, False
    sent = algorithm.download(state, "a").tensors
    assert sent.keys() == set(names_of_role(parts.layers, changed))
    assert {tensor.dtype for tensor in sent.values()} == {torch.float32}
    with undone(parts.model, parts.layers):
        client = make_client(parts)
        full = algorithm.install(client, Kept(), algorithm.download(state, "a"))
        algorithm.prepare_steps(client, full, algorithm.download(state, "a"))
        tuned = seam.current(parts.model, state.tensors)
    assert all(torch.equal(tuned[name], tensor) for name, tensor in state.tensors.items())
    state.beside[MASTERS][0] = True
    assert algorithm.download(state, "a").tensors == {}


@pytest.mark.slow
def test_a_bfloat16_model_is_tuned_in_float32_and_left_as_it_was(make_config, tmp_path, quiet):
    short = ("evaluation.exam.source=none", "evaluation.matrix=false", 'evaluation.metrics=["loss"]')
    config = make_config("flux", *SMALL, *short, "model.dtype=bfloat16", "algorithm.upload=int8")
    result, state = run(config, tmp_path / "run", quiet)
    assert result["frozen_unchanged"]
    assert result["failures"] == []
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert result["bytes"]["download_counted"] == result["bytes"]["download_predicted"]


# The client's turn


def test_exact_utilities_are_those_of_the_model_that_trains():
    parts, algorithm = make_parts(), Flux(num_tuned=6, merged_per_layer=2)
    state = planned(algorithm, parts, ("a",))
    upload, kept = turn(algorithm, parts, state, num_steps=1)
    sent = algorithm.download(state, "a")
    with undone(parts.model, parts.layers):
        client = make_client(parts, num_steps=1)
        algorithm.prepare_steps(client, algorithm.install(client, kept, sent), sent)
        expected = gradient_utility(parts.model, parts.layers, [make_batch(0)]).values()
    measured = upload.beside[UTILITY]
    part = state.beside[ROLES][0] | state.beside[EXPLORED][0]
    assert torch.equal(measured >= 0, part)
    assert torch.allclose(measured[part], torch.stack(expected)[part], rtol=1e-5)


def test_forward_utilities_are_measured_for_explored_experts():
    parts = make_parts()
    exact, forward = Flux(num_tuned=6), Flux(num_tuned=6, utility="forward", probe_pairs=4)
    state = planned(exact, parts, ("a",))
    (one, _), (other, _) = (turn(each, parts, state) for each in (exact, forward))
    role, explored = state.beside[ROLES][0], state.beside[EXPLORED][0]
    assert torch.equal(one.beside[UTILITY][role], other.beside[UTILITY][role])
    reached = explored & (one.beside[UTILITY] > 0)
    assert reached.any()
    assert not torch.equal(one.beside[UTILITY][reached], other.beside[UTILITY][reached])
    assert (other.beside[UTILITY][reached] > 0).all()


def test_the_profile_is_one_round_old_after_the_first():
    parts = make_parts()
    stale, fresh = Flux(num_tuned=4, profile_error=True), Flux(num_tuned=4, profile="fresh")
    state = planned(stale, parts, ("a",))
    first, kept = turn(stale, parts, state)
    assert first.seconds.keys() == {"profile", "merge"}
    assert first.measured["profile_error"] == first.measured["profile_error_fresh"]
    loud = {name: tensor * 30 for name, tensor in first.tensors.items()}
    state = stale.plan_round(stale.server_update(state, [("a", replace(first, tensors=loud))]), ("a",), 2)
    second, kept_then = turn(stale, parts, state, kept=kept, round_number=2)
    assert torch.equal(second.beside[FREQUENCY], first.beside[FREQUENCY])
    assert second.seconds.keys() == {"profile_overlapped", "merge"}
    now, _ = turn(fresh, parts, state, kept=kept, round_number=2)
    assert not torch.equal(now.beside[FREQUENCY], first.beside[FREQUENCY])
    tokens = kept_then.beside[PROFILE["tokens_LE"]].double()
    assert torch.equal(tokens / tokens.sum(1, keepdim=True), now.beside[FREQUENCY])
    assert second.measured["profile_error"] > second.measured["profile_error_fresh"]


def test_a_full_profile_has_no_error_when_fresh():
    parts, algorithm = make_parts(), Flux(num_tuned=4, profile_bits=0, profile_error=True)
    upload, _ = turn(algorithm, parts, planned(algorithm, parts, ("a",)))
    assert upload.measured["profile_error"] == 0.0


@pytest.mark.parametrize(
    ("settings", "num_slots"),
    [
        ({"merged_per_layer": 2}, 8),
        ({"others": "kept"}, 12),
        ({"others": "absent"}, 4),
        ({"merged_per_layer": 2, "merge": MergeSettings(is_dropping=True)}, 8),
        ({"merge": MergeSettings(budget="one_per_layer")}, 6),
        ({"merged_per_layer": 2, "merge": MergeSettings(clusters="outputs", refit_down=True)}, 8),
    ],
)
def test_others_are_merged_kept_absent_or_dropped_in_as_many_slots(settings, num_slots):
    parts, algorithm = make_parts(), Flux(num_tuned=4, **settings)
    state = planned(algorithm, parts, ("a",))
    upload, _ = turn(algorithm, parts, state)
    slots, part = upload.tables[SLOTS], upload.tables[PARTS]
    assert sum(int(row.max()) + 1 for row in slots) == num_slots
    assert (slots[part > 0] >= 0).all()
    assert bool((slots == -1).any()) == (
        settings.get("others") == "absent" or "is_dropping=True" in str(settings)
    )


def test_a_profile_without_tokens_is_an_error_that_names_the_client():
    parts, algorithm = make_parts(), Flux(num_tuned=4)
    batch = make_batch()
    empty = replace(batch, attention_mask=torch.zeros_like(batch.attention_mask))
    client = replace(make_client(parts), calibration_batches=lambda largest: [empty])
    state = planned(algorithm, parts, ("a",))
    with pytest.raises(UserError, match="client a: the profile of its experts counts no token"):
        algorithm.client_update(client, Kept(), algorithm.download(state, "a"))


def test_a_utility_that_is_not_finite_is_an_error_that_names_the_expert():
    parts = make_parts()
    with undone(parts.model, parts.layers):
        for layer in parts.layers:
            split_layer(layer, SlotPlan(num_experts=6, tuned=(0, 1, 2, 3, 4, 5)))
        squares = [torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)]
        squares[1][4] = torch.inf
        utility = Utility(squares_LE=squares, counts_LE=[torch.ones(6, dtype=torch.int64)] * 2)
        with pytest.raises(UserError, match=r"utility of expert 4 of layer .* is not finite"):
            add_utilities(parts.layers, utility, torch.zeros(2, 6, dtype=torch.float64))


def test_a_role_of_another_model_is_refused():
    parts, algorithm = make_parts(), Flux(num_tuned=4)
    state = planned(algorithm, parts, ("a",))
    sent = algorithm.download(state, "a")
    wrong = replace(sent, beside={**sent.beside, "role": torch.zeros(2, 5, dtype=torch.bool)})
    with pytest.raises(UserError, match=r"roles are for \(2, 5\) layers and experts, but .* has \(2, 6\)"):
        algorithm.client_update(make_client(parts), Kept(), wrong)


@pytest.mark.slow
def test_clients_with_little_memory_learn_and_their_roles_follow_utility(make_config, tmp_path, quiet):
    config = make_config(
        "flux",
        *SMALL,
        "rounds=6",
        "training.num_local_steps=6",
        "training.lr=0.01",
        "training.lr_final_share=1.0",
        "evaluation.exam.source=none",
        "evaluation.matrix=false",
    )
    result = run_experiment(config, tmp_path / "run", progress=quiet)
    assert result["mean"]["loss_before"] < result["mean"]["loss_base"] - 0.3
    lines = [
        line for line in read_lines(tmp_path / "run" / "clients.jsonl") if line["client"] == "client-000"
    ]
    roles = [tuple(map(tuple, line["algorithm"]["parts"])) for line in lines]
    assert len(set(roles)) > 2
    assert all(line["upload_bytes"] == line["upload_predicted"] for line in lines)
    assert all(line["download_bytes"] == line["download_predicted"] for line in lines)


# Packed uploads


@pytest.mark.parametrize("packing", ["bfloat16", "int8", "int4"])
def test_a_packed_upload_opens_to_the_weights_and_feeds_its_error_back(packing):
    parts, algorithm = make_parts(), Flux(num_tuned=4, upload=packing)
    whole = Flux(num_tuned=4)
    state = planned(algorithm, parts, ("a",))
    exact, _ = turn(whole, parts, state)
    upload, kept = turn(algorithm, parts, state)
    expected = algorithm.expected(parts, state, "a")
    assert upload.tensors.keys() == expected.tensors.keys() == exact.tensors.keys()
    for due, sent in ((expected.tensors, upload.tensors), (expected.beside, upload.beside)):
        assert {n: (t.shape, t.dtype) for n, t in due.items()} == {
            n: (t.shape, t.dtype) for n, t in sent.items()
        }
    opened = algorithm.opened(state, upload).tensors
    for name, weight in exact.tensors.items():
        change, arrived = weight - state.tensors[name], opened[name] - state.tensors[name]
        lost = kept.beside.get(f"lost/{name}", torch.zeros_like(weight))
        # Both sums round once more, relative to the weights, which are below 1.
        assert torch.allclose(arrived + lost, change, atol=2e-7), name
        largest = float(change.abs().max())
        assert float(lost.abs().max()) <= largest * {"bfloat16": 2**-8, "int8": 0.01, "int4": 0.14}[packing]

    again, kept_again = turn(algorithm, parts, state, kept=kept)
    name = next(n for n in exact.tensors if f"lost/{n}" in kept.beside)
    twice = algorithm.opened(state, again).tensors[name] - state.tensors[name]
    first = kept.beside[f"lost/{name}"]
    assert torch.allclose(
        twice + kept_again.beside[f"lost/{name}"],
        exact.tensors[name] - state.tensors[name] + first,
        atol=2e-7,
    )


def test_what_an_idle_expert_has_lost_waits():
    parts, algorithm = make_parts(), Flux(upload="int4")
    state, ids = planned(algorithm, parts, ("a",)), torch.tensor([[5, 6]])
    batch = Batch(
        input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, num_examples=1, num_labels=1
    )
    client = replace(make_client(parts), draw_batches=lambda: [batch])
    with undone(parts.model, parts.layers):
        upload, kept = algorithm.client_update(client, Kept(), algorithm.download(state, "a"))
    tokens = upload.beside[TOKENS]
    assert 0 < int((tokens == 0).sum()) < 12
    names = {name.removeprefix("lost/") for name in kept.beside if name.startswith("lost/")}
    assert names == set(names_of_role(parts.layers, tokens > 0))


def test_a_client_cannot_spoil_the_sums_of_utilities():
    parts, algorithm = make_parts(), Flux(num_tuned=4)
    state = planned(algorithm, parts, ("a",))
    utility, frequency = (torch.full((2, 6), value, dtype=torch.float64) for value in (1e308, 1e-300))
    frequency[0, 0] = 1e308
    for _ in range(2):
        upload = answer(algorithm, parts, state, "a", utility, frequency)
        state = algorithm.server_update(state, [("a", upload)])
        state = algorithm.plan_round(state, ("a",), 2)
    assert all(torch.isfinite(tensor).all() for tensor in state.beside.values())
    assert torch.isfinite(algorithm.worth(state, "a")).all()


@pytest.mark.slow
def test_int4_uploads_are_smaller_and_learn_as_well(make_config, tmp_path, quiet):
    short = ("evaluation.exam.source=none", "evaluation.matrix=false", "cohort.max_change_norm=100.0")
    whole = run_experiment(make_config("flux", *SMALL, *short), tmp_path / "whole", progress=quiet)
    config = make_config("flux", *SMALL, *short, "algorithm.upload=int4")
    packed = run_experiment(config, tmp_path / "packed", progress=quiet)
    assert packed["failures"] == []
    assert packed["bytes"]["upload_counted"] == packed["bytes"]["upload_predicted"]
    assert packed["bytes"]["upload_counted"] < whole["bytes"]["upload_counted"]
    assert packed["mean"]["loss_before"] == pytest.approx(whole["mean"]["loss_before"], abs=0.01)
