"""The worker of a node: its turns, when they end early, and how it starts and ends."""

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from multiprocessing import Pipe
from multiprocessing.connection import Listener
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from test_flower_apps import run_over_grid

from fedexperts.federation import flower_worker
from fedexperts.federation.flower_worker import Worker, _serve_all, watched
from fedexperts.federation.interruption import INTERRUPTION
from fedexperts.federation.warm import OTHER, SERVER, TAKEN, WORKER_FILE, _running, _started, ask_worker
from fedexperts.messages import decode_upload
from fedexperts.run_directory import read_lines

REQUEST = {"run_config": {"experiment": ""}, "node_config": {}, "refused": "", "seconds": 60.0}


def served(worker, request=REQUEST, blob=b"garbage"):
    """What a worker says to one request."""
    here, there = Pipe()
    here.send_bytes(json.dumps(request).encode())
    here.send_bytes(blob)
    worker.serve(there)
    said = [here.recv_bytes()]
    return [*said, here.recv_bytes()] if said == [TAKEN] else said


def test_a_worker_answers_its_run_and_ends_at_another():
    worker = Worker()
    _, reply = served(worker)
    assert "message of 7 bytes cannot be read" in decode_upload(reply).failure
    _, reply = served(worker, REQUEST | {"refused": "no message of ours"})
    assert decode_upload(reply).failure == "no message of ours"
    assert not worker.is_over
    assert served(worker, REQUEST | {"run_config": {"experiment": "other"}}) == [OTHER]
    assert worker.is_over


@pytest.fixture
def ended(monkeypatch):
    """Reason with which a turn is ended, at the latest after 10 s; ``watch`` gives it."""
    monkeypatch.setattr(flower_worker, "LOOK_SECONDS", 0.001)

    def watch(connection, seconds=60.0, server=""):
        reasons, told = [], threading.Event()

        def end_turn(reason):
            reasons.append(reason)
            told.set()

        with watched(connection, end_turn, seconds, server):
            assert told.wait(10.0)
        return reasons

    return watch


def test_a_turn_ends_when_the_process_that_asked_has_gone(ended):
    here, there = Pipe()
    here.close()
    assert ended(there) == ["the process that asked for it has gone"]


def test_a_turn_ends_with_the_time_to_answer(ended):
    _here, there = Pipe()
    assert ended(there, seconds=0.0) == ["the time to answer is over"]


def test_a_turn_ends_when_the_server_has_gone(ended):
    _here, there = Pipe()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = f"127.0.0.1:{listening.getsockname()[1]}"
        assert flower_worker.is_reachable(server)
    assert ended(there, server=server) == [f"the server {server} has gone"]


def test_an_interrupted_turn_ends_at_its_next_step_and_leaves_no_trace(make_config, tmp_path):
    """The client goes on from what it kept before, as if it had been away."""

    def interrupted(position, node):
        def answer(message):
            if (position, message.metadata.group_id) == (1, "train 1"):
                INTERRUPTION.ask("nobody waits")
            try:
                return node(message)
            finally:
                INTERRUPTION.clear()

        return answer

    config = make_config(
        "flex", "cohort.on_failure=continue", "transport.name=flower", "evaluation.matrix=false"
    )
    result = run_over_grid(config, tmp_path / "run", wrap=interrupted)
    assert result["failures"] == [
        {"round": 1, "client": "client-001", "reason": "its turn was ended: nobody waits"}
    ]
    turns = [(line["round"], line["client"]) for line in read_lines(tmp_path / "run" / "clients.jsonl")]
    assert (1, "client-001") not in turns
    assert (2, "client-001") in turns
    assert result["frozen_unchanged"]


def test_a_running_worker_is_asked_over_its_socket(tmp_path):
    request = {key: value for key, value in REQUEST.items() if key != "seconds"}

    def serve_once():
        with own.accept() as connection:
            Worker().serve(connection)

    with TemporaryDirectory() as place, Listener(f"{place}/worker", family="AF_UNIX", authkey=b"key") as own:
        known = {"socket": own.address, "token": b"key".hex(), "parent": os.getppid()}
        (tmp_path / WORKER_FILE).write_text(json.dumps(known))
        serving = threading.Thread(target=serve_once, daemon=True)
        serving.start()
        reply = ask_worker(tmp_path, request, b"garbage", seconds=60.0)
        serving.join(10.0)
    assert "message of 7 bytes cannot be read" in decode_upload(reply).failure
    assert json.loads((tmp_path / WORKER_FILE).read_text()) == known, "no other was started"
    assert _running(tmp_path, os.getppid() + 1) is None


def test_a_worker_watches_the_server_that_its_environment_names(monkeypatch):
    watched_ones = []

    class Over:
        is_over = True

        def __init__(self, server):
            watched_ones.append(server)

    monkeypatch.setattr(flower_worker, "Worker", Over)
    monkeypatch.delenv(SERVER, raising=False)
    _serve_all(None)
    monkeypatch.setenv(SERVER, "server.example:9092")
    _serve_all(None)
    assert watched_ones == ["", "server.example:9092"]


def test_a_worker_that_does_not_start_is_told_and_its_folder_is_its_owners_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RuntimeError, match="the worker of this node could not be started"):
        _started(tmp_path / "node", os.getpid())
    assert stat.S_IMODE((tmp_path / "node").stat().st_mode) == 0o700


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_one_worker_answers_message_after_message_and_ends_with_its_supernode(tmp_path):
    request = {key: value for key, value in REQUEST.items() if key != "seconds"}
    for _ in range(2):
        reply = ask_worker(tmp_path, request, b"garbage", seconds=60.0)
        assert "cannot be read" in decode_upload(reply).failure
        known = json.loads((tmp_path / WORKER_FILE).read_text())
        assert known["parent"] == os.getppid()
        assert (tmp_path / WORKER_FILE).stat().st_mode & 0o777 == 0o600
    assert json.loads((tmp_path / WORKER_FILE).read_text()) == known
    ask_worker(tmp_path, request | {"run_config": {"experiment": "other"}}, b"", seconds=60.0)
    assert json.loads((tmp_path / WORKER_FILE).read_text())["socket"] != known["socket"]
    node = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    _started(tmp_path / "other", node.pid).close()
    place = Path(json.loads((tmp_path / "other" / WORKER_FILE).read_text())["socket"])
    node.communicate()
    deadline = time.monotonic() + 60
    while place.exists():
        assert time.monotonic() < deadline, "the worker has not ended"
        time.sleep(0.1)
