"""One upload of each client and round counts; replays and late ones are refused by name and counted."""

from dataclasses import replace

import pytest
import torch
from test_flower_apps import run_over_grid

from fedexperts.errors import UserError
from fedexperts.federation.ledger import Ledger
from fedexperts.federation.runtime import ClientRuntime
from fedexperts.federation.transport import Delivery
from fedexperts.messages import Stamp, Upload, decode_upload, encode_upload
from fedexperts.run_directory import read_lines
from fedexperts.running.experiment import run_experiment
from fedexperts.running.progress import QuietProgress

SMALL = ("training.num_local_steps=1", "evaluation.max_test_examples=1", "evaluation.matrix=false")
LAPTOPS = ("clock.device=laptop", "clock.straggler_share=0.4", "clock.straggler_factor=50")


def delivered(client_id="a", value=1.0, **stamp):
    stamp = Stamp(**{"run": "r", "round_number": 3, "client_id": client_id} | stamp)
    upload = Upload(tensors={"w": torch.tensor([value])}, weights={"w": 1.0}, stamp=stamp)
    return Delivery(client_id=client_id, upload=upload, download_bytes=0, upload_bytes=0)


def test_a_stamp_survives_the_wire():
    upload = delivered().upload
    assert decode_upload(encode_upload(upload)).stamp == upload.stamp


@pytest.mark.parametrize(
    ("stamp", "kind", "reason"),
    [
        ({}, "", ""),
        ({"run": "other"}, "other_run", "upload refused: it is of another run"),
        ({"round_number": 2}, "old_round", "upload refused: it is of round 2"),
    ],
)
def test_an_upload_answers_the_round_under_way(stamp, kind, reason):
    assert Ledger(run="r", round_number=3).fence(delivered(**stamp)) == (kind, reason)


def test_another_clients_upload_is_refused():
    foreign = replace(delivered("b"), client_id="a")
    kind, reason = Ledger(run="r", round_number=3).fence(foreign)
    assert (kind, reason) == ("other_client", "upload refused: it is of client 'b'")


def test_a_second_upload_is_refused_whether_it_is_the_same_or_not():
    ledger = Ledger(run="r", round_number=3)
    assert ledger.fence(delivered()) == ledger.fence(delivered("b")) == ("", "")
    assert ledger.fence(delivered()) == (
        "repeated",
        "upload refused: it is the client's second one in this round, of the same content",
    )
    assert ledger.fence(delivered(value=2.0))[1].endswith("of another content")


def rounds_of(config, folder, quiet):
    result = run_experiment(config, folder, progress=quiet)
    return result, read_lines(folder / "rounds.jsonl"), read_lines(folder / "clients.jsonl")


@pytest.fixture
def a_replay(monkeypatch):
    """One of three clients answers the second round with its upload of the first."""
    handle, first = ClientRuntime.handle, {}

    def replaying(self, client_id, download):
        upload = handle(self, client_id, download)
        if client_id == "client-001" and download.task == "train":
            return first.setdefault(client_id, upload)
        return upload

    monkeypatch.setattr(ClientRuntime, "handle", replaying)


@pytest.mark.usefixtures("a_replay")
@pytest.mark.parametrize("transport", ["inprocess", "flower"])
def test_a_replay_of_an_old_round_is_refused_and_counted(transport, make_config, tmp_path, quiet):
    config = make_config("fedavg", "cohort.on_failure=continue", *SMALL, f"transport.name={transport}")
    if transport == "flower":
        result = run_over_grid(config, tmp_path / "run")
    else:
        result = run_experiment(config, tmp_path / "run", progress=quiet)
    (failure,) = result["failures"]
    assert failure == {"round": 2, "client": "client-001", "reason": "upload refused: it is of round 1"}
    assert [line["refused"] for line in read_lines(tmp_path / "run" / "rounds.jsonl")] == [
        {},
        {"old_round": 1},
    ]
    assert result["refused"] == {"old_round": 1}


@pytest.mark.usefixtures("a_replay")
def test_a_round_of_too_few_uploads_leaves_the_server_s_state(make_config, tmp_path, quiet):
    config = make_config("fedavg", "cohort.on_failure=continue", "cohort.min_uploads=3", *SMALL)
    result, (full, few), lines = rounds_of(config, tmp_path / "run", quiet)
    reason = "only 2 uploads counted, where cohort.min_uploads is 3"
    assert [failure["reason"] for failure in few["failures"][1:]] == [reason] * 3
    assert [line["round"] for line in lines] == [1] * 3
    assert full["server_state_sha256"] == few["server_state_sha256"] == result["server_state_sha256"]


