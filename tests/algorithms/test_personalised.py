"""Personalised methods: degenerate cases bit for bit, update rules by hand, and memory that matters."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fedexperts.algorithms.api import ClientFacts, Kept, ModelParts, ServerState, TrainedGroup
from fedexperts.algorithms.ditto import Ditto
from fedexperts.algorithms.fdlora import FUSION, FDLoRA, fused
from fedexperts.algorithms.fedavg_finetune import HAS_OWN, FedAvgFinetune
from fedexperts.algorithms.feddpa import FedDPA
from fedexperts.algorithms.fedper import FedPer
from fedexperts.algorithms.fedrep import FedRep
from fedexperts.costs.stopwatch import Stopwatch
from fedexperts.errors import UserError
from fedexperts.federation import scoring
from fedexperts.federation.checkpoint import load_checkpoint
from fedexperts.federation.personal import PersonalStore
from fedexperts.messages import Sent, Upload
from fedexperts.models import prompts
from fedexperts.models.adapters import AdapterSettings, adapter_scales, add_lora
from fedexperts.models.instance_weights import REFERENCES, instance_weights_of
from fedexperts.models.tiny import tiny_model
from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.undo import first_difference, undone
from fedexperts.run_directory import RunDirectory, read_json, read_lines
from fedexperts.running.experiment import run_experiment
from fedexperts.running.export import export_client, load_personalised, opened_model
from fedexperts.running.progress import QuietProgress
from fedexperts.running.workbench import open_workbench
from fedexperts.tensors import equal_bits

DROPOUT = "adapter.dropout=0.2"
"""Equalities hold for the seeds of dropout too."""
CHEAP = (
    "data.partition.num_clients=2",
    "evaluation.metrics=['loss']",
    "evaluation.matrix=false",
    "evaluation.max_test_examples=2",
    "evaluation.exam.num_questions=2",
    "evaluation.exam.personalised=false",
)


FIXED = "algorithm.weighting=fixed"
STATES = [pytest.param("fresh", marks=pytest.mark.slow), "kept"]
"""Settings of ``training.optimizer_state``."""
FUSION_OF_TWO = ("algorithm.fusion_grid=[0.0, 1.0]", "algorithm.fusion_examples=2")


@pytest.fixture(scope="module")
def done():
    """Results by method and overrides: runs that several tests compare are made once."""
    return {}


@pytest.fixture
def run(make_config, done, tmp_path_factory, quiet):
    """Run a method with overrides; returns its result and its folder."""

    def run(name, *overrides):
        key = (name, *overrides)
        if key not in done:
            folder = tmp_path_factory.mktemp(name) / "run"
            run_experiment(make_config(name, DROPOUT, *CHEAP, *overrides), folder, progress=quiet)
            done[key] = read_json(folder / "result.json") | {"folder": folder}
        return done[key]

    return run


def kept_by(result, round_number=2):
    """What each client keeps after a round."""
    store = PersonalStore(result["folder"] / "clients")
    return {client: store.load(client, round_number) for client in result["clients"]}


def state_of(result):
    return load_checkpoint(RunDirectory(result["folder"])).state


def clients_lines(result):
    return read_lines(result["folder"] / "clients.jsonl")


def assert_same_runs(one, other):
    for key in ("server_state_sha256", "personal_sha256", "mean"):
        assert one[key] == other[key], key
    assert one["exam"]["global"] == other["exam"]["global"]


# Degenerate cases


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("fedavg_finetune", ("algorithm.federated_rounds=2",)),
        pytest.param("fedper", ("algorithm.personal_layers=0",), marks=pytest.mark.slow),
        ("fedrep", ("algorithm.personal_layers=0", "algorithm.head_steps=0")),
    ],
)
def test_a_method_without_anything_personal_is_fedavg(run, name, settings):
    assert_same_runs(run(name, *settings), run("fedavg"))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        pytest.param("fedper", ("algorithm.personal_layers=2",), marks=pytest.mark.slow),
        ("fedrep", ("algorithm.personal_layers=2", "algorithm.head_steps=2")),
    ],
)
@pytest.mark.parametrize("state", STATES)
def test_a_method_without_anything_shared_is_local_only(run, name, settings, state):
    optimizer = f"training.optimizer_state={state}"
    assert_same_runs(run(name, *settings, optimizer), run("local_only", optimizer))


def test_finetuning_from_the_first_round_is_local_only(run):
    finetuned, local = run("fedavg_finetune", "algorithm.federated_rounds=0"), run("local_only")
    assert finetuned["personal_sha256"] == local["personal_sha256"]
    assert finetuned["mean"] == local["mean"]


@pytest.mark.parametrize("state", STATES)
def test_ditto_without_pull_is_local_only_beside_fedavg(run, state):
    optimizer = f"training.optimizer_state={state}"
    ditto = run("ditto", "algorithm.strength=0", optimizer)
    local, fedavg = run("local_only", optimizer), run("fedavg", optimizer)
    assert ditto["personal_sha256"] == local["personal_sha256"]
    assert ditto["mean"] == local["mean"]
    assert ditto["server_state_sha256"] == fedavg["server_state_sha256"]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ditto", ("algorithm.strength=0.7",)),
        pytest.param("feddpa", ("algorithm.variant=T", "algorithm.mix=0.3"), marks=pytest.mark.slow),
        ("feddpa", ("algorithm.variant=F", "algorithm.federated_rounds=2")),
    ],
)
def test_the_server_of_a_method_with_two_models_is_that_of_fedavg(run, name, settings):
    mine, fedavg = run(name, *settings), run("fedavg")
    assert mine["server_state_sha256"] == fedavg["server_state_sha256"]
    assert mine["exam"]["global"] == fedavg["exam"]["global"]


@pytest.mark.parametrize("state", STATES)
def test_feddpa_t_with_all_weight_on_the_local_adapter_is_local_only(run, state):
    """Without dropout: with it the global adapter draws from the same generator."""
    same = ("adapter.dropout=0", f"training.optimizer_state={state}")
    dual = run("feddpa", "algorithm.variant=T", "algorithm.mix=1", FIXED, *same)
    local = run("local_only", *same)
    assert dual["mean"] == local["mean"]
    alone = kept_by(local)
    for client, kept in kept_by(dual).items():
        for name, tensor in alone[client].parameters.items():
            assert equal_bits(kept.parameters[name.replace(".default.", ".own.")], tensor), name


def test_feddpa_f_starts_as_finetuning_after_fedavg(run):
    """Its local adapter is the averaged one, fine-tuned alone; the same as fine-tuning the average itself."""
    off = "adapter.dropout=0"
    dual = run("feddpa", "algorithm.variant=F", "algorithm.federated_rounds=1", FIXED, off)
    single = run("fedavg_finetune", "algorithm.federated_rounds=1", off)
    assert dual["server_state_sha256"] == single["server_state_sha256"]
    alone, average = kept_by(single), state_of(dual).tensors
    for client, kept in kept_by(dual).items():
        assert kept.beside.keys() == average.keys()
        assert first_difference(kept.beside, average) is None
        for name, tensor in kept.parameters.items():
            assert equal_bits(alone[client].beside[name.replace(".own.", ".default.")], tensor), name


@pytest.mark.parametrize("variant", ["T", pytest.param("F", marks=pytest.mark.slow)])
def test_feddpa_trains_the_same_adapters_whatever_weighs_them_at_inference(run, variant):
    settings = (f"algorithm.variant={variant}", f"algorithm.federated_rounds={int(variant == 'F')}")
    fixed, by_instance = run("feddpa", *settings, FIXED), run("feddpa", *settings)
    assert by_instance["server_state_sha256"] == fixed["server_state_sha256"]
    assert by_instance["mean"] != fixed["mean"], "scored with other weights"
    trained = kept_by(fixed)
    for client, kept in kept_by(by_instance).items():
        assert kept.parameters.keys() == trained[client].parameters.keys() | {REFERENCES}
        assert first_difference(kept.parameters, trained[client].parameters) is None
        assert kept.parameters[REFERENCES].shape[0] == 5


def test_stored_instances_are_the_clients_prompts_under_its_own_adapter(make_config, tmp_path):
    """Those of a new client from the start of its adapter, and after its turn from the trained one."""
    algorithm = FedDPA(variant="T", num_instances=3)
    with open_workbench(make_config("feddpa", "algorithm.variant=T"), Stopwatch()) as bench:
        runtime = bench.scorer(PersonalStore(tmp_path)).runtime
        client_id = bench.data.client_ids[0]
        sent = Sent(tensors=seam.current(bench.parts.model, bench.parts.lora_names))
        with runtime.turn(client_id, 1) as turn:
            begun = algorithm.install(turn.client, Kept(), sent)
        with runtime.turn(client_id, 1) as turn:
            _, kept = algorithm.client_update(turn.client, Kept(), sent)
            (batch,) = turn.client.calibration_batches(3)
            weights = instance_weights_of(bench.parts.model)
            assert equal_bits(weights.embed(bench.parts.model, batch.prompts()), kept.parameters[REFERENCES])
            unlike = weights.embed(bench.parts.model, [tuple(range(4, 9))])
    assert not torch.equal(begun.parameters[REFERENCES], kept.parameters[REFERENCES])
    assert not torch.equal(unlike[0], kept.parameters[REFERENCES][0])


def test_routing_is_counted_with_the_prompts_of_each_batch():
    batch = SimpleNamespace(prompts=lambda: [(5, 6), (4,)])
    for _ in scoring._with_prompts([batch]):
        assert prompts._announced[-1]() == [(5, 6), (4,)]
    assert not prompts._announced


@pytest.mark.slow
def test_a_plain_checkpoint_of_feddpa_needs_fixed_weights(run, tmp_path):
    settings = ("algorithm.variant=T", "algorithm.mix=0.3")
    by_instance, fixed = run("feddpa", *settings), run("feddpa", *settings, FIXED)
    with pytest.raises(UserError, match="has adapters that are weighed anew for each prompt, which a plain"):
        export_client(by_instance["folder"], "client-001", tmp_path / "out", as_checkpoint=True)
    assert export_client(fixed["folder"], "client-001", tmp_path / "out", as_checkpoint=True).exists()


def test_fdlora_with_a_plain_outer_step_has_the_server_of_fedavg(run):
    plain = run("fdlora", *FUSION_OF_TWO, "algorithm.outer_momentum=0", "rounds=3")
    fedavg = run("fedavg", "rounds=3")
    mine, theirs = state_of(plain).tensors, state_of(fedavg).tensors
    assert all(equal_bits(mine[name], theirs[name]) for name in theirs)


# What travels


def test_nothing_is_sent_after_the_federation(run):
    result = run("fedavg_finetune", "algorithm.federated_rounds=1", "rounds=3")
    by_round = [[line for line in clients_lines(result) if line["round"] == number] for number in (1, 2, 3)]
    sizes = [{(line["upload_bytes"], line["download_bytes"]) for line in lines} for lines in by_round]
    empty = 4096 + 16
    (first,), (second,), (third,) = sizes
    assert first[0] > empty
    assert second[0] == empty
    assert second[1] == first[1], "the averaged model comes once more"
    assert third == (empty, empty)
    assert all(line["upload_bytes"] == line["upload_predicted"] for line in clients_lines(result))
    assert all(line["download_bytes"] == line["download_predicted"] for line in clients_lines(result))


def test_a_client_that_missed_the_parting_still_gets_the_average():
    algorithm = FedAvgFinetune(federated_rounds=1)
    facts = tuple(ClientFacts(client_id=name, num_train=1) for name in ("a", "b"))
    state = ServerState(round_number=1, tensors={"x": torch.ones(2)}, clients=facts)
    state = algorithm.server_update(state, [("b", Upload())])
    assert state.beside[HAS_OWN].tolist() == [False, True]
    assert [len(algorithm.download(state, name).tensors) for name in ("a", "b")] == [1, 0]
    state = algorithm.server_update(state, [("a", Upload())])
    assert state.beside[HAS_OWN].tolist() == [True, True]


def test_the_server_keeps_its_average_while_clients_train_alone(run):
    short = run("fedavg_finetune", "algorithm.federated_rounds=1", "rounds=2")
    long = run("fedavg_finetune", "algorithm.federated_rounds=1", "rounds=3")
    assert short["exam"]["global"] == long["exam"]["global"]
    assert short["routing"]["tokens_per_expert"]["global"] == long["routing"]["tokens_per_expert"]["global"]
    assert short["personal_sha256"] != long["personal_sha256"]
    average = state_of(long).tensors
    for kept in kept_by(long, 3).values():
        view = FedAvgFinetune(federated_rounds=1).server_view(kept, Sent()).tensors
        assert view.keys() == average.keys()
        assert first_difference(view, average) is None


def test_the_last_layers_stay(tiny_names):
    parts = ModelParts(model=nn.Module(), layers=(), lora_names=tiny_names)
    algorithm = FedPer(personal_layers=1)
    personal = algorithm.personal_names(parts)
    assert personal == tuple(name for name in tiny_names if ".10." in name or "lm_head" in name)
    assert set(algorithm.shared_names(parts)) == set(tiny_names) - set(personal)
    assert FedPer(personal_layers=0).personal_names(parts) == ()
    assert FedPer(personal_layers=3).shared_names(parts) == ()


@pytest.fixture
def tiny_names():
    paths = [f"model.layers.{layer}.self_attn.q_proj" for layer in (2, 9, 10)]
    return tuple(f"{path}.lora_{half}.default.weight" for path in (*paths, "lm_head") for half in "AB")


def test_fedper_sends_the_lower_layers_alone(run):
    result = run("fedper", "algorithm.personal_layers=1")
    shared, kept = set(state_of(result).tensors), kept_by(result)
    assert shared
    assert all(".layers.0." in name for name in shared)
    for client in kept.values():
        assert client.parameters
        assert all(".layers.1." in name for name in client.parameters)


# Update rules


def test_dittos_pull_is_lambda_times_the_distance():
    model = nn.Linear(2, 1, bias=False)
    parts = ModelParts(model=model, layers=(), lora_names=("weight",))
    sent = Sent(tensors={"weight": torch.tensor([[1.0, -2.0]])})
    pull = Ditto(strength=0.5).pull(parts, sent).gradient
    corrected = pull("weight", torch.tensor([[3.0, 0.0]]), torch.tensor([[10.0, 20.0]]))
    assert corrected.tolist() == [[11.0, 21.0]]
    assert Ditto(strength=0).pull(parts, sent) is None


def test_a_client_of_ditto_that_joins_late_starts_as_lora_does():
    model = tiny_model("qwen2_moe")
    names = add_lora(model, AdapterSettings(rank=2), 0)
    parts = ModelParts(model=model, layers=seam.find_moe_layers(model), lora_names=names)
    start = seam.current(model, names)
    sent = Sent(tensors={name: torch.ones_like(tensor) for name, tensor in start.items()})
    algorithm = Ditto(strength=0.1)
    kept = algorithm.install(SimpleNamespace(parts=parts), Kept(), sent)
    assert first_difference(seam.current(model, names), start) is None
    assert first_difference(algorithm.holds(kept, sent), start) is None


def test_a_strong_pull_keeps_the_personal_model_near_the_average(run):
    distances = {}
    for strength in (0, 50):
        result = run("ditto", f"algorithm.strength={strength}", "training.optimizer=sgd", "training.lr=0.01")
        average = state_of(result).tensors
        distances[strength] = sum(
            float((kept.beside[name] - average[name]).square().sum())
            for kept in kept_by(result).values()
            for name in average
        )
    assert distances[50] < distances[0]


def test_fedrep_trains_the_head_first_and_then_the_body(make_config, tmp_path):
    algorithm = FedRep(personal_layers=1, head_steps=1)
    with open_workbench(make_config("fedavg", DROPOUT), Stopwatch()) as bench:
        runtime = bench.scorer(PersonalStore(tmp_path)).runtime
        client_id = bench.data.client_ids[0]
        head, body = algorithm.personal_names(bench.parts), algorithm.shared_names(bench.parts)
        sent = Sent(tensors=seam.current(bench.parts.model, body))
        with runtime.turn(client_id, 1) as turn:
            upload, kept = algorithm.client_update(turn.client, Kept(), sent)
        with runtime.turn(client_id, 1) as turn:
            first, second = turn.client.draw_batches()
            turn.client.train((TrainedGroup(names=head),), batches=[first])
            turn.client.train((TrainedGroup(names=body),), batches=[second], purpose="body_dropout")
            by_hand = seam.current(bench.parts.model, (*head, *body))
    assert first_difference(by_hand, {**kept.parameters, **upload.tensors}) is None
    assert kept.parameters.keys() == set(head)
    assert upload.tensors.keys() == set(body)
    assert upload.metrics["num_untrained"] == 0
    assert upload.metrics["num_examples"] == 8


def test_the_outer_step_is_nesterovs():
    """Against torch's SGD with the mean change as gradient, in float64."""
    algorithm = FDLoRA(outer_lr=0.7, outer_momentum=0.5)
    means = [torch.tensor([1.0, -2.0]), torch.tensor([0.25, 3.0]), torch.tensor([2.0, 2.0])]
    parameter = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=0.7, momentum=0.5, nesterov=True)
    state = ServerState(round_number=1, tensors={"x": torch.zeros(2)})
    for mean in means:
        parameter.grad = parameter.detach() - mean
        optimizer.step()
        state = algorithm.server_update(state, [("a", Upload(tensors={"x": mean}, weights={"x": 4.0}))])
    torch.testing.assert_close(state.tensors["x"].double(), parameter.detach(), rtol=1e-6, atol=1e-7)
    # By hand: 0.7 * (1 + 0.5) * 1 after the first step.
    first = algorithm.outer_step(ServerState(round_number=1, tensors={"x": torch.zeros(2)}), "x", means[0])[0]
    torch.testing.assert_close(first, torch.tensor([1.05, -2.1]))


