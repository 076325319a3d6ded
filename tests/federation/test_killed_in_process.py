"""A run in one process, killed with SIGKILL again and again: it ends as the one left alone."""

import random
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from deployment import deadly, plan, points_of_run

from fedexperts.config.load import resolved_toml
from fedexperts.run_directory import read_json, read_lines
from fedexperts.running.experiment import run_experiment

RUN = "fedexperts\0run\0"


def identity(run):
    """All that is the same in every run of one configuration: the files of the log but for their seconds."""
    result = read_json(run / "result.json")
    names = ("server_state_sha256", "personal_sha256", "mean", "exam", "bytes", "failures", "refused")
    lines = [*read_lines(run / "rounds.jsonl"), *read_lines(run / "clients.jsonl")]
    told = [{name: value for name, value in line.items() if name != "seconds"} for line in lines]
    return {name: result[name] for name in names} | {
        "clock": result.get("clock", {}).get("seconds"),
        "lines": told,
    }


class Killed:
    """The command of a run, begun once and resumed ever after."""

    def __init__(self, config, folder):
        folder.mkdir()
        self.folder, self.num_starts = folder, 0
        (folder / "experiment.toml").write_text(resolved_toml(config))

    def start(self):
        is_begun = (self.folder / "run" / "config.toml").exists()
        what = ["--resume", "run"] if is_begun else ["experiment.toml", "--to", "run"]
        command = [sys.executable, "-m", "fedexperts", "run", *what, "--quiet"]
        self.num_starts += 1
        return subprocess.Popen(command, cwd=self.folder, env=deadly(self.folder), stdout=subprocess.DEVNULL)


def has_ended(process, seconds):
    """Whether a process ends within seconds."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    return process.returncode is not None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_is_killed_at_twenty_points_ends_in_the_same_bits(make_config, tmp_path, quiet):
    small = ("rounds=3", "data.partition.num_clients=2", "training.num_local_steps=1")
    config = make_config("flex", *small, "evaluation.exam.num_questions=2")
    run_experiment(config, tmp_path / "whole", progress=quiet)
    killed = Killed(config, tmp_path / "killed")
    points = points_of_run(RUN, "fedexperts.running.workbench", RUN)
    for point in points:
        plan(killed.folder, "run", (point, [RUN]))
        assert killed.start().wait() == -9, f"it did not die at {point}"
    assert killed.start().wait() == 0
    assert killed.num_starts == 21
    assert identity(killed.folder / "run") == identity(tmp_path / "whole")


SOAK = (
    "rounds=100",
    "data.partition.num_clients=4",
    "training.num_local_steps=1",
    "training.batch_size=2",
    "evaluation.max_test_examples=1",
    "evaluation.exam.source=none",
    "cohort.on_failure=continue",
    "clock.device=custom",
    *(f"clock.custom.{name}=1" for name in ("half_tflops", "float32_tflops", "memory_gb_per_s")),
    *(f"clock.custom.{name}=1" for name in ("host_gb_per_s", "disk_gb_per_s", "memory_gb")),
    "clock.custom.download_mbit=1e-4",
    "clock.custom.upload_mbit=1e-4",
    "clock.available_hours=16.8",
    "clock.available_spread=24",
    "transport.round_seconds=1800",
)
"""By the simulated clock a round takes half an hour, for slow links, and three of ten clients sleep at any
time: they miss it. A hundred rounds are two days."""
NUM_KILLS = 10


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_hundred_rounds_with_dropout_and_random_kills_end_in_the_same_bits(make_config, tmp_path, quiet):
    config, rng, started = make_config("flex", *SOAK), random.Random(0), time.monotonic()
    whole = run_experiment(config, tmp_path / "whole", progress=quiet)
    killed = Killed(config, tmp_path / "killed")
    rounds = killed.folder / "run" / "rounds.jsonl"
    for last_round in sorted(rng.sample(range(95), NUM_KILLS)):
        process = killed.start()
        while len(read_lines(rounds)) < last_round:
            assert not has_ended(process, 0.05)
        assert not has_ended(process, rng.uniform(0.0, 0.3))
        process.kill()
        process.wait()
    assert killed.start().wait() == 0
    assert identity(killed.folder / "run") == identity(tmp_path / "whole")
    share = whole["refused"]["late"] / 400
    print(f"{share:.0%} of 400 turns dropped, {NUM_KILLS} kills, {time.monotonic() - started:.0f} s")
    assert 0.2 < share < 0.4
