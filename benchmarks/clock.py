"""The simulated clock against this machine: measure its rates, calibrate them, and predict measured runs.

A product of two large matrices and a large copy give the best rates. Turns of three methods at three batch
sizes then say how much slower whole turns are (one factor on both rates) and what each operation costs beside
its work, in training and outside of it. With these, the clock predicts how long the clients of runs work that
played no part in the calibration. All of it takes one thread: what threads cost each other depends on the
size of every operation, which these numbers cannot say.
"""

import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import nnls

from benchmarks.matmul_roof import square_flops_per_second
from benchmarks.setting import bench_config, one_thread
from benchmarks.tables import Figures, Table
from fedexperts.algorithms.api import Kept
from fedexperts.config.load import build_config, to_table
from fedexperts.config.schema import RunConfig
from fedexperts.costs.devices import Device
from fedexperts.costs.stopwatch import Stopwatch
from fedexperts.costs.work import WorkMeter, counting
from fedexperts.federation.personal import PersonalStore
from fedexperts.run_directory import read_lines
from fedexperts.running.experiment import run_experiment
from fedexperts.running.progress import QuietProgress
from fedexperts.running.workbench import open_workbench

BATCH_SIZES = (2, 6, 16)
"""Of the turns that calibrate; the runs that are predicted have 8."""
RUNS: Mapping[str, tuple[str, ...]] = {
    "fedavg": (),
    "fedavg_experts": (),
    "fmd": ("algorithm.cache_gb=0.004",),
    "flux": ("algorithm.num_tuned=8", "algorithm.merged_per_layer=2"),
    "flex": (),
}
"""Methods whose runs are predicted, and their settings: a cache of some experts, a small role for Flux."""
CALIBRATING = ("fedavg", "fmd", "flux")
"""Methods whose turns calibrate: whole batches through all experts, experts one by one, and no gradients."""
NO_WORK = {"transport", "download", "upload", "wait", "total"}
COPIED_BYTES = 2**28


def measure(
    model: str,
    *,
    repeats: int = 5,
    copied_bytes: int = COPIED_BYTES,
    num_local_steps: int = 5,
    rounds: int = 3,
) -> dict[str, Any]:
    """Rates of this machine, what calibration makes of them, and measured against predicted runs."""
    with one_thread():
        best = _rates(copied_bytes)
        few = (
            "threads=1",
            f"training.num_local_steps={num_local_steps}",
            f"rounds={rounds}",
            "evaluation.retention.neutral=none",
        )
        turns = {
            f"{method}, batches of {size}": _turn(
                bench_config(model, method, *few, *RUNS[method], f"training.batch_size={size}"), best, repeats
            )
            for method in CALIBRATING
            for size in BATCH_SIZES
        }
        fitted = _fit(list(turns.values()))
        device = _calibrated(best, fitted)
        return {
            "rates": vars(best),
            **asdict(fitted),
            "turns": {
                name: {"measured": turn.seconds, "predicted": turn.predicted(fitted)}
                for name, turn in turns.items()
            },
            "runs": {
                method: _against(bench_config(model, method, *few, *own), device)
                for method, own in RUNS.items()
            },
        }


def _rates(copied_bytes: int) -> Device:
    """Measure the best rates of this machine; host memory is the model's own."""
    gigabytes = _copy_rate(copied_bytes)
    tflops = square_flops_per_second() / 1e12
    return Device(
        half_tflops=tflops,
        float32_tflops=tflops,
        memory_gb_per_s=gigabytes,
        host_gb_per_s=gigabytes,
        disk_gb_per_s=_disk_rate(copied_bytes),
        memory_gb=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        download_mbit=1000.0,
        upload_mbit=1000.0,
    )


def _copy_rate(num_bytes: int) -> float:
    """Return 10^9 bytes per second, read and written, of a copy that no cache holds."""
    source = torch.ones(num_bytes, dtype=torch.uint8)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - started)
    return 2 * num_bytes / min(seconds) / 1e9


def _disk_rate(num_bytes: int) -> float:
    """Return 10^9 bytes per second of reading a file that the system was told to forget."""
    with tempfile.TemporaryFile() as file:
        file.write(bytes(num_bytes))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        started = time.perf_counter()
        while file.read(2**24):
            pass
        return num_bytes / (time.perf_counter() - started) / 1e9


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Numbers that the calibration finds."""

    slowdown: float
    """Factor by which whole turns are slower than the best rates."""
    operation_us: float
    no_grad_operation_us: float


@dataclass(frozen=True, kw_only=True)
class CountedTurn:
    """One client's turn: its counted work, and its measured time."""

    at_best_rates: float
    """Seconds of all operations at the best rates."""
    moving: float
    """Seconds in which bytes move from main memory or disk."""
    num_training: int
    num_no_grad: int
    seconds: float
    """Measured: the median."""

    def columns(self) -> tuple[float, float, float]:
        """Return what the numbers of :class:`Fitted` are multiplied with, in their order."""
        return self.at_best_rates, self.num_training / 1e6, self.num_no_grad / 1e6

    def predicted(self, fitted: Fitted) -> float:
        """Return the turn's seconds by the calibration."""
        return self.moving + sum(a * b for a, b in zip(astuple(fitted), self.columns(), strict=True))