def test_the_outer_step_needs_an_upload():
    state = ServerState(round_number=1, tensors={"x": torch.ones(2)}, beside={"x": torch.ones(2).double()})
    after = FDLoRA().server_update(state, [])
    assert equal_bits(after.tensors["x"], state.tensors["x"])
    assert equal_bits(after.beside["x"], state.beside["x"])


def test_fusion_weighs_both_halves_of_both_loras():
    one, other = {"A": torch.tensor([1.0, 2.0])}, {"A": torch.tensor([10.0, -1.0])}
    assert fused(one, other, (0.5, 0.25))["A"].tolist() == [3.0, 0.75]


def test_the_first_round_of_fdlora_is_its_local_stage(run):
    first, local = run("fdlora", *FUSION_OF_TWO, "rounds=1"), run("local_only", "rounds=1")
    alone = kept_by(local, 1)
    for client, kept in kept_by(first, 1).items():
        for name, tensor in alone[client].parameters.items():
            assert equal_bits(kept.beside[name], tensor), name


def test_a_personal_lora_is_synchronised_at_its_rounds_alone(run):
    first = kept_by(run("fdlora", *FUSION_OF_TWO, "rounds=1"), 1)
    seldom = run("fdlora", *FUSION_OF_TWO, "rounds=3")
    always = run("fdlora", *FUSION_OF_TWO, "algorithm.sync_every=1", "rounds=3")
    for client, kept in kept_by(seldom, 3).items():
        for name in state_of(seldom).tensors:
            assert equal_bits(kept.beside[name], first[client].beside[name])
            assert not equal_bits(kept_by(always, 3)[client].beside[name], first[client].beside[name])


