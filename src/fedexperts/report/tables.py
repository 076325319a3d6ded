"""Tables as plain data: the headline one here, rendered as HTML, Markdown or in a terminal elsewhere."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedexperts.report import quantities
from fedexperts.report.grouping import Method, methods_of, tasks_of
from fedexperts.report.quantities import Spread
from fedexperts.report.reading import Run


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column's heading; numbers stand to the right."""

    title: str
    is_number: bool = True


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under columns; ``marked`` holds (row, column) of the cells to be set off as best."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: frozenset[tuple[int, int]] = frozenset()
    is_folded: bool = False
    """Whether the page shows it only when opened."""
    is_grouped: bool = False
    """Whether the first column names groups of rows, which the page shows as headings."""
    is_drawn: bool = False
    """Whether the page has a figure in its place, so that only Markdown shows it."""

    def __post_init__(self) -> None:
        """A row of another width is our own fault."""
        assert all(len(row) == len(self.columns) for row in self.rows), self.caption


def make_table(
    caption: str,
    titles: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    num_text: int = 1,
    is_folded: bool = False,
    is_drawn: bool = False,
) -> Table:
    """A table whose first ``num_text`` columns are text and the others numbers."""
    columns = tuple(Column(title=title, is_number=i >= num_text) for i, title in enumerate(titles))
    cells = tuple(map(tuple, rows))
    return Table(caption=caption, columns=columns, rows=cells, is_folded=is_folded, is_drawn=is_drawn)


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One number of a method: where it stands in ``result.json``, how it is written, which end is best."""

    path: str
    title: str
    text: Callable[[Spread | None], str]
    best: int = 0
    """1 where more is better, -1 where less is, 0 where none is marked."""


HEADLINE = (
    Measure(path="mean.rougeL_before", title="ROUGE-L before", text=quantities.points_spread),
    Measure(path="mean.rougeL_after", title="ROUGE-L after", text=quantities.points_spread, best=1),
    Measure(path="mean.loss_after", title="loss after", text=quantities.plain_spread, best=-1),
    Measure(path="exam.base", title="exam base", text=quantities.points_spread),
    Measure(path="exam.global", title="exam global", text=quantities.points_spread),
    Measure(path="exam.personalised", title="exam personalised", text=quantities.points_spread, best=1),
    Measure(
        path="bytes.upload_per_client_round",
        title="upload per client and round",
        text=quantities.bytes_spread,
    ),
    Measure(path="seconds.total", title="time", text=quantities.seconds_spread),
)


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """One method of the headline table."""

    method: str
    task: str
    seeds: tuple[int, ...]
    values: Mapping[str, Spread | None] = field(default_factory=dict)
    """By path in ``result.json``, e.g. ``mean.rougeL_after`` (a share of 1); None where no run has it."""
    best: frozenset[str] = frozenset()
    """The paths at which the method has the best mean of its task; none where it is alone."""


def result_table(results: Sequence[Mapping[str, Any]]) -> list[ResultRow]:
    """One row per method from the contents of ``result.json`` files, best mean ROUGE-L first in each task."""
    runs = [
        Run(name=str(result.get("name", "")), result=dict(result), rounds=(), environment={}, ledger=None)
        for result in results
    ]
    return rows_of(methods_of(runs))


def rows_of(methods: Sequence[Method]) -> list[ResultRow]:
    """The headline rows of ``methods``, in their order."""
    rows = []
    for task, group in tasks_of(methods).items():
        values = [{measure.path: method.spread(measure.path) for measure in HEADLINE} for method in group]
        for method, own in zip(group, values, strict=True):
            best = frozenset(m.path for m in HEADLINE if _is_best(m, own, values))
            seeds = tuple(run.seed for run in method.runs)
            rows.append(ResultRow(method=method.name, task=task, seeds=seeds, values=own, best=best))
    return rows


def _is_best(
    measure: Measure, own: Mapping[str, Spread | None], others: Sequence[Mapping[str, Spread | None]]
) -> bool:
    """Best as written: a tie in the digits shown is a tie, and where all are equal none is best."""
    present = [value for value in (other[measure.path] for other in others) if value is not None]
    mine = own[measure.path]
    if not measure.best or mine is None or len(present) < 2:
        return False
    top = _mean_text(measure, max(present, key=lambda value: measure.best * value.mean))
    is_distinction = any(_mean_text(measure, value) != top for value in present)
    return is_distinction and _mean_text(measure, mine) == top


def _mean_text(measure: Measure, value: Spread) -> str:
    return measure.text(Spread(mean=value.mean, std=None, num_values=1))


def _caption(rows: Sequence[ResultRow], *, has_best: bool) -> str:
    spread = max((len(row.seeds) for row in rows), default=0) > 1
    parts = [
        "Mean over clients, then mean ± sample standard deviation over n seeds"
        if spread
        else "Mean over clients"
    ]
    parts += ["best of each task marked" if len({row.task for row in rows}) > 1 else "best marked"] * has_best
    return "; ".join(parts)


def headline_table(rows: Sequence[ResultRow]) -> Table:
    """``rows`` as text, without the columns that no row fills; with the task where there are several."""
    shown = [m for m in HEADLINE if any(row.values.get(m.path) for row in rows)]
    has_task = len({row.task for row in rows}) > 1
    columns = [
        Column(title="method", is_number=False),
        Column(title="n"),
        *(Column(title=m.title) for m in shown),
    ]
    if has_task:
        columns.insert(0, Column(title="task", is_number=False))
    cells, marked = [], set()
    for number, row in enumerate(rows):
        head = [row.task] * has_task + [row.method, str(len(row.seeds))]
        cells.append((*head, *(m.text(row.values.get(m.path)) for m in shown)))
        marked |= {(number, len(head) + i) for i, m in enumerate(shown) if m.path in row.best}
    return Table(
        caption=_caption(rows, has_best=bool(marked)),
        columns=tuple(columns),
        rows=tuple(cells),
        marked=frozenset(marked),
        is_grouped=has_task,
    )
