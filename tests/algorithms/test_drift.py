"""Methods against client drift: FedProx's pull, and SCAFFOLD's control variates."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedexperts.algorithms.api import Client, ClientFacts, Kept, ModelParts, ServerState
from fedexperts.algorithms.fedavg import FedAvg
from fedexperts.algorithms.fedprox import FedProx
from fedexperts.algorithms.scaffold import Scaffold, _option_two
from fedexperts.data.batches import Batch
from fedexperts.errors import UserError
from fedexperts.federation.checkpoint import load_checkpoint
from fedexperts.federation.personal import PersonalStore
from fedexperts.messages import Sent, Upload
from fedexperts.models.adapters import AdapterSettings, add_lora
from fedexperts.models.tiny import tiny_model
from fedexperts.moe.surgery import seam
from fedexperts.run_directory import RunDirectory
from fedexperts.running.experiment import run_experiment
from fedexperts.tensors import Tensors, sha256_of
from fedexperts.training.settings import TrainingSettings

# A federation whose optimum is known


class Unigram(nn.Module):
    """Logits of the next token, whatever came before: its cross-entropy is convex, and least at log p."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.head = Logits(vocabulary)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=self.head(input_ids[..., None]))


class Logits(nn.Module):
    def __init__(self, vocabulary: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(vocabulary), requires_grad=False)

    def forward(self, hidden):
        return self.logits.expand(*hidden.shape[:-1], -1)


NAME = "head.logits"


def batch_of(counts: tuple[int, ...]) -> Batch:
    """One sequence of two tokens for each count; the second is to be predicted."""
    tokens = torch.tensor([token for token, count in enumerate(counts) for _ in range(count)])
    ids = torch.stack([torch.zeros_like(tokens), tokens], 1)
    mask, num = torch.ones_like(ids), len(tokens)
    return Batch(input_ids=ids, attention_mask=mask, labels=ids, num_examples=num, num_labels=num)


def federate(algorithm, counts, *, rounds, steps, cohorts=None, **settings):
    """Run rounds of full-batch SGD; return the server's state after each, and what the clients keep."""
    parts = ModelParts(model=Unigram(len(counts[0])), layers=(), lora_names=(NAME,))
    training = TrainingSettings(
        num_local_steps=steps, optimizer="sgd", gradient_clip=0, **{"lr": 1.0, **settings}
    )
    ids = [f"client-{number}" for number in range(len(counts))]
    facts = [ClientFacts(client_id=name, num_train=sum(own)) for name, own in zip(ids, counts, strict=True)]
    states, kept = [algorithm.init(parts, facts)], dict.fromkeys(ids, Kept())
    for round_number in range(1, rounds + 1):
        cohort = range(len(ids)) if cohorts is None else cohorts[round_number - 1]
        uploads = []
        for number in cohort:
            batch, name = batch_of(counts[number]), ids[number]
            client = Client(
                client_id=name,
                round_number=round_number,
                num_rounds=10**9,
                seed=0,
                parts=parts,
                training=training,
                num_train=batch.num_examples,
                draw_batches=lambda batch=batch: [batch] * steps,
                calibration_batches=lambda largest, batch=batch: [batch],
            )
            sent = algorithm.download(states[-1], name)
            upload, kept[name] = algorithm.client_update(client, kept[name], sent)
            uploads.append((name, upload))
        states.append(algorithm.server_update(states[-1], uploads))
    return states, kept


def logits(state: ServerState) -> torch.Tensor:
    return state.tensors[NAME] - state.tensors[NAME].mean()


LABELS = ((8, 1, 1), (1, 3, 6))
MEAN = torch.tensor([0.45, 0.20, 0.35])
"""Distribution of both clients' labels together: the optimum of the mean loss is its logarithm."""


def distance_to_optimum(algorithm, **training) -> float:
    states, _ = federate(algorithm, LABELS, rounds=25, steps=10, **training)
    best = MEAN.log() - MEAN.log().mean()
    return float((logits(states[-1]) - best).norm())


def test_scaffold_removes_the_drift_that_fedavg_shows():
    """Clients come near their own optima, log p_i, and FedAvg ends between the mean of these and the best.

    The same rounds in float64, written apart from this code, end 0.1508 from the optimum under FedAvg.
    SCAFFOLD ends at the optimum, up to what float32 resolves of a gradient.
    """
    assert distance_to_optimum(FedAvg()) == pytest.approx(0.1508, abs=1e-4)
    assert distance_to_optimum(Scaffold()) < 1e-5
    assert distance_to_optimum(Scaffold(variate="gradient")) < 1e-5
    assert distance_to_optimum(Scaffold(correction="parameter")) < 1e-5


