"""Nothing that a client sends can stop or spoil a run: hostile answers over both transports."""

import json
import random
import re
from dataclasses import replace

import pytest
import torch
from test_flower_apps import run_over_grid

from fedexperts.algorithms.api import Algorithm
from fedexperts.errors import UserError
from fedexperts.federation import inprocess, workers
from fedexperts.federation.cohort import CohortSettings
from fedexperts.federation.edge import REQUIRED_METRICS, evaluation_refusal, failure_of, refusal
from fedexperts.federation.runtime import ClientRuntime
from fedexperts.messages import HEADER_BLOCK, Expected, Upload, encode_upload
from fedexperts.report import write_report
from fedexperts.run_directory import read_json, read_lines
from fedexperts.running.experiment import run_experiment

HOSTILE, TASK = "client-001", "train"
HONEST = ["client-000", "client-002"]
SMALL = (
    "cohort.on_failure=continue",
    "training.num_local_steps=1",
    "evaluation.max_test_examples=1",
)


class Raw(Upload):
    """An answer whose bytes are what a hostile client wrote."""


def header(upload, **changes):
    """The upload's message with other header fields than our own code would ever write."""
    message = encode_upload(upload)
    fields = json.loads(message[24:HEADER_BLOCK]) | changes
    return message[:24] + json.dumps(fields).encode().ljust(HEADER_BLOCK - 24) + message[HEADER_BLOCK:]


def without(figures, *names):
    return {name: value for name, value in figures.items() if name not in names}


def everywhere(upload, value):
    return {name: torch.full_like(tensor, value) for name, tensor in upload.tensors.items()}


def first_changed(upload, change):
    name = next(iter(upload.tensors))
    return replace(upload, tensors=upload.tensors | {name: change(upload.tensors[name])})


def added(upload, name):
    return replace(
        upload, tensors=upload.tensors | {name: torch.zeros(1)}, weights=upload.weights | {name: 1.0}
    )


def heavy(upload, weight):
    return replace(upload, weights=dict.fromkeys(upload.tensors, weight))


NAN, INF = float("nan"), float("inf")
DEEP = json.loads("[" * 900 + "]" * 900)
TRAINING = {
    "no train_loss": lambda up: replace(
        up, metrics={k: v for k, v in up.metrics.items() if k != "train_loss"}
    ),
    "a metric named as a column": lambda up: header(up, metrics=up.metrics | {"round": "x"}),
    "a loss of 1e308": lambda up: replace(up, metrics=up.metrics | {"train_loss": 1e308}),
    "seconds of 1e308": lambda up: replace(up, seconds={"train": 1e308}),
    "metrics are a list": lambda up: header(up, metrics=[1]),
    "metrics are null": lambda up: header(up, metrics=None),
    "a metric is a text": lambda up: header(up, metrics=up.metrics | {"train_loss": "low"}),
    "a metric is a list": lambda up: header(up, metrics=up.metrics | {"train_loss": [1.0]}),
    "a metric is NaN": lambda up: header(up, metrics=up.metrics | {"train_loss": NAN}),
    "a metric nobody knows": lambda up: replace(up, metrics=up.metrics | {"upload_bytes": 0.0}),
    "measured under no name": lambda up: replace(up, measured={"../x": 1.0}),
    "seconds are a text": lambda up: header(up, seconds="12"),
    "seconds are negative": lambda up: replace(up, seconds={"train": -1e9}),
    "a report of another": lambda up: replace(up, report={"client": "client-000", "round": 99}),
    "a report 900 deep": lambda up: header(up, report={"a": DEEP}),
    "a lone surrogate": lambda up: header(up, failure="\ud800"),
    "weight 1e308": lambda up: heavy(replace(up, tensors=everywhere(up, 20.0)), 1e308),
    "weight 0": lambda up: heavy(up, 0.0),
    "weight below 0": lambda up: heavy(up, -1.0),
    "weight NaN": lambda up: heavy(up, NAN),
    "values NaN": lambda up: replace(up, tensors=everywhere(up, NAN)),
    "values infinite": lambda up: replace(up, tensors=everywhere(up, INF)),
    "values 1e4": lambda up: replace(up, tensors=everywhere(up, 1e4)),
    "nothing at all": lambda up: replace(up, tensors={}, weights={}),
    "a tensor too few": lambda up: replace(up, tensors=dict(list(up.tensors.items())[1:])),
    "a tensor too many": lambda up: added(up, "model.embed_tokens.weight"),
    "an expert that does not travel": lambda up: added(up, "model.layers.0.mlp.experts.0.down_proj"),
    "another shape": lambda up: first_changed(up, lambda tensor: tensor[:1]),
    "another dtype": lambda up: first_changed(up, lambda tensor: tensor.double()),
    "integers": lambda up: first_changed(up, lambda tensor: tensor.to(torch.int64)),
    "beside that nobody asked for": lambda up: replace(up, beside={"variate": torch.zeros(2)}),
    "a table that nobody asked for": lambda up: replace(up, tables={"gate_mean": torch.zeros(2)}),
    "cut short": lambda up: encode_upload(up)[:-7],
    "empty": lambda _: b"",
    "garbage": lambda _: b"\x80\x04pickle" * 900,
}


