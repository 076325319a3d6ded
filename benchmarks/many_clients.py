"""A run in process of more and more clients, of which a round draws ten: what grows faster than they do?"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.setting import bench_config, one_thread
from benchmarks.tables import Figures, Table
from fedexperts.report import write_report
from fedexperts.running.experiment import run_experiment
from fedexperts.running.progress import QuietProgress

SIZES = (250, 500, 1000)
COHORT = 10
ROUNDS = 3
_SMALL = (
    f"rounds={ROUNDS}",
    f"cohort.size={COHORT}",
    "data.tinyworld.examples_per_client=12",
    "training.num_local_steps=1",
    "training.batch_size=2",
    "threads=1",  # a second one waits for others' work in a loop, whose CPU time would be counted
    "evaluation.retention.neutral=none",  # else each client's model answers 32 instructions, twice
    "algorithm.selection=random",  # else a client that was never drawn has a pass over its data
)


class _Marks(QuietProgress):
    """Remembers when rounds began and ended."""

    def __init__(self) -> None:
        self.begun, self.ended = list[float](), list[float]()

    def round_started(self, round_number: int, num_clients: int) -> None:
        self.begun.append(time.process_time())

    def round_finished(self, round_number: int, line: Mapping[str, Any]) -> None:
        self.ended.append(time.process_time())


def measure(model: str, *, sizes: Sequence[int] = SIZES) -> dict[str, Any]:
    """CPU seconds, which other work on the machine hardly changes; bytes and files of the run directory."""
    with one_thread(), tempfile.TemporaryDirectory() as folder:
        _measure(model, COHORT, Path(folder) / "first")  # loads what is loaded once
        return {"sizes": {str(size): _measure(model, size, Path(folder) / str(size)) for size in sizes}}


def _measure(model: str, num_clients: int, folder: Path) -> dict[str, float]:
    config = bench_config(model, "flex", *_SMALL, f"data.partition.num_clients={num_clients}")
    marks, started, begun = _Marks(), time.process_time(), time.perf_counter()
    run_experiment(config, folder, progress=marks)
    ended, elapsed = time.process_time(), time.perf_counter() - begun
    files = [path for path in folder.rglob("*") if path.is_file()]
    num_bytes = sum(path.stat().st_size for path in files)
    write_report(folder)
    return {
        "set_up": marks.begun[0] - started,
        "round": (marks.ended[-1] - marks.begun[0]) / ROUNDS,
        "evaluation": ended - marks.ended[-1],
        "report": time.process_time() - ended,
        "elapsed": elapsed,
        "bytes": float(num_bytes),
        "files": float(len(files)),
    }


_ROWS: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "set_up": ("set-up, with the scores of the pretrained model", lambda value: f"{value:.1f} s"),
    "round": (f"a round of {COHORT} clients", lambda value: f"{value:.2f} s"),
    "evaluation": ("last evaluation and result", lambda value: f"{value:.1f} s"),
    "report": ("report", lambda value: f"{value:.1f} s"),
    "elapsed": ("all but the report, by the clock on the wall", lambda value: f"{value:.1f} s"),
    "bytes": ("run directory", lambda value: f"{value / 1e6:.1f} MB"),
    "files": ("its files", lambda value: f"{value:,.0f}"),
}


def tables(figures: Figures) -> list[Table]:
    """Everything by the number of clients; per client, the largest number over the smallest."""
    sizes = figures["sizes"]
    first, *_, last = sizes
    rows = []
    for name, (text, shown) in _ROWS.items():
        factor = 1 if name == "round" else int(last) / int(first)
        ratio = sizes[last][name] / sizes[first][name] / factor
        rows.append((text, *(shown(sizes[size][name]) for size in sizes), f"{ratio:.2f}"))
    return [
        Table(
            title="CPU seconds of a run in process by the number of clients",
            columns=("", *(f"{size} clients" for size in sizes), f"per client, {last} over {first}"),
            rows=tuple(rows),
        )
    ]
