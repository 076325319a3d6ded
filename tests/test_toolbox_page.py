"""The examples run and make the pages and pictures that are committed."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from examples.round_picture import picture

ROOT = Path(__file__).parent.parent
DECIMAL = re.compile(r"\d+\.(\d+)")


def assert_same_figures(made: str, committed: str) -> None:
    """Everything is equal but the last digit of decimals, which another order of sums turns by one or two."""
    assert DECIMAL.sub("#", made) == DECIMAL.sub("#", committed)
    for one, other in zip(DECIMAL.finditer(made), DECIMAL.finditer(committed), strict=True):
        unit = 10.0 ** -len(other[1])
        assert abs(float(one[0]) - float(other[0])) < 2.5 * unit, (one[0], other[0])


@pytest.mark.slow
def test_the_experts_page_and_its_pictures_come_from_its_command(tmp_path: Path) -> None:
    shutil.copy(ROOT / "docs" / "experts.md", tmp_path)
    command = [sys.executable, "-m", "examples.experts", "--docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("experts.md", "images/experts_before.svg", "images/experts_after.svg"):
        assert_same_figures((tmp_path / name).read_text(), (ROOT / "docs" / name).read_text())


def test_a_figure_off_by_more_than_its_last_digit_is_noticed() -> None:
    assert_same_figures("a 0.667, 12", "a 0.665, 12")
    for made in ("a 0.667, 13", "a 0.670, 12", "a 0.67, 12", "b 0.667, 12"):
        with pytest.raises(AssertionError):
            assert_same_figures(made, "a 0.667, 12")


def test_the_picture_of_a_round_comes_from_its_command() -> None:
    assert picture() == (ROOT / "docs" / "images" / "round.svg").read_text()