@pytest.fixture(params=[pytest.param("inprocess", marks=pytest.mark.slow), "flower"])
def run(request, make_config, tmp_path, quiet, monkeypatch):
    """Run ``method`` with one client whose answers to ``task`` go through ``change``."""

    def encoded(upload):
        return upload.report["raw"] if isinstance(upload, Raw) else encode_upload(upload)

    monkeypatch.setattr(inprocess, "encode_upload", encoded)
    monkeypatch.setattr(workers, "encode_upload", encoded)
    handle = ClientRuntime.handle

    def go(kinds, *overrides, method="fedavg", task=TASK, num_rounds=None):
        """In round r (of one more) the hostile client sends the r-th kind; it is honest in the last."""

        def hostile(self, client_id, download):
            upload = handle(self, client_id, download)
            is_attack = client_id == HOSTILE and download.task == task
            place = download.round_number - (1 if task == TASK else 2)
            if not is_attack or not 0 <= place < len(kinds):
                return upload
            made = kinds[place](upload)
            return Raw(report={"raw": made}) if isinstance(made, bytes) else made

        monkeypatch.setattr(ClientRuntime, "handle", hostile)
        rounds = f"rounds={num_rounds or len(kinds)}"
        transport = f"transport.name={request.param}"
        config = make_config(method, *SMALL, rounds, *overrides, transport)
        if request.param == "inprocess":
            run_experiment(config, tmp_path / "run", progress=quiet)
        else:
            run_over_grid(config, tmp_path / "run")
        return tmp_path / "run"

    return go


def test_hostile_uploads_are_refused_by_name_and_harm_nobody(run):
    folder = run(list(TRAINING.values()))
    lines = read_lines(folder / "clients.jsonl")
    rounds = range(1, len(TRAINING) + 1)
    assert [(line["round"], line["client"]) for line in lines] == [(r, c) for r in rounds for c in HONEST]
    result = read_json(folder / "result.json")
    named = {failure["round"]: failure["client"] for failure in result["failures"]}
    passed = [kind for place, kind in enumerate(TRAINING, 1) if named.get(place) != HOSTILE]
    assert passed == []
    assert all(failure["reason"] for failure in result["failures"])
    assert result["frozen_unchanged"]
    assert result["bytes"]["upload_counted"] == result["bytes"]["upload_predicted"]


