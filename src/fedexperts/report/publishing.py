"""Publish a report beside its suite, if its runs come from one committed state of the code."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedexperts.errors import UserError
from fedexperts.report.markdown import markdown
from fedexperts.report.reading import Run, read_suite
from fedexperts.report.sections import content_of
from fedexperts.report.write import write_text

_MAX_NAMES = 3
_SECTIONS = {
    "mean",
    "exam",
    "retention",
    "bytes",
    "parameters",
    "expert_balance_std",
    "seconds",
    "clock",
    "extraction",
}


def publish_report(directory: Path, folder: Path, *, any_code: bool = False) -> Path:
    """Write ``REPORT.md`` and ``results.json``, the numbers by run, to ``folder``; return the report's path.

    Raises:
        UserError: a run is of uncommitted code, or two are of different code, and ``any_code`` is not given;
            or ``directory`` holds no finished run.
    """
    suite = read_suite(directory)
    if not any_code:
        _refuse(
            directory, "uncommitted or unknown code", [run for run in suite.runs if not _is_committed(run)]
        )
        first = suite.runs[0].environment.get("code_sha256")
        other = [run for run in suite.runs if run.environment.get("code_sha256") != first]
        _refuse(directory, f"other code than {suite.runs[0].name}", other)
    path = folder / "REPORT.md"
    write_text(path, markdown(content_of(suite)))
    write_text(folder / "results.json", _as_lines([_numbers(run) for run in suite.runs]))
    return path


def _as_lines(runs: Sequence[dict[str, Any]]) -> str:
    """Return a JSON list with a line for each run, so that a change of one is seen as one."""
    return "[\n" + ",\n".join(json.dumps(run) for run in runs) + "\n]\n"


def _numbers(run: Run) -> dict[str, Any]:
    """Return the numbers of a run, to six digits, without those of clients, subjects, layers and experts."""
    numbers = {
        path: float(f"{value:.6g}")
        for path, value in run.numbers.items()
        if path.partition(".")[0] in _SECTIONS and "by_subject" not in path
    }
    hashes = {"server_state_sha256": run.result.get("server_state_sha256")}
    return {"name": run.name, "seed": run.seed, **hashes, "numbers": numbers}


def _is_committed(run: Run) -> bool:
    own = run.environment
    known = bool(own.get("commit")) and bool(own.get("code_sha256"))
    return known and own.get("has_uncommitted_changes") is False


def _refuse(directory: Path, what: str, runs: Sequence[Run]) -> None:
    if runs:
        names = ", ".join(run.name for run in runs[:_MAX_NAMES]) + (", ..." if len(runs) > _MAX_NAMES else "")
        raise UserError(
            f"{directory} cannot be published: {len(runs)} of its runs are of {what} ({names}); "
            "run them again from one commit, or publish with --any-code"
        )
