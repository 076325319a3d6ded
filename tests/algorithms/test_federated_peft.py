"""FedSA-LoRA, FFA-LoRA, FlexLoRA, FLoRA and FRLoRA: what travels, what is exact, what clients keep."""

from dataclasses import replace

import pytest
import torch

from fedexperts.algorithms.api import Client, ClientFacts, Kept, ModelParts, ServerState, mean_of
from fedexperts.algorithms.fedsa_lora import FedSALora
from fedexperts.algorithms.ffa_lora import FFALora
from fedexperts.algorithms.flexlora import FlexLora
from fedexperts.algorithms.flora import Flora
from fedexperts.algorithms.folding import folded
from fedexperts.algorithms.frlora import FRLora
from fedexperts.algorithms.low_rank import pairs_of, principal_part, scaling
from fedexperts.data.batches import Batch
from fedexperts.errors import UserError
from fedexperts.federation.snapshot import take_snapshot
from fedexperts.messages import Upload
from fedexperts.models.adapters import AdapterSettings, add_lora
from fedexperts.models.tiny import tiny_model
from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.undo import undone
from fedexperts.run_directory import read_lines
from fedexperts.running.experiment import run_experiment
from fedexperts.tensors import equal_bits, shapes_of
from fedexperts.training.settings import TrainingSettings

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
"""A few roundings of float32 at values around 1, of another order of the same sums."""
TOKENS = torch.arange(24).reshape(2, 12)


@pytest.fixture
def parts():
    model = tiny_model("qwen2_moe")
    adapter = AdapterSettings(rank=4, alpha=8.0)
    names = add_lora(model, adapter, 0)
    return ModelParts(model=model, layers=seam.find_moe_layers(model), lora_names=names, adapter=adapter)


def facts(*client_ids):
    return tuple(ClientFacts(client_id=client_id, num_train=10) for client_id in client_ids)


def client_of(parts, client_id="a", round_number=1, num_train=10):
    """A client whose batches depend on its name; its large steps make updates far from zero."""
    offset = sum(map(ord, client_id))
    batch = Batch(
        input_ids=(TOKENS + offset) % 100,
        attention_mask=torch.ones_like(TOKENS),
        labels=(TOKENS + offset) % 100,
        num_examples=2,
        num_labels=24,
    )
    return Client(
        client_id=client_id,
        round_number=round_number,
        num_rounds=9,
        seed=0,
        parts=parts,
        training=TrainingSettings(lr=0.05, weight_decay=0.1, gradient_clip=0.0),
        num_train=num_train,
        draw_batches=lambda: [batch] * 3,
        calibration_batches=lambda largest: [batch],
    )


def turn(algorithm, client, kept, sent, *, logits=None):
    """Take one turn, undone at its end; the model's logits after training go to the list ``logits``."""
    with undone(client.parts.model, client.parts.layers):
        upload, kept = algorithm.client_update(client, kept, sent)
        if logits is not None:
            logits.append(logits_of(client.parts.model))
    return upload, kept


@torch.no_grad()
def logits_of(model):
    return model(TOKENS).logits.clone()


def server_logits(algorithm, parts, state):
    with undone(parts.model, parts.layers):
        algorithm.install_shared(parts, algorithm.server_model(state))
        return logits_of(parts.model)


class Rounds:
    """A federation of two clients in a few lines: who is in the cohort differs by round."""

    def __init__(self, algorithm, parts):
        self.algorithm, self.parts = algorithm, parts
        self.state = algorithm.init(parts, facts("a", "b"))
        self.kept = {"a": Kept(), "b": Kept()}
        self.uploads = []

    def sent(self, client_id):
        return self.algorithm.download(self.state, client_id)

    def run(self, *cohort, logits=None):
        self.uploads = []
        for client_id in cohort:
            client = client_of(
                self.parts, client_id, self.state.round_number + 1, 10 if client_id == "a" else 30
            )
            upload, self.kept[client_id] = turn(
                self.algorithm, client, self.kept[client_id], self.sent(client_id), logits=logits
            )
            self.uploads.append((client_id, upload))
        self.state = self.algorithm.server_update(self.state, self.uploads)