def test_scaffold_goes_to_the_optimum_under_a_schedule_within_the_round():
    """Its variates are means over the rates that were really taken."""
    assert distance_to_optimum(Scaffold(), step_schedule="linear", step_final_share=0.1) < 1e-5


def test_a_pull_lessens_the_drift_of_fedavg():
    assert distance_to_optimum(FedProx(mu=0.5)) < 0.75 * distance_to_optimum(FedAvg())


# SCAFFOLD by hand


def test_three_rounds_of_scaffold_are_those_computed_by_hand():
    """Two tokens with logits (a, -a); client 1 has token 0 alone, client 2 each token as often.

    The gradients of a's logit are G1 = σ(2a) - 1 and G2 = σ(2a) - 1/2. Two steps at rate 1 from x:
    a ← a - (G_i(a) - c_i + c), then c_i ← c_i - c + (x - a)/2; the server takes means, since both take part.

    Round 1, c = c1 = c2 = 0, x = 0:
      1: 0 + 0.5 = 0.5;  G1 = 0.73105858 - 1;  0.5 + 0.26894142 = 0.76894142;  c1 = -0.38447071
      2: G2(0) = 0, stays at 0;  c2 = 0;  x = 0.38447071, c = -0.19223536
    Round 2, c - c1 = 0.19223536, c - c2 = -0.19223536:
      1: G1 = -0.31670814, a = 0.50894350;  G1 = -0.26543919, a = 0.58214733
         c1 = -0.19223536 - (0.58214733 - 0.38447071)/2 = -0.29107367
      2: G2 = 0.18329186, a = 0.39341421;  G2 = 0.18714992, a = 0.39849964
         c2 = 0.19223536 - (0.39849964 - 0.38447071)/2 = 0.18522089
      x = 0.49032349, c = -0.05292639
    Round 3, c - c1 = 0.23814728, c - c2 = -0.23814728:
      1: G1 = -0.27276343, a = 0.52493964;  G1 = -0.25924828, a = 0.54604064;  c1 = -0.26600586
      2: G2 = 0.22723657, a = 0.50123420;  G2 = 0.23154362, a = 0.50783786;  c2 = 0.22939009
      x = 0.52693925, c = -0.01830788
    """
    expected = [(0.38447071, -0.19223536), (0.49032349, -0.05292639), (0.52693925, -0.01830788)]
    states, kept = federate(Scaffold(), ((4, 0), (2, 2)), rounds=3, steps=2)
    for state, (x, c) in zip(states[1:], expected, strict=True):
        # Float32 resolves 6e-8 here; there are six steps.
        assert state.tensors[NAME].tolist() == pytest.approx([x, -x], abs=5e-7)
        assert state.beside[NAME].tolist() == pytest.approx([c, -c], abs=5e-7)
    assert kept["client-0"].beside[NAME][0].item() == pytest.approx(-0.26600586, abs=5e-7)
    assert kept["client-1"].beside[NAME][0].item() == pytest.approx(0.22939009, abs=5e-7)


def test_the_server_rate_and_both_weightings_by_hand():
    """Tensors: clients of 1 and 3 examples come to 4 and 8 from 2, so the means are 6 and 7.

    At rate 0.5: 2 + 0.5·4 and 2 + 0.5·5. Variates: (1/N) Σ Δc_i = (1 + 2) / 4 on top of 10, N = 4.
    """
    clients = tuple(ClientFacts(client_id=name, num_train=1) for name in "abcd")
    state = ServerState(
        round_number=0,
        tensors={"w": torch.full((1,), 2.0)},
        beside={"w": torch.full((1,), 10.0)},
        clients=clients,
    )
    uploads = [
        ("a", Upload(tensors=one(4.0), weights={"w": 1.0}, beside=one(1.0))),
        ("b", Upload(tensors=one(8.0), weights={"w": 3.0}, beside=one(2.0))),
    ]
    equal = Scaffold(server_lr=0.5).server_update(state, uploads)
    by_examples = Scaffold(server_lr=0.5, weighting="examples").server_update(state, uploads)
    assert (equal.tensors["w"].item(), by_examples.tensors["w"].item()) == (4.0, 4.5)
    assert equal.beside["w"].item() == by_examples.beside["w"].item() == 10.75


def one(value: float) -> Tensors:
    return {"w": torch.full((1,), value)}


