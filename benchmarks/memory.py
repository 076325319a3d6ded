"""Peak memory of FLEx with few and with many clients and as many turns, each in a process of its own."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.setting import bench_config
from benchmarks.timing import spread
from fedexperts.running.experiment import run_experiment
from fedexperts.running.progress import QuietProgress

SAME_MEMORY = 0.05
"""Largest difference of the peaks, as a share."""
_OVERRIDES = (
    # As many categories as the few clients have, so that the many do not bring longer examples.
    "data.labels=['closed_qa','information_extraction','classification','summarization']",
    "data.tinyworld.examples_per_client=24",
    "training.num_local_steps=1",
    "algorithm.calibration_examples=8",
)


def measure(model: str, *, few: int = 4, many: int = 200, repeats: int = 1) -> dict[str, Any]:
    """All figures, ready for JSON; the peaks are megabytes (10^6 bytes) of resident memory."""
    peaks: dict[int, list[dict[str, float]]] = {few: [], many: []}
    for _ in range(repeats):
        for num_clients, made in peaks.items():
            # Equal turns, so that the longest batch and what the allocator keeps have equal chances to show.
            made.append(_peak_in_new_process(model, num_clients, rounds=many // num_clients))
    kinds = {
        kind: {str(number): spread([peak[kind] for peak in made]) for number, made in peaks.items()}
        for kind in ("loaded", "peak", "seconds")
    }
    ratio = kinds["peak"][str(many)]["median"] / kinds["peak"][str(few)]["median"]
    return {"model": model, "few": few, "many": many, "kinds": kinds, "many_over_few": ratio}


def _peak_in_new_process(model: str, num_clients: int, rounds: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.memory", model, str(num_clients), str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run_alone(model: str, num_clients: int, rounds: int) -> dict[str, float]:
    """One run in this process, which must be new; megabytes before the first client and at the peak."""
    size = (f"data.partition.num_clients={num_clients}", f"rounds={rounds}")
    config = bench_config(model, "flex", *size, *_OVERRIDES)
    loaded: list[float] = []
    progress = _AtStart(loaded)
    with tempfile.TemporaryDirectory() as folder:
        result = run_experiment(config, Path(folder) / "run", progress=progress)
    assert len(result["clients"]) == num_clients
    return {"loaded": loaded[0], "peak": _peak_megabytes(), "seconds": result["seconds"]["total"]}


class _AtStart(QuietProgress):
    """Notes the memory when the first phase after loading begins."""

    def __init__(self, loaded: list[float]) -> None:
        self._loaded = loaded

    def phase(self, name: str) -> None:
        """Note it once."""
        if name.startswith("evaluating") and not self._loaded:
            self._loaded.append(_peak_megabytes())


def _peak_megabytes() -> float:
    """Largest resident memory of this process so far; unlike ru_maxrss it is not the parent's before exec."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise AssertionError("this benchmark needs Linux: there is no VmHWM in /proc/self/status")


if __name__ == "__main__":
    print(json.dumps(run_alone(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
