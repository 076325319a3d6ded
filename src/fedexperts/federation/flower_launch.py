"""Submits a run to Flower and waits for its result. Starts programs; imports nothing of Flower."""

import importlib.resources
import importlib.util
import json
import logging
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch

from fedexperts import __version__
from fedexperts.config.load import resolved_toml, to_table
from fedexperts.config.schema import RunConfig
from fedexperts.data.federated import load_federated_data
from fedexperts.errors import UserError, needs_extra
from fedexperts.federation.flower_events import FAILED, RELAYED, WARNED, heard
from fedexperts.plugins import refuse_script_only
from fedexperts.run_directory import RunDirectory, write_atomically
from fedexperts.running.progress import Progress
from fedexperts.seals import read_sealed

logger = logging.getLogger(__name__)

LOCAL = "local"
"""Name of the connection to the SuperLink that a simulation starts for itself."""

PROGRAMS = Path(sys.executable).parent

LOOK_SECONDS = 1.0
LOST_SECONDS = 6.0
"""Seconds for which nobody writes a run before its server app counts as killed; its last words take a few."""

QUIET = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONUNBUFFERED": "1",
}
"""Flower must not install packages, ask for updates or report use; it is to start a turn at once, and its
log is to come line by line."""

_SUPERLINK = """
"$1/flower-superlink" --insecure --simulation --isolation process --host 127.0.0.1 --port "$2" &
"$1/flower-superexec" --insecure --runtime-api-address "127.0.0.1:$2" &
cat >/dev/null
rm -rf -- "$3"
kill -KILL 0
"""
# They live until their standard input ends, which it does however this process ends. All of them are then
# killed as one group: Flower's simulation outlives its parents, and there is nothing to save.


@dataclass(frozen=True, kw_only=True)
class FlowerLink:
    """A SuperLink that this command has started for a federation of sites."""

    environment: Mapping[str, str]
    """Environment in which Flower's programs know it."""
    sites: Mapping[str, int]
    """Node id of each site's key, by the site's name."""
    is_up: Callable[[], bool]
    """Return whether it is still there."""


class ServerLostError(UserError):
    """The server app ended, and left no reason and no result: it, or the SuperLink, was killed."""


def run_with_flower(
    config: RunConfig, run: RunDirectory, *, progress: Progress, link: FlowerLink | None = None
) -> dict[str, Any]:
    """Run, or go on with, what ``run`` holds the configuration of; returns ``result.json``'s object.

    Without ``transport.connection`` Flower's simulation runs here, one client at a time. With it the run is
    submitted to that SuperLink, whose machine must see the run directory under the same path: the server
    app writes it. ``link`` is the SuperLink of that connection, where this command has started it.

    Raises:
        UserError: Flower is not installed, refuses, or ends without a result; what it logged is in
            ``flower.log``.
    """
    _require_flower(is_simulated=not config.transport.connection)
    _require_plugins(config)
    with tempfile.TemporaryDirectory(prefix="fedexperts-flower-", ignore_cleanup_errors=True) as folder:
        app = _write_app(config, run, Path(folder) / "app", link.sites if link else {})
        if config.transport.connection:
            environment = link.environment if link else flower_environment({})
            arguments = [str(app), config.transport.connection]
            _submit(arguments, run, environment, progress, is_here=link is not None)
        else:
            with _superlink(Path(folder)) as environment:
                _submit([str(app), LOCAL, *_simulation(config)], run, environment, progress, is_here=True)
    return read_sealed(run.result)


def _require_flower(*, is_simulated: bool) -> None:
    for package in ("flwr", "ray") if is_simulated else ("flwr",):
        if importlib.util.find_spec(package) is None:
            raise needs_extra('transport.name = "flower"', package, "flower")


def _require_plugins(config: RunConfig) -> None:
    """Own algorithms and metrics must be known to processes that this one does not start."""
    if not type(config.algorithm).__module__.startswith("fedexperts."):
        refuse_script_only("algorithm", to_table(config)["algorithm"]["name"])
    for name in config.evaluation.own_metrics:
        refuse_script_only("metric", name)


