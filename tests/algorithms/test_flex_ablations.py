"""FLEx's ablations: without federation, without graft, in place, with a shared graft; choices and texts."""

import json
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fedexperts.algorithms.flex import CHOSEN, SHARED, Flex
from fedexperts.algorithms.local_graft import LocalGraft
from fedexperts.data.examples import Example
from fedexperts.errors import UserError
from fedexperts.federation.calibration import of_majority_label
from fedexperts.federation.checkpoint import load_checkpoint
from fedexperts.federation.personal import read_kept
from fedexperts.federation.snapshot import install_snapshot, read_snapshot, take_snapshot
from fedexperts.messages import Sent
from fedexperts.moe.choosing.selection import choose_by_routing, choose_experts, draw_experts
from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.graft import GraftForm
from fedexperts.moe.surgery.in_place import adapt_in_place
from fedexperts.moe.surgery.undo import undone
from fedexperts.run_directory import RunDirectory
from fedexperts.running.experiment import run_experiment
from fedexperts.running.workbench import build_parts, open_workbench, personal_store
from fedexperts.tensors import equal_bits, sha256_of

ALONE = "data.partition.num_clients=1"


@dataclass
class Finished:
    """A run, the server's tensors, and what each client keeps."""

    result: dict
    server: dict
    kept: dict
    path: object


@pytest.fixture
def run(make_config, tmp_path, quiet):
    def start(method, *overrides, name="run"):
        path = tmp_path / f"{name}-{method}"
        result = run_experiment(make_config(method, *overrides), path, progress=quiet)
        kept = {p.parent.name: read_kept(p) for p in sorted(path.glob("clients/*/personal-round-00002.*"))}
        return Finished(result, load_checkpoint(RunDirectory(path)).state.tensors, kept, path)

    return start


def same_tensors(one, other):
    assert one.keys() == other.keys()
    return all(equal_bits(one[name], other[name]) for name in one)


def test_local_graft_of_one_client_is_flex_of_one_client(run):
    """The mean over one client is that client: what FLEx sends and keeps, local graft keeps."""
    flex, local = run("flex", ALONE), run("local_graft", ALONE)
    (flex_kept,), (local_kept,) = flex.kept.values(), local.kept.values()
    assert same_tensors({**flex.server, **flex_kept.parameters}, local_kept.parameters)
    assert same_tensors(flex_kept.beside, local_kept.beside)
    assert flex.result["mean"] == local.result["mean"]
    assert local.server == {}
    assert local.result["parameters"]["travelling"] == 0


@pytest.mark.slow
def test_without_a_graft_local_graft_is_local_only_and_flex_is_fedavg(run):
    """No graft is asked for, so none is trained, kept or measured."""
    for method, reference in (("local_graft", "local_only"), ("flex", "fedavg")):
        ours, theirs = run(method, "algorithm.num_grafts=0"), run(reference)
        for key in ("server_state_sha256", "personal_sha256", "mean", "bytes", "parameters"):
            assert ours.result[key] == theirs.result[key], (method, key)


def test_in_place_trains_the_chosen_experts_alone_and_keeps_them(run, make_config):
    """Every other parameter of the client's model is the pretrained one, but for LoRA."""
    done = run("flex", "algorithm.placement=in_place")
    kept = next(iter(done.kept.values()))
    assert not [name for name in done.server if ".experts." in name]
    assert all(".experts.slots.tuned.weights." in name for name in kept.parameters)
    assert kept.beside[CHOSEN].shape == (2,)
    assert done.result["frozen_unchanged"]
    parts, _ = build_parts(make_config("flex"))
    snapshot = read_snapshot(done.path / "clients" / "client-000" / "adapted.safetensors")
    chosen = done.kept["client-000"].beside[CHOSEN].tolist()
    expected = {
        seam.expert_name(layer, expert, name)
        for layer, expert in zip(parts.layers, chosen, strict=True)
        for name in layer.parameter_names()
    }
    assert {name for name in snapshot.tensors if ".lora_" not in name} == expected
    pretrained = seam.current(parts.model, expected)
    assert not any(equal_bits(snapshot.tensors[name], pretrained[name]) for name in expected)


@pytest.mark.parametrize("rank", [0, 2])
def test_an_expert_in_place_starts_as_the_pretrained_one_and_is_given_back(make_config, rank):
    """In full it is a float32 copy, and under LoRA its update is zero."""
    parts, _ = build_parts(make_config("flex"))
    before = sha256_of(dict(parts.model.named_parameters()))
    weights = {name: weight.clone() for name, weight in parts.layers[0].expert(3).items()}
    with undone(parts.model, parts.layers, parts.originals):
        names = adapt_in_place(parts.layers, [(3,), (5,)], lora_rank=rank, lora_alpha=4.0, seed=1)
        assert same_tensors(dict(parts.layers[0].expert(3)), weights)
        halves = {name for name in names if ".lora_A." in name or ".lora_B." in name}
        assert halves == (set(names) if rank else set())
    assert sha256_of(dict(parts.model.named_parameters())) == before


