"""A matrix of runs, one after the other: what has a result is skipped, what is unfinished is resumed.

A suite directory holds ``suite.toml`` (the resolved suite), ``runs/<name>/`` (run directories) and, where the
suite searches, ``search/<name>/`` (more run directories) and ``search.json``.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fedexperts.config.load import difference, load_config
from fedexperts.config.matrix import SearchSettings, Suite, suite_changes
from fedexperts.config.schema import RunConfig
from fedexperts.config.toml import read_toml, render_toml
from fedexperts.errors import UserError, is_disk_full
from fedexperts.run_directory import hold_folder, is_in_use, read_json, write_atomically, write_json
from fedexperts.running.experiment import run_experiment
from fedexperts.running.progress import Progress
from fedexperts.running.search import GroupSearch, search_groups

logger = logging.getLogger(__name__)

OpenProgress = Callable[[str], Progress]
"""Progress under a title such as ``2/6 flex-seed-0``."""


class RunExperiment(Protocol):
    """What a suite needs of :func:`run_experiment`."""

    def __call__(
        self, config: RunConfig, run_directory: Path, *, progress: Progress, resume: bool
    ) -> dict[str, Any]:
        """Run or go on with one experiment and return its result."""


@dataclass(kw_only=True)
class Outcome:
    """What became of a suite's runs."""

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Reason by name of the run, those of the search included."""
    search: dict[str, GroupSearch] = field(default_factory=dict)
    """By group; empty without a search."""


def compare(
    suite: Suite, directory: Path, open_progress: OpenProgress, run: RunExperiment = run_experiment
) -> Outcome:
    """Bring every run of ``suite`` to its result in ``directory``.

    A run that fails does not stop the others; an interrupt or a full disk does. What has finished stays.

    Raises:
        UserError: ``directory`` belongs to another suite, holds something else, or is in use.
    """
    _refuse_other_suite(suite, directory)
    with hold_folder(directory, "suite directory"):
        _refuse_other_suite(suite, directory)
        write_atomically(directory / "suite.toml", render_toml(suite.resolved).encode())
        return _compare(suite, directory, open_progress, run)


def _compare(suite: Suite, directory: Path, open_progress: OpenProgress, run: RunExperiment) -> Outcome:
    runner = _Runner(open_progress=open_progress, run=run)
    if suite.search is not None:
        _search(suite, suite.search, directory, runner)
    configs = {}
    for planned in suite.runs:
        chosen = _chosen(runner.outcome, planned.group)
        if chosen is None:
            runner.outcome.failed[planned.name] = f"no run of the search for {planned.group} gave a score"
        else:
            configs[planned.name] = suite.config(planned.name, {**planned.values, **chosen})
    for name, config in configs.items():
        _refuse_other_config(directory / "runs" / name, config)
    for number, (name, config) in enumerate(configs.items(), start=1):
        if runner.attempt(config, directory / "runs" / name, f"{number}/{len(configs)} {name}") is not None:
            runner.outcome.finished.append(name)
    return runner.outcome


def _refuse_other_suite(suite: Suite, directory: Path) -> None:
    file = directory / "suite.toml"
    if file.exists():
        changes = suite_changes(read_toml(file), suite.resolved)
        if changes:
            raise UserError(
                f"{directory} was made from another suite ({'; '.join(changes)}): choose another with --to"
            )
    elif directory.is_file() or is_in_use(directory):
        raise UserError(f"output folder {directory} is already in use: choose another with --to")


def _refuse_other_config(run_directory: Path, config: RunConfig) -> None:
    file = run_directory / "config.toml"
    changes = difference(load_config(file), config) if file.exists() else []
    if changes:
        raise UserError(
            f"{run_directory} was run with another configuration ({'; '.join(changes)}): "
            "choose another folder with --to"
        )


def _search(suite: Suite, search: SearchSettings, directory: Path, runner: "_Runner") -> None:
    """Let every group choose, and write what was tried after each of them."""

    def attempt(name: str, values: Mapping[str, Any], title: str) -> dict[str, Any] | None:
        config, path = suite.config(name, values), directory / "search" / name
        _refuse_other_config(path, config)
        return runner.attempt(config, path, title)

    for group, found in search_groups(suite, search, attempt):
        runner.outcome.search[group] = found
        for key in found.at_edge():
            value = (found.chosen or {})[key]
            logger.warning("%s chose %s = %s, an end of the grid: widen search.grid", group, key, value)
        groups = {name: one.as_json() for name, one in runner.outcome.search.items()}
        write_json(
            directory / "search.json",
            {"metric": search.metric, "seeds": list(search.seeds), "groups": groups},
        )


def _chosen(outcome: Outcome, group: str) -> Mapping[str, Any] | None:
    return outcome.search[group].chosen if outcome.search else {}


@dataclass(kw_only=True)
class _Runner:
    open_progress: OpenProgress
    run: RunExperiment
    outcome: Outcome = field(default_factory=Outcome)

    def attempt(self, config: RunConfig, path: Path, title: str) -> dict[str, Any] | None:
        """The run's result, from disk if it is there; None if the run failed, which is noted."""
        if (path / "result.json").exists():
            logger.info("%s: has a result", title)
            return read_json(path / "result.json")
        try:
            with self.open_progress(title) as progress:
                return self.run(config, path, progress=progress, resume=(path / "config.toml").exists())
        except Exception as error:
            if is_disk_full(error):
                raise
            if not isinstance(error, UserError):
                logger.exception("run %s failed", path)
            self.outcome.failed[path.name] = str(error) or type(error).__name__
            return None
