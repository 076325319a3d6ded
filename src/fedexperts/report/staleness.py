"""Show the age of uploads in runs whose server does not wait: a table, and curves over its steps."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean

from fedexperts.report.figures import Figure, curve, styles_of
from fedexperts.report.grouping import Method, tasks_of
from fedexperts.report.quantities import spread, text
from fedexperts.report.reading import Run
from fedexperts.report.tables import Table, make_table

_MEAN, _MAX = "asynchronous.staleness_mean", "asynchronous.staleness_max"
_WEIGHT, _AT_WORK = "asynchronous.weight_mean", "asynchronous.num_at_work"
_NOTE = (
    "Staleness is the number of steps that the server made during the turn of an upload. Mean over seeds; "
    "the band is one standard deviation."
)


def staleness_table(methods: Sequence[Method]) -> list[Table]:
    """A row for each method whose server does not wait: age and weight of the uploads that counted."""
    rows = [
        [
            method.label,
            *(text(path, spread(read(run) for run in method.runs)) for path, read in _COLUMNS.values()),
        ]
        for method in methods
        if all(_told(run, _MEAN) for run in method.runs)
    ]
    caption = "Uploads of a server that does not wait"
    return [make_table(caption, ["method", *_COLUMNS], rows)] if rows else []


def staleness_figures(methods: Sequence[Method]) -> list[Figure]:
    """A figure for each task: mean and largest staleness by step."""
    legend, figures = list(styles_of(methods).items()), []
    for task, group in tasks_of(methods).items():
        panels = [
            one for path in (_MEAN, _MAX) for one in curve(methods, group, path, partial(_by_round, path))
        ]
        if panels:
            figures.append(Figure(title=task, note=_NOTE, panels=panels, legend=legend, is_in_text=False))
    return figures


def _by_round(path: str, run: Run) -> dict[int, float]:
    return {number: line[path] for number, line in run.rounds.items() if path in line}


def _told(run: Run, path: str) -> list[float]:
    return list(_by_round(path, run).values())


def _mean(run: Run, path: str) -> float:
    """Return the mean over a run's steps."""
    return fmean(_told(run, path))


_COLUMNS: Mapping[str, tuple[str, Callable[[Run], float]]] = {
    "steps": ("num_steps", lambda run: len(_told(run, _MEAN))),
    "staleness, mean": (_MEAN, lambda run: _mean(run, _MEAN)),
    "staleness, largest": (_MAX, lambda run: max(_told(run, _MAX))),
    "weight, mean": (_WEIGHT, lambda run: _mean(run, _WEIGHT)),
    "too old": ("num_refused", lambda run: run.numbers.get("refused.stale", 0.0)),
    "clients at work after a step": (_AT_WORK, lambda run: _mean(run, _AT_WORK)),
}
"""For each column how its numbers are written, and how they are read."""
