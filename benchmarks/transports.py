"""Rounds of a job in one process, in Flower's simulation, and among three sites over SuperLink.

The job is FedAvg on LoRA, and ends in the same server state on all three; the benchmark stops unless it does.
Beside them stands the usual recipe, in one process and with no transport: a new TRL trainer for every client
and round.
"""

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.setting import model_source, one_thread
from benchmarks.tables import Figures, Table
from fedexperts.config.load import build_config
from fedexperts.config.toml import render_toml
from fedexperts.costs.stopwatch import Stopwatch
from fedexperts.data.tinyworld import CATEGORIES, make_example
from fedexperts.moe.surgery.seam import current
from fedexperts.run_directory import read_json, read_lines
from fedexperts.running.workbench import open_workbench

SITES = ("alder", "birch", "cedar")
MARK = "FEDEXPERTS_BENCHMARK"
"""Variable in the environment of every process that a command starts, however deep."""
PROGRAMS = {
    "flower-superlink": "SuperLink",
    "flower-superexec": "SuperExec",
    "flower-supernode": "SuperNode",
    "flwr-serverapp": "server app",
    "flwr-simulation": "simulation",
    "flower_worker": "warm worker of a site",
    "flwr-clientapp": "client app",
    "ray::": "ray",
    "raylet": "ray",
    "gcs_server": "ray",
    "/ray/": "ray",
    "flwr": "flwr run",
    "fedexperts": "fedexperts",
}
"""Parts of command lines, the first of which names a process."""
SAMPLE_SECONDS = 0.2


def measure(model: str, *, rounds: int = 5, num_local_steps: int = 5) -> dict[str, Any]:
    """Seconds and bytes of rounds, and anonymous megabytes (10^6 bytes) of each process at its peak."""
    with one_thread(), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_data(folder)
        tables = {
            place: _table(model, place, rounds, num_local_steps)
            for place in ("process", "simulation", "sites")
        }
        for place, table in tables.items():
            (folder / f"{place}.toml").write_text(render_toml(table))
        recipe = _recipe(folder, model, tables["process"])
        found = {place: _run(folder, place) for place in tables}
    states = {one["server_state_sha256"] for one in found.values()}
    if len(states) > 1:
        raise RuntimeError(f"the server's states differ between transports: {states}")
    return {"rounds": rounds, "num_local_steps": num_local_steps, "places": found, "recipe": recipe}


def _write_data(folder: Path) -> None:
    for category, site in zip(CATEGORIES, SITES, strict=False):
        taught = [make_example(seed=0, category=category, index=index) for index in range(100)]
        rows = [{"instruction": e.instruction, "context": e.context, "response": e.response} for e in taught]
        (folder / f"{site}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _table(model: str, place: str, rounds: int, num_local_steps: int) -> dict[str, Any]:
    is_split = place != "sites"
    return {
        "threads": 1,
        "rounds": rounds,
        "model": {"name": model, "device": "cpu"},
        "data": {
            "source": [f"{site}.jsonl" for site in SITES] if is_split else "site",
            "partition": {"kind": "file"} if is_split else {"kind": "site", "num_clients": len(SITES)},
        },
        "training": {"num_local_steps": num_local_steps, "batch_size": 8},
        "algorithm": {"name": "fedavg"},
        "transport": {"name": "flower"} if place == "simulation" else {},
        "evaluation": {
            "metrics": ["loss"],
            "max_test_examples": 1,
            "matrix": False,
            "exam": {"source": "none"},
            "retention": {"neutral": "none"},
        },
    }


def _run(folder: Path, place: str) -> dict[str, Any]:
    """Run the job by its command, and read what the run directory says."""
    with _watched(folder) as peaks:
        if place == "sites":
            _federate(folder)
        else:
            _wait(folder, _start(folder, place, "run", f"{place}.toml", "--to", place, "--quiet"), place)
    result = read_json(folder / place / "result.json")
    lines, clients = (read_lines(folder / place / f"{name}.jsonl") for name in ("rounds", "clients"))
    seconds = [line["seconds"]["total"] for line in lines]
    later = [line for line in clients if line["round"] > 1] or clients
    num_bytes = sum(line["upload_bytes"] + line["download_bytes"] for line in clients)
    return {
        "server_state_sha256": result["server_state_sha256"],
        "first_round": seconds[0],
        "round": statistics.median(seconds[1:] or seconds),
        "train": statistics.median(line["seconds"]["train"] for line in lines),
        "under_way": statistics.median(line["seconds"]["transport"] for line in later),
        "bytes_per_round": num_bytes / len(lines),
        "peak_megabytes": {name: max(own.values()) / 1e6 for name, own in sorted(peaks.items())},
        "processes": {name: len(own) for name, own in sorted(peaks.items())},
    }


def _federate(folder: Path) -> None:
    """Run the server and its sites as their users do."""
    _wait(folder, _start(folder, "keys", "keys", "keys", "--sites", ",".join(SITES)), "keys")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    server = ["--keys", "keys/server", "--listen", address, "--to", "sites", "--quiet"]
    programs = [_start(folder, "sites", "server", "sites.toml", *server)]
    for site in SITES:
        own = ["--data", f"{site}.jsonl", "--keys", f"keys/{site}", "--folder", f"site-{site}"]
        programs.append(_start(folder, site, "site", "--server", address, *own, 'tell=["counts"]'))
    try:
        _wait(folder, programs[0], "sites")
    finally:
        for program in programs:
            if program.poll() is None:
                os.killpg(program.pid, signal.SIGTERM)
        for program in programs:
            program.wait(timeout=60)


def _start(folder: Path, log: str, *arguments: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, MARK: str(folder), "OMP_NUM_THREADS": "1"}
    with (folder / f"{log}.log").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "fedexperts", *arguments],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait(folder: Path, program: subprocess.Popen[bytes], log: str) -> None:
    if program.wait():
        raise RuntimeError((folder / f"{log}.log").read_text()[-2000:])