def test_a_repeated_upload_counts_once_and_stops_nothing(make_config, tmp_path, monkeypatch):
    config = make_config("fedavg", "rounds=1", *SMALL, "transport.name=flower")
    plain = run_over_grid(config, tmp_path / "once")
    pull = run_over_grid.__globals__["InMemoryGrid"].pull_messages
    monkeypatch.setattr(
        run_over_grid.__globals__["InMemoryGrid"],
        "pull_messages",
        lambda self, ids: [reply for reply in pull(self, ids) for _ in range(2)],
    )
    twice = run_over_grid(config, tmp_path / "twice")
    assert twice["server_state_sha256"] == plain["server_state_sha256"]
    assert (twice["refused"], twice["failures"]) == ({"repeated": 3}, [])


# Waiting by the simulated clock


@pytest.fixture(scope="module")
def unhurried(make_config, tmp_path_factory):
    """A round that waits for all: its result, line, and lines of clients."""
    config = make_config("fedavg", "rounds=1", *SMALL, *LAPTOPS)
    return rounds_of(config, tmp_path_factory.mktemp("unhurried") / "run", QuietProgress())


def test_the_first_of_an_over_selected_cohort_are_taken_by_the_clock(make_config, unhurried, tmp_path, quiet):
    """One of three clients is fifty times slower: it is the one that nobody waits for."""
    _, (slow,), lines = unhurried
    times = {line["client"]: line["simulated_seconds"]["total"] for line in lines}
    slowest = max(times, key=times.get)
    config = make_config("fedavg", "rounds=1", *SMALL, *LAPTOPS, "cohort.size=2", "cohort.over_select=1")
    result, (line,), lines = rounds_of(config, tmp_path / "run", quiet)
    assert [one["client"] for one in lines] == sorted(set(times) - {slowest})
    assert (result["refused"], result["failures"]) == ({"surplus": 1}, [])
    assert line["simulated"]["seconds"]["turns"] == sorted(times.values())[1]
    assert line["simulated"]["slowest"] != slow["simulated"]["slowest"] == slowest


def between_the_last_two(unhurried):
    times = sorted(line["simulated_seconds"]["total"] for line in unhurried[2])
    return (times[1] + times[2]) / 2


def test_a_deadline_by_the_clock_refuses_the_straggler_and_ends_the_round(
    make_config, unhurried, tmp_path, quiet
):
    limit = between_the_last_two(unhurried)
    late = (*SMALL, *LAPTOPS, f"transport.round_seconds={limit}", "cohort.on_failure=continue")
    result, (line,), _ = rounds_of(make_config("fedavg", "rounds=1", *late), tmp_path / "run", quiet)
    assert result["refused"] == {"late": 1}
    assert (
        "simulated seconds after the round's start, transport.round_seconds is"
        in (result["failures"][0]["reason"])
    )
    assert line["simulated"]["seconds"]["turns"] == limit


@pytest.mark.slow
def test_a_deadline_that_nobody_misses_changes_nothing(make_config, unhurried, tmp_path, quiet):
    plain = unhurried[0]
    config = make_config("fedavg", "rounds=1", *SMALL, *LAPTOPS, "transport.round_seconds=1e9")
    timed, _, _ = rounds_of(config, tmp_path / "timed", quiet)
    for name in ("server_state_sha256", "mean", "refused"):
        assert timed[name] == plain[name]
    assert timed["clock"]["seconds"] == plain["clock"]["seconds"]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("transport.round_seconds=5",), r"transport\.round_seconds is 5, but has no effect in process"),
        (
            ("cohort.size=1", "cohort.over_select=1"),
            r"cohort\.over_select is 1, but has no effect in process",
        ),
        (("transport.round_seconds=-1",), "round_seconds must be 0 .* not -1"),
        (("cohort.over_select=1",), "over_select is 1, but has no effect with size = 0"),
        (("cohort.min_uploads=1",), 'min_uploads is 1, but has no effect with on_failure = "stop"'),
        (("cohort.min_uploads=-1",), "min_uploads must not be negative, but is -1"),
        (
            ("cohort.min_uploads=3", "cohort.size=2", "cohort.on_failure=continue"),
            "min_uploads is 3, more than size = 2",
        ),
    ],
)
def test_settings_of_waiting_without_effect_are_refused(make_config, overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        make_config("fedavg", *overrides)
