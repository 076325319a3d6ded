"""Setting that every benchmark runs: tinyworld clients, two threads, evaluation cut to almost nothing."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch

from fedexperts.config.load import build_config
from fedexperts.config.schema import RunConfig
from fedexperts.models.load import EMBEDDED, embedded_folder
from fedexperts.running.environment import describe_environment

THREADS = 2
BENCH_PACKAGES = ("trl", "accelerate", "datasets")


def bench_config(model: str, algorithm: str, *overrides: str) -> RunConfig:
    """A run on ``model`` (as ``model.name``), with ``key=value`` overrides; it evaluates very little."""
    table: dict[str, Any] = {
        "threads": THREADS,
        "rounds": 3,
        "model": {"name": model, "device": "cpu"},
        "data": {"source": "tinyworld", "partition": {"num_clients": 4}},
        "training": {"num_local_steps": 5, "batch_size": 8},
        "algorithm": {"name": algorithm},
        "evaluation": {
            "metrics": ["loss"],
            "max_test_examples": 1,
            "matrix": False,
            "exam": {"source": "none"},
        },
    }
    return build_config(table, "benchmarks/setting.py", overrides)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run the block with one thread of torch."""
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(THREADS)


def model_source(model: str) -> str:
    """Where transformers itself finds ``model``."""
    return str(embedded_folder()) if model == EMBEDDED else model


def describe_machine(load_before: float) -> dict[str, Any]:
    """Hardware, versions and commit, with the load average before the benchmark began."""
    environment = describe_environment(THREADS, "cpu")
    del environment["simulated"]
    environment["packages"] |= {name: metadata.version(name) for name in BENCH_PACKAGES}
    blas = "MKL" if torch.backends.mkl.is_available() else "no MKL"
    return environment | {"blas": blas, "load_average_before": round(load_before, 2)}


def load_average() -> float:
    """Processes that ran or waited to run, over the last minute."""
    return os.getloadavg()[0]