@pytest.mark.slow
def test_a_thousand_hostile_uploads_stop_nothing_and_are_all_named(run):
    kinds = random.Random(0).choices([*TRAINING.values()], k=1000)
    folder = run(kinds, "evaluation.exam.source=none", 'evaluation.metrics=["loss"]')
    result, lines = read_json(folder / "result.json"), read_lines(folder / "clients.jsonl")
    assert [(one["round"], one["client"]) for one in result["failures"]] == [
        (number, HOSTILE) for number in range(1, 1001)
    ]
    assert len(lines) == 1000 * len(HONEST)
    assert result["frozen_unchanged"]
    assert 0 < result["mean"]["loss_after"] < result["mean"]["loss_base"]


def test_the_server_ends_as_if_the_refused_client_had_been_away(
    run, make_config, tmp_path, quiet, monkeypatch
):
    handle = ClientRuntime.handle
    refused = read_json(run([TRAINING["values NaN"]], num_rounds=2) / "result.json")

    def away(self, client_id, download):
        is_away = client_id == HOSTILE and download.task == TASK and download.round_number == 1
        return Upload(failure="away") if is_away else handle(self, client_id, download)

    monkeypatch.setattr(ClientRuntime, "handle", away)
    result = run_experiment(make_config("fedavg", *SMALL, "rounds=2"), tmp_path / "away", progress=quiet)
    assert result["server_state_sha256"] == refused["server_state_sha256"]


ANSWERS = {
    "a tensor is missing": lambda up: replace(up, beside={}),
    "a tensor is ragged": lambda up: replace(
        up, beside={"personal_sha256": torch.zeros(31, dtype=torch.uint8)}
    ),
    "a tensor too many": lambda up: replace(up, beside=up.beside | {"routing_global": torch.zeros(2, 6)}),
    "a score is a text": lambda up: header(up, metrics=up.metrics | {"loss_after": "good"}),
    "a score is null": lambda up: header(up, metrics=up.metrics | {"loss_after": None}),
    "a score nobody asked for": lambda up: replace(up, metrics=up.metrics | {"accuracy_after": 1.0}),
    "no metrics": lambda up: header(up, metrics=None),
    "a score of 1e308": lambda up: replace(up, metrics=up.metrics | {"loss_after": 1e308}),
    "a huge table": lambda up: replace(up, tables={"chosen_experts": torch.zeros(1_000_001)}),
    "it sends tensors": lambda up: replace(up, tensors={"a": torch.zeros(1)}, weights={"a": 1.0}),
    "garbage": lambda _: b"\x80\x04pickle" * 900,
}


@pytest.mark.parametrize("run", ["inprocess", pytest.param("flower", marks=pytest.mark.slow)], indirect=True)
def test_hostile_answers_to_an_evaluation_leave_one_client_without_scores(run):
    """An interim evaluation after each round but the last gets another kind each time."""
    kinds = list(ANSWERS.values())
    folder = run(kinds, "evaluation.every=1", task="evaluate", num_rounds=len(kinds) + 1)
    result = read_json(folder / "result.json")
    assert [(f["round"], f["client"]) for f in result["failures"]] == [
        (place, HOSTILE) for place in range(1, len(kinds) + 1)
    ]
    assert list(result["clients"]) == ["client-000", HOSTILE, "client-002"]


def test_a_client_without_any_score_does_not_keep_a_run_from_its_report(run):
    folder = run([lambda up: replace(up, metrics={}, measured={})], task="evaluate_fully", num_rounds=1)
    result = read_json(folder / "result.json")
    assert "loss_after" not in result["clients"][HOSTILE]
    assert result["failures"] == []
    assert all(path.exists() for path in write_report(folder))


def test_a_refused_client_is_not_poisoned(run):
    """Its round 1 is refused although it trained well; in round 2 it starts again from what counted."""
    folder = run([TRAINING["values NaN"]], method="flex", num_rounds=2)
    lines = [line for line in read_lines(folder / "clients.jsonl") if line["client"] == HOSTILE]
    assert [line["round"] for line in lines] == [2]
    assert read_json(folder / "checkpoint.json")["kept_rounds"][HOSTILE] == 2


