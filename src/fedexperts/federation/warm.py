"""Talk to the worker of a Flower node, which keeps data and model loaded; start it where there is none.

Requests pass over a socket in a folder that the owner alone can enter. Both ends prove that they know a
token, which is in a file of the same kind.
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

WORKER_FILE = "worker.json"
"""File in a node's folder: socket and token of its worker, and the process with which the worker ends."""

START_SECONDS = 120.0
"""Longest wait for a worker that was started; it listens before it loads anything."""

SERVER = "FEDEXPERTS_SERVER"
"""Environment variable of a site's processes: HOST:PORT of the server, to notice that it has gone."""

TAKEN, OTHER = b"taken", b"other"
"""Answers to a request: its turn begins; or the worker is of another run and ends."""


def ask_worker(folder: Path, request: Mapping[str, Any], blob: bytes, seconds: float) -> bytes:
    """Return the worker's answer to a download; the turn ends early if this process does.

    A worker that is killed is started again, once: a turn can be taken twice, with the same result.

    Args:
        folder: of the node.
        request: what the worker has to know beside the download.
        blob: the download.
        seconds: how long the answer is waited for.

    Raises:
        RuntimeError: the worker cannot be started, or ended during the turn, twice.
    """
    header = json.dumps({**request, "seconds": seconds}).encode()
    parent, refused = os.getppid(), list[str]()
    while len(set(refused)) == len(refused):  # each may happen once
        with _running(folder, parent) or _started(folder, parent) as connection:
            try:
                connection.send_bytes(header)
                if connection.recv_bytes() == TAKEN:
                    connection.send_bytes(blob)
                    return connection.recv_bytes()
                refused.append("is of another run")
            except (EOFError, OSError):
                refused.append("ended during the turn")
        (folder / WORKER_FILE).unlink(missing_ok=True)
    raise RuntimeError(f"the worker of this node {refused[-1]}")


def _running(folder: Path, parent: int) -> Connection | None:
    """Return a connection to the worker of the SuperNode under which this process runs, if there is one."""
    try:
        known = json.loads((folder / WORKER_FILE).read_text())
        if known["parent"] != parent:
            return None
        return Client(known["socket"], family="AF_UNIX", authkey=bytes.fromhex(known["token"]))
    except (OSError, EOFError, ValueError, LookupError, AuthenticationError):
        return None


def _started(folder: Path, parent: int) -> Connection:
    """Start a worker that ends with the process ``parent``; return a connection to it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / WORKER_FILE).unlink(missing_ok=True)
    command = [sys.executable, "-m", "fedexperts.federation.flower_worker", str(folder), str(parent)]
    no_input = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
    process = os.posix_spawn(sys.executable, command, os.environ, file_actions=[no_input], setsid=True)
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and os.waitpid(process, os.WNOHANG) == (0, 0):
        connection = _running(folder, parent)
        if connection:
            return connection
        time.sleep(0.05)
    raise RuntimeError("the worker of this node could not be started")
