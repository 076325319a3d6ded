"""FedAMoLE: the assignment, what travels, the update rule, and memory that matters."""

import itertools
import math

import pytest
import torch

from fedexperts.algorithms.api import ClientFacts, Kept, ModelParts
from fedexperts.algorithms.fedamole import ASSIGNMENT, CLIENTS, EXPERTS, FedAMoLE, affinity, assign
from fedexperts.costs.stopwatch import Stopwatch
from fedexperts.errors import UserError
from fedexperts.federation.checkpoint import load_checkpoint
from fedexperts.federation.edge import refusal
from fedexperts.federation.personal import PersonalStore
from fedexperts.messages import Upload
from fedexperts.models.adapters import AdapterSettings, add_lora
from fedexperts.models.routed_lora import place_of, routed_modules
from fedexperts.models.tiny import tiny_model
from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.undo import undone
from fedexperts.run_directory import RunDirectory, read_json, read_lines
from fedexperts.running.experiment import run_experiment
from fedexperts.running.export import export_client
from fedexperts.running.workbench import open_workbench
from fedexperts.tensors import equal_bits

CHEAP = (
    "evaluation.metrics=['loss']",
    "evaluation.matrix=false",
    "evaluation.max_test_examples=2",
    "evaluation.exam.num_questions=2",
    "evaluation.exam.personalised=false",
)


def facts(*names):
    return tuple(ClientFacts(client_id=name, num_train=5) for name in names)


@pytest.fixture(scope="module")
def parts():
    model = tiny_model("qwen2_moe")
    adapter = AdapterSettings(rank=2)
    names = add_lora(model, adapter, 0)
    layers = seam.find_moe_layers(model)
    return ModelParts(model=model, layers=layers, lora_names=names, adapter=adapter, seed=4)


@pytest.fixture(scope="module")
def done():
    """Results by overrides: runs that several tests compare are made once."""
    return {}


@pytest.fixture
def run(make_config, done, tmp_path_factory, quiet):
    """Run with overrides; returns the result with its folder."""

    def run(*overrides):
        if overrides not in done:
            folder = tmp_path_factory.mktemp("fedamole") / "run"
            run_experiment(make_config("fedamole", *CHEAP, *overrides), folder, progress=quiet)
            done[overrides] = read_json(folder / "result.json") | {"folder": folder}
        return done[overrides]

    return run


def state_of(result):
    return load_checkpoint(RunDirectory(result["folder"])).state


# The assignment


def totals(affinity_EC, each, fewest, most):
    """Total affinity of every assignment within the limits, by trying all."""
    num_experts, num_clients = affinity_EC.shape
    for rows in itertools.product(itertools.combinations(range(num_clients), each), repeat=num_experts):
        loads = [sum(client in row for row in rows) for client in range(num_clients)]
        if all(fewest <= load <= most for load in loads):
            yield math.fsum(float(affinity_EC[e, c]) for e, row in enumerate(rows) for c in row)


