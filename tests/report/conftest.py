"""A suite of three methods by three seeds, and one run, as directories."""

from pathlib import Path

import pytest
from synthetic_runs import make_result, write_run, write_suite

METHODS = ("flex", "fedavg", "local_only")


@pytest.fixture(scope="session")
def suite_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only; a test that writes makes its own."""
    results = [make_result(method, seed, rounds=3) for method in METHODS for seed in range(3)]
    return write_suite(tmp_path_factory.mktemp("suite") / "three-methods", results)


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    """One finished run of FLEx."""
    return write_run(tmp_path / "one-run", make_result("flex", 0, rounds=4))
