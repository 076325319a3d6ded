"""FedMoE and ESFT: roles, experts averaged by use, and the degenerate cases."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from turns import CLIENTS, ExpertsOnly, make_client, make_parts, planned, run, turn

from fedexperts.algorithms import ALGORITHMS
from fedexperts.algorithms.api import ClientFacts, Kept
from fedexperts.algorithms.esft import GATES, Esft
from fedexperts.algorithms.fedmoe import BUDGET, FedMoE
from fedexperts.algorithms.tuned_experts import CHANGED, ROLE, ROLES, SCORES, TOKENS, names_of_role
from fedexperts.errors import UserError
from fedexperts.federation.cohort import CohortSettings
from fedexperts.federation.edge import refusal
from fedexperts.messages import Upload
from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.undo import undone
from fedexperts.run_directory import read_lines
from fedexperts.running.checking import check_experiment
from fedexperts.running.experiment import run_experiment


@dataclass(frozen=True, kw_only=True)
class StockFedMoE(FedMoE):
    """FedMoE that sums over experts in the order in which transformers does."""

    order: ClassVar = "stock"


@pytest.fixture
def registered(monkeypatch):
    """The registry with the two variants above."""
    monkeypatch.setitem(ALGORITHMS, "stock_fedmoe", StockFedMoE)
    monkeypatch.setitem(ALGORITHMS, "experts_only", ExpertsOnly)


def answer(algorithm, parts, state, client_id, value, tokens, **beside):
    """A made-up upload in which every expert of the role is filled with ``value``."""
    names = names_of_role(parts.layers, state.beside[ROLES][state.position(client_id)])
    tensors = {name: torch.full_like(state.tensors[name], value) for name in names}
    weights = {
        name: max(float(tokens[int(name.split(".")[2]), int(name.split(".")[5])]), 1.0) for name in names
    }
    return client_id, Upload(tensors=tensors, weights=weights, beside={TOKENS: tokens, **beside})


# Degenerate cases


@pytest.mark.parametrize("lora", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_role_of_all_experts_is_fedavg_of_all_experts(lora, registered, make_config, tmp_path, quiet):
    options = ("algorithm.experts_per_layer=0", f"algorithm.lora={str(lora).lower()}")
    by_examples = (*options, "algorithm.weighting=examples")
    fedavg, fedavg_state = run(
        make_config("fedavg_experts" if lora else "experts_only", "algorithm.experts=true"),
        tmp_path / "fedavg",
        quiet,
    )
    stock, stock_state = run(make_config("stock_fedmoe", *by_examples), tmp_path / "stock", quiet)
    assert stock_state.keys() == fedavg_state.keys()
    assert all(torch.equal(stock_state[name], fedavg_state[name]) for name in fedavg_state)
    assert stock["mean"] == fedavg["mean"]
    assert stock["exam"]["global"] == fedavg["exam"]["global"]

    _, state = run(make_config("fedmoe", *by_examples), tmp_path / "rows", quiet)
    # Grouped rows sum in another order. Adam divides a gradient by its own size, so one that is all rounding
    # may move a value by the rate in either direction: 2 rounds of 2 steps at 3e-3.
    assert all(torch.allclose(state[name], fedavg_state[name], rtol=0, atol=2.4e-2) for name in fedavg_state)
    apart = [float((state[name] - fedavg_state[name]).abs().median()) for name in fedavg_state]
    assert max(apart) < 1e-5


def test_one_client_is_local_training_of_its_experts():
    parts, algorithm = make_parts(), FedMoE(experts_per_layer=2)
    state = planned(algorithm, parts)
    upload, _ = turn(algorithm, parts, state)
    after = algorithm.server_update(state, [("a", upload)])
    assert upload.tensors
    for name, before in state.tensors.items():
        trained = upload.tensors.get(name)
        assert torch.equal(after.tensors[name], before if trained is None else trained), name


# The server's mean


def test_an_expert_is_averaged_over_those_whose_tokens_reached_it_weighted_by_their_number():
    parts, algorithm = make_parts(), FedMoE(experts_per_layer=2)
    state = planned(algorithm, parts)
    roles = torch.zeros_like(state.beside[ROLES])
    roles[0, :, [0, 1]] = roles[1, :, [0, 2]] = roles[2, :, [0, 3]] = True
    state = replace(state, beside=state.beside | {ROLES: roles})
    tokens = torch.zeros(3, 2, 6, dtype=torch.int64)
    tokens[0, :, 0], tokens[1, :, 0], tokens[0, :, 1], tokens[1, :, 2] = 1, 3, 5, 7
    uploads = [
        answer(algorithm, parts, state, name, value, tokens[row])
        for row, (name, value) in enumerate((("a", 2.0), ("b", 6.0), ("c", 100.0)))
    ]
    after = algorithm.server_update(state, iter(uploads))
    # Expert 0: (1·2 + 3·6) / 4 = 5, without c, whose tokens never reached it; 3: idle at its only client.
    for layer in parts.layers:
        for expert, value in ((0, 5.0), (1, 2.0), (2, 6.0)):
            assert (after.tensors[seam.expert_name(layer, expert, "down_proj")] == value).all()
        for expert in (3, 4, 5):
            name = seam.expert_name(layer, expert, "down_proj")
            assert torch.equal(after.tensors[name], state.tensors[name])
    assert after.beside[CHANGED].tolist() == [[True, True, True, False, False, False]] * 2
    assert torch.equal(after.beside[SCORES], tokens.double())
    assert after.round_number == state.round_number + 1


def test_a_download_has_what_has_changed_and_the_clients_role():
    parts, algorithm = make_parts(torch.bfloat16), FedMoE(experts_per_layer=1)
    state = planned(algorithm, parts)
    assert algorithm.download(state, "a").tensors == {}
    tokens = torch.ones(2, 6, dtype=torch.int64)
    state = algorithm.server_update(state, [answer(algorithm, parts, state, "a", 0.3, tokens)])
    role = state.beside[ROLES][0]
    sent = algorithm.download(state, "a")
    assert sent.tensors.keys() == set(names_of_role(parts.layers, role))
    assert {tensor.dtype for tensor in sent.tensors.values()} == {torch.float32}, "masters keep small steps"
    assert torch.equal(sent.beside[ROLE], role)
    other = replace(state, beside=state.beside | {ROLES: ~state.beside[ROLES]})
    assert {t.dtype for t in algorithm.download(other, "a").tensors.values()} == {torch.bfloat16}
    assert algorithm.server_model(state).tensors.keys() == sent.tensors.keys()


@pytest.mark.slow
def test_on_a_bfloat16_model_masters_come_back_in_float32(make_config, tmp_path, quiet):
    config = make_config("fedmoe", "algorithm.experts_per_layer=2", "model.dtype=bfloat16")
    result, state = run(config, tmp_path / "run", quiet)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in state.values())
    assert result["bytes"]["download_counted"] == result["bytes"]["download_predicted"]


# Roles


def test_a_role_is_the_most_used_experts_and_of_equals_the_lower_index():
    parts, algorithm = make_parts(), FedMoE(experts_per_layer=2)
    state = planned(algorithm, parts)
    tokens = torch.tensor([[4, 9, 9, 9, 0, 1], [0, 0, 0, 0, 1, 0]])
    state = algorithm.server_update(state, [answer(algorithm, parts, state, "b", 1.0, tokens)])
    roles = algorithm.plan_round(state, ("b",), 2).beside[ROLES]
    assert [row.nonzero().flatten().tolist() for row in roles[1]] == [[1, 2], [0, 4]]
    assert not roles[0].any(), "not in this round's cohort"


def test_before_its_first_report_a_clients_role_is_drawn():
    parts, algorithm = make_parts(), FedMoE(experts_per_layer=2)
    roles = planned(algorithm, parts).beside[ROLES]
    assert (roles.sum(dim=2) == 2).all()
    assert torch.equal(roles[:2], planned(algorithm, parts, ("b", "a")).beside[ROLES][:2]), "by name alone"
    assert len({tuple(row.flatten().tolist()) for row in roles}) > 1
    other = algorithm.plan_round(replace(algorithm.init(parts, CLIENTS), seed=5), ("a", "b", "c"), 1)
    assert not torch.equal(roles, other.beside[ROLES])


def test_esft_takes_experts_until_their_share_is_reached():
    parts, algorithm = make_parts(), Esft(p=0.6)
    state = planned(algorithm, parts)
    assert (state.beside[ROLES].sum(dim=2) == 4).all(), "of 6 equal scores, 4 reach 0.6"
    tokens = torch.tensor([[6, 1, 1, 1, 1, 0], [1, 2, 3, 4, 0, 0]])
    upload = answer(algorithm, parts, state, "a", 1.0, tokens)
    roles = algorithm.plan_round(algorithm.server_update(state, [upload]), ("a",), 2).beside[ROLES]
    assert [row.nonzero().flatten().tolist() for row in roles[0]] == [[0], [2, 3]]

    by_gate = Esft(p=0.6, score="gate")
    gates = torch.tensor([[1.0, 1.0, 8.0, 0, 0, 0], [0, 0, 0, 0, 3.0, 3.0]], dtype=torch.float64)
    upload = answer(by_gate, parts, state, "a", 1.0, tokens, **{GATES: gates})
    roles = by_gate.plan_round(by_gate.server_update(state, [upload]), ("a",), 2).beside[ROLES]
    assert [row.nonzero().flatten().tolist() for row in roles[0]] == [[2], [4, 5]]


@pytest.mark.parametrize("wrong", [-5, 2**63 - 1])
def test_a_report_that_no_router_gives_stops_nobody(wrong):
    parts, algorithm = make_parts(), Esft()
    state = planned(algorithm, parts)
    tokens = torch.full((2, 6), wrong)
    tokens[0, 0] = 1
    upload = answer(algorithm, parts, state, "a", 1.0, tokens)
    after = algorithm.server_update(state, [upload])
    assert algorithm.plan_round(after, ("a",), 2).beside[ROLES][0].any(dim=1).all()


def test_what_clients_reported_decides_the_next_round(make_config, tmp_path, quiet):
    """A server that forgets would draw the same roles again."""
    for method, setting in (("fedmoe", "experts_per_layer=1"), ("esft", "p=0.2")):
        folder = tmp_path / method
        run_experiment(make_config(method, f"algorithm.{setting}"), folder, progress=quiet)
        path = max(folder.rglob("beside-round-*.safetensors"))
        beside = load_file(path)
        algorithm = make_config(method, f"algorithm.{setting}").algorithm
        parts = make_parts()
        clients = tuple(ClientFacts(client_id=f"client-00{i}", num_train=1) for i in range(3))
        first = replace(algorithm.init(parts, clients), seed=3)
        ids = [facts.client_id for facts in clients]
        drawn = algorithm.plan_round(first, ids, 1).beside[ROLES]
        assert (beside[SCORES].sum(dim=2) > 0).all()
        assert not torch.equal(beside[ROLES], drawn)


# The client


def test_only_the_experts_of_the_role_train_and_are_sent():
    parts, algorithm = make_parts(), FedMoE(experts_per_layer=2, lora=True)
    state = planned(algorithm, parts)
    sent = algorithm.download(state, "a")
    names = names_of_role(parts.layers, sent.beside[ROLE])
    with undone(parts.model, parts.layers):
        algorithm.install(make_client(parts), Kept(), sent)
        lora, tuned = algorithm.trained(parts, sent)
        numbers = [parts.model.get_parameter(name).numel() for name in tuned.names]
        assert sum(numbers) == sum(state.tensors[name].numel() for name in names)
        assert lora.names == parts.lora_names
    with undone(parts.model, parts.layers):
        upload, kept = algorithm.client_update(make_client(parts), Kept(), sent)
        after = seam.current(parts.model, seam.expert_names(parts.layers))
    changed = {name for name in after if not torch.equal(after[name], state.tensors[name])}
    assert changed <= set(names)
    assert upload.tensors.keys() == {*parts.lora_names, *names}
    assert not kept


def test_an_upload_is_weighted_by_tokens_and_counts_idle_experts():
    parts = make_parts()
    algorithm = FedMoE(experts_per_layer=0, lora=True)
    state = planned(algorithm, parts)
    upload, _ = turn(algorithm, parts, state)
    tokens = upload.beside[TOKENS]
    assert tokens.sum(dim=1).tolist() == [2 * 4 * 12 * 2] * 2, "steps · examples · tokens · top-k"
    for layer in parts.layers:
        for expert in range(6):
            weight = upload.weights[seam.expert_name(layer, expert, "down_proj")]
            assert weight == max(int(tokens[layer.index, expert]), 1)
    assert {upload.weights[name] for name in parts.lora_names} == {5.0}
    assert upload.measured == {
        "num_tuned_experts": 12.0,
        "num_idle_experts": float((tokens == 0).sum()),
    }
    by_examples, _ = turn(FedMoE(experts_per_layer=0, weighting="examples"), parts, state)
    assert set(by_examples.weights.values()) == {5.0}


def test_an_expert_outside_the_role_is_refused_by_name():
    parts, algorithm = make_parts(), FedMoE(experts_per_layer=2)
    state = planned(algorithm, parts)
    upload, _ = turn(algorithm, parts, state)
    expected = algorithm.expected(parts, state, "a")
    assert refusal(upload, expected, state.tensors, CohortSettings()) == ""
    other = next(name for name in state.tensors if name not in upload.tensors)
    tensors = {**upload.tensors, other: state.tensors[other]}
    bad = replace(upload, tensors=tensors, weights=dict.fromkeys(tensors, 1.0))
    reason = refusal(bad, expected, state.tensors, CohortSettings())
    assert reason == f"upload refused: tensors: {other!r} is not one that this client may send"


# Memory


def test_memory_decides_how_many_experts_a_client_tunes():
    """Weights, then 16 bytes for each parameter of one expert per layer."""
    parts = make_parts()
    weights = sum(p.numel() * p.element_size() for p in parts.model.parameters())
    one = 16 * sum(tensor.numel() for layer in parts.layers for tensor in layer.expert(0).values())
    sizes = {weights + one: 1, weights + 3 * one - 1: 2, 10**12: 4, 0: 4}
    clients = [ClientFacts(client_id=str(s), num_train=1, memory_bytes=s) for s in sizes]
    state = FedMoE(experts_per_layer=4).init(parts, clients)
    assert state.beside[BUDGET].tolist() == list(sizes.values())
    small = ClientFacts(client_id="small", num_train=1, memory_bytes=weights + one - 1)
    with pytest.raises(UserError, match=r"client small has .* GB \(cohort.memory_gb\), but one tuned expert"):
        FedMoE(experts_per_layer=4).init(parts, [small])


def test_memory_is_cycled_over_the_clients_and_changes_their_uploads(make_config):
    free = check_experiment(make_config("fedmoe", "algorithm.experts_per_layer=4"))
    one_in_each = free.parameters["travelling"] / 4
    small = (free.memory.weights + 16 * 2.5 * one_in_each) / 1e9
    memory = f"cohort.memory_gb=[1.0, {small}]"
    bound = check_experiment(make_config("fedmoe", "algorithm.experts_per_layer=4", memory))
    two = check_experiment(make_config("fedmoe", "algorithm.experts_per_layer=2"))
    sizes = [one.upload for one in bound.bytes]
    assert sizes == [free.bytes[0].upload, two.bytes[1].upload, free.bytes[2].upload]


def test_memory_without_effect_is_refused(make_config):
    with pytest.raises(UserError, match=r"cohort.memory_gb is \[8.0\], but has no effect"):
        make_config("fedavg", "cohort.memory_gb=[8.0]")
    with pytest.raises(UserError, match="memory_gb must have numbers above 0 only"):
        make_config("fedmoe", "algorithm.experts_per_layer=1", "cohort.memory_gb=[0.0]")


@pytest.mark.parametrize(
    ("method", "setting", "sentence"),
    [
        ("fedmoe", "experts_per_layer=-1", "experts_per_layer must be at least 0, not -1"),
        ("esft", "p=0.0", "p must be above 0 and at most 1, not 0.0"),
        ("esft", "experts_lr_scale=0.0", "experts_lr_scale must be above 0, not 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(method, setting, sentence, make_config):
    with pytest.raises(UserError, match=sentence):
        make_config(method, f"algorithm.{setting}")


def test_more_experts_than_the_model_has_are_refused(make_config):
    config = make_config("fedmoe", "algorithm.experts_per_layer=7")
    with pytest.raises(UserError, match="experts_per_layer is 7, but the model has 6 experts per layer"):
        check_experiment(config)


def test_the_log_names_tuned_and_idle_experts(make_config, tmp_path, quiet):
    run_experiment(make_config("esft", "rounds=1"), tmp_path / "run", progress=quiet)
    lines = read_lines(tmp_path / "run" / "clients.jsonl")
    assert all({"num_tuned_experts", "num_idle_experts"} <= line["algorithm"].keys() for line in lines)
