"""Peak anonymous memory of Flux clients in processes of their own, against the plan of their turns."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.setting import bench_config
from benchmarks.tables import Table
from benchmarks.workers import SIZES, save_random_model
from fedexperts.federation.client_processes import PEAK
from fedexperts.federation.rounds import PLANNED
from fedexperts.run_directory import read_lines
from fedexperts.running.experiment import run_experiment
from fedexperts.running.progress import QuietProgress

LARGE = SIZES | {"num_hidden_layers": 4, "num_experts": 24}
QUICK = {"rounds": 1, "cases": 1, "sizes": SIZES | {"num_hidden_layers": 1}}
CASES = {
    "12 tuned, the others merged into 2 per layer": (
        "algorithm.num_tuned=12",
        "algorithm.merged_per_layer=2",
    ),
    "48 tuned, the others merged into 4 per layer": ("algorithm.num_tuned=48",),
    "12 tuned, the others merged by least squares": (
        "algorithm.num_tuned=12",
        "algorithm.merge.refit_down=true",
    ),
    "12 tuned, the others merged into 2 per layer, in bfloat16": (
        "algorithm.num_tuned=12",
        "algorithm.merged_per_layer=2",
        "model.dtype=bfloat16",
    ),
}
_SETTING = (
    "threads=1",
    "transport.clients=process",
    "data.partition.num_clients=2",
    "data.max_tokens=128",
    "training.batch_size=4",
    "training.num_local_steps=2",
    "algorithm.profile_examples=16",
    "algorithm.exploit_share=1",
    "algorithm.exploit_share_last=1",
)


def measure(
    model: str, *, rounds: int = 2, cases: int = len(CASES), sizes: Mapping[str, int] = LARGE
) -> dict[str, Any]:
    """Megabytes (10^6 bytes) by case; a peak is above what the process takes without a model."""
    with tempfile.TemporaryDirectory() as folder:
        weights = save_random_model(model, Path(folder), sizes)
        found = {name: _case(folder, rounds, CASES[name]) for name in list(CASES)[:cases]}
    return {"model": model, "rounds": rounds, "weights_megabytes": weights, "cases": found}


def _case(folder: str, rounds: int, options: Sequence[str]) -> dict[str, float]:
    config = bench_config(folder, "flux", *_SETTING, f"rounds={rounds}", *options)
    with tempfile.TemporaryDirectory() as run:
        run_experiment(config, Path(run) / "run", progress=QuietProgress())
        lines = [line["algorithm"] for line in read_lines(Path(run) / "run" / "clients.jsonl")]
    fullest = max(lines, key=lambda line: line[PEAK] / line[PLANNED])
    return {
        "planned": fullest[PLANNED] / 1e6,
        "peak": fullest[PEAK] / 1e6,
    }


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """Return the table of the document."""
    rows = tuple(
        (
            name,
            *(f"{case[kind]:,.0f}" for kind in ("planned", "peak")),
            f"{case['peak'] / case['planned']:.2f}",
        )
        for name, case in figures["cases"].items()
    )
    return [
        Table(
            title=(
                f"Anonymous memory of a client's process, MB, on a model with "
                f"{figures['weights_megabytes']:.0f} MB of weights: the fullest turn of "
                f"{figures['rounds']} rounds"
            ),
            columns=("Flux with", "planned", "measured peak", "peak / planned"),
            rows=rows,
        )
    ]