def test_a_shared_graft_is_averaged_and_the_private_one_beside_it_stays(run):
    done = run("flex", "algorithm.shared_graft=true", "algorithm.graft.lora_rank=2")
    shared = {name for name in done.server if ".graft." in name}
    private = {name for kept in done.kept.values() for name in kept.parameters}
    assert {name.split(".graft.")[1].split(".")[0] for name in shared} == {"0"}
    assert {name.split(".graft.")[1].split(".")[0] for name in private} == {"1"}
    assert len({tuple(kept.beside[SHARED].tolist()) for kept in done.kept.values()}) == 1
    assert any(bool(done.server[name].any()) for name in shared if ".lora_B." in name), "it was trained"
    bytes_ = done.result["bytes"]
    assert bytes_["upload_counted"] == bytes_["upload_predicted"]
    assert done.result["frozen_unchanged"]


def test_the_servers_model_with_a_shared_graft_goes_into_a_snapshot_and_back(make_config):
    """One graft that could be several keeps the names of several."""
    config = make_config("flex", "algorithm.shared_graft=true", "algorithm.num_grafts=0")
    parts, _ = build_parts(config)
    state = config.algorithm.init(parts, ())
    with undone(parts.model, parts.layers, parts.originals) as undo:
        config.algorithm.install_shared(parts, config.algorithm.server_model(state))
        snapshot = take_snapshot(parts, undo.written)
    with undone(parts.model, parts.layers, parts.originals):
        install_snapshot(parts, snapshot)
        assert same_tensors(seam.current(parts.model, state.tensors), state.tensors)


# Choices


@dataclass
class Tokens:
    input_ids: Tensor
    attention_mask: Tensor


