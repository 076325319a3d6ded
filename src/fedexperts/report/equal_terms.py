"""The section "Equal terms": methods at the same search budget, and at the same parameters or bytes."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedexperts.report.grouping import Method, variant_of
from fedexperts.report.quantities import Spread, text, title_of
from fedexperts.report.reading import Suite
from fedexperts.report.tables import Table, make_table

_BYTES = ("bytes.upload_per_client_round", "bytes.download_per_client_round")
_COSTS = ("parameters.trained", *_BYTES)
_SCORES = (
    "mean.rougeL_after",
    "mean.loss_after",
    "exam.personalised",
    "retention.exam_free.personalised",
    "retention.neutral_rougeL.personalised",
)
_QUANTITIES = {"trained_parameters": ("parameters.trained",), "bytes": _BYTES}
_WORDS = {"trained_parameters": "trained parameters", "bytes": "bytes of a client and round, both ways"}


def equal_tables(suite: Suite, methods: Sequence[Method]) -> list[Table]:
    """One table of all methods at the suite's search budget, then one for each set that it declares equal."""
    if len(methods) < 2:
        return []
    declared = [(one, _of_groups(methods, one["groups"])) for one in suite.equal]
    tables = [_table(_equal_caption(one["by"], own), own, suite.search) for one, own in declared if own]
    return [_table(_budget_caption(suite.search), methods, suite.search), *tables]


def _of_groups(methods: Sequence[Method], groups: Sequence[str]) -> list[Method]:
    return [method for method in methods if variant_of(method.runs[0]) in groups]


def _table(caption: str, methods: Sequence[Method], search: Mapping[str, Any]) -> Table:
    paths = [path for path in (*_COSTS, *_SCORES) if any(method.spread(path) for method in methods)]
    rows = [
        [method.label, _tried(method, search), *(text(path, method.spread(path)) for path in paths)]
        for method in methods
    ]
    names = {"parameters.trained": "trained parameters"}
    titles = ["method", "runs searched", *(names.get(path) or title_of(path) for path in paths)]
    return make_table(caption, titles, rows)


def _tried(method: Method, search: Mapping[str, Any]) -> str:
    """Return the number of runs that the search spent on the method."""
    found = (search.get("groups") or {}).get(variant_of(method.runs[0])) or {}
    return str(sum(len(point["scores"]) for point in found.get("tried") or ()))


def _budget_caption(search: Mapping[str, Any]) -> str:
    if not search:
        return "Without a search: every method at the settings of its runs"
    return "At equal search budget: every method chose from the same points, by validation examples alone"


def _equal_caption(by: str, methods: Sequence[Method]) -> str:
    amounts = [sum(value.mean for value in _values(method, by)) for method in methods]
    least, most = min(amounts), max(amounts)
    apart = f"{100 * (most / least - 1):.1f} % apart" if least else "one of them none"
    return f"At equal {_WORDS[by]}: {least:,.0f} to {most:,.0f}, {apart}"


def _values(method: Method, by: str) -> list[Spread]:
    return [value for path in _QUANTITIES[by] if (value := method.spread(path))]
