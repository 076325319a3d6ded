"""Take the turns of a Flower node in one process, which keeps data and model from message to message.

``python -m fedexperts.federation.flower_worker FOLDER PID`` is started by the client app at the first
message, and ends with the process PID, which the SuperNode has started. A turn ends at its next local step
when the client app, the server or the time to answer has gone.
"""

import importlib
import json
import os
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

from fedexperts.federation.warm import OTHER, SERVER, TAKEN, WORKER_FILE
from fedexperts.run_directory import write_atomically

LOOK_SECONDS = 0.5
PROBES = 4
"""Looks without a server, one after the other, after which it has gone."""


def main(folder: Path, parent: int) -> None:
    """Listen, and serve one request after the other, until the process ``parent`` has ended."""
    os.umask(0o077)
    with tempfile.TemporaryDirectory(prefix="fedexperts-", ignore_cleanup_errors=True) as made:
        place = Path(made)
        threading.Thread(target=_end_with, args=(parent, place), daemon=True).start()
        token = secrets.token_bytes(32)
        with Listener(str(place / "worker"), family="AF_UNIX", authkey=token) as listener:
            known = {"socket": str(place / "worker"), "token": token.hex(), "parent": parent}
            write_atomically(folder / WORKER_FILE, json.dumps(known).encode(), is_private=True)
            _serve_all(listener)


def _serve_all(listener: Listener) -> None:
    """Serve one request after the other until one of another run comes."""
    worker = Worker(os.environ.get(SERVER, ""))
    while not worker.is_over:
        try:
            with listener.accept() as connection:
                worker.serve(connection)
        except (AuthenticationError, EOFError, OSError) as error:
            print(f"a request to the worker broke off: {error!r}", file=sys.stderr, flush=True)


def _end_with(parent: int, place: Path) -> None:
    while Path(f"/proc/{parent}").exists():
        time.sleep(LOOK_SECONDS)
    shutil.rmtree(place, ignore_errors=True)
    os._exit(0)


class Worker:
    """Answers the messages of one run."""

    def __init__(self, server: str = "") -> None:
        """Prepare for the run of the first request; ``server`` is HOST:PORT, where that is known."""
        self._server = server
        self._run: dict[str, Any] = {}
        self.is_over = False
        """Whether a request of another run has come: this process holds the model of its own."""

    def serve(self, connection: Connection) -> None:
        """Answer one request."""
        request = json.loads(connection.recv_bytes())
        seconds, refused = request.pop("seconds"), request.pop("refused")
        self._run = self._run or request
        self.is_over = self._run != request
        if self.is_over:
            connection.send_bytes(OTHER)
            return
        connection.send_bytes(TAKEN)
        blob = connection.recv_bytes()
        # Imported here: the client app waits for a worker that listens, and torch takes its time.
        answers = importlib.import_module("fedexperts.federation.flower_answers")
        interruption = importlib.import_module("fedexperts.federation.interruption").INTERRUPTION
        interruption.clear()
        with watched(connection, interruption.ask, seconds, self._server):
            reply = answers.answer_bytes(blob, refused=refused, **request)
        connection.send_bytes(reply)


@contextmanager
def watched(
    connection: Connection, end_turn: Callable[[str], None], seconds: float, server: str
) -> Iterator[None]:
    """Call ``end_turn`` with a reason as soon as nobody waits for the turn inside the block."""
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(connection, end_turn, seconds, server, done), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _watch(
    connection: Connection,
    end_turn: Callable[[str], None],
    seconds: float,
    server: str,
    done: threading.Event,
) -> None:
    deadline, missed = time.monotonic() + seconds, 0
    while not done.wait(LOOK_SECONDS):
        missed = missed + 1 if server and not is_reachable(server) else 0
        for is_so, reason in (
            (connection.poll(), "the process that asked for it has gone"),
            (time.monotonic() > deadline, "the time to answer is over"),
            (missed >= PROBES, f"the server {server} has gone"),
        ):
            if is_so:
                end_turn(reason)
                return


def is_reachable(server: str) -> bool:
    """Return whether something listens at HOST:PORT."""
    host, _, port = server.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2.0).close()
        return True
    except OSError:
        return False


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