@pytest.mark.parametrize("score", ["frequency", "gate_score"])
def test_choice_by_routing_is_that_of_counting_by_hand_and_skips_padding(make_config, score):
    parts, _ = build_parts(make_config("flex"))
    ids = torch.randint(4, 200, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    totals = [Counter() for _ in parts.layers]

    def see(layer, hidden_TD, index_TK, weight_TK, _):
        for token, is_token in enumerate(mask.flatten().tolist()):
            for expert, weight in zip(index_TK[token].tolist(), weight_TK[token].tolist(), strict=True):
                totals[layer.index][expert] += is_token * (1 if score == "frequency" else weight)

    with torch.no_grad(), seam.watch_experts(parts.layers, see):
        parts.model(input_ids=ids, attention_mask=mask)
    expected = [tuple(sorted(sorted(t, key=lambda e: (-t[e], e))[:2])) for t in totals]
    batches = [Tokens(ids, mask)]
    assert choose_by_routing(parts.model, parts.layers, batches, 2, score) == expected
    assert choose_experts(score, parts.model, parts.layers, lambda: batches, 2, seed=0) == expected


def test_a_random_choice_depends_on_client_and_layer_and_looks_at_nothing(make_config, tmp_path):
    config = make_config("flex", "algorithm.selection=random", "algorithm.num_grafts=3")
    parts, _ = build_parts(config)
    draws = [draw_experts(parts.layers, 3, seed) for seed in range(8)]
    assert draws[0] == draw_experts(parts.layers, 3, 0)
    assert len({tuple(draw) for draw in draws}) > 1
    assert any(draw[0] != draw[1] for draw in draws)
    with pytest.raises(AssertionError, match="looked at"):
        config.algorithm._calibration_batches(_Blind(parts))
    assert len(config.algorithm.choose(_Blind(parts))) == 2


class _Blind:
    """A client whose data nobody may look at."""

    client_id, seed = "client-000", 3

    def __init__(self, parts):
        self.parts = parts

    def calibration_batches(self, *_, **__):
        raise AssertionError("looked at")


def test_the_majority_label_is_the_most_frequent_one_and_the_first_of_equals():
    def labelled(*labels):
        return [Example(instruction=str(i), response="r", label=each) for i, each in enumerate(labels)]

    assert {example.label for example in of_majority_label(labelled("b", "a", "b", ""))} == {"b"}
    assert {example.label for example in of_majority_label(labelled("b", "a", "", "", ""))} == {"a"}
    with pytest.raises(UserError, match="has a label"):
        of_majority_label(labelled("", ""))


def test_calibration_texts_are_those_of_the_setting(make_config, tmp_path):
    """Own: all labels; majority label: its examples alone; other: the same texts for every client."""
    corpus = tmp_path / "corpus.jsonl"
    texts = [f"The quick brown fox number {number} jumps." for number in range(5)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    two_labels = {"kind": "dirichlet", "num_clients": 3, "alpha": 100.0}
    data = {"source": "tinyworld", "partition": two_labels, "tinyworld": {"examples_per_client": 40}}
    with open_workbench(make_config("flex", data=data), _NoWatch()) as bench:
        runtime = bench.scorer(personal_store(tmp_path)).runtime
        largest = Counter(e.label for e in bench.data.examples("client-000", "train")).most_common(1)[0][1]
        with runtime.turn("client-000", 1) as one:
            own = one.client.calibration_batches(1000)
            majority = one.client.calibration_batches(1000, is_majority_label=True)
            other = one.client.calibration_batches(3, texts=str(corpus), key="algorithm.calibration_file")
        with runtime.turn("client-001", 1) as two:
            again = two.client.calibration_batches(3, texts=str(corpus), key="algorithm.calibration_file")
            none = str(tmp_path / "none.jsonl")
            with pytest.raises(UserError, match=r"calibration_file: missing file"):
                two.client.calibration_batches(3, texts=none, key="algorithm.calibration_file")
    assert sum(batch.num_examples for batch in own) == bench.data.num_examples("client-000", "train")
    assert sum(batch.num_examples for batch in majority) == largest
    assert sum(batch.num_examples for batch in other) == 3
    read = bench.format.tokenizer.batch_decode(torch.cat([b.input_ids[:, :4] for b in other]))
    assert all(text.startswith("The") for text in read)
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(other, again, strict=True))


class _NoWatch:
    """A stopwatch for those who do not ask for the time."""

    def phase(self, _):
        return torch.no_grad()


@pytest.mark.parametrize("content", ['{"document": "x"}\n', '{"text": ""}\n', ""])
def test_a_corpus_without_text_is_refused_by_the_settings_name(make_config, tmp_path, quiet, content):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(content)
    options = ("algorithm.calibration=other", f"algorithm.calibration_file={corpus}")
    with pytest.raises(UserError, match=r"algorithm\.calibration_file.*corpus\.jsonl"):
        run_experiment(make_config("flex", *options), tmp_path / "run", progress=quiet)


# Settings

NO_GRAFT = {"num_grafts": 0}
IN_PLACE = {"placement": "in_place"}


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (NO_GRAFT | {"graft_lr_scale": 2.0}, "graft_lr_scale is 2.0, but has no effect with num_grafts = 0"),
        (NO_GRAFT | {"graft": GraftForm(gate="none")}, "graft is set, but"),
        (NO_GRAFT | {"layers": (1,)}, "layers"),
        (NO_GRAFT | {"shared_graft": True, "selection": "random"}, "selection is random"),
        (NO_GRAFT | IN_PLACE, "placement"),
        ({"num_grafts": 9}, "from 0 to 8"),
        (IN_PLACE | {"gate_lr_scale": 2.0}, "gate_lr_scale"),
        (IN_PLACE | {"shared_graft": True}, "shared_graft"),
        (IN_PLACE | {"graft": GraftForm(gate_bias=-4.0)}, "graft has settings of gate or mix"),
        ({"selection": "random", "calibration_examples": 3}, "calibration_examples is 3"),
        ({"calibration": "other"}, "calibration_file is empty"),
        ({"calibration_file": "c4.jsonl"}, 'has no effect with calibration = "own"'),
    ],
)
def test_a_setting_without_effect_is_refused(settings, complaint):
    with pytest.raises(UserError, match=complaint):
        Flex(**settings)


@pytest.mark.parametrize(
    "setting",
    [{"shared_graft": True}, {"experts": True}, {"own_model": "received"}],
    ids=lambda one: next(iter(one)),
)
def test_local_graft_has_no_setting_of_what_is_shared(setting):
    ((name, value),) = setting.items()
    with pytest.raises(UserError, match=f"{name} is {value}, but has no effect where nothing is sent"):
        LocalGraft(**setting)


def test_local_graft_keeps_every_optimizer_state_and_flex_not_that_of_what_is_sent(make_config):
    parts, _ = build_parts(make_config("flex"))
    flex, local = (method().trained(parts, Sent()) for method in (Flex, LocalGraft))
    assert flex[0].names == local[0].names == parts.lora_names
    assert not flex[0].keeps_optimizer
    assert all(group.keeps_optimizer for group in local)


def test_settings_that_differ_from_the_defaults_and_work_are_taken():
    Flex(num_grafts=0, shared_graft=True, graft=GraftForm(lora_rank=2), layers=(0,))
    Flex(placement="in_place", graft=GraftForm(lora_rank=4, lora_alpha=8.0), selection="frequency")
    Flex(calibration="other", calibration_file="c4.jsonl", selection="gate_score")