@contextmanager
def _watched(folder: Path) -> Iterator[Mapping[str, Mapping[int, int]]]:
    """Yield the peaks of anonymous bytes by program and process id, of all that bear the folder's mark."""
    peaks: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    done = threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLE_SECONDS):
            for process_id, name, num_bytes in _marked(f"{MARK}={folder}".encode()):
                peaks[name][process_id] = max(peaks[name][process_id], num_bytes)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peaks
    finally:
        done.set()
        watcher.join()


def _marked(mark: bytes) -> Iterator[tuple[int, str, int]]:
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if mark not in (place / "environ").read_bytes().split(b"\0"):
                continue
            command = (place / "cmdline").read_bytes().decode(errors="replace")
            status = (place / "status").read_text()
        except OSError:  # it has ended meanwhile, or is somebody else's
            continue
        anonymous = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:")]
        kinds = [name for part, name in PROGRAMS.items() if part in command]
        if anonymous and kinds:
            yield int(place.name), kinds[0], int(anonymous[0]) * 1024


def _recipe(folder: Path, model: str, table: Mapping[str, Any]) -> dict[str, float]:
    """Return the seconds of a round of the usual recipe on the same data."""
    from benchmarks.usual_recipe import UsualRecipe  # TRL comes with the extra ``bench`` alone

    data = {**table["data"], "source": [str(folder / name) for name in table["data"]["source"]]}
    config = build_config({**table, "data": data}, "benchmarks/transports.py")
    with open_workbench(config, Stopwatch()) as bench:
        start = current(bench.parts.model, bench.parts.lora_names)
        recipe = UsualRecipe(model_source(model), config, start, tokenized_before=False)
        job = recipe.run(bench.format.tokenizer)
    return {"round": job.rounds_seconds / config.rounds}


def tables(figures: Figures) -> list[Table]:
    """Rounds by transport, and processes with their memory."""
    return [_round_table(figures), _memory_table(figures["places"])]


_PLACES = {
    "process": "in one process",
    "simulation": "Flower's simulation",
    "sites": "three sites over SuperLink",
}


def _round_table(figures: Figures) -> Table:
    places, recipe = figures["places"], figures["recipe"]
    rows = [
        (
            text,
            f"{places[place]['first_round']:.2f}",
            f"{places[place]['round']:.2f}",
            f"{places[place]['train']:.2f}",
            f"{places[place]['under_way']:.2f}",
            f"{places[place]['bytes_per_round'] / 1e3:,.1f}",
            f"{recipe['round'] / places[place]['round']:.2f}",
        )
        for place, text in _PLACES.items()
    ]
    rows.append(("usual recipe, in one process", "", f"{recipe['round']:.2f}", "", "", "", "1.00"))
    what = f"three clients, {figures['num_local_steps']} steps of 8 examples, one thread each"
    return Table(
        title=f"Seconds of a round ({what})",
        columns=(
            "",
            "first round",
            "later ones, median",
            "training of all clients",
            "a client's messages under way, both ways, median",
            "kB sent in a round",
            "recipe's seconds over these",
        ),
        rows=tuple(rows),
    )


def _memory_table(places: Mapping[str, Mapping[str, Any]]) -> Table:
    rows: Sequence[tuple[str, str, str, str]] = [
        (text, name, str(places[place]["processes"][name]), f"{peak:,.0f}")
        for place, text in _PLACES.items()
        for name, peak in places[place]["peak_megabytes"].items()
    ]
    return Table(
        title="Anonymous memory of processes at their peak, MB",
        columns=("", "process", "number in all", "the largest"),
        rows=tuple(rows),
    )
