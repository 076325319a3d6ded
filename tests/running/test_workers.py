"""Runs side by side: the same results as one after the other, whatever happens to one of them."""

import logging
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from fedexperts.cli import INTERRUPTED
from fedexperts.config.load import resolved_toml
from fedexperts.config.matrix import load_suite
from fedexperts.errors import UserError
from fedexperts.report import write_report
from fedexperts.run_directory import SEAL, read_json, read_lines
from fedexperts.running.progress import PlainProgress, QuietProgress
from fedexperts.running.suite import compare, count_jobs

sys.path.insert(0, str(Path(__file__).parent))
from fake_runs import fake_run


def compare_fakes(tmp_path, seeds, **how):
    suite = tmp_path / "suite.toml"
    suite.write_text(f'[base]\nalgorithm.name = "fedavg"\nthreads = 1\n[matrix]\nseed = {list(seeds)}\n')
    return compare(load_suite(suite), tmp_path / "out", PlainProgress, run=fake_run, **how)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Two jobs over runs of which some fail in every way there is."""
    folder, records = tmp_path_factory.mktemp("mixed"), []
    handler = logging.Handler()
    handler.emit = records.append
    package = logging.getLogger("fedexperts")
    package.addHandler(handler)
    before, package.level = package.level, logging.INFO
    try:
        outcome = compare_fakes(folder, range(6), jobs=2)
    finally:
        package.removeHandler(handler)
        package.level = before
    return folder / "out", outcome, [record.getMessage() for record in records]


@pytest.mark.slow
def test_runs_that_fail_do_not_stop_the_others(mixed):
    _, outcome, _ = mixed
    assert outcome.finished == ["seed-0", "seed-5"]
    assert outcome.failed == {
        "seed-1": "loss is nan",
        "seed-2": "division by zero",
        "seed-3": "its process was killed; if memory ran out, fewer --jobs need less of it",
        "seed-4": "Unpicklable: this and that",
    }


@pytest.mark.slow
def test_progress_and_log_name_their_run(mixed):
    said = mixed[2]
    phases = sorted(line for line in said if "loading" in line)
    assert phases == [f"{number + 1}/6 seed-{number}: loading" for number in range(6)]
    assert "seed-5: the weather is strange" in said


@pytest.mark.slow
def test_runs_are_in_other_processes(mixed):
    pids = {read_json(path)["pid"] for path in mixed[0].glob("runs/*/result.json")}
    assert pids
    assert os.getpid() not in pids


@pytest.mark.slow
def test_a_full_disk_stops_all_jobs(tmp_path):
    with pytest.raises(OSError, match="No space left"):
        compare_fakes(tmp_path, [6, 7, 8, 9, 10], jobs=2)


def test_the_number_of_jobs(monkeypatch, caplog):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert [count_jobs("auto", threads) for threads in (1, 3, 16)] == [8, 2, 1]
    assert [count_jobs(4, 2), caplog.records] == [4, []]
    assert count_jobs(5, 2) == 5
    assert [record.getMessage() for record in caplog.records] == [
        "5 jobs of 2 threads share 8 cores: fewer jobs, or threads=1, may be faster"
    ]
    assert count_jobs(1, 16) == 1
    assert len(caplog.records) == 1


@pytest.mark.parametrize("jobs", [0, -1, "many"])
def test_a_number_of_jobs_that_is_none_is_refused_before_anything_is_written(jobs, tmp_path):
    with pytest.raises(UserError, match=f"--jobs must be a whole number of at least 1, or auto, not {jobs}"):
        compare_fakes(tmp_path, [0], jobs=jobs)
    assert not (tmp_path / "out").exists()


SUITE = """
base = "experiment.toml"
[matrix]
"algorithm.name" = ["fedavg", "local_only"]
"""

SEARCH = """
[search]
seeds = [100]
metric = "validation_loss_after"
[search.grid]
"training.lr" = [1e-3, 3e-3]
"""


SMALL = ("evaluation.exam.source=none", "data.partition.num_clients=2")


def write_suite(tmp_path, config, text):
    table = resolved_toml(config).replace('name = "local_only"\n', "")
    (tmp_path / "experiment.toml").write_text(table)
    (tmp_path / "suite.toml").write_text(text)
    return tmp_path / "suite.toml"


def facts_of(directory):
    """What runs in ``directory`` came to, without times."""
    found = {}
    for path in sorted(directory.glob("*/*/result.json")):
        result = read_json(path)
        losses = [line["train_loss"] for line in read_lines(path.with_name("rounds.jsonl"))]
        facts = {name: value for name, value in result.items() if name not in ("seconds", SEAL)}
        found[path.parent.name] = facts | {"losses": losses}
    return found | {"search": read_json(directory / "search.json")}


def report_of(directory):
    write_report(directory)
    text = (directory / "REPORT.md").read_text()
    return re.sub(r"[\d.]+( ± [\d.]+)? s\b", "TIME", text.replace(f"# {directory.name}", ""))


@pytest.mark.slow
def test_two_jobs_give_the_bits_and_the_report_of_one(make_config, tmp_path):
    config = make_config("local_only", *SMALL, "rounds=1")
    suite = load_suite(write_suite(tmp_path, config, SUITE + SEARCH))
    for jobs in (1, 2):
        compare(suite, tmp_path / f"jobs-{jobs}", lambda title: QuietProgress(), jobs=jobs)
    assert facts_of(tmp_path / "jobs-2") == facts_of(tmp_path / "jobs-1")
    assert len(facts_of(tmp_path / "jobs-1")) == 7
    assert report_of(tmp_path / "jobs-2") == report_of(tmp_path / "jobs-1")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_all_processes_and_the_same_command_goes_on(number, code, make_config, tmp_path):
    config = make_config("local_only", *SMALL, "rounds=300")
    suite = write_suite(tmp_path, config, SUITE)
    command = [sys.executable, "-m", "fedexperts", "compare", str(suite), "--to", str(tmp_path / "out")]
    # A shell's background job ignores Ctrl-C, and so would every process below it.
    with subprocess.Popen(
        [*command, "--jobs", "2"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    ) as process:
        rounds = {"1/2": False, "2/2": False}
        lines = iter(process.stderr)
        while not all(rounds.values()):
            line = next(lines)
            rounds |= {number: True for number in rounds if f" {number} " in line and ": round " in line}
        os.killpg(process.pid, number)
        # The end of stderr is the end of every process that could write to it.
        last = list(lines)[-1]
    assert process.returncode == code
    assert last == "interrupted: finished rounds are kept; to go on: the same command\n"
    for name in ("fedavg", "local_only"):
        assert read_lines(tmp_path / "out/runs" / name / "rounds.jsonl")
        assert not (tmp_path / "out/runs" / name / "result.json").exists()