def flower_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which Flower's programs find each other, past any proxy on this machine."""
    path = os.pathsep.join([str(PROGRAMS), os.environ.get("PATH", "")])
    direct = ",".join([os.environ.get("no_proxy", os.environ.get("NO_PROXY", "")), "127.0.0.1"]).strip(",")
    return {**os.environ, **QUIET, "PATH": path, "no_proxy": direct, "NO_PROXY": direct, **extra}


def _write_app(config: RunConfig, run: RunDirectory, folder: Path, sites: Mapping[str, int]) -> Path:
    """The app that is sent to every node: our pyproject.toml with this run's configuration in it."""
    template = importlib.resources.files("fedexperts") / "assets" / "flower_app" / "pyproject.toml"
    table = tomllib.loads(template.read_text(encoding="utf-8"))
    table["project"]["version"] = __version__
    is_simulated = not config.transport.connection
    table["tool"]["flwr"]["app"]["config"] = {
        "experiment": resolved_toml(config),
        "run-directory": str(run.path.absolute()),
        "run-token": _token(run),
        "personal-folder": str(run.client_folders.absolute()) if is_simulated else "",
        "sites": json.dumps(sites) if sites else "",
    }
    folder.mkdir()
    (folder / "pyproject.toml").write_text(tomli_w.dumps(table), encoding="utf-8")
    return folder


def _token(run: RunDirectory) -> str:
    """Return the name of this run on a node's disk, unlike any other's; the same when the run is resumed."""
    if not run.flower_token.exists():
        write_atomically(run.flower_token, uuid.uuid4().hex.encode())
    return run.flower_token.read_text()


def _simulation(config: RunConfig) -> list[str]:
    """One actor of ray, with one resident model, on which clients take turns."""
    with load_federated_data(config.data, config.seed) as data:
        num_clients = len(data.client_ids)
    num_gpus = int(config.model.device != "cpu" and torch.cuda.is_available())
    settings = {
        "num-supernodes": num_clients,
        "client-resources-num-cpus": config.threads,
        "init-args-num-cpus": config.threads,
        "client-resources-num-gpus": f"{num_gpus}.0",
        "init-args-num-gpus": num_gpus,
    }
    return ["--federation-config", " ".join(f"{key}={value}" for key, value in settings.items())]


