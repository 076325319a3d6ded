"""Asynchronous rounds: equal to rounds that wait where none is late, weights by hand, and any crash."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedexperts.algorithms import ALGORITHMS
from fedexperts.doctor import examine
from fedexperts.errors import UserError
from fedexperts.federation.asynchronous import rebased
from fedexperts.federation.asynchronous_settings import AsynchronousSettings
from fedexperts.federation.buffer import Buffer, ByClock
from fedexperts.federation.clock import Turn
from fedexperts.federation.inprocess import InProcess
from fedexperts.federation.personal import read_tensors
from fedexperts.federation.runtime import ClientRuntime
from fedexperts.federation.transport import TransportSettings
from fedexperts.federation.under_way import TurnUnderWay, UploadFolder
from fedexperts.integrity import rewind
from fedexperts.messages import Upload
from fedexperts.run_directory import RunDirectory, read_json, read_lines
from fedexperts.running import experiment
from fedexperts.running.checking import check_experiment
from fedexperts.running.experiment import run_experiment
from fedexperts.running.forgetting import forget
from fedexperts.seeds import derive_random

CLIENTS = ("a", "b", "c", "d")
FAST = (
    "clock.device=phone",
    "clock.straggler_share=0.34",
    "clock.straggler_factor=1.7",
    "training.num_local_steps=1",
    "evaluation.matrix=false",
    'evaluation.metrics=["loss"]',
    "evaluation.exam.source=none",
    "evaluation.retention.neutral=none",
    "evaluation.max_test_examples=1",
)
"""One of three clients is slow."""
FLEX = (*FAST, "algorithm.selection=random")
LATE = (*FLEX, "rounds=5", "asynchronous.buffer=1")
"""One upload a step: nearly every upload is late."""


def asynchronous_settings(**given):
    return AsynchronousSettings(**{"buffer": 2, **given})


# Order of uploads by the clock


class Clients:
    """Four clients whose turns take so many seconds, and what they were asked."""

    def __init__(self, seconds, failing=()):
        self.seconds, self.failing, self.asked = dict(zip(CLIENTS, seconds, strict=True)), failing, []

    def buffer(self, round_number, now=0.0, under_way=(), **given):
        def ask(client_ids, time):
            self.asked.append((time, *client_ids))
            for client_id in client_ids:
                if client_id not in self.failing:
                    end = time + self.seconds[client_id]
                    turn = Turn(client_id=client_id, uploaded=end, ready=end, upload_bytes=1)
                    yield TurnUnderWay(turn=turn, received=round_number - 1)

        buffer = Buffer(
            settings=asynchronous_settings(**given),
            client_ids=CLIENTS,
            seed=0,
            round_number=round_number,
            source=ByClock(client_ids=CLIENTS, now=now, under_way=list(under_way), begin=ask),
        )
        buffer.fill()
        return buffer


def names(turns):
    return [one.turn.client_id for one in turns]


def test_the_first_uploads_make_a_step_and_others_work_on_from_what_they_received():
    clients = Clients((5.0, 1.0, 9.0, 2.0))
    first = clients.buffer(1)
    assert (names(first.arrived), first.source.now, names(first.source.under_way)) == (
        ["b", "d"],
        2.0,
        ["a", "c"],
    )
    second = clients.buffer(2, 2.5, first.source.under_way)
    assert clients.asked == [(0.0, *CLIENTS), (2.5, "b", "d")]
    assert (names(second.arrived), second.source.now) == (["b", "d"], 4.5)
    third = clients.buffer(3, 4.5, second.source.under_way)
    assert (names(third.arrived), third.source.now) == (["a", "b"], 5.5)
    assert [third.staleness(one) for one in third.arrived] == [2, 0]


def test_uploads_are_folded_in_the_order_of_the_data_and_a_tie_goes_to_the_first_client():
    buffer = Clients((3.0, 2.0, 2.0, 2.0)).buffer(1)
    assert names(buffer.arrived) == ["b", "c"]
    assert names(Clients((3.0, 9.0, 9.0, 2.0)).buffer(1).arrived) == ["a", "d"]


def test_a_free_place_goes_at_once_to_a_client_without_an_upload_in_this_step():
    clients = Clients((1.0, 1.0, 1.0, 1.0))
    buffer = clients.buffer(1, buffer=3, concurrency=1)
    times, asked = zip(*clients.asked, strict=True)
    assert times == (0.0, 1.0, 2.0)
    assert len(set(asked)) == 3
    assert buffer.source.now == 3.0
    assert asked[0] == derive_random(0, "asynchronous", 1, 0).sample(list(CLIENTS), 1)[0]


def test_an_upload_that_came_while_the_server_added_up_counts_from_then_on():
    clients = Clients((1.0, 9.0, 9.0, 1.0))
    first = clients.buffer(1, buffer=1)
    assert names(first.source.under_way) == ["b", "c", "d"]
    second = clients.buffer(2, 1.5, first.source.under_way, buffer=1)
    assert (names(second.arrived), second.source.now, second.staleness(second.arrived[0])) == (["d"], 1.5, 1)


def test_an_upload_that_is_too_old_is_left_out_and_its_client_begins_anew():
    clients = Clients((1.0, 1.0, 3.5, 9.0))
    under_way, now = [], 0.0
    for round_number in (1, 2, 3):
        buffer = clients.buffer(round_number, now, under_way, max_staleness=2)
        under_way, now = buffer.source.under_way, buffer.source.now
    fourth = clients.buffer(4, now, under_way, max_staleness=2)
    assert (names(fourth.arrived), names(fourth.too_old)) == (["a", "b"], ["c"])
    assert clients.asked[-1] == (3.5, "c")
    assert asynchronous_settings(max_staleness=3).is_too_old(3) is False
    assert asynchronous_settings().is_too_old(1000) is False


def test_a_client_that_fails_leaves_its_place_to_another_and_a_step_waits_for_nobody_who_cannot_come():
    clients = Clients((1.0, 1.0, 1.0, 1.0), failing=("a", "b", "c"))
    buffer = clients.buffer(1, concurrency=1)
    assert names(buffer.arrived) == ["d"]
    assert sorted(client for _, client in clients.asked) == list(CLIENTS)


# Weights


def test_a_late_change_is_weighed_down_and_applied_to_the_present_state():
    weights = [asynchronous_settings().weight(age) for age in (0, 3, 8)]
    assert weights == [1.0, 0.5, pytest.approx(1 / 3)]
    assert asynchronous_settings(staleness_exponent=0.0).weight(7) == 1.0
    assert asynchronous_settings(staleness_exponent=1.0).weight(1) == 0.5
    upload, received, present = (
        {"w": torch.tensor(values)} for values in ([3.0, 1.0], [1.0, 1.0], [7.0, 8.0])
    )
    assert rebased(upload, received, present, 0.5)["w"].tolist() == [8.0, 8.0]
    assert rebased(upload, received, present, 1.0)["w"].tolist() == [9.0, 8.0]


# Whole runs


def outcome(folder):
    """All that a run is, measured seconds apart."""
    result = read_json(folder / "result.json")
    names = ("server_state_sha256", "personal_sha256", "mean", "bytes", "failures", "refused", "clock")
    found = {name: result[name] for name in names}
    found["clock"].pop("measured_seconds")
    lines = [read_lines(folder / f"{name}.jsonl") for name in ("rounds", "clients")]
    for line in (one for own in lines for one in own):
        line.pop("seconds")
    return json.loads(json.dumps({**found, "lines": lines}))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return {"folder": tmp_path_factory.mktemp("asynchronous")}


@pytest.fixture
def late_run(made, make_config, quiet):
    """A finished run of FLEx whose uploads are late, made once; with all that clients sent."""
    if "config" not in made:
        made["config"] = make_config("flex", *LATE, "keep_states=9")
        made["sent"], write = [], UploadFolder.write

        def record(self, upload, turn, line, norms):
            made["sent"].append((turn.turn.client_id, turn.received, upload))
            return write(self, upload, turn, line, norms)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(UploadFolder, "write", record)
            run_experiment(made["config"], made["folder"] / "run", progress=quiet)
    return made["config"], made["folder"] / "run", made["sent"]


def test_with_a_buffer_of_all_clients_it_is_the_run_that_waits_bit_for_bit(make_config, tmp_path, quiet):
    waits = make_config("flex", *FLEX)
    mine = replace(waits, asynchronous=AsynchronousSettings(buffer=3, concurrency=3))
    for config, name in ((waits, "waits"), (mine, "mine")):
        run_experiment(config, tmp_path / name, progress=quiet)
    theirs, own = outcome(tmp_path / "waits"), outcome(tmp_path / "mine")
    rounds, clients = own["lines"]
    figures = {"staleness_mean": 0.0, "staleness_max": 0, "weight_mean": 1.0, "num_at_work": 0}
    assert [line.pop("asynchronous") for line in rounds] == [figures] * 2
    for line in clients:
        assert (line.pop("staleness"), line.pop("staleness_weight")) == (0, 1.0)
        line.pop("simulated_start")
    assert own == theirs


def test_each_step_is_the_mean_of_late_changes_by_hand(late_run):
    _, folder, sent = late_run
    sent = {(client, received): upload for client, received, upload in sent}
    state = [read_tensors(folder / f"state/state-round-{number:05d}.safetensors") for number in range(6)]
    ages = []
    for line in read_lines(folder / "clients.jsonl"):
        number, age = line["round"], line["staleness"]
        ages.append(age)
        weight, upload = (1 + age) ** -0.5, sent[line["client"], number - 1 - age]
        assert line["staleness_weight"] == weight
        for name, tensor in upload.tensors.items():
            change = tensor.double() - state[number - 1 - age][name].double()
            due = state[number - 1][name].double() + weight * change if age else tensor.double()
            assert torch.equal(state[number][name], due.float()), (number, name)
    assert ages == [0, 1, 2, 2, 2]
    told = [line["asynchronous"] for line in read_lines(folder / "rounds.jsonl")]
    assert [one["staleness_max"] for one in told] == ages


class Crash(BaseException):
    pass


def crash_in_round(number, patched):
    """Let a run end without a word when the checkpoint of a round is about to be written."""
    save = experiment.save_checkpoint

    def crash(directory, reached, **rest):
        if reached.state.round_number == number:
            raise Crash
        save(directory, reached, **rest)

    patched.setattr(experiment, "save_checkpoint", crash)


def crash_in_turn(number, patched):
    """Let a run end without a word after a turn; three are taken before the first round."""
    exchange, done = InProcess.exchange, []

    def crash(self, downloads):
        for delivery in exchange(self, downloads):
            done.append(delivery)
            yield delivery
            if len(done) == number:
                raise Crash

    patched.setattr(InProcess, "exchange", crash)


@pytest.mark.parametrize(
    ("crash", "number"), [(crash_in_turn, 10), pytest.param(crash_in_round, 4, marks=pytest.mark.slow)]
)
def test_a_run_that_was_killed_ends_as_the_uninterrupted_one(
    late_run, tmp_path, quiet, monkeypatch, crash, number
):
    config, folder, _ = late_run
    config = replace(config, keep_states=2)
    with monkeypatch.context() as patched:
        crash(number, patched)
        with pytest.raises(Crash):
            run_experiment(config, tmp_path / "run", progress=quiet)
    assert examine(tmp_path / "run").problems == ()
    run_experiment(config, tmp_path / "run", progress=quiet, resume=True)
    assert outcome(tmp_path / "run") == outcome(folder)


def test_every_state_that_is_kept_can_be_gone_back_to(late_run, tmp_path, quiet):
    config, folder, _ = late_run
    for number in (1, 3, 4):
        shutil.copytree(folder, tmp_path / str(number))
        rewind(RunDirectory(tmp_path / str(number)), number)
        assert examine(tmp_path / str(number)).problems == ()
    run_experiment(config, tmp_path / "4", progress=quiet, resume=True)
    assert outcome(tmp_path / "4") == outcome(folder)


def test_a_client_whose_upload_was_too_old_goes_on_from_what_it_kept_before(make_config, tmp_path, quiet):
    config = make_config("flex", *LATE, "asynchronous.max_staleness=1", "rounds=3")
    result = run_experiment(config, tmp_path / "run", progress=quiet)
    assert (result["refused"], result["failures"]) == ({"stale": 1}, [])
    rounds, clients = (read_lines(tmp_path / "run" / f"{name}.jsonl") for name in ("rounds", "clients"))
    assert [line["refused"] for line in rounds] == [{}, {}, {"stale": 1}]
    assert [line["staleness"] for line in clients] == [0, 1, 1]
    (slow,) = set(result["clients"]) - {line["client"] for line in clients}
    assert slow not in read_json(tmp_path / "run" / "checkpoint.json")["kept_rounds"]


def test_what_is_under_way_is_sealed_and_forgotten_with_its_client(late_run, tmp_path):
    _, whole, _ = late_run
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    run = RunDirectory(folder)
    rewind(run, 4)
    (first, *_) = read_json(run.checkpoint)["under_way"]
    path = run.under_way / f"{first['turn']['client_id']}-from-{first['received']:05d}.message"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert any(str(path) in problem for problem in examine(folder).problems)
    path.write_bytes(content)
    forget(folder, first["turn"]["client_id"])
    assert list(run.under_way.iterdir()) == []
    assert {file.name for file in run.state.iterdir()} == {
        f"{what}-round-00004.{kind}"
        for what, kind in (("state", "safetensors"), ("beside", "safetensors"), ("checkpoint", "json"))
    }


@pytest.mark.slow
def test_a_failed_turn_takes_no_time_and_the_run_goes_on_without_it(
    make_config, tmp_path, quiet, monkeypatch
):
    handle = ClientRuntime.handle

    def fail(self, client_id, download):
        if (client_id, download.round_number, download.task) == ("client-001", 1, "train"):
            return Upload(failure="lost")
        return handle(self, client_id, download)

    monkeypatch.setattr(ClientRuntime, "handle", fail)
    config = make_config("fedavg", *FAST, "asynchronous.buffer=3", "cohort.on_failure=continue")
    result = run_experiment(config, tmp_path / "run", progress=quiet)
    assert [(one["round"], one["client"], one["reason"]) for one in result["failures"]] == [
        (1, "client-001", "lost")
    ]
    rounds = read_lines(tmp_path / "run" / "rounds.jsonl")
    assert [len(line["cohort"]) for line in rounds] == [2, 3]
    with pytest.raises(UserError, match="round 1 is refused: client client-001: lost"):
        run_experiment(
            make_config("fedavg", *FAST, "asynchronous.buffer=1"), tmp_path / "stop", progress=quiet
        )


@pytest.mark.slow
def test_workers_change_no_bit(late_run, tmp_path, quiet):
    config, folder, _ = late_run
    config = replace(config, transport=TransportSettings(workers=2))
    run_experiment(config, tmp_path / "run", progress=quiet)
    assert outcome(tmp_path / "run") == outcome(folder)


@pytest.mark.slow
def test_check_predicts_steps_bytes_and_age(late_run):
    config, folder, _ = late_run
    report = check_experiment(config)
    result, steps = read_json(folder / "result.json"), report.clock.steps
    counted = result["bytes"]["upload_counted"] + result["bytes"]["download_counted"]
    assert sum(steps.uploads_by_client.values()) == 5
    # Steps are of the batches' mean shape, and the turn's copies are left out.
    assert report.clock.run_seconds == pytest.approx(result["clock"]["seconds"], rel=0.2)
    assert steps.staleness_max >= 2
    assert report._both_row() == ["both, 5 uploads, 5 rounds", f"{counted:,} bytes"]
    most = max(line["upload_bytes"] for line in read_lines(folder / "clients.jsonl"))
    assert report.as_json()["under_way_bytes"] > 3 * most
    assert [row[0] for row in steps.rows()] == ["uploads of a client that count", "staleness of uploads"]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("asynchronous.buffer=0",), "asynchronous.buffer must be at least 1, not 0"),
        (("asynchronous.concurrency=1",), "asynchronous.buffer is missing"),
        (("asynchronous.max_staleness=-1",), "asynchronous.max_staleness must not be negative, but is -1"),
        (("asynchronous.staleness_exponent=-1",), "asynchronous.staleness_exponent must be 0 (no weighting)"),
        (("cohort.size=2",), "cohort.size is 2, but must be 0 with [asynchronous]"),
        (("cohort.size=2", "cohort.over_select=1"), "cohort.size is 2, but must be 0 with [asynchronous]"),
        (("transport.round_seconds=5",), "transport.round_seconds is 5.0, but must be 0"),
        (("transport.name=flower",), 'clock is set, but with [asynchronous] and transport.name = "flower"'),
        (
            ("cohort.on_failure=continue", "cohort.min_uploads=3"),
            "cohort.min_uploads is 3, but must be at most asynchronous.buffer",
        ),
        (("aggregation.kind=median",), 'aggregation.kind is "median", but must be "mean" or "clipped"'),
        (("privacy.clip_norm=1", "cohort.max_change_factor=0"), "privacy.clip_norm is 1.0, but must be 0"),
    ],
)
def test_a_setting_without_meaning_is_refused_in_one_sentence(make_config, overrides, sentence):
    given = [one for one in overrides if "asynchronous.concurrency" in one] or [
        "asynchronous.buffer=2",
        *overrides,
    ]
    with pytest.raises(UserError) as refused:
        make_config("fedavg", *FAST, *given)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_method_without_an_asynchronous_form_or_a_clock_is_refused(make_config):
    for method in ("scaffold", "local_only", "flora"):
        with pytest.raises(UserError, match="this algorithm has no asynchronous form"):
            make_config(method, *FAST, "asynchronous.buffer=2")
    with pytest.raises(UserError, match=r"nothing says which uploads come first: add a section \[clock\]"):
        make_config("fedavg", "asynchronous.buffer=2")


@pytest.mark.parametrize("key", ["buffer", "concurrency"])
def test_more_than_there_are_clients_is_refused_before_anything_runs(make_config, tmp_path, quiet, key):
    config = make_config("fedavg", *FAST, asynchronous={"buffer": 1} | {key: 4})
    with pytest.raises(UserError, match=rf"asynchronous.{key} is 4, but there are only 3 clients"):
        run_experiment(config, tmp_path / "run", progress=quiet)
    assert not (tmp_path / "run").exists()


def test_the_page_names_the_methods_that_have_an_asynchronous_form():
    page = (Path(__file__).parents[2] / "docs" / "asynchronous.md").read_text()
    told = page.partition("nothing else: ")[2].partition(". Each")[0]
    have = [
        name for name, cls in ALGORITHMS.items() if object.__new__(cls).has_private_form and cls.uses_mean
    ]
    assert sorted(re.findall(r"`(\w+)`", told)) == sorted(have)
