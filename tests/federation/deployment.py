"""A server and two sites as processes, as their users start them, and started again whenever they end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

from fedexperts.config.load import resolved_toml
from fedexperts.data.tinyworld import CATEGORIES, make_example
from fedexperts.federation.keys import make_keys
from fedexperts.run_directory import read_json, read_lines

SITES = ("alder", "birch")
DEADLY = Path(__file__).parent / "deadly"
SERVER_APP, SUPERLINK = "flwr-serverapp", "flower-superlink"
SITE, NODE, WORKER = "fedexperts\0site\0", "flower-supernode", "flower_worker"


@dataclass(frozen=True)
class Point:
    """A moment of a run, by what a process is about to do."""

    event: str
    place: str
    """End of the file's path, or the module."""
    at: str = ""
    """Program that is about to do it."""
    after: str = ""
    """A file that must be there already, by its pattern in the deployment's folder."""


def committed(round_number):
    """The file that says that a round counts; the round after it is under way while the file is there."""
    return f"run/state/checkpoint-round-{round_number:05d}.json"


def named(number, what):
    return f"{what}-round-{number:05d}.safetensors"


def points_of_run(at, first, trained):
    """Twenty moments of a run of three rounds, from an import to the result, in what writes it.

    ``first`` is a module that is imported at the start; the files of ``trained`` are written by a client in
    its turn of a round.
    """
    start = [
        Point("import", first),
        Point("os.rename", "run/environment.json"),
        Point("os.rename", "run/base.json"),
        Point("os.rename", named(0, "run/state/state")),
        Point("os.rename", "run/checkpoint.json"),
    ]
    rounds = [
        (
            Point("os.rename", named(number, "personal"), at=trained),
            Point("open", "run/clients.jsonl", after=committed(number - 1)),
            Point("open", "run/rounds.jsonl", after=committed(number - 1)),
            Point("os.rename", named(number, "run/state/state")),
            Point("os.rename", "run/checkpoint.json", after=committed(number)),
        )
        for number in (1, 2, 3)
    ]
    points = [*[*start, *chain(*rounds)][:19], Point("os.rename", "run/result.json")]
    return [replace(point, at=point.at or at) for point in points]


def deadly(folder):
    """Environment of processes that die as ``folder`` has plans for it."""
    path = os.pathsep.join([str(DEADLY), str(Path(__file__).parents[2] / "src")])
    return {**os.environ, "DEADLY_FOLDER": str(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def plan(folder, name, *queue):
    """Let programs die at points, one after the other: each pair of ``queue`` is a point and its programs."""
    plans = [vars(point) | {"kill": kill} for point, kill in queue]
    (folder / f"plan-{name}.part").write_text(json.dumps(plans))
    (folder / f"plan-{name}.part").rename(folder / f"plan-{name}.json")


@dataclass
class Deployment:
    """All of a federation in one folder."""

    folder: Path
    port: int
    host: str = "127.0.0.1"
    """Address of the server."""
    prefixes: dict = field(default_factory=dict)
    """Words before a program's command, by name: what starts it on another host."""
    programs: dict = field(default_factory=dict)
    """Running programs of the users, by name."""
    num_starts: dict = field(default_factory=dict)

    @property
    def run(self):
        return self.folder / "run"

    def start(self, name):
        command = [
            *self.prefixes.get(name, ()),
            *(sys.executable, "-m", "fedexperts", *self.arguments(name)),
        ]
        with (self.folder / f"{name}.log").open("a") as log:
            self.programs[name] = subprocess.Popen(
                command,
                cwd=self.folder,
                env=deadly(self.folder),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.num_starts[name] = self.num_starts.get(name, 0) + 1

    def arguments(self, name):
        address = f"{self.host}:{self.port}"
        if name == "server":
            is_begun = (self.run / "config.toml").exists()
            what = ["--resume", "run"] if is_begun else ["experiment.toml", "--to", "run"]
            return ["server", *what, "--keys", "keys/server", "--listen", address, "--quiet"]
        site = ["--data", f"{name}.jsonl", "--folder", f"site-{name}", "--keys", f"keys/{name}"]
        return ["site", "--server", address, *site, 'tell=["counts"]']

    def go_on(self, plans, seconds, least=1.0):
        """Start again what has ended, until there is a result; each queue of plans goes in order.

        At least this share of the points has to find whom it kills.
        """
        deadline = time.monotonic() + seconds
        for name, queue in plans.items():
            plan(self.folder, name, *queue)
        while self.programs["server"].poll() != 0:
            assert time.monotonic() < deadline, self.last_words()
            for name, process in list(self.programs.items()):
                if process.poll() not in (None, 0):
                    self.start(name)
            time.sleep(0.05)
        assert not list(self.folder.glob("plan-*.json")), "a point did not come"
        deaths = read_lines(self.folder / "deaths.jsonl")
        assert sum(death["killed"] > 0 for death in deaths) >= least * sum(map(len, plans.values())), deaths

    def wait_for(self, condition, seconds):
        """Wait until ``condition()`` holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.last_words()
            time.sleep(0.02)

    def last_words(self):
        logs = [self.folder / f"{name}.log" for name in self.programs]
        logs += [*self.folder.glob("site-*/site.log"), self.run / "flower.log"]
        return "\n".join(f"{path}:\n{path.read_text()[-1500:]}" for path in logs if path.exists())

    def identity(self):
        """Return what a run must share with an uninterrupted one, at the server and at its sites."""
        result = read_json(self.run / "result.json")
        names = ("server_state_sha256", "personal_sha256", "mean", "exam", "bytes", "failures")
        found = {name: result[name] for name in names}
        for place in (self.run, *(next((self.folder / f"site-{site}" / "runs").iterdir()) for site in SITES)):
            lines = read_lines(place / "rounds.jsonl")
            found[f"losses at {place.relative_to(self.folder).parts[0]}"] = [
                (line["round"], line["train_loss"]) for line in lines
            ]
        return found


@contextmanager
def deployed(config, folder, host="127.0.0.1", prefixes=None):
    """A server and its sites, which end with the block."""
    folder.mkdir(parents=True)
    (folder / "experiment.toml").write_text(resolved_toml(config))
    make_keys(folder / "keys", list(SITES), hosts=[host])
    for number, site in enumerate(SITES):
        taught = [make_example(seed=0, category=CATEGORIES[number], index=index) for index in range(20)]
        rows = [{"instruction": e.instruction, "context": e.context, "response": e.response} for e in taught]
        (folder / f"{site}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        deployment = Deployment(folder, probe.getsockname()[1], host, prefixes or {})
    try:
        for name in ("server", *SITES):
            deployment.start(name)
        yield deployment
    finally:
        for process in deployment.programs.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in deployment.programs.values():
            process.wait(timeout=30)
