"""What a report contains, in order, before it is written as HTML or as Markdown."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from fedexperts.report import details, figure_maps, figures, summary
from fedexperts.report.figures import Figure
from fedexperts.report.grouping import Method, methods_of
from fedexperts.report.reading import Suite
from fedexperts.report.tables import Table, headline_table, rows_of

Item = TypeVar("Item")

_BEFORE_AFTER = (
    "Each client's own model on its own test examples. Before: what the server sends after the last round, "
    "with what the client keeps; after: the same after one more turn of local steps. "
    "ROUGE-L, exact match and exam accuracy are in points of 100. The exam measures what the model knew "
    "before: base is the untouched model, global the server's, personalised the mean over clients."
)
_ONE_SEED = "One seed only: there is no spread, and a difference from another run is no finding yet."
_FEW_SEEDS = "Fewer than three seeds for {}: the spread says little, and a difference is no finding yet."


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading with its sentences, figures and tables."""

    title: str
    sentences: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.sentences or self.figures or self.tables)


@dataclass(frozen=True, kw_only=True)
class Content:
    """A whole report."""

    title: str
    what_ran: str
    simulated: tuple[str, ...]
    glance: tuple[str, ...]
    warnings: tuple[str, ...]
    failures: Table | None
    sections: tuple[Section, ...]


def content_of(suite: Suite) -> Content:
    """All that is said about the runs of ``suite``; what no run has is left out."""
    methods = methods_of(suite.runs)
    return Content(
        title=suite.title,
        what_ran=summary.what_ran(methods),
        simulated=summary.what_is_simulated(methods),
        glance=summary.at_a_glance(methods),
        warnings=summary.warnings(suite, methods),
        failures=details.failures(methods),
        sections=tuple(section for section in _sections(suite, methods) if not section.is_empty),
    )


def _sections(suite: Suite, methods: Sequence[Method]) -> Iterable[Section]:
    yield _results(methods)
    yield Section(title="Rounds", figures=tuple(figures.curves(methods)))
    yield Section(
        title="Clients", figures=tuple(figures.client_bars(methods)), tables=_some(details.clients(methods))
    )
    yield Section(
        title="Personalisation",
        figures=tuple(figure_maps.matrices(methods)),
        tables=(*_some(details.matrix_means(methods)), *details.matrix_cells(methods)),
    )
    yield Section(
        title="Experts", figures=tuple(figure_maps.routing(methods)), tables=_some(details.balance(methods))
    )
    yield Section(
        title="Data",
        figures=_some(figure_maps.partitions(methods)),
        tables=(*_some(details.example_counts(methods)), *details.label_counts(methods)),
    )
    yield Section(
        title="Bytes",
        sentences=_some(details.ledger_sentence(methods)),
        figures=_some(figures.bytes_bars(methods)),
        tables=_some(details.bytes_table(methods), details.parameters(methods)),
    )
    yield Section(
        title="Time", figures=_some(figures.time_bars(methods)), tables=_some(details.seconds(methods))
    )
    yield Section(
        title="Settings and environment",
        tables=(
            *details.settings(methods),
            *_some(details.search(suite), details.environment(suite)),
            details.runs(suite, methods),
        ),
    )


def _some(*items: Item | None) -> tuple[Item, ...]:
    return tuple(item for item in items if item is not None)


def _few_seeds(methods: Sequence[Method]) -> str | None:
    few = [method.label for method in methods if len(method.runs) < 3]
    if not few:
        return None
    if max(len(method.runs) for method in methods) == 1:
        return _ONE_SEED
    return _FEW_SEEDS.format("all methods" if len(few) == len(methods) else ", ".join(few))


def _results(methods: Sequence[Method]) -> Section:
    sentences = (*_some(_few_seeds(methods)), _BEFORE_AFTER)
    return Section(
        title="Results",
        sentences=sentences,
        tables=(
            headline_table(rows_of(methods)),
            *_some(details.all_metrics(methods), details.subjects(methods)),
        ),
    )