def test_a_change_above_the_cap_is_refused(run):
    far = [lambda up: replace(up, tensors=everywhere(up, 1e4))]
    (failure,) = read_json(run(far, "cohort.max_change_norm=1000") / "result.json")["failures"]
    assert failure["client"] == HOSTILE
    assert "above cohort.max_change_norm = 1000" in failure["reason"]


def test_a_run_whose_clients_do_not_tell_what_was_cut_ends_and_has_a_report(run):
    folder = run([lambda up: replace(up, metrics=without(up.metrics, "num_truncated", "num_without_label"))])
    result = read_json(folder / "result.json")
    assert result["failures"] == []
    assert "num_truncated" not in result["clients"][HOSTILE]
    assert all(path.is_file() for path in write_report(folder))


def test_with_a_clock_an_upload_that_does_not_tell_its_work_is_refused(run):
    result = read_json(run([lambda up: replace(up, work={})], "clock.device=l20") / "result.json")
    (failure,) = result["failures"]
    assert (failure["client"], failure["round"]) == (HOSTILE, 1)
    assert failure["reason"].startswith("upload refused: it does not say what work it took")


def test_a_round_whose_mean_is_not_finite_changes_nothing(make_config, tmp_path, quiet, monkeypatch):
    fold = Algorithm.server_update

    def overflow(self, state, uploads):
        after = fold(self, state, uploads)
        if state.round_number:
            return after
        return replace(after, tensors={n: torch.full_like(t, INF) for n, t in after.tensors.items()})

    monkeypatch.setattr(Algorithm, "server_update", overflow)
    folder = tmp_path / "run"
    result = run_experiment(make_config("fedavg", *SMALL, "rounds=2"), folder, progress=quiet)
    named = [(failure["round"], failure["client"]) for failure in result["failures"]]
    assert named == [(1, client) for client in ("client-000", HOSTILE, "client-002")]
    assert {line["round"] for line in read_lines(folder / "clients.jsonl")} == {2}
    assert result["mean"]["loss_after"] > 0


EXPECTED = Expected(
    tensors={"a": torch.empty(2), "b": torch.empty(1)}, beside={"count": torch.empty(1, dtype=torch.int64)}
)


