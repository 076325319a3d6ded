"""Run directories and suite directories as they lie on disk, read without torch.

A run directory has ``result.json`` once it has finished; a suite directory has ``runs/<name>/``. A run that
has not finished, or cannot be read, stays in the suite by name with the reason, so that no table hides it.
"""

import hashlib
import json
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from fedexperts.errors import UserError
from fedexperts.report.quantities import mean_of, numbers_of
from fedexperts.run_directory import SCHEMA_VERSION, RunDirectory, read_json
from fedexperts.seals import check_log, read_perhaps_sealed

TURN_TABLES = ("parts", "slots")
"""Tables of codes that an algorithm writes for each turn: a mean over clients would say nothing."""
TURN_NUMBERS = ("memory_planned_bytes", "memory_peak_bytes")
"""Numbers that stand for a client and not for a round."""
_OF_NO_CLIENT = ("server", "base")
"""Models of an extraction test that are no client's own."""
_EXTRACTED = (
    ("planted", "rate"),
    ("planted", "mean_best_similarity"),
    ("not_planted", "mean_best_similarity"),
)
_REQUIRED = {"method": str, "seed": int, "settings": dict, "clients": dict, "mean": dict}


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A line of ``clients.jsonl``: one client's turn in one round."""

    round_number: int
    client: str
    seconds: dict[str, float]
    """Measured seconds by phase."""
    simulated: dict[str, float]
    """Simulated seconds by phase; empty without a clock."""
    started: float = 0.0
    """Simulated time at which the turn began, where turns of a round begin at different times."""
    numbers: dict[str, float]
    """Numbers measured under :data:`TURN_NUMBERS`."""
    tables: dict[str, list[list[int]]]
    """Tables measured under :data:`TURN_TABLES`, by MoE layer and expert."""


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """The sums of ``clients.jsonl``: one line is one client's turn in one round."""

    num_messages: int
    num_unequal: int
    """Messages whose bytes differ from their prediction."""
    measured: dict[str, dict[int, Any]]
    """By name and round the mean over clients of what the algorithm measured: a number or (nested) list."""
    turns: tuple[Turn, ...] = ()
    """Every turn, in the order of the lines."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One finished run."""

    name: str
    result: dict[str, Any]
    rounds: dict[int, dict[str, float]] = field(default_factory=dict)
    """The numbers of rounds.jsonl by dotted path."""
    environment: dict[str, Any] = field(default_factory=dict)
    ledger: Ledger | None = None
    extraction: dict[str, float] = field(default_factory=dict)
    """Numbers of ``extraction.json`` by dotted path; empty where no canaries were asked for."""
    folder: Path | None = None
    """The run directory; None for a result that was not read from one."""

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.result["seed"])

    @cached_property
    def numbers(self) -> dict[str, float]:
        """Every number of the result by its dotted path, and those of an extraction test."""
        return numbers_of(self.result) | self.extraction


@dataclass(frozen=True, kw_only=True)
class Suite:
    """The runs that a report is made from, one or several."""

    title: str
    runs: tuple[Run, ...]
    absent: dict[str, str] = field(default_factory=dict)
    """Reason why a run is in no table, by its name."""
    search: dict[str, Any] = field(default_factory=dict)
    """``search.json``: what was tried before the runs, and what was chosen; empty without a search."""
    equal: tuple[dict[str, Any], ...] = ()
    """The suite's ``[[equal]]`` sections: groups of runs that are equal in parameters or bytes."""


def read_suite(directory: Path) -> Suite:
    """The runs under ``directory``, a run directory or a suite directory; UserError where it is neither."""
    if (directory / "result.json").is_file():
        run = read_run(directory)
        return Suite(title=run.name, runs=(run,))
    if (directory / "runs").is_dir():
        return _read_runs(directory)
    if (directory / "config.toml").is_file():
        raise UserError(f"{directory} has no result.json to report on yet ({progress_of(directory)})")
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory; give a run directory or a suite directory")
    raise UserError(f"{directory} is neither a run directory (result.json) nor a suite directory (runs/)")


def _read_runs(directory: Path) -> Suite:
    runs: list[Run] = []
    absent: dict[str, str] = {}
    for folder in sorted(path for path in (directory / "runs").iterdir() if path.is_dir()):
        try:
            if (folder / "result.json").is_file():
                runs.append(read_run(folder))
            else:
                absent[folder.name] = progress_of(folder)
        except UserError as error:
            absent[folder.name] = f"not readable: {error}"
    if not runs:
        first = "; the first, {}, is {}".format(*next(iter(absent.items()))) if absent else ""
        raise UserError(f"{directory} has no run with a result in runs/ ({len(absent)} without{first})")
    return Suite(
        title=directory.resolve().name,
        runs=tuple(runs),
        absent=absent,
        search=_read_search(directory, runs),
        equal=tuple(_read_equal(directory / "suite.toml")),
    )


