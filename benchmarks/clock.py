"""The simulated clock against this machine: measure its rates, calibrate them, and predict measured runs.

A product of two large matrices and a large copy give the best rates. Turns at three batch sizes then say how
much slower whole steps are (one factor on both rates) and what each operation costs beside its work. With
these, the clock predicts how long the clients of runs work that played no part in the calibration.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import nnls

from benchmarks.matmul_roof import square_flops_per_second
from benchmarks.setting import THREADS, bench_config
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
}
"""Methods whose runs are predicted, and their settings: a cache of some experts, a small role for Flux."""
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
    torch.set_num_threads(THREADS)
    best = _rates(copied_bytes)
    few = (
        f"training.num_local_steps={num_local_steps}",
        f"rounds={rounds}",
        "evaluation.retention.neutral=none",
    )
    points = [
        _turn_cost(bench_config(model, "fedavg", *few, f"training.batch_size={size}"), best, repeats)
        for size in BATCH_SIZES
    ]
    (slowdown, operation), _ = nnls([point[:2] for point in points], [point[2] for point in points])
    # Without noise the factor is above 1; a machine that is busy while its rates are measured may say less.
    device = _calibrated(best, max(slowdown, 1e-6), operation)
    return {
        "rates": vars(best),
        "slowdown": slowdown,
        "operation_us": operation * 1e6,
        "turns": {
            str(size): {"measured": seconds, "predicted": slowdown * roofline + operation * count}
            for size, (roofline, count, seconds) in zip(BATCH_SIZES, points, strict=True)
        },
        "runs": {
            method: _against(bench_config(model, method, *few, *own), device) for method, own in RUNS.items()
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


def _turn_cost(config: RunConfig, best: Device, repeats: int) -> tuple[float, int, float]:
    """Return seconds at the best rates, number of operations, and median measured seconds of a turn."""
    with tempfile.TemporaryDirectory() as folder, open_workbench(config, Stopwatch()) as bench:
        runtime, algorithm = bench.scorer(PersonalStore(Path(folder))).runtime, config.algorithm
        client_id = bench.data.client_ids[0]
        state = algorithm.init(bench.parts, runtime.facts())
        sent, meter, seconds = algorithm.download(state, client_id), WorkMeter(), []
        for number in range(repeats + 2):
            with runtime.turn(client_id, 1) as turn, counting(meter if number == 0 else None):
                started = time.perf_counter()
                algorithm.client_update(turn.client, Kept(), sent)
                seconds.append(time.perf_counter() - started)
        work = meter.work(best)["train"]
        # The first turn was counted, which slows it, and the second warms up.
        return work.seconds, meter.operations.total(), statistics.median(seconds[2:])


def _calibrated(best: Device, slowdown: float, operation: float) -> Device:
    slower = {
        name: getattr(best, name) / slowdown for name in ("half_tflops", "float32_tflops", "memory_gb_per_s")
    }
    return Device(**{**vars(best), **slower, "operation_us": operation * 1e6})


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
        ("whole steps are slower by", f"{figures['slowdown']:.2f}"),
        ("each operation beside its work, 10^-6 s", f"{figures['operation_us']:.1f}"),
    ]
    return Table(title="This machine", columns=("", "value"), rows=tuple(rows))


def _error_table(figures: Figures) -> Table:
    rows = [
        (f"calibration: a turn with batches of {size}", *_pair(one["measured"], one["predicted"]), "")
        for size, one in figures["turns"].items()
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
        title="Seconds of the clients' work, measured and simulated",
        columns=("", "measured", "simulated", "error", "counting adds"),
        rows=tuple(rows),
    )


def _pair(measured: float, predicted: float) -> tuple[str, str, str]:
    return f"{measured:.2f}", f"{predicted:.2f}", f"{predicted / measured - 1:+.0%}"