def products_of(parts, uploads):
    """The weighted sum of the clients' updates of each frozen weight, in float64."""
    total = sum(next(iter(upload.weights.values())) for _, upload in uploads)
    return {
        pair.weight: scaling(parts)
        * sum(
            upload.tensors[pair.b].double() @ upload.tensors[pair.a].double() * upload.weights[pair.a] / total
            for _, upload in uploads
        )
        for pair in pairs_of(parts.lora_names)
    }


def logits_with(parts, changes):
    """The pretrained model's logits with ``changes`` added to frozen weights and LoRA at its start."""
    with undone(parts.model, parts.layers):
        weights = seam.current(parts.model, changes)
        seam.load_tensors(parts.model, {n: (w.double() + changes[n]).float() for n, w in weights.items()})
        return logits_of(parts.model)


# FedSA-LoRA and FFA-LoRA


def test_fedsa_sends_every_a_and_keeps_every_b(parts):
    rounds = Rounds(FedSALora(), parts)
    rounds.run("a", "b")
    pairs = pairs_of(parts.lora_names)
    for client_id, upload in rounds.uploads:
        assert set(upload.tensors) == {pair.a for pair in pairs} == set(rounds.sent(client_id).tensors)
        assert set(rounds.kept[client_id].parameters) == {pair.b for pair in pairs}
        assert set(FedSALora().expected(parts, rounds.state, client_id).tensors) == set(upload.tensors)
        assert all(tensor.any() for tensor in rounds.kept[client_id].parameters.values())


def test_fedsa_starts_the_next_round_from_its_own_b(parts):
    rounds = Rounds(FedSALora(), parts)
    rounds.run("a", "b")
    goes_on, _ = turn(FedSALora(), client_of(parts, "a", 2), rounds.kept["a"], rounds.sent("a"))
    forgets, _ = turn(FedSALora(), client_of(parts, "a", 2), Kept(), rounds.sent("a"))
    name = pairs_of(parts.lora_names)[0].a
    assert not torch.equal(goes_on.tensors[name], forgets.tensors[name])


def test_one_client_of_fedsa_is_local_only(make_config, tmp_path, quiet):
    alone = "data.partition.num_clients=1"
    fedsa = run_experiment(make_config("fedsa_lora", alone), tmp_path / "fedsa", progress=quiet)
    local = run_experiment(make_config("local_only", alone), tmp_path / "local", progress=quiet)
    assert fedsa["mean"] == local["mean"]


def test_ffa_trains_and_sends_b_and_a_never_changes_a_bit(parts):
    start = seam.current(parts.model, parts.lora_names)
    pairs = pairs_of(parts.lora_names)
    rounds = Rounds(FFALora(), parts)
    with undone(parts.model, parts.layers):
        upload, kept = FFALora().client_update(client_of(parts), Kept(), rounds.sent("a"))
        after = seam.current(parts.model, parts.lora_names)
    assert all(equal_bits(after[pair.a], start[pair.a]) for pair in pairs)
    assert not any(equal_bits(after[pair.b], start[pair.b]) for pair in pairs)
    assert set(upload.tensors) == {pair.b for pair in pairs}
    assert not kept


def test_the_mean_of_ffa_is_the_mean_of_the_updates(parts):
    rounds = Rounds(FFALora(), parts)
    start = seam.current(parts.model, parts.lora_names)
    rounds.run("a", "b")
    for _, upload in rounds.uploads:
        upload.tensors.update({name: start[name] for name in start if name not in upload.tensors})
        upload.weights.update(dict.fromkeys(upload.tensors, next(iter(upload.weights.values()))))
    exact = logits_with(parts, products_of(parts, rounds.uploads))
    torch.testing.assert_close(server_logits(FFALora(), parts, rounds.state), exact, **CLOSE)


# FlexLoRA

A, B = "q.lora_A.default.weight", "q.lora_B.default.weight"


def flex_state(rank, size):
    tensors = {A: torch.randn(rank, size), B: torch.zeros(size, rank)}
    return ServerState(round_number=0, tensors=tensors, clients=facts("a", "b"))