@contextmanager
def _superlink(folder: Path) -> Iterator[dict[str, str]]:
    """A SuperLink of our own on a free port of the loopback; gives the environment that knows it."""
    port = free_port()
    home, log = folder / "home", folder / "superlink.log"
    home.mkdir()
    connection = {"address": f"127.0.0.1:{port}", "insecure": True}
    (home / "config.toml").write_text(tomli_w.dumps({"superlink": {"default": LOCAL, LOCAL: connection}}))
    environment = flower_environment({"FLWR_HOME": str(home)})
    with (
        log.open("w") as output,
        subprocess.Popen(
            ["sh", "-c", _SUPERLINK, "superlink", str(PROGRAMS), str(port), str(folder)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        ),
    ):
        wait_until_up(port, log)
        yield environment


def free_port() -> int:
    """Return a port of the loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_up(port: int, log: Path, seconds: float = 60.0, *, host: str = "127.0.0.1") -> None:
    """Wait until something listens on a port of this machine; raise UserError with the log's end if not."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host, port)).close()
            return
        except OSError:
            time.sleep(0.1)
    logged = _in_one_line(log.read_text().splitlines()[-5:])
    raise UserError(f"Flower's SuperLink did not start within {seconds:g} s: {logged}")


def _submit(
    arguments: Sequence[str],
    run: RunDirectory,
    environment: Mapping[str, str],
    progress: Progress,
    *,
    is_here: bool,
) -> None:
    """``flwr run`` until the run has ended; its exit code says nothing of how, ``result.json`` does.

    Where the server app is a process of this machine (``is_here``), it is missed within seconds of its death;
    Flower takes a minute.
    """
    flwr, listener, connection = _Flwr(environment), _Listener(progress), arguments[1]
    look = _Lookout(run, listener) if is_here else None
    try:
        with (run.path / "flower.log").open("a", encoding="utf-8") as log:
            for line in flwr.lines("run", *arguments, "--stream", look=look):
                log.write(listener.without_events(line))
        while not listener.failure and not run.result.exists():
            if look and look.is_lost:
                flwr.stop(listener.run_id, connection)
                break
            if not flwr.is_going_on(listener.run_id, connection):
                break
            time.sleep(1.0)  # the stream of the log broke, the run did not
    except BaseException:
        flwr.stop(listener.run_id, connection)
        raise
    if listener.failure:
        raise UserError(listener.failure)
    if not run.result.exists():
        raise _lost(run, listener)


def _lost(run: RunDirectory, listener: "_Listener") -> UserError:
    """Return in a sentence that there is no result: the server app was lost, or never began."""
    if not listener.run_id:
        return UserError(f"Flower did not take the run: {_in_one_line(listener.tail)}")
    return ServerLostError(
        f"the server's process in Flower ended before the run had finished; {run.path / 'flower.log'} has "
        f"what Flower logged. Finished rounds are kept: --resume {run.path} goes on after them"
    )


class _Listener:
    """Reads the log of a run and hands on what the server app says in it."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.run_id = ""
        self.failure = ""
        self.has_begun = False
        """Whether the server app has begun to write the run."""
        self.tail = deque[str](maxlen=5)
        """The last lines that were no events."""

    def without_events(self, line: str) -> str:
        """The line, or nothing of it if it was an event."""
        event, values = heard(line) or ("", [])
        if event == FAILED:
            self.failure = values[0]
        elif event == WARNED:
            logger.warning(values[0])
        elif event in RELAYED:
            self.has_begun = True
            getattr(self._progress, event)(*values)
        else:
            self.tail.append(line)
            started = re.search(r"Successfully started run (\d+)", line)
            self.run_id = started[1] if started else self.run_id
            return line
        return ""


class _Lookout:
    """Looks, while the log of a run is read, whether anybody still writes the run."""

    def __init__(self, run: RunDirectory, listener: _Listener) -> None:
        self._run, self._listener, self._done = run, listener, threading.Event()
        self.is_lost = False

    @contextmanager
    def over(self, process: subprocess.Popen[str]) -> Iterator[None]:
        """End a process, which reads the log, once nobody does."""
        watcher = threading.Thread(target=self._watch, args=(process,), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            self._done.set()
            watcher.join()

    def _watch(self, process: subprocess.Popen[str]) -> None:
        alone = 0.0
        while not self._done.wait(LOOK_SECONDS):
            is_written = not self._listener.has_begun or self._run.is_locked()
            alone = 0.0 if is_written else alone + LOOK_SECONDS
            if alone >= LOST_SECONDS and not self._run.result.exists():
                self.is_lost = True
                process.terminate()
                return


class _Flwr:
    """The command line of Flower."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def lines(self, *arguments: str, look: _Lookout | None) -> Iterator[str]:
        """The lines of a command's output as they come; the command ends when nobody listens any more."""
        with subprocess.Popen(
            [str(PROGRAMS / "flwr"), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self._environment,
        ) as process:
            assert process.stdout is not None
            try:
                with look.over(process) if look else nullcontext():
                    yield from process.stdout
            finally:
                process.terminate()

    def is_going_on(self, run_id: str, connection: str) -> bool:
        """Whether the run has not ended, as far as the SuperLink can be asked."""
        answer = self._call("list", connection, "--run-id", run_id, "--format", "json") if run_id else ""
        try:
            return not json.loads(answer)["runs"][0]["status"].startswith("finished")
        except (ValueError, LookupError):
            return False

    def stop(self, run_id: str, connection: str) -> None:
        """Stop the run, if it began."""
        if run_id:
            self._call("stop", run_id, connection)

    def _call(self, *arguments: str) -> str:
        command = [str(PROGRAMS / "flwr"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=self._environment).stdout


def _in_one_line(lines: Iterable[str]) -> str:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", " ".join(lines))
    return " ".join(plain.split()) or "it logged nothing"
