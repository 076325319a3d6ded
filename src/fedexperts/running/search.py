"""An equal search budget for every group of a suite: the same grid, the same seeds, validation data only."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedexperts.config.matrix import SEED, SearchSettings, Suite, varied_label

Values = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class SearchRun:
    """One run of the search."""

    name: str
    values: Values
    """Settings over the base, by full key."""


RunAll = Callable[[Sequence[SearchRun]], Iterator[dict[str, Any] | None]]
"""Runs to their results, in the same order and one by one; None for a run that failed."""


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One point of the grid for one group."""

    values: Values
    scores: tuple[float | None, ...]
    """The metric by seed; None where the run failed or the metric is not a number."""

    @property
    def mean(self) -> float | None:
        """Mean over the seeds; None unless every seed has a score."""
        scores = [score for score in self.scores if score is not None]
        return math.fsum(scores) / len(scores) if len(scores) == len(self.scores) else None


@dataclass(frozen=True, kw_only=True)
class GroupSearch:
    """Points that one group tried, and the one that it chose."""

    tried: tuple[Tried, ...]
    chosen: Values | None
    """None where no point has a mean."""

    def at_edge(self) -> tuple[str, ...]:
        """Settings whose chosen number is the least or largest that was tried: the best may lie beyond."""
        found = []
        for key, value in (self.chosen or {}).items():
            tried = {one.values[key] for one in self.tried}
            if len(tried) > 1 and all(_is_number(one) for one in tried) and value in (min(tried), max(tried)):
                found.append(key)
        return tuple(found)

    def as_json(self) -> dict[str, Any]:
        """As it stands in ``search.json``."""
        points = [
            {"values": dict(one.values), "scores": list(one.scores), "mean": one.mean} for one in self.tried
        ]
        return {"chosen": self.chosen, "at_edge": list(self.at_edge()), "tried": points}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def search_groups(suite: Suite, search: SearchSettings, run_all: RunAll) -> Iterator[tuple[str, GroupSearch]]:
    """Each group of the suite with its choice, one after the other; ties go to the earlier point."""
    groups = {run.group: run.values for run in reversed(suite.runs)}
    ordered = list(dict.fromkeys(run.group for run in suite.runs))
    cells = [(group, point, seed) for group in ordered for point in suite.grid for seed in search.seeds]
    results = run_all(
        [
            SearchRun(
                name=f"{group}-{varied_label(point)}-seed-{seed}",
                values={**groups[group], **point, SEED: seed},
            )
            for group, point, seed in cells
        ]
    )
    for group in ordered:
        tried = [
            Tried(values=point, scores=tuple(_score(next(results), search.metric) for _ in search.seeds))
            for point in suite.grid
        ]
        yield group, GroupSearch(tried=tuple(tried), chosen=_best(tried, search.metric))


def _score(result: Mapping[str, Any] | None, metric: str) -> float | None:
    value = result["mean"].get(metric) if result is not None else None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _best(tried: Sequence[Tried], metric: str) -> Values | None:
    sign = -1 if "loss" in metric else 1
    scored = [one for one in tried if one.mean is not None]
    return max(scored, key=lambda one: sign * (one.mean or 0.0)).values if scored else None