def test_fusion_weights_are_the_best_of_the_grid(run):
    """A penalty above any loss chooses nothing; without one, trained LoRA is better than none."""
    punished = run("fdlora", *FUSION_OF_TWO, "algorithm.fusion_penalty=100")
    assert all(kept.beside[FUSION].tolist() == [0, 0] for kept in kept_by(punished).values())
    free = run("fdlora", *FUSION_OF_TWO, "algorithm.fusion_penalty=0", "training.num_local_steps=4")
    assert all(kept.beside[FUSION].sum() > 0 for kept in kept_by(free).values())


# Memory and models


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        pytest.param("fedper", ("algorithm.personal_layers=1",), marks=pytest.mark.slow),
        ("fedrep", ("algorithm.personal_layers=1", "algorithm.head_steps=1")),
        pytest.param(*("ditto", ("algorithm.strength=0.1",)), marks=pytest.mark.slow),
        pytest.param(*("feddpa", ("algorithm.variant=T",)), marks=pytest.mark.slow),
        pytest.param(
            *("feddpa", ("algorithm.variant=F", "algorithm.federated_rounds=1")), marks=pytest.mark.slow
        ),
        pytest.param(*("fdlora", FUSION_OF_TWO), marks=pytest.mark.slow),
        pytest.param(*("fedavg_finetune", ("algorithm.federated_rounds=1",)), marks=pytest.mark.slow),
    ],
)
def test_what_a_client_keeps_is_gone_on_from(make_config, tmp_path, quiet, monkeypatch, name, settings):
    """A run whose clients forget everything after round 2 ends elsewhere."""

    class Forgetful(QuietProgress):
        def round_finished(self, round_number, line):
            if round_number == 2:
                monkeypatch.setattr(PersonalStore, "load", lambda *_: Kept())

    config = make_config(name, *CHEAP, *settings, "rounds=3")
    remembered = run_experiment(config, tmp_path / "remembered", progress=quiet)
    forgot = run_experiment(config, tmp_path / "forgot", progress=Forgetful())
    assert forgot["personal_sha256"] != remembered["personal_sha256"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("feddpa", ("algorithm.variant=T", "algorithm.mix=0.3")),
        pytest.param(
            *("feddpa", ("algorithm.variant=T", "algorithm.mix=0.3", FIXED)), marks=pytest.mark.slow
        ),
        pytest.param(
            *("feddpa", ("algorithm.variant=F", "algorithm.federated_rounds=1")), marks=pytest.mark.slow
        ),
        ("fdlora", FUSION_OF_TWO),
        ("ditto", ("algorithm.strength=0.1",)),
    ],
)
def test_an_exported_model_is_the_clients_own(run, tmp_path, name, settings, when):
    result = run(name, *settings)
    client, ids = next(iter(result["clients"])), torch.arange(4, 24)[None]
    with opened_model(result["folder"], client, when) as (bench, _, _), torch.no_grad():
        expected = bench.parts.model(input_ids=ids).logits
    loaded = load_personalised(export_client(result["folder"], client, tmp_path / "out", when=when))
    with torch.no_grad():
        assert torch.equal(loaded.model(input_ids=ids).logits, expected)
    if name == "feddpa":
        mix = 0.3 if "algorithm.mix=0.3" in settings else 0.5
        assert adapter_scales(loaded.model) == {"default": 8 * (1 - mix), "own": 8 * mix}
        weights = instance_weights_of(loaded.model)
        assert (weights is None) is (FIXED in settings)
        assert weights is None or weights.form.largest == mix


