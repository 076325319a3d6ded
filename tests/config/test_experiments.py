"""Every experiment and suite in the repository loads."""

import json
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


def test_the_published_figures_are_those_of_the_suite_s_runs():
    folder = ROOT / "experiments/methods"
    published = {(each["name"], each["seed"]) for each in json.loads((folder / "results.json").read_text())}
    planned = load_suite(folder / "suite.toml").runs
    assert published == {(each.name, each.values["seed"]) for each in planned}