def _turn(config: RunConfig, best: Device, repeats: int) -> CountedTurn:
    """Count and measure a client's first turn."""
    with tempfile.TemporaryDirectory() as folder, open_workbench(config, Stopwatch()) as bench:
        runtime, algorithm = bench.scorer(PersonalStore(Path(folder))).runtime, config.algorithm
        client_id = bench.data.client_ids[0]
        state = algorithm.plan_round(algorithm.init(bench.parts, runtime.facts()), bench.data.client_ids, 1)
        sent, meter, seconds = algorithm.download(state, client_id), WorkMeter(), []
        for number in range(repeats + 2):
            with runtime.turn(client_id, 1) as turn, counting(meter if number == 0 else None):
                started = time.perf_counter()
                algorithm.client_update(turn.client, Kept(), sent)
                seconds.append(time.perf_counter() - started)
    work, numbers = meter.work(best).values(), Counter[bool]()
    for one, count in meter.operations.items():
        numbers[one.has_grad] += count
    moving = sum(best.moving_seconds(host_bytes=own.host_bytes, disk_bytes=own.disk_bytes) for own in work)
    return CountedTurn(
        at_best_rates=sum(own.seconds for own in work) - moving,
        moving=moving,
        num_training=numbers[True],
        num_no_grad=numbers[False],
        # The first turn was counted, which slows it, and the second warms up.
        seconds=statistics.median(seconds[2:]),
    )


def _fit(turns: Sequence[CountedTurn]) -> Fitted:
    """Return the numbers, none below 0, with the least sum of squared relative errors."""
    rows = [[value / turn.seconds for value in turn.columns()] for turn in turns]
    found, _ = nnls(rows, [1 - turn.moving / turn.seconds for turn in turns])
    # Without noise the factor is above 1; a machine that is busy while its rates are measured may say less.
    return Fitted(
        slowdown=max(found[0], 1e-6), operation_us=float(found[1]), no_grad_operation_us=float(found[2])
    )


def _calibrated(best: Device, fitted: Fitted) -> Device:
    slower = {
        name: getattr(best, name) / fitted.slowdown
        for name in ("half_tflops", "float32_tflops", "memory_gb_per_s")
    }
    return replace(
        best,
        **slower,
        operation_us=fitted.operation_us,
        no_grad_operation_us=fitted.no_grad_operation_us,
    )


def _against(config: RunConfig, device: Device) -> dict[str, float]:
    """Return measured and simulated seconds of all work of a run's clients, and what counting costs."""
    overrides = [
        "clock.device=custom",
        *(f"clock.custom.{name}={rate}" for name, rate in vars(device).items()),
    ]
    measured = _work_seconds(config)
    with_clock = _work_seconds(build_config(to_table(config), "benchmarks/clock.py", overrides))
    return {
        "measured": measured["seconds"],
        "simulated": with_clock["simulated_seconds"],
        "error": with_clock["simulated_seconds"] / measured["seconds"] - 1,
        "counting": with_clock["seconds"] / measured["seconds"] - 1,
    }


def _work_seconds(config: RunConfig) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        run_experiment(config, Path(folder) / "run", progress=QuietProgress())
        lines = read_lines(Path(folder) / "run" / "clients.jsonl")
    return {
        name: sum(seconds for line in lines for phase, seconds in line[name].items() if phase not in NO_WORK)
        for name in ("seconds", "simulated_seconds")
        if name in lines[0]
    }


def tables(figures: Figures) -> list[Table]:
    """Rates, calibration and predictions."""
    return [_rate_table(figures), _error_table(figures)]


def _rate_table(figures: Figures) -> Table:
    rates: Mapping[str, float] = figures["rates"]
    rows = [
        ("matrix products in float32, GFLOP/s", f"{1e3 * rates['float32_tflops']:,.0f}"),
        ("copies in memory, GB/s", f"{rates['memory_gb_per_s']:.1f}"),
        ("reading from disk, GB/s", f"{rates['disk_gb_per_s']:.2f}"),
        ("whole turns are slower by", f"{figures['slowdown']:.2f}"),
        ("each operation of training beside its work, 10^-6 s", f"{figures['operation_us']:.1f}"),
        ("each operation without gradients, 10^-6 s", f"{figures['no_grad_operation_us']:.1f}"),
    ]
    return Table(title="This machine, one thread", columns=("", "value"), rows=tuple(rows))


def _error_table(figures: Figures) -> Table:
    rows = [
        (f"calibration: a turn of {name}", *_pair(one["measured"], one["predicted"]), "")
        for name, one in figures["turns"].items()
    ]
    rows += [
        (
            f"run of `{method}`",
            *_pair(one["measured"], one["simulated"]),
            f"{one['counting']:+.0%}",
        )
        for method, one in figures["runs"].items()
    ]
    return Table(
        title="Seconds of the clients' work on one thread, measured and simulated",
        columns=("", "measured", "simulated", "error", "counting adds"),
        rows=tuple(rows),
    )


def _pair(measured: float, predicted: float) -> tuple[str, str, str]:
    return f"{measured:.2f}", f"{predicted:.2f}", f"{predicted / measured - 1:+.0%}"