def upload_of_product(product, weight):
    """A client's upload of B A = ``product``, of full rank: B is the product and A the identity."""
    tensors = {A: torch.eye(len(product)), B: product}
    return Upload(tensors=tensors, weights=dict.fromkeys(tensors, weight))


def test_flexlora_hands_out_the_svd_of_the_weighted_mean():
    """(1·diag(8, 0) + 3·diag(0, 2)) / 4 = diag(2, 1.5), whose rank-1 part is diag(2, 0)."""
    uploads = [
        ("a", upload_of_product(torch.diag(torch.tensor([8.0, 0.0])), 1.0)),
        ("b", upload_of_product(torch.diag(torch.tensor([0.0, 2.0])), 3.0)),
    ]
    algorithm = FlexLora(ranks=(1, 2))
    state = algorithm.server_update(flex_state(2, 2), uploads)
    small, large = (algorithm.download(state, client_id).tensors for client_id in ("a", "b"))
    torch.testing.assert_close(large[B] @ large[A], torch.diag(torch.tensor([2.0, 1.5])))
    torch.testing.assert_close(small[B] @ small[A], torch.diag(torch.tensor([2.0, 0.0])))
    torch.testing.assert_close(large[B].norm(dim=0), torch.tensor([2.0, 1.5]))
    torch.testing.assert_close(large[A] @ large[A].T, torch.eye(2))