def _read_search(directory: Path, runs: Sequence[Run]) -> dict[str, Any]:
    """Return ``search.json`` if the suite and the code of these very runs have written it.

    Raises:
        UserError: it is stale.
    """
    file, suite = directory / "search.json", directory / "suite.toml"
    if not file.is_file():
        return {}
    search = read_json(file)
    if suite.is_file() and search.get("suite_sha256") != hashlib.sha256(suite.read_bytes()).hexdigest():
        raise UserError(f"{file} is stale: another state of {suite} has written it; run the suite again")
    other = [run.name for run in runs if run.environment.get("code_sha256") != search.get("code_sha256")]
    if other:
        raise UserError(
            f"{file} is stale: {len(other)} runs, {other[0]} first, are of other code than the search; "
            "run the suite again in another folder"
        )
    return search


def _read_equal(suite: Path) -> list[dict[str, Any]]:
    """Return the ``[[equal]]`` sections of a resolved suite."""
    equal = tomllib.loads(suite.read_text(encoding="utf-8")).get("equal", []) if suite.is_file() else []
    return list(equal)


def read_run(directory: Path) -> Run:
    """One run directory; UserError where its result is of another schema version, incomplete or damaged."""
    paths = RunDirectory(directory)
    result = _read_result(paths.result)
    _refuse_changed_logs(paths)
    name = result.get("name")
    return Run(
        name=name if isinstance(name, str) and name else directory.resolve().name,
        result=result,
        rounds={line["round"]: numbers_of(line) for line in _lines(paths.rounds)},
        environment=read_perhaps_sealed(paths.environment) if paths.environment.is_file() else {},
        ledger=_read_ledger(paths.clients),
        extraction=_read_extraction(paths.extraction),
        folder=directory,
    )


def _refuse_changed_logs(paths: RunDirectory) -> None:
    """Raise UserError if a log is not as the record of the run, or of a site, says; some have no record."""
    for record in (paths.checkpoint, paths.site):
        if record.is_file():
            for name, seal in read_perhaps_sealed(record).get("logs", {}).items():
                check_log(paths.path / name, seal)


def _read_extraction(path: Path) -> dict[str, float]:
    """Return rates and similarities by kind of model, with means over the clients' own models."""
    rows: dict[str, list[dict[str, Any]]] = {}
    try:
        for row in read_json(path)["models"] if path.is_file() else ():
            rows.setdefault(row["model"] if row["model"] in _OF_NO_CLIENT else "personal", []).append(row)
        return {
            f"extraction.{model}.{which}_{figure}": fmean(row[which][figure] for row in own)
            for model, own in rows.items()
            for which, figure in _EXTRACTED
        }
    except (KeyError, TypeError):
        raise UserError(
            f"{path} is not the file of an extraction test; run `fedexperts extract` again"
        ) from None


def _read_result(path: Path) -> dict[str, Any]:
    result = read_perhaps_sealed(path)
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
    if result.get("forgotten") and not result["clients"]:
        raise UserError(f"every client of {path.parent} has been forgotten: there is nothing to report")
    if not all(isinstance(client, dict) for client in result["clients"].values()):
        raise UserError(f"{path} is not the result of a run: 'clients' does not hold one table per client")
    return result


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file; one that is cut or no object is the user's to know about."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path} line {number} is not JSON: {error}") from error
            if not isinstance(record, dict) or not isinstance(record.get("round"), int):
                raise UserError(f"{path} line {number} has no 'round'")
            yield record


def _read_ledger(path: Path) -> Ledger | None:
    if not path.is_file():
        return None
    num_messages = num_unequal = 0
    measured: dict[str, dict[int, list[Any]]] = {}
    turns = []
    for line in _lines(path):
        for direction in ("upload", "download"):
            counted, predicted = line.get(f"{direction}_bytes"), line.get(f"{direction}_predicted")
            num_messages += 1
            num_unequal += counted is not None and predicted is not None and counted != predicted
        turns.append(_turn(line))
        for name, value in (line.get("algorithm") or {}).items():
            if name not in {*TURN_TABLES, *TURN_NUMBERS}:
                measured.setdefault(name, {}).setdefault(line["round"], []).append(value)
    means = {name: {n: mean_of(values) for n, values in own.items()} for name, own in measured.items()}
    return Ledger(num_messages=num_messages, num_unequal=num_unequal, measured=means, turns=tuple(turns))


def _turn(line: dict[str, Any]) -> Turn:
    own = line.get("algorithm") or {}
    return Turn(
        round_number=line["round"],
        client=str(line.get("client", "")),
        seconds=numbers_of(line.get("seconds") or {}),
        simulated=numbers_of(line.get("simulated_seconds") or {}),
        started=float(line.get("simulated_start", 0.0)),
        numbers=numbers_of({name: own[name] for name in TURN_NUMBERS if name in own}),
        tables={name: own[name] for name in TURN_TABLES if isinstance(own.get(name), list)},
    )


def progress_of(directory: Path) -> str:
    """Say how far a run without result has come; a line half written is not counted."""
    path = directory / "rounds.jsonl"
    written = path.read_bytes() if path.is_file() else b""
    done = written.count(b"\n")
    try:
        planned = tomllib.loads((directory / "config.toml").read_text(encoding="utf-8")).get("rounds")
    except (OSError, ValueError):
        planned = None
    of_planned = f" of {planned}" if isinstance(planned, int) else ""
    return f"unfinished, {done}{of_planned} rounds done" if done else "unfinished, no round done"