def test_a_client_that_waits_a_round_keeps_its_variate():
    """Client 1 takes part in rounds 1 and 3, client 2 in rounds 1 and 2; c stays the mean of the variates."""
    states, kept = federate(
        Scaffold(), ((4, 0), (2, 2), (1, 3)), rounds=3, steps=2, cohorts=((0, 1), (1,), (0,))
    )
    variates = [kept[f"client-{number}"].beside.get(NAME, torch.zeros(2)) for number in range(3)]
    assert not variates[2].any(), "it has never taken part"
    torch.testing.assert_close(sum(variates) / 3, states[-1].beside[NAME], atol=1e-7, rtol=0)
    whole, _ = federate(Scaffold(), ((4, 0), (2, 2), (1, 3)), rounds=3, steps=2)
    assert not torch.equal(whole[-1].tensors[NAME], states[-1].tensors[NAME])


def test_option_one_is_the_gradient_at_the_servers_tensors():
    """At logits 0 it is 1/2 - share of the label; at x it is softmax(x) - share."""
    states, kept = federate(Scaffold(variate="gradient"), ((4, 0), (1, 3)), rounds=2, steps=2)
    shares = torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    for number in range(2):
        due = states[1].tensors[NAME].softmax(0) - shares[number]
        torch.testing.assert_close(kept[f"client-{number}"].beside[NAME], due, atol=1e-6, rtol=0)
    torch.testing.assert_close(states[1].beside[NAME], (0.5 - shares).mean(0))


def test_a_tensor_that_took_no_step_or_steps_at_rate_0_keeps_its_variate():
    """Option II of a tensor that moved from 3 to 1 at rates that add up to 2: 2 / 2 - 0.5."""
    names = ("moved", "idle", "at rate 0")
    here, variates = ({name: torch.tensor([value]) for name in names} for value in (3.0, 0.5))
    sent = Sent(tensors=here, beside=variates)
    trained = sent.tensors | {"moved": torch.tensor([1.0])}
    change = _option_two(sent, trained, {"moved": 2.0, "at rate 0": 0.0})
    assert {name: tensor.tolist() for name, tensor in change.items()} == {
        "moved": [0.5],
        "idle": [0.0],
        "at rate 0": [0.0],
    }


def test_the_releases_correction_is_the_papers_under_plain_sgd():
    """w - lr (g + s) = (w - lr g) - lr s, up to float32's rounding in 3 rounds of 5 steps."""
    ends = [
        federate(Scaffold(correction=where), LABELS, rounds=3, steps=5, lr=0.5)[0][-1]
        for where in ("gradient", "parameter")
    ]
    torch.testing.assert_close(ends[0].tensors[NAME], ends[1].tensors[NAME], atol=2e-6, rtol=0)
    torch.testing.assert_close(ends[0].beside[NAME], ends[1].beside[NAME], atol=2e-6, rtol=0)


# Equalities with FedAvg, in whole runs


def tensors_sha256(run) -> str:
    return sha256_of(load_checkpoint(RunDirectory(run)).state.tensors)


