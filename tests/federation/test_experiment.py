"""A whole run in process: what travels, what stays, what is counted, and going on after a crash."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from fedexperts.algorithms.api import Algorithm
from fedexperts.config.load import resolved_toml
from fedexperts.errors import UserError
from fedexperts.evaluation.multiple_choice import load_exam
from fedexperts.federation import rounds
from fedexperts.federation.checkpoint import load_checkpoint
from fedexperts.federation.personal import PersonalStore, read_kept
from fedexperts.federation.scoring import Scorer
from fedexperts.run_directory import RunDirectory, read_json, read_lines
from fedexperts.running.experiment import run_experiment
from fedexperts.training.local_steps import NonFiniteLossError

METHODS = ("flex", "fedavg", "fedavg_experts", "local_only")


def identity(run: Path) -> dict[str, object]:
    """What two runs must share to be called the same."""
    result = read_json(run / "result.json")
    return {
        "server": result["server_state_sha256"],
        "personal": result["personal_sha256"],
        "mean": result["mean"],
        "exam": result["exam"],
        "losses": [line["train_loss"] for line in read_lines(run / "rounds.jsonl")],
    }


def test_the_exam_of_clients_models_is_told_by_subject(make_config, tmp_path, quiet):
    config = make_config("local_only")
    exam = run_experiment(config, tmp_path / "run", progress=quiet)["exam"]
    settings = config.evaluation.exam
    questions = load_exam(settings, data_source=config.data.source, seed=config.seed)
    by_subject = Counter(question.subject for question in questions)
    assert list(exam["personalised_by_subject"]) == list(exam["base_by_subject"]) == sorted(by_subject)
    right = sum(by_subject[subject] * share for subject, share in exam["personalised_by_subject"].items())
    assert right / len(questions) == pytest.approx(exam["personalised"]), "the order of a sum"


@pytest.mark.parametrize("method", METHODS)
def test_no_personal_name_is_ever_in_an_upload(method, make_config, tmp_path, quiet, monkeypatch):
    sent: set[str] = set()
    refusal = rounds.refusal

    def record(upload, *rest):
        sent.update(upload.tensors)
        return refusal(upload, *rest)

    monkeypatch.setattr(rounds, "refusal", record)
    run_experiment(make_config(method), tmp_path / "run", progress=quiet)
    kept = set()
    for path in (tmp_path / "run" / "clients").glob("*/personal-round-*.safetensors"):
        kept |= set(read_kept(path).parameters)
    assert not sent & kept
    assert not any(".graft." in name for name in sent)
    assert bool(kept) == (method in ("flex", "local_only"))
    assert any(".experts." in name for name in sent) == (method == "fedavg_experts")


@pytest.mark.slow
def test_the_same_configuration_gives_the_same_run(make_config, tmp_path, quiet):
    for name in ("one", "two"):
        run_experiment(make_config("flex"), tmp_path / name, progress=quiet)
    assert identity(tmp_path / "one") == identity(tmp_path / "two")


def test_seconds_of_a_round_are_those_of_its_phases(make_config, tmp_path, quiet):
    run_experiment(make_config("fedavg", "rounds=1"), tmp_path / "run", progress=quiet)
    (line,) = read_lines(tmp_path / "run" / "rounds.jsonl")
    clients = [client["seconds"] for client in read_lines(tmp_path / "run" / "clients.jsonl")]
    assert [seconds.keys() for seconds in clients] == [{"load", "train", "save", "transport"}] * 3
    total = line["seconds"].pop("total")
    assert line["seconds"].keys() == {"load", "train", "save", "transport", "aggregate"}
    assert line["seconds"]["train"] == pytest.approx(sum(seconds["train"] for seconds in clients))
    assert sum(line["seconds"].values()) == pytest.approx(total), "every phase lies within the round"
    assert line["seconds"]["aggregate"] > 0


def test_an_algorithm_is_told_whether_a_turn_counts(make_config, tmp_path, quiet, monkeypatch):
    turns, update = [], Algorithm.client_update

    def watched(self, client, kept, sent):
        turns.append((client.round_number, client.purpose))
        return update(self, client, kept, sent)

    monkeypatch.setattr(Algorithm, "client_update", watched)
    run_experiment(make_config("fedavg"), tmp_path / "run", progress=quiet)
    assert turns == [(number, "train") for number in (1, 2) for _ in range(3)] + [(3, "evaluate")] * 3


def test_one_client_fedavg_keeps_its_tensors_bit_for_bit(make_config, tmp_path, quiet):
    config = make_config("fedavg", "data.partition.num_clients=1", "rounds=1")
    result = run_experiment(config, tmp_path / "run", progress=quiet)
    state = load_checkpoint(RunDirectory(tmp_path / "run"))
    assert state is not None
    assert result["server_state_sha256"] == read_json(tmp_path / "run" / "checkpoint.json")["state_sha256"]


class _Stopped(Exception):
    pass


@pytest.mark.parametrize(
    "stage",
    ["client", *(pytest.param(one, marks=pytest.mark.slow) for one in ("lines", "checkpoint", "evaluation"))],
)
@pytest.mark.parametrize("kept", [pytest.param("fresh", marks=pytest.mark.slow), "kept"])
def test_a_resumed_run_ends_as_the_uninterrupted_one(stage, kept, make_config, tmp_path, quiet, monkeypatch):
    config = make_config("flex", "rounds=3", f"training.optimizer_state={kept}", "cohort.size=2")
    run_experiment(config, tmp_path / "whole", progress=quiet)
    places = {
        "client": ("fedexperts.federation.rounds.client_line", 4),
        "lines": ("fedexperts.running.experiment.append_lines", 4),
        "checkpoint": ("fedexperts.running.experiment.save_checkpoint", 3),
        "evaluation": ("fedexperts.running.experiment.build_result", 1),
    }
    where, count = places[stage]
    module, _, name = where.rpartition(".")
    original, calls = getattr(sys.modules[module], name), []

    def stop_at_call(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            raise _Stopped
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(where, stop_at_call)
        with pytest.raises(_Stopped):
            run_experiment(config, tmp_path / "cut", progress=quiet)
    run_experiment(config, tmp_path / "cut", progress=quiet, resume=True)
    assert identity(tmp_path / "cut") == identity(tmp_path / "whole")


@pytest.mark.slow
def test_kill_9_in_the_middle_loses_at_most_the_round_under_way(make_config, tmp_path, quiet):
    config = make_config("flex", "rounds=4")
    run_experiment(config, tmp_path / "whole", progress=quiet)
    experiment = tmp_path / "experiment.toml"
    experiment.write_text(resolved_toml(config))
    command = [
        sys.executable,
        "-m",
        "fedexperts",
        "run",
        str(experiment),
        "--to",
        str(tmp_path / "cut"),
        "--quiet",
    ]
    process = subprocess.Popen(command, start_new_session=True)
    checkpoint = tmp_path / "cut" / "checkpoint.json"
    while process.poll() is None:
        if checkpoint.exists() and json.loads(checkpoint.read_bytes())["round"] >= 1:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == -signal.SIGKILL, "killed before its end"
    run_experiment(config, tmp_path / "cut", progress=quiet, resume=True)
    assert identity(tmp_path / "cut") == identity(tmp_path / "whole")


def test_a_full_disk_loses_nothing_that_was_finished(make_config, tmp_path, quiet, monkeypatch):
    config = make_config("fedavg", "rounds=3")
    run_experiment(config, tmp_path / "whole", progress=quiet)
    replace, calls = Path.replace, []

    def full(self, target):
        calls.append(self.name)
        if len(calls) > 9:
            raise OSError(28, "No space left on device")
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            run_experiment(config, tmp_path / "cut", progress=quiet)
    assert not list((tmp_path / "cut").rglob("*.partial"))
    run_experiment(config, tmp_path / "cut", progress=quiet, resume=True)
    assert identity(tmp_path / "cut") == identity(tmp_path / "whole")


def test_resume_with_another_configuration_shows_the_difference(make_config, tmp_path, quiet):
    run_experiment(make_config("fedavg", "rounds=1"), tmp_path / "run", progress=quiet)
    with pytest.raises(UserError, match=r"training\.lr: 0\.003 -> 0\.01"):
        run_experiment(
            make_config("fedavg", "rounds=1", "training.lr=0.01"),
            tmp_path / "run",
            progress=quiet,
            resume=True,
        )


def test_a_folder_in_use_is_refused(make_config, tmp_path, quiet):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="already in use"):
        run_experiment(make_config(), tmp_path / "run", progress=quiet)
    assert (tmp_path / "run" / "thesis.txt").read_text() == "mine"


def test_a_run_that_cannot_start_leaves_no_folder(make_config, tmp_path, quiet):
    with pytest.raises(UserError, match="there is no such folder"):
        run_experiment(make_config("flex", f"model.name={tmp_path}/none"), tmp_path / "run", progress=quiet)
    assert not (tmp_path / "run").exists()


def _break_one_client(monkeypatch, client_id):
    import fedexperts.federation.runtime as runtime

    train = runtime.ClientRuntime._train

    def broken(self, asked, download):
        if asked == client_id:
            raise NonFiniteLossError("loss at local step 1 is nan")
        return train(self, asked, download)

    monkeypatch.setattr(runtime.ClientRuntime, "_train", broken)


def test_a_non_finite_loss_stops_the_run_and_names_the_client(make_config, tmp_path, quiet, monkeypatch):
    config = make_config("fedavg")
    with monkeypatch.context() as patch:
        _break_one_client(patch, "client-001")
        with pytest.raises(
            UserError, match=r"round 1 is refused: client client-001: loss at local step 1 is nan"
        ):
            run_experiment(config, tmp_path / "run", progress=quiet)
    assert read_lines(tmp_path / "run" / "rounds.jsonl") == []
    run_experiment(config, tmp_path / "run", progress=quiet, resume=True)


def test_with_continue_the_run_goes_on_without_the_failed_client(make_config, tmp_path, quiet, monkeypatch):
    config = make_config("fedavg", "cohort.on_failure=continue", "rounds=1")
    _break_one_client(monkeypatch, "client-001")
    result = run_experiment(config, tmp_path / "run", progress=quiet)
    failure = {"round": 1, "client": "client-001", "reason": "loss at local step 1 is nan"}
    assert result["failures"] == [failure]
    line = read_lines(tmp_path / "run" / "rounds.jsonl")[0]
    assert (line["num_failed"], line["failures"]) == (1, [failure])
    assert {record["client"] for record in read_lines(tmp_path / "run" / "clients.jsonl")} == {
        "client-000",
        "client-002",
    }


def test_with_continue_a_client_that_cannot_be_scored_is_left_out_and_named(
    make_config, tmp_path, quiet, monkeypatch
):
    evaluate = Scorer.evaluate

    def broken(self, client_id, download):
        if client_id == "client-001" and download.task == "evaluate_fully":
            raise NonFiniteLossError("loss at local step 1 is nan")
        return evaluate(self, client_id, download)

    monkeypatch.setattr(Scorer, "evaluate", broken)
    config = make_config("fedavg", "cohort.on_failure=continue", "rounds=1")
    result = run_experiment(config, tmp_path / "run", progress=quiet)
    assert list(result["clients"]) == ["client-000", "client-002"]
    assert result["failures"][0]["client"] == "client-001"
    with pytest.raises(UserError, match="evaluating client client-001 after round 1"):
        run_experiment(make_config("fedavg", "rounds=1"), tmp_path / "stopped", progress=quiet)


def test_a_client_scores_its_own_model(make_config, tmp_path, quiet, monkeypatch):
    """Swapping personal tensors between clients is noticed, not averaged away."""
    load = PersonalStore.load

    def swapped(self, client_id, kept_round):
        other = {"client-000": "client-001", "client-001": "client-000"}.get(client_id, client_id)
        return load(self, other, kept_round)

    run_experiment(make_config("flex"), tmp_path / "right", progress=quiet)
    monkeypatch.setattr(PersonalStore, "load", swapped)
    run_experiment(make_config("flex"), tmp_path / "wrong", progress=quiet)
    assert identity(tmp_path / "right") != identity(tmp_path / "wrong")


def test_personal_tensors_move_and_only_the_chosen_experts_stay(make_config, tmp_path, quiet):
    run_experiment(make_config("flex"), tmp_path / "run", progress=quiet)
    store = PersonalStore(tmp_path / "run" / "clients")
    first, second = (store.load("client-000", kept_round) for kept_round in (1, 2))
    assert torch.equal(first.beside["chosen_experts"], second.beside["chosen_experts"])
    assert not any(torch.equal(first.parameters[name], second.parameters[name]) for name in first.parameters)