def honest(**changes):
    made = Upload(
        tensors={"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([5.0])},
        weights={"a": 1e12, "b": 1.0},
        beside={"count": torch.tensor([7])},
        metrics=dict.fromkeys(REQUIRED_METRICS, 1.0) | {"gradient_norm": 1.0},
        seconds={"train": 0.0},
        measured={"num_idle_experts": 1.0},
    )
    return replace(made, **changes)


BEFORE = {"b": torch.tensor([1.0])}
"""What the client had: of ``a`` nothing, so that the upload of ``honest`` has moved by 3 and by 4."""


def judged(upload, cap=0.0):
    return refusal(upload, EXPECTED, BEFORE, CohortSettings(max_change_norm=cap))


def test_an_upload_at_every_limit_counts():
    assert judged(honest()) == judged(honest(), cap=5.0) == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"failure": "loss is nan"}, "^loss is nan$"),
        ({"metrics": {"train_loss": 1.0}}, "^upload refused: metrics lack 'num_examples'$"),
        ({"metrics": honest().metrics | {"accuracy": 1.0}}, "metrics have 'accuracy', which no algorithm"),
        ({"metrics": honest().metrics | {"train_loss": -1e101}}, "metrics 'train_loss' is -1e"),
        ({"measured": {"gate": 1e101}}, "measured 'gate' is 1e"),
        ({"seconds": {"train": 1e101}}, "seconds 'train' is 1e"),
        ({"measured": {"9x": 1.0}}, "measured have the name '9x'$"),
        ({"measured": {"x" * 65: 1.0}}, f"measured have the name '{'x' * 60}'$"),
        ({"seconds": {"a b": 1.0}}, "seconds have the name 'a b'$"),
        ({"seconds": {"train": -0.5}}, "seconds are negative$"),
        ({"work": {"train.beauty": 1.0}}, "work has the name 'train.beauty'$"),
        ({"work": {"train.flops": -1.0}}, "work train.flops is -1: must be from 0 to 1e"),
        ({"work": {"train.seconds": 1e31}}, "work train.seconds is 1e"),
        ({"report": {"client": "b"}}, "it has a report, which training rounds do not$"),
        ({"tensors": {"a": torch.zeros(2)}}, r"tensors: 'b' is missing \(1 of 2 are there\)$"),
        ({"tensors": honest().tensors | {"c": torch.zeros(1)}}, "tensors: 'c' is not one that this client"),
        (
            {"tensors": honest().tensors | {"b": torch.zeros(2)}},
            r"'b' has shape \(2,\) and dtype torch\.float32, where \(1,\) and torch\.float32 are due$",
        ),
        ({"tensors": honest().tensors | {"b": torch.zeros(1).half()}}, r"dtype torch\.float16, where"),
        ({"tensors": honest().tensors | {"b": torch.tensor([NAN])}}, "tensors: 'b' has values that are not"),
        ({"beside": {}}, "beside: 'count' is missing"),
        ({"tables": {"gates": torch.zeros(1)}}, "tables: 'gates' is not one that"),
        ({"weights": {"a": 2e12}}, r"weight of 'a' is 2e\+12: must be above 0 and at most 1e\+12$"),
        ({"weights": {"a": 0.0}}, "weight of 'a' is 0: must be above 0"),
    ],
)
def test_a_refusal_says_which_part_is_wrong(changes, reason):
    assert re.search(reason, judged(honest(**changes)))


def test_a_change_is_measured_over_all_tensors_from_what_the_client_had():
    assert judged(honest(), cap=4.5).endswith("its change has norm 5, above cohort.max_change_norm = 4.5")


def answer():
    beside = {"count": torch.tensor([-1])}
    tables = {"chosen": torch.zeros(1_000_000)}
    return Upload(metrics={"loss_after": 1.0}, beside=beside, tables=tables)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "^$"),
        ({"failure": "is away"}, "^is away$"),
        ({"metrics": {"loss": 1.0}}, "^evaluation refused: metrics have 'loss', which no evaluation gives$"),
        ({"beside": {}}, "beside: 'count' is missing"),
        ({"beside": {"count": torch.tensor([-2])}}, "'count' has negative counts$"),
        ({"measured": {"a b": 1.0}}, "measured have the name 'a b'$"),
        ({"tensors": {"a": torch.zeros(1)}}, "it sends tensors$"),
        ({"report": {"a": 1}}, "it sends tensors$"),
        ({"metrics": {"loss_after": 1e101}}, "metrics 'loss_after' is 1e"),
        ({"tables": {"a": torch.tensor([-1e101], dtype=torch.float64)}}, "tables 'a' has values of a size"),
        ({"tables": {"a b": torch.zeros(1)}}, "tables have the name 'a b'$"),
        ({"tables": {"a": torch.tensor([INF])}}, "tables are not finite, or of more than a million values$"),
        ({"tables": {"a": torch.zeros(1_000_000), "b": torch.zeros(1)}}, "of more than a million values$"),
    ],
)
def test_an_answer_to_an_evaluation_is_refused_by_its_part(changes, reason):
    said = evaluation_refusal(replace(answer(), **changes), EXPECTED.beside, ["loss_after"])
    assert re.search(reason, said)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (UserError("no answer"), "no answer"),
        (UserError(""), "no reason given"),
        (KeyError("x"), "its answer cannot be read: KeyError: 'x'"),
    ],
)
def test_whatever_goes_wrong_with_an_answer_has_a_reason(error, reason):
    assert failure_of(error).failure == reason
