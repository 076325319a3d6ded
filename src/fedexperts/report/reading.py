"""Run directories and suite directories as they lie on disk, read without torch.

A run directory has ``result.json`` once it has finished; a suite directory has ``runs/<name>/``. A run that
has not finished, or cannot be read, stays in the suite by name with the reason, so that no table hides it.
"""

import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedexperts.errors import UserError
from fedexperts.report.quantities import finite
from fedexperts.run_directory import SCHEMA_VERSION, RunDirectory, read_json

_REQUIRED = {"method": str, "seed": int, "settings": dict, "clients": dict, "mean": dict}


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """What ``clients.jsonl`` says in sum: one line is one client's turn in one round."""

    num_lines: int
    num_unequal_uploads: int
    num_unequal_downloads: int
    gate_by_round: dict[int, float]
    """Mean opening of the graft gates over layers and clients, by round; empty where nothing has gates."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One finished run."""

    name: str
    result: dict[str, Any]
    rounds: tuple[dict[str, Any], ...]
    environment: dict[str, Any]
    ledger: Ledger | None

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.result["seed"])


@dataclass(frozen=True, kw_only=True)
class AbsentRun:
    """A run that is in no table, and why."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What a report is made from: several runs, or one."""

    title: str
    is_single_run: bool
    runs: tuple[Run, ...]
    absent: tuple[AbsentRun, ...] = ()
    search: dict[str, Any] = field(default_factory=dict)
    """``search.json``: what was tried before the runs, and what was chosen; empty without a search."""


def read_suite(directory: Path) -> Suite:
    """The runs under ``directory``, a run directory or a suite directory; UserError where it is neither."""
    if (directory / "result.json").is_file():
        run = read_run(directory)
        return Suite(title=run.name, is_single_run=True, runs=(run,))
    if (directory / "runs").is_dir():
        return _read_runs(directory)
    if (directory / "config.toml").is_file():
        raise UserError(f"{directory} has no result.json to report on yet ({progress_of(directory)})")
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory; give a run directory or a suite directory")
    raise UserError(f"{directory} is neither a run directory (result.json) nor a suite directory (runs/)")


def _read_runs(directory: Path) -> Suite:
    runs: list[Run] = []
    absent: list[AbsentRun] = []
    for folder in sorted(path for path in (directory / "runs").iterdir() if path.is_dir()):
        if not (folder / "result.json").is_file():
            absent.append(AbsentRun(name=folder.name, reason=progress_of(folder)))
            continue
        try:
            runs.append(read_run(folder))
        except UserError as error:
            absent.append(AbsentRun(name=folder.name, reason=f"not readable: {error}"))
    if not runs:
        first = f"; the first, {absent[0].name}, is {absent[0].reason}" if absent else ""
        raise UserError(f"{directory} has no run with a result in runs/ ({len(absent)} without{first})")
    title = directory.resolve().name
    search = read_json(directory / "search.json") if (directory / "search.json").is_file() else {}
    return Suite(title=title, is_single_run=False, runs=tuple(runs), absent=tuple(absent), search=search)


def read_run(directory: Path) -> Run:
    """One run directory; UserError where its result is of another schema version or incomplete."""
    paths = RunDirectory(directory)
    result = _read_result(paths.result)
    name = result.get("name")
    return Run(
        name=name if isinstance(name, str) and name else directory.resolve().name,
        result=result,
        rounds=_read_rounds(paths.rounds),
        environment=read_json(paths.environment) if paths.environment.is_file() else {},
        ledger=_read_ledger(paths.clients),
    )


def _read_result(path: Path) -> dict[str, Any]:
    result = read_json(path)
    if "schema_version" not in result:
        raise UserError(f"{path} is not the result of a run: 'schema_version' is missing")
    version = result["schema_version"]
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema_version {version!r}, and only {SCHEMA_VERSION} is read here; run it again "
            "or report on it with the version of fedexperts that wrote it"
        )
    for key, kind in _REQUIRED.items():
        if not isinstance(result.get(key), kind):
            raise UserError(f"{path} is not the result of a run: {key!r} is missing or no {kind.__name__}")
    if not all(isinstance(client, dict) for client in result["clients"].values()):
        raise UserError(f"{path} is not the result of a run: 'clients' does not hold one table per client")
    return result


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file; one that is cut or no object is the user's to know about."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path} line {number} is not JSON: {error}") from error
            if not isinstance(record, dict) or not isinstance(record.get("round"), int):
                raise UserError(f"{path} line {number} has no 'round'")
            yield record


def _read_rounds(path: Path) -> tuple[dict[str, Any], ...]:
    by_round = {record["round"]: record for record in _lines(path)}
    return tuple(by_round[number] for number in sorted(by_round))


def _read_ledger(path: Path) -> Ledger | None:
    if not path.is_file():
        return None
    num_lines = unequal_uploads = unequal_downloads = 0
    gates: dict[int, list[float]] = {}
    for record in _lines(path):
        num_lines += 1
        unequal_uploads += _is_unequal(record, "upload")
        unequal_downloads += _is_unequal(record, "download")
        gate = _mean_gate(record)
        if gate is not None:
            gates.setdefault(record["round"], []).append(gate)
    return Ledger(
        num_lines=num_lines,
        num_unequal_uploads=unequal_uploads,
        num_unequal_downloads=unequal_downloads,
        gate_by_round={number: sum(values) / len(values) for number, values in sorted(gates.items())},
    )


def _is_unequal(record: dict[str, Any], direction: str) -> bool:
    counted, predicted = record.get(f"{direction}_bytes"), record.get(f"{direction}_predicted")
    return counted is not None and predicted is not None and counted != predicted


def _mean_gate(record: dict[str, Any]) -> float | None:
    """The mean of ``gate_mean.0``, ``gate_mean.1`` and so on, one a layer."""
    values = (finite(value) for name, value in record.items() if name.startswith("gate_mean."))
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def progress_of(directory: Path) -> str:
    """How far a run without result has come, in words; a line half written is not counted."""
    path = directory / "rounds.jsonl"
    written = path.read_bytes() if path.is_file() else b""
    done = written.count(b"\n")
    try:
        planned = tomllib.loads((directory / "config.toml").read_text(encoding="utf-8")).get("rounds")
    except (OSError, ValueError):
        planned = None
    of_planned = f" of {planned}" if isinstance(planned, int) else ""
    return f"unfinished, {done}{of_planned} rounds done" if done else "unfinished, no round done"
