"""The examples run and make what they say they make."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_experts_page_and_its_pictures_come_from_its_command(tmp_path: Path) -> None:
    shutil.copy(ROOT / "docs" / "experts.md", tmp_path)
    command = [sys.executable, "-m", "examples.experts", "--docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made, committed = ((folder / "experts.md").read_text() for folder in (tmp_path, ROOT / "docs"))
    assert len(made.splitlines()) == len(committed.splitlines())
    for name in ("before", "after"):
        assert (tmp_path / "images" / f"experts_{name}.svg").read_text().startswith("<svg ")