@pytest.mark.parametrize("mix", [0.25, 1.0])
def test_the_mix_weighs_the_adapters_and_is_undone(mix):
    model = tiny_model("qwen2_moe")
    settings, ids = AdapterSettings(rank=2, alpha=8.0), torch.arange(4, 24)[None]
    names = add_lora(model, settings, 0)
    parts = ModelParts(model=model, layers=seam.find_moe_layers(model), lora_names=names, adapter=settings)
    client, algorithm = SimpleNamespace(parts=parts, seed=0), FedDPA(variant="T", mix=mix, weighting="fixed")
    with torch.no_grad(), undone(model, parts.layers):
        before = model(input_ids=ids).logits
        algorithm.install(client, Kept(), Sent())
        assert adapter_scales(model) == {"default": (1 - mix) * 4, "own": mix * 4}
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)
    assert adapter_scales(model) == {"default": 4.0}


# Settings


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FedAvgFinetune(federated_rounds=-1), "federated_rounds must be at least 0, not -1"),
        (lambda: FedPer(personal_layers=-1), "personal_layers must be at least 0, not -1"),
        (lambda: Ditto(strength=-0.1), "strength must be at least 0, not -0.1"),
        (lambda: FedDPA(variant="T", mix=0), "mix must be above 0 and at most 1, not 0"),
        (lambda: FedDPA(variant="F"), 'federated_rounds must be at least 1 with variant "F", not 0'),
        (lambda: FedDPA(variant="T", federated_rounds=2), "has no effect"),
        (lambda: FedDPA(variant="T", num_instances=0), "num_instances must be at least 1, not 0"),
        (lambda: FedDPA(variant="T", weighting="fixed", num_instances=3), "num_instances is 3, but has no"),
        (lambda: FDLoRA(outer_momentum=1), "outer_momentum must be from 0 to below 1, not 1"),
        (lambda: FDLoRA(fusion_grid=(1.0, 1.0)), "fusion_grid must have two values or more"),
    ],
)
def test_numbers_outside_their_range_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "fedavg_finetune",
            ("algorithm.federated_rounds=3",),
            "algorithm.federated_rounds is 3, but must be at",
        ),
        ("fedper", ("algorithm.personal_layers=3",), "algorithm.personal_layers is 3, but must be at most"),
        (
            "fedrep",
            ("algorithm.personal_layers=1", "algorithm.head_steps=2"),
            "algorithm.head_steps must be 1 with training.num_local_steps = 2",
        ),
        (
            "fedrep",
            ("algorithm.personal_layers=0", "algorithm.head_steps=1"),
            "algorithm.head_steps must be 0",
        ),
    ],
)
def test_settings_that_do_not_fit_the_run_are_refused(run, name, settings, message):
    with pytest.raises(UserError, match=message):
        run(name, *settings)