def test_flexlora_of_a_three_by_three_product_by_hand():
    """3·u v' with u = (1, 2, 2)/3 and v = (0, 1, 0) is [[0, 1, 0], [0, 2, 0], [0, 2, 0]]."""
    product = torch.tensor([[0.0, 1.0, 0.0], [0.0, 2.0, 0.0], [0.0, 2.0, 0.0]])
    state = FlexLora().server_update(flex_state(3, 3), [("a", upload_of_product(product, 5.0))])
    sign = torch.sign(state.tensors[A][0, 1])
    torch.testing.assert_close(sign * state.tensors[A][0], torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(sign * state.tensors[B][:, 0], torch.tensor([1.0, 2.0, 2.0]))
    torch.testing.assert_close(state.tensors[B][:, 1:], torch.zeros(3, 2))


def test_flexlora_truncates_to_the_best_approximation_of_its_rank():
    torch.manual_seed(0)
    uploads = [
        (name, upload_of_product(torch.randn(6, 6), weight)) for name, weight in (("a", 1.0), ("b", 2.0))
    ]
    mean = sum(upload.weights[B] / 3 * upload.tensors[B].double() for _, upload in uploads)
    u, values, vh = torch.linalg.svd(mean)
    state = FlexLora().server_update(flex_state(4, 6), uploads)
    best = (u[:, :4] * values[:4]) @ vh[:4]
    torch.testing.assert_close(state.tensors[B].double() @ state.tensors[A].double(), best, **CLOSE)


def test_a_mean_of_low_rank_leaves_every_row_of_a_trainable():
    """Rows of zeros in A would never get a gradient again, nor the columns of B that belong to them."""
    torch.manual_seed(0)
    tensors = {A: torch.randn(1, 6), B: torch.randn(6, 1)}
    upload = Upload(tensors=tensors, weights=dict.fromkeys(tensors, 1.0))
    state = FlexLora(ranks=(1,)).server_update(flex_state(4, 6), [("a", upload)])
    torch.testing.assert_close(state.tensors[A] @ state.tensors[A].T, torch.eye(4), **CLOSE)


def test_flexlora_of_more_ranks_than_the_weight_has_is_exact_and_padded():
    torch.manual_seed(0)
    product = torch.randn(2, 2)
    state = FlexLora().server_update(flex_state(3, 2), [("a", upload_of_product(product, 1.0))])
    assert state.tensors[A].shape == (3, 2)
    torch.testing.assert_close(state.tensors[B] @ state.tensors[A], product, **CLOSE)


def test_the_server_of_flexlora_at_full_rank_has_the_exact_mean_of_the_updates():
    """Two clients of rank 2 have a mean of rank 4 at most, which is what the server's LoRA has room for."""
    model, adapter = tiny_model("qwen2_moe"), AdapterSettings(rank=4, alpha=8.0)
    names = add_lora(model, adapter, 0)
    parts = ModelParts(model=model, layers=seam.find_moe_layers(model), lora_names=names, adapter=adapter)
    algorithm = FlexLora(ranks=(2,))
    rounds = Rounds(algorithm, parts)
    rounds.run("a", "b")
    exact = logits_with(parts, products_of(parts, rounds.uploads))
    torch.testing.assert_close(server_logits(algorithm, parts, rounds.state), exact, **CLOSE)


@pytest.mark.parametrize("cls", [FlexLora, Flora])
def test_a_smaller_rank_stays_zero_beyond_it_and_sends_no_more(cls, parts):
    rounds = Rounds(cls(ranks=(1, 3)), parts)
    pair = pairs_of(parts.lora_names)[0]
    with undone(parts.model, parts.layers):
        upload, _ = rounds.algorithm.client_update(client_of(parts, "b"), Kept(), rounds.sent("b"))
        after = seam.current(parts.model, parts.lora_names)
    assert after[pair.a][:3].any(dim=1).all()
    assert after[pair.b][:, :3].any(dim=0).all()
    assert not after[pair.a][3:].any()
    assert not after[pair.b][:, 3:].any()
    assert equal_bits(upload.tensors[pair.b], after[pair.b][:, :3].contiguous())
    expected = rounds.algorithm.expected(parts, rounds.state, "b").tensors
    assert {n: t.shape for n, t in expected.items()} == {n: t.shape for n, t in upload.tensors.items()}
    assert upload.measured == {"rank": 3.0}


@pytest.mark.parametrize("method", ["flexlora", "flora"])
def test_bytes_of_clients_of_different_ranks_are_predicted(method, make_config, tmp_path, quiet):
    """The cap on an upload's change is on too: it is measured from what this client was sent.

    Ranks 2 and 3 do not broadcast against each other, as 1 would.
    """
    ranks = ("adapter.rank=3", "algorithm.ranks=[2, 3, 3]", "cohort.max_change_norm=1000.0")
    result = run_experiment(make_config(method, *ranks), tmp_path / "run", progress=quiet)
    lines = read_lines(tmp_path / "run" / "clients.jsonl")
    assert not result["failures"]
    assert result["frozen_unchanged"]
    assert all(line["upload_bytes"] == line["upload_predicted"] for line in lines)
    assert all(line["download_bytes"] == line["download_predicted"] for line in lines)
    assert [line["algorithm"]["rank"] for line in lines] == [2, 3, 3] * 2
    assert lines[0]["upload_bytes"] < lines[1]["upload_bytes"] == lines[2]["upload_bytes"]


@pytest.mark.parametrize("cls", [FlexLora, Flora])
def test_ranks_that_cannot_be_are_refused(cls, parts):
    with pytest.raises(UserError, match=r"ranks must be at least 1, but are \[4, 0\]"):
        cls(ranks=(4, 0))
    with pytest.raises(UserError, match="ranks_drawn has no effect"):
        cls(ranks=(4, 4), ranks_drawn=True)
    with pytest.raises(UserError, match=r"algorithm.ranks has 5, but adapter.rank is 4"):
        cls(ranks=(2, 5)).init(parts, facts("a"))


def test_drawn_ranks_follow_the_seed_and_not_the_order_of_clients():
    algorithm, names = FlexLora(ranks=(1, 2, 3), ranks_drawn=True), [f"client-{n}" for n in range(30)]
    state = ServerState(round_number=0, tensors={}, clients=facts(*names), seed=5)
    reverse = replace(state, clients=facts(*reversed(names)))
    drawn = [algorithm.rank_of(state, name) for name in names]
    assert set(drawn) == {1, 2, 3}
    assert drawn == [algorithm.rank_of(reverse, name) for name in names]
    assert drawn != [algorithm.rank_of(replace(state, seed=6), name) for name in names]


# FLoRA and FRLoRA


@pytest.mark.parametrize("ranks", [(), (1, 4)])
def test_after_a_round_of_flora_the_model_is_base_plus_the_weighted_sum(ranks, parts):
    rounds = Rounds(Flora(ranks=ranks), parts)
    rounds.run("a", "b")
    first = products_of(parts, rounds.uploads)
    exact = logits_with(parts, first)
    torch.testing.assert_close(server_logits(rounds.algorithm, parts, rounds.state), exact, **CLOSE)
    assert not torch.allclose(exact, logits_of(parts.model), atol=1e-2)
    rounds.run("a", "b")
    both = {name: first[name] + change for name, change in products_of(parts, rounds.uploads).items()}
    torch.testing.assert_close(
        server_logits(rounds.algorithm, parts, rounds.state), logits_with(parts, both), **CLOSE
    )


def test_the_stack_of_flora_is_as_high_as_all_ranks_together(parts):
    rounds = Rounds(Flora(ranks=(1, 3)), parts)
    rounds.run("a", "b")
    pair = pairs_of(parts.lora_names)[0]
    assert rounds.sent("a").beside[pair.a].shape[0] == 4 == rounds.sent("a").beside[pair.b].shape[1]
    assert not rounds.sent("a").tensors


def test_flora_restarts_at_another_random_a_in_each_round_and_client(parts):
    starts = []
    for client_id, round_number in (("a", 1), ("a", 2), ("b", 1)):
        with undone(parts.model, parts.layers):
            rounds = Rounds(Flora(), parts)
            Flora().install(client_of(parts, client_id, round_number), Kept(), rounds.sent(client_id))
            starts.append(seam.current(parts.model, parts.lora_names))
    pair = pairs_of(parts.lora_names)[0]
    assert len({tuple(start[pair.a].flatten().tolist()) for start in starts}) == 3
    assert not any(start[pair.b].any() for start in starts)


@pytest.mark.parametrize("cls", [Flora, FRLora])
def test_one_client_alone_leaves_its_trained_model_to_the_server(cls, parts):
    rounds, logits = Rounds(cls(), parts), []
    rounds.run("a", logits=logits)
    torch.testing.assert_close(server_logits(rounds.algorithm, parts, rounds.state), logits[0], **CLOSE)
    rounds.run("a", logits=logits)
    torch.testing.assert_close(server_logits(rounds.algorithm, parts, rounds.state), logits[1], **CLOSE)


@pytest.mark.parametrize("algorithm", [Flora(ranks=(2,)), FRLora()])
def test_a_client_that_missed_rounds_has_the_same_bits_as_one_that_did_not(algorithm, parts):
    """b is sent the stacks of all rounds since its own in one message, a one by one."""
    rounds = Rounds(algorithm, parts)
    for cohort in (("a", "b"), ("a",), ("a",)):
        rounds.run(*cohort)
    late, steady = rounds.sent("b").beside, rounds.sent("a").beside
    assert late["ranks"].tolist()[-1:] == steady["ranks"].tolist()
    assert len(late["ranks"]) == 3
    views = [rounds.algorithm.server_view(rounds.kept[name], rounds.sent(name)) for name in ("a", "b")]
    server = rounds.algorithm.server_model(rounds.state)
    for view in views:
        assert view.beside.keys() == server.beside.keys()
        assert all(equal_bits(view.beside[name], server.beside[name]) for name in server.beside)
        assert all(equal_bits(view.tensors[name], server.tensors[name]) for name in server.tensors)


@pytest.mark.parametrize("cls", [Flora, FRLora])
def test_a_client_that_missed_more_than_the_sum_is_worth_gets_the_sum(cls, parts):
    """Rank 4 a round on weights of 32 by 32: stacks of rank 16 have as many numbers as the sum."""
    rounds = Rounds(cls(), parts)
    rounds.run("a", "b")
    for _ in range(5):
        rounds.run("a")
    sums = rounds.algorithm.server_model(rounds.state).beside
    sent = rounds.sent("b")
    assert sent.beside.keys() == sums.keys()
    view = rounds.algorithm.server_view(rounds.kept["b"], sent)
    assert all(equal_bits(view.beside[name], sums[name]) for name in sums)
    held = sum(t.numel() for n, t in rounds.state.beside.items() if ".lora_" in n)
    assert 0 < held <= sum(t.numel() for t in sums.values())


@pytest.mark.parametrize("cls", [Flora, FRLora])
def test_a_client_that_forgets_what_it_folded_trains_another_model(cls, parts):
    rounds = Rounds(cls(), parts)
    rounds.run("a", "b")
    rounds.run("a", "b")
    forgotten = Kept(beside={n: t for n, t in rounds.kept["a"].beside.items() if ".lora_" in n})
    goes_on, forgets = (
        turn(rounds.algorithm, client_of(parts, "a", 3), kept, rounds.sent("a"))[0]
        for kept in (rounds.kept["a"], forgotten)
    )
    name = pairs_of(parts.lora_names)[0].b
    assert not torch.equal(goes_on.tensors[name], forgets.tensors[name])


@pytest.mark.parametrize("cls", [Flora, FRLora])
def test_a_round_without_uploads_changes_nothing(cls, parts):
    rounds = Rounds(cls(), parts)
    rounds.run("a", "b")
    after = rounds.algorithm.server_update(rounds.state, [])
    assert after == replace(rounds.state, round_number=rounds.state.round_number + 1)


def test_frlora_starts_as_the_pretrained_model(parts):
    rounds = Rounds(FRLora(), parts)
    pretrained = logits_of(parts.model)
    with undone(parts.model, parts.layers):
        kept = FRLora().install(client_of(parts), Kept(), rounds.sent("a"))
        torch.testing.assert_close(logits_of(parts.model), pretrained, **CLOSE)
        for pair in pairs_of(parts.lora_names):
            rest = torch.linalg.svdvals(kept.parameters[pair.weight].double())
            assert rest[-4:].max() < 1e-6, "the frozen weight still has the part that LoRA starts from"


def test_the_principal_part_by_hand():
    """W = diag(9, 4): the rank-1 part is 9, and each factor has its root."""
    a, b = principal_part(torch.diag(torch.tensor([9.0, 4.0])), 1)
    torch.testing.assert_close(b @ a, torch.diag(torch.tensor([9.0, 0.0])).double())
    assert float(a.abs().max()) == pytest.approx(3.0) == float(b.abs().max())


def test_frlora_adds_the_residual_of_the_means_by_hand():
    """Start 2·3 = 6; means 4 and 5 in round one and 1 and 2 in round two: (20 - 6) + (2 - 6) = 10."""
    weight = "q.base_layer.weight"
    start = {A: torch.tensor([[3.0]]), B: torch.tensor([[2.0]])}
    stacks = {
        A: torch.tensor([[5.0], [2.0]]),
        B: torch.tensor([[4.0, 1.0]]),
        "ranks": torch.tensor([1, 1]),
    }
    assert folded({}, stacks, start) == {weight: torch.tensor([[10.0]])}
    assert folded({weight: torch.tensor([[1.0]])}, stacks, {}) == {weight: torch.tensor([[23.0]])}


def test_frlora_averages_a_and_b_apart_and_always_restarts_at_the_same_place(parts):
    rounds = Rounds(FRLora(), parts)
    start = rounds.sent("a").tensors
    rounds.run("a", "b")
    means = mean_of(ServerState(round_number=0, tensors=start), rounds.uploads)
    sent = rounds.sent("a")
    assert all(equal_bits(sent.beside[name], means[name]) for name in means)
    assert not sent.tensors, "a client that has the start is not sent it again"
    with undone(parts.model, parts.layers):
        FRLora().install(client_of(parts, "a", 2), rounds.kept["a"], sent)
        again = seam.current(parts.model, parts.lora_names)
    assert all(equal_bits(again[name], start[name]) for name in start)


@pytest.mark.parametrize("cls", [Flora, FRLora])
def test_the_server_model_carries_the_folded_weights_into_a_snapshot(cls, parts):
    rounds = Rounds(cls(), parts)
    rounds.run("a", "b")
    before = shapes_of(dict(parts.model.named_parameters()))
    with undone(parts.model, parts.layers) as undo:
        rounds.algorithm.install_shared(parts, rounds.algorithm.server_model(rounds.state))
        snapshot = take_snapshot(parts, undo.written)
    assert {pair.weight for pair in pairs_of(parts.lora_names)} <= snapshot.tensors.keys()
    assert before.keys() == dict(parts.model.named_parameters()).keys()
