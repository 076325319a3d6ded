"""Every experiment and suite in the repository loads."""

from pathlib import Path

import pytest

from fedexperts.config.load import load_config
from fedexperts.config.matrix import load_suite

ROOT = Path(__file__).parents[2]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "experiments").rglob("*.toml"))


@pytest.mark.parametrize("file", FILES)
def test_it_loads(file):
    path = ROOT / file
    assert load_suite(path).runs if path.name == "suite.toml" else load_config(path)


def test_there_are_some():
    assert "experiments/demo/suite.toml" in FILES
