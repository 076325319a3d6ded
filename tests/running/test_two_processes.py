"""Two processes on one folder: the second is refused, and the first does not notice."""

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedexperts.config.load import resolved_toml
from fedexperts.config.matrix import load_suite
from fedexperts.errors import UserError
from fedexperts.run_directory import read_json, read_lines
from fedexperts.running.experiment import run_experiment
from fedexperts.running.progress import QuietProgress
from fedexperts.running.suite import compare

WAITING_RUN = Path(__file__).with_name("waiting_run.py")


@contextmanager
def going_on(how, file, directory):
    """Another process that holds ``directory`` during the block, and must end well after it."""
    command = [sys.executable, str(WAITING_RUN), how, str(file), str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "holds\n"
            yield
            process.communicate("go on\n", timeout=200)
        finally:
            process.kill()
    assert process.returncode == 0


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def outcome_of(directory):
    """What two equal runs share."""
    result = read_json(directory / "result.json")
    rounds = [line["train_loss"] for line in read_lines(directory / "rounds.jsonl")]
    names = ("server_state_sha256", "personal_sha256", "mean", "bytes", "failures")
    return {name: result[name] for name in names} | {"rounds": rounds}


@pytest.fixture
def config(make_config):
    return make_config("fedavg", "evaluation.exam.source=none", "evaluation.max_test_examples=1")


@pytest.fixture
def experiment(config, tmp_path):
    path = tmp_path / "experiment.toml"
    path.write_text(resolved_toml(config))
    return path


@pytest.fixture
def alone(config, tmp_path, quiet):
    """What the run comes to when nobody disturbs it."""
    run_experiment(config, tmp_path / "alone", progress=quiet)
    return outcome_of(tmp_path / "alone")


def refuse(config, directory, message, *, resume):
    with pytest.raises(UserError, match=message):
        run_experiment(config, directory, progress=QuietProgress(), resume=resume)


@pytest.mark.slow
def test_a_second_and_a_third_process_leave_a_run_as_it_is(config, experiment, alone, tmp_path):
    run = tmp_path / "run"
    with going_on("run", experiment, run):
        before = files_in(run)
        assert "config.toml" in before
        for _ in range(2):
            refuse(config, run, "in use by another process", resume=True)
            refuse(config, run, "already in use", resume=False)
        assert files_in(run) == before
    assert outcome_of(run) == alone


class Stop(QuietProgress):
    def round_finished(self, round, summary):
        raise KeyboardInterrupt


@pytest.mark.slow
def test_of_two_processes_that_resume_a_run_one_wins(config, experiment, alone, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_experiment(config, run, progress=Stop())
    with going_on("resume", experiment, run):
        refuse(config, run, "in use by another process", resume=True)
    assert outcome_of(run) == alone


@pytest.mark.slow
def test_over_flower_a_refused_process_leaves_the_folder_as_it_is(make_config, experiment, tmp_path):
    run = tmp_path / "run"
    over_flower = make_config(
        "fedavg", "evaluation.exam.source=none", "evaluation.max_test_examples=1", "transport.name=flower"
    )
    with going_on("run", experiment, run):
        before = files_in(run)
        refuse(over_flower, run, "in use by another process", resume=True)
        refuse(over_flower, run, "already in use", resume=False)
        assert files_in(run) == before


@pytest.mark.slow
def test_a_second_compare_is_refused_and_the_first_is_left_as_it_is(config, alone, tmp_path, quiet):
    suite, directory = tmp_path / "suite.toml", tmp_path / "suite"
    suite.write_text(f'base = "experiment.toml"\n[matrix]\nseed = [{config.seed}]\n')
    table = resolved_toml(config).splitlines(keepends=True)
    (tmp_path / "experiment.toml").write_text("".join(line for line in table if line[:5] != "seed "))
    (name,) = (run.name for run in load_suite(suite).runs)
    with going_on("compare", suite, directory):
        before = files_in(directory)
        with pytest.raises(UserError, match=f"suite directory {directory} is in use by another process"):
            compare(load_suite(suite), directory, lambda title: quiet)
        refuse(config, directory / "runs" / name, "in use by another process", resume=True)
        assert files_in(directory) == before
    assert outcome_of(directory / "runs" / name) == alone