@pytest.mark.parametrize(("each", "fewest", "most"), [(1, 1, 2), (2, 2, 3), (2, 1, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_the_assignment_is_the_best_of_all(each, fewest, most, seed):
    affinity_EC = torch.rand(4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = assign(affinity_EC, each, fewest, most)
    assert found.sum(1).tolist() == [each] * 4
    assert all(fewest <= load <= most for load in found.sum(0).tolist())
    best = max(totals(affinity_EC, each, fewest, most))
    assert float(affinity_EC[found].sum()) == pytest.approx(best, rel=1e-9)


def test_limits_overrule_similarity():
    """Everybody wants the first client, who has room for two."""
    wanted = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
    assert assign(wanted, 1, 2, 2).tolist() == [[True, False], [True, False], [False, True], [False, True]]


def test_an_expert_takes_all_clients_where_there_are_fewer():
    assert assign(torch.rand(3, 1), 2, 2, 8).tolist() == [[True]] * 3


def test_affinity_is_a_softmax_over_the_clients():
    experts = torch.tensor([[[2.0, 0.0], [0.0, 4.0]]])
    clients = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    found = affinity(experts, clients)[0]
    high, low = math.exp(2 / 2**0.5), math.exp(4 / 2**0.5)
    expected = torch.tensor([[high / (high + 1), 1 / (high + 1)], [1 / (low + 1), low / (low + 1)]])
    torch.testing.assert_close(found, expected.double())


@pytest.mark.parametrize("num_clients", [1, 2, 4, 10])
def test_the_default_pool_suits_any_number_of_clients(parts, num_clients):
    clients = facts(*(str(number) for number in range(num_clients)))
    assigned_MEC = FedAMoLE().init(parts, clients).beside[ASSIGNMENT]
    assert assigned_MEC.shape[1:] == (3 * num_clients, num_clients)
    assert (assigned_MEC.sum(1) >= 2).all()
    assert (assigned_MEC.sum(1) <= 8).all()
    assert (assigned_MEC.sum(2) == min(2, num_clients)).all()


# What travels


def test_a_client_gets_the_experts_that_chose_it(parts):
    algorithm = FedAMoLE()
    state = algorithm.init(parts, facts("a", "b", "c", "d"))
    assigned_MEC = state.beside[ASSIGNMENT]
    paths = sorted({place[0] for place in map(place_of, state.tensors) if place})
    for position, client in enumerate("abcd"):
        sent = algorithm.download(state, client).tensors
        places = {place_of(name) for name in sent} - {None}
        assert {(path, None) for path in paths} <= places, "every router comes"
        assert {place for place in places if place[1] is not None} == {
            (paths[module], expert) for module, expert in assigned_MEC[:, :, position].nonzero().tolist()
        }
        assert set(parts.lora_names) <= sent.keys(), "the shared expert comes"
        assert algorithm.expected(parts, state, client).tensors.keys() == sent.keys()


def test_an_expert_that_did_not_choose_the_client_is_refused(make_config, tmp_path):
    algorithm = FedAMoLE()
    with open_workbench(make_config("fedamole", "data.partition.num_clients=4"), Stopwatch()) as bench:
        runtime, config = bench.scorer(PersonalStore(tmp_path)).runtime, bench.config
        state = algorithm.init(bench.parts, runtime.facts())
        client_id = bench.data.client_ids[0]
        sent = algorithm.download(state, client_id)
        with runtime.turn(client_id, 1) as turn:
            upload, kept = algorithm.client_update(turn.client, Kept(), sent)
        expected = algorithm.expected(bench.parts, state, client_id)
        assert refusal(upload, expected, sent.tensors, config.cohort) == ""
        assert not kept
        assert upload.metrics["num_untrained"] == 0
        foreign = next(name for name in state.tensors if name not in sent.tensors)
        upload.tensors[foreign] = state.tensors[foreign]
        assert "is not one that this client may send" in refusal(upload, expected, {}, config.cohort)


def test_every_place_is_taken_in_every_round(run):
    """Twelve experts in each module choose two of four clients each."""
    result = run("data.partition.num_clients=4", "rounds=2")
    num_modules = state_of(result).beside[CLIENTS].shape[1]
    for number in (1, 2):
        lines = [line for line in read_lines(result["folder"] / "clients.jsonl") if line["round"] == number]
        assert sum(line["algorithm"]["num_domain_experts"] for line in lines) == 12 * 2 * num_modules
        assert all(line["upload_bytes"] == line["upload_predicted"] for line in lines)


# The update rule


def answer(algorithm, parts, state, client, value):
    """A made-up upload: all tensors and embeddings are ``value``."""
    expected = algorithm.expected(parts, state, client)
    tensors = {name: torch.full(tensor.shape, value) for name, tensor in expected.tensors.items()}
    beside = {name: torch.full(tensor.shape, value) for name, tensor in expected.beside.items()}
    weights = {name: value * 10 for name in tensors}
    return client, Upload(tensors=tensors, weights=weights, beside=beside)


@pytest.mark.parametrize(("weighting", "of_both"), [("equal", 2.0), ("examples", 2.5)])
def test_experts_are_averaged_over_the_clients_that_have_them(parts, weighting, of_both):
    """Weights 10 and 30: equal (1 + 3) / 2, by examples (1 * 10 + 3 * 30) / 40."""
    algorithm = FedAMoLE(weighting=weighting)
    state = algorithm.init(parts, facts("a", "b", "c"))
    uploads = [answer(algorithm, parts, state, client, value) for client, value in (("a", 1.0), ("b", 3.0))]
    after = algorithm.server_update(state, uploads)
    assigned_MEC, paths = (
        state.beside[ASSIGNMENT],
        sorted({place_of(n)[0] for n in state.tensors if place_of(n)}),
    )
    kinds = set()
    for name, tensor in after.tensors.items():
        path, expert = place_of(name) or (None, None)
        has_a, has_b = (
            (True, True) if expert is None else assigned_MEC[paths.index(path), expert, :2].tolist()
        )
        kinds.add((has_a, has_b))
        if has_a or has_b:
            expected = of_both if has_a and has_b else 1.0 if has_a else 3.0
            assert torch.equal(tensor, torch.full_like(tensor, expected)), name
            continue
        assert equal_bits(tensor, state.tensors[name]), name
    assert len(kinds) >= 3
    both = assigned_MEC[:, :, 0] & assigned_MEC[:, :, 1]
    assert (after.beside[EXPERTS][both] == 2.0).all(), "embeddings have equal weights"
    assert after.beside[CLIENTS][:, 0, 0].tolist() == [1.0, 3.0, 0.0]


def test_experts_choose_the_client_that_their_embeddings_point_to(parts):
    algorithm = FedAMoLE(clients_per_expert=1, experts_per_token=1, num_experts=2)
    state = algorithm.init(parts, facts("a", "b"))
    uploads = []
    for position, (client, value) in enumerate((("a", 1.0), ("b", -1.0))):
        _, upload = answer(algorithm, parts, state, client, value)
        upload.beside[CLIENTS] = torch.full_like(upload.beside[CLIENTS], value)
        upload.beside[EXPERTS] = torch.full_like(upload.beside[EXPERTS], -value)
        assert state.beside[ASSIGNMENT][:, :, position].sum() == len(upload.beside[EXPERTS])
        upload.weights.update(dict.fromkeys(upload.weights, 1.0))
        uploads.append((client, upload))
    after = algorithm.server_update(state, uploads)
    assert torch.equal(after.beside[ASSIGNMENT], ~state.beside[ASSIGNMENT]), "all change sides"


def test_one_client_is_local_training(parts):
    algorithm = FedAMoLE()
    state = algorithm.init(parts, facts("a"))
    upload = answer(algorithm, parts, state, "a", 0.3)[1]
    after = algorithm.server_update(state, [("a", upload)])
    assert after.tensors.keys() == upload.tensors.keys()
    assert all(equal_bits(tensor, upload.tensors[name]) for name, tensor in after.tensors.items())


def test_a_round_without_uploads_changes_no_tensor(parts):
    algorithm = FedAMoLE(assignment="fixed")
    state = algorithm.init(parts, facts("a", "b"))
    after = algorithm.server_update(state, [])
    assert all(equal_bits(tensor, state.tensors[name]) for name, tensor in after.tensors.items())
    assert torch.equal(after.beside[ASSIGNMENT], state.beside[ASSIGNMENT])


def test_before_training_a_client_has_the_pretrained_model(parts):
    algorithm, ids = FedAMoLE(), torch.arange(4, 24)[None]
    state = algorithm.init(parts, facts("a", "b"))
    with torch.no_grad():
        before = parts.model(input_ids=ids).logits
        with undone(parts.model, parts.layers):
            algorithm.install_shared(parts, algorithm.download(state, "a"))
            assert torch.equal(parts.model(input_ids=ids).logits, before)


# Memory and settings


@pytest.mark.slow
def test_the_next_assignment_is_made_from_embeddings(run):
    options = ("data.partition.num_clients=4", "rounds=2")
    similar = state_of(run(*options)).beside
    random = state_of(run(*options, "algorithm.assignment=random")).beside
    fixed = state_of(run(*options, "algorithm.assignment=fixed")).beside
    assert set(random) == set(fixed) == {ASSIGNMENT}
    assert similar[CLIENTS].abs().amax(dim=(1, 2)).gt(0).all()
    assert not torch.equal(similar[ASSIGNMENT], random[ASSIGNMENT])
    assert not torch.equal(fixed[ASSIGNMENT], random[ASSIGNMENT])
    expected = FedAMoLE()._solved(affinity(similar[EXPERTS], similar[CLIENTS]))
    assert torch.equal(similar[ASSIGNMENT], expected)


def test_the_balance_loss_trains_along(run):
    options = ("data.partition.num_clients=2", "rounds=1")
    plain = state_of(run(*options)).tensors
    without = state_of(run(*options, "algorithm.balance_loss=0")).tensors
    assert any(not equal_bits(plain[name], without[name]) for name in plain)


def test_micro_batches_share_the_weight_of_the_balance_loss(make_config, tmp_path):
    """Each adds its own loss to the gradient; together they weigh what one batch does."""
    algorithm, config = FedAMoLE(balance_loss=0.5), make_config("fedamole", "training.accumulation=2")
    with open_workbench(config, Stopwatch()) as bench:
        runtime = bench.scorer(PersonalStore(tmp_path)).runtime
        sent = algorithm.download(algorithm.init(bench.parts, runtime.facts()), "client-000")
        with runtime.turn("client-000", 1) as turn:
            algorithm.client_update(turn.client, Kept(), sent)
            assert {one.balance for one in routed_modules(bench.parts.model).values()} == {0.25}


def test_a_plain_checkpoint_is_refused(run, tmp_path):
    result = run("data.partition.num_clients=2", "rounds=1")
    for who in ("client-001", "server"):
        with pytest.raises(UserError, match="has LoRA experts with a router, which a plain checkpoint"):
            export_client(result["folder"], who, tmp_path / "out", as_checkpoint=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": -1}, "num_experts must be at least 0, not -1"),
        ({"clients_per_expert": 0}, "clients_per_expert must be at least 1, not 0"),
        ({"balance_loss": -0.1}, r"balance_loss must be at least 0, not -0\.1"),
        ({"embedding_share": 0}, "embedding_share must be above 0 and at most 1, not 0"),
        ({"max_experts": 1}, "max_experts must be at least experts_per_token, which is 2, not 1"),
        ({"assignment": "fixed", "embedding_share": 0.1}, "embedding_share is 0.1, but has no effect"),
    ],
)
def test_numbers_outside_their_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        FedAMoLE(**settings)


@pytest.mark.parametrize("num_experts", [1, 2, 30])
def test_a_pool_that_does_not_fit_the_clients_is_refused(parts, num_experts):
    message = (
        f"algorithm.num_experts is {num_experts}, and each expert chooses 2 of 3 clients: {2 * num_experts} "
        "places in all, but there must be from 6"
    )
    with pytest.raises(UserError, match=message):
        FedAMoLE(num_experts=num_experts).init(parts, facts("a", "b", "c"))