@pytest.mark.parametrize("experts", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_fedprox_without_a_pull_is_fedavg(experts, make_config, tmp_path, quiet):
    ends = {}
    for name, settings in (("fedavg", ()), ("fedprox", ("algorithm.mu=0",))):
        config = make_config(name, f"algorithm.experts={experts}", *settings)
        result = run_experiment(config, tmp_path / name, progress=quiet)
        ends[name] = result["server_state_sha256"], result["mean"], result["exam"]
    assert ends["fedavg"] == ends["fedprox"]


@pytest.mark.parametrize("experts", [pytest.param("false", marks=pytest.mark.slow), "true"])
def test_scaffold_of_one_client_is_fedavg(experts, make_config, tmp_path, quiet):
    """c is then c_1 bit for bit, and corrects nothing, in all rounds."""
    settings = ("data.partition.num_clients=1", f"algorithm.experts={experts}")
    ends = {}
    for name in ("fedavg", "scaffold"):
        result = run_experiment(make_config(name, *settings), tmp_path / name, progress=quiet)
        ends[name] = tensors_sha256(tmp_path / name), result["mean"], result["exam"]
    assert ends["fedavg"] == ends["scaffold"]


def test_scaffold_with_zero_variates_is_fedavg(make_config, tmp_path, quiet):
    """All variates are 0 in round 1; FedAvg's mean is by examples, and the clients are of unequal size."""
    partition = {"kind": "dirichlet", "alpha": 0.3, "num_clients": 3}
    data = {"source": "tinyworld", "max_tokens": 192, "partition": partition}
    data |= {"tinyworld": {"examples_per_client": 24}}
    ends = {}
    for name, weighting in (("fedavg", ()), ("scaffold", ("examples",)), ("scaffold", ("equal",))):
        settings = ("rounds=1", *(f"algorithm.weighting={how}" for how in weighting))
        run = tmp_path / str(len(ends))
        run_experiment(make_config(name, *settings, data=data), run, progress=quiet)
        ends[name, *weighting] = tensors_sha256(run)
    assert ends["fedavg",] == ends["scaffold", "examples"]
    assert ends["fedavg",] != ends["scaffold", "equal"]


def test_the_servers_variate_is_the_mean_of_all_clients(make_config, tmp_path, quiet):
    """Two of three clients take part in a round; a variate that has not been sent is 0."""
    config = make_config("scaffold", "cohort.size=2", "algorithm.experts=true")
    run_experiment(config, tmp_path / "run", progress=quiet)
    checkpoint = load_checkpoint(RunDirectory(tmp_path / "run"))
    store = PersonalStore(tmp_path / "run" / "clients")
    own = [store.load(name, last).beside for name, last in checkpoint.kept_rounds.items()]
    num_clients = len(checkpoint.state.clients)
    assert num_clients == 3
    for name, variate in checkpoint.state.beside.items():
        total = sum(beside[name].double() for beside in own)
        # Either side rounds each of its additions to float32.
        rounding = 1e-6 * float(max(beside[name].abs().max() for beside in own))
        torch.testing.assert_close(variate.double(), total / num_clients, atol=rounding, rtol=0)


# FedProx against autograd


def test_the_pull_is_the_gradient_of_the_penalised_loss():
    """Three steps of SGD on the loss plus μ/2 ‖w - w_global‖², by autograd, with LoRA and all experts."""
    mu, lr = 2.0, 0.5
    ids = torch.randint(3, 100, (3, 2, 10), generator=torch.Generator().manual_seed(1))
    model, plain = prepared(), prepared()
    algorithm = FedProx(mu=mu, experts=True)
    client = Client(
        client_id="a",
        round_number=1,
        num_rounds=1,
        seed=0,
        parts=model,
        training=TrainingSettings(num_local_steps=3, lr=lr, optimizer="sgd", gradient_clip=0),
        num_train=6,
        draw_batches=lambda: [
            Batch(input_ids=x, attention_mask=torch.ones_like(x), labels=x, num_examples=2, num_labels=18)
            for x in ids
        ],
        calibration_batches=lambda largest: [],
    )
    sent = algorithm.download(algorithm.init(model, ()), "a")
    algorithm.client_update(client, Kept(), sent)
    trained = {name for group in algorithm.trained(plain, sent) for name in group.names}
    parameters = {name: p for name, p in plain.model.named_parameters() if name in trained}
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for x in ids:
        found = plain.model(input_ids=x, use_cache=False).logits
        loss = functional.cross_entropy(found[:, :-1].flatten(0, 1), x[:, 1:].flatten())
        penalty = sum((parameter - start[name]).square().sum() for name, parameter in parameters.items())
        gradients = torch.autograd.grad(loss + mu / 2 * penalty, list(parameters.values()))
        with torch.no_grad():
            for parameter, gradient in zip(parameters.values(), gradients, strict=True):
                parameter -= lr * gradient
    for name, parameter in model.model.named_parameters():
        if name in trained:
            assert not torch.equal(parameter, start[name])
            # The two passes sum a batch's losses in another order.
            torch.testing.assert_close(parameter, parameters[name].detach(), atol=1e-6, rtol=1e-5)


def prepared() -> ModelParts:
    model = tiny_model("qwen2_moe").requires_grad_(False)
    seam.install_implementation(model)
    names = add_lora(model, AdapterSettings(rank=2), 0)
    return ModelParts(model=model, layers=seam.find_moe_layers(model), lora_names=names)


# What travels, and what is refused


def test_variates_of_experts_are_stacked_as_the_layer_holds_them():
    parts = prepared()
    names = (*parts.lora_names, *seam.expert_names(parts.layers))
    tensors = seam.current(parts.model, names)
    fused = seam.fuse(parts.layers, tensors)
    parameters = dict(parts.model.named_parameters())
    assert all(torch.equal(tensor, parameters[name]) for name, tensor in fused.items())
    back = seam.unfuse(parts.layers, fused)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: FedProx(mu=-0.1), "^mu must be at least 0, not -0.1"),
        (lambda: FedProx(mu=math.nan), "^mu must be at least 0, not nan"),
        (lambda: Scaffold(server_lr=0.0), "^server_lr must be above 0"),
        (lambda: Scaffold(experts_lr_scale=2.0), "no effect without experts"),
    ],
)
def test_settings_out_of_range_or_without_effect_are_refused(make, complaint):
    with pytest.raises(UserError, match=complaint):
        make()


def test_the_pull_must_be_chosen(make_config):
    with pytest.raises(UserError, match=r"algorithm\.mu is missing"):
        make_config("fedprox")
