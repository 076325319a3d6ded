"""Real Flower: ``flwr run`` in simulation, and a SuperLink with three SuperNodes on the loopback."""

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from test_every_method import config_of

from fedexperts.cli.program import main
from fedexperts.config.load import build_config
from fedexperts.errors import UserError
from fedexperts.federation import flower_launch
from fedexperts.run_directory import read_json, read_lines
from fedexperts.running.experiment import run_experiment

PROGRAMS = Path(sys.executable).parent
EXAMPLE_APP = Path(__file__).parents[2] / "examples" / "flower_app"
SLOW, WITHIN = pytest.mark.slow, pytest.mark.timeout(900)


def same(run):
    """What a run over Flower must share with the run in process."""
    result = read_json(run / "result.json")
    names = ("server_state_sha256", "personal_sha256", "mean", "exam", "bytes")
    losses = [line["train_loss"] for line in read_lines(run / "rounds.jsonl")]
    return {name: result[name] for name in names} | {"losses": losses}


def test_without_flower_the_extra_is_named(make_config, tmp_path, quiet, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"package flwr: run pip install -e '\.\[flower\]'"):
        run_experiment(make_config("flex", "transport.name=flower"), tmp_path / "run", progress=quiet)


OF_EACH_KIND = ("fedadam", "fedavg", "flex", "flux", "scaffold")
"""A server's optimiser, nothing but the mean, personal tensors, roles and tuned experts, clients' states."""


def small(make_config, method, *overrides):
    return config_of(make_config, method, "data.partition.num_clients=3", *overrides)


@SLOW
@WITHIN
@pytest.mark.parametrize("method", OF_EACH_KIND)
def test_the_simulation_is_the_run_in_process(method, make_config, tmp_path, quiet):
    run_experiment(small(make_config, method), tmp_path / "inprocess", progress=quiet)
    config = small(make_config, method, "transport.name=flower")
    run_experiment(config, tmp_path / "flower", progress=quiet)
    assert same(tmp_path / "flower") == same(tmp_path / "inprocess")


@SLOW
@WITHIN
def test_a_fault_in_the_server_app_is_one_sentence_here(make_config, tmp_path, quiet):
    """Flower's own command ends with 0 whatever became of the run."""
    config = make_config("flex", "transport.name=flower", "evaluation.exam.source=nowhere.jsonl")
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        run_experiment(config, tmp_path / "run", progress=quiet)
    assert not (tmp_path / "run" / "result.json").exists()


@SLOW
@WITHIN
def test_flwr_run_in_the_folder_of_the_example_app_is_the_run_in_process(tmp_path, monkeypatch, quiet):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link").mkdir()
    with flower_launch._superlink(tmp_path / "link") as environment:
        flower = flower_launch._Flwr(environment)
        command = [str(PROGRAMS / "flwr"), "run", ".", "--stream"]
        log = subprocess.run(command, cwd=EXAMPLE_APP, env=environment, capture_output=True, text=True).stdout
        run_id = re.search(r"Successfully started run (\d+)", log)[1]
        run = tmp_path / "fedexperts-runs" / f"flower-{run_id}"
        # On a busy machine Flower ends the stream of a log before the run has ended.
        while not (run / "result.json").exists() and flower.is_going_on(run_id, flower_launch.LOCAL):
            time.sleep(0.5)
    assert main(["report", str(run)]) == main(["doctor", str(run)]) == 0
    table = tomllib.loads((EXAMPLE_APP / "pyproject.toml").read_text())
    experiment = tomllib.loads(table["tool"]["flwr"]["app"]["config"]["experiment"])
    run_experiment(build_config(experiment, "example"), tmp_path / "inprocess", progress=quiet)
    assert same(run) == same(tmp_path / "inprocess")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@contextmanager
def running(command, log):
    """A program with all that it starts, killed at the end whatever happens."""
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(PROGRAMS / command[0]), *command[1:]],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until(condition, what, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} within {seconds} s"
        time.sleep(0.2)


def answers(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
            return True
    except OSError:
        return False


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    """A SuperLink and three SuperNodes as processes of this machine; gives the folder of the nodes."""
    tmp_path, patch = tmp_path_factory.mktemp("federation"), pytest.MonkeyPatch()
    home = tmp_path / "flwr_home"
    home.mkdir()
    port = free_port()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "lab"\n[superlink.lab]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    for name, value in {**flower_launch.QUIET, "FLWR_HOME": str(home)}.items():
        patch.setenv(name, value)
    patch.setenv("PATH", str(PROGRAMS), prepend=os.pathsep)
    with ExitStack() as stack:
        link = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", port]
        stack.enter_context(running(link, tmp_path / "superlink.log"))
        wait_until(lambda: answers(port), "the SuperLink answers")
        for position in range(3):
            own = f'partition-id={position} num-partitions=3 personal-folder="{tmp_path}/node-{position}"'
            node = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}"]
            node += ["--host", "127.0.0.1", "--port", free_port(), "--node-config", own]
            stack.enter_context(running(node, tmp_path / f"node-{position}.log"))
        yield tmp_path
    patch.undo()


@SLOW
@WITHIN
@pytest.mark.parametrize("method", OF_EACH_KIND)
def test_a_deployment_on_the_loopback_is_the_run_in_process(method, federation, make_config, tmp_path, quiet):
    run_experiment(small(make_config, method), tmp_path / "inprocess", progress=quiet)
    before = {path.name for path in federation.glob("node-*/*")}
    config = small(make_config, method, "transport.name=flower", "transport.connection=lab")
    started = time.monotonic()
    run_experiment(config, tmp_path / "flower", progress=quiet)
    print(f"deployment of {method}: {time.monotonic() - started:.0f} s")
    assert same(tmp_path / "flower") == same(tmp_path / "inprocess")
    assert not (tmp_path / "flower" / "clients").exists()
    (token,) = {path.name for path in federation.glob("node-*/*") if path.is_dir()} - before
    for position in range(3):
        kept = [path.name for path in (federation / f"node-{position}" / token).iterdir()]
        assert kept == [f"client-{position:03d}"]
