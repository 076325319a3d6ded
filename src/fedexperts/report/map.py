"""The section "Map": where in the world that the data describe each method beats its reference."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedexperts.report.figures import Figure, Panel, cells, heat, range_of
from fedexperts.report.grouping import (
    TASK_SECTIONS,
    Flat,
    Method,
    settings_of,
    short_names,
    value_text,
    varied_keys,
)
from fedexperts.report.pairing import Compared, Difference, less_is_better, scores_of
from fedexperts.report.quantities import finite, heading, signed_text
from fedexperts.report.tables import Table, make_table

_FIRST = tuple(f"data.tinyworld.{name}" for name in ("common_share", "disagreement", "examples_per_client"))
"""Keys that become axes before others."""
_NOTE = (
    "Difference from {}, paired by client and seed: blue is better, orange worse. Outlined: the 95 % "
    "interval excludes 0, over three seeds or more. One colour scale for all panels of a score."
)


@dataclass(frozen=True, kw_only=True)
class _Axes:
    """Keys of the columns and of the rows, the second empty if there is one key alone."""

    column: str
    row: str
    others: tuple[str, ...]
    """Further keys that vary: a panel for each of their combinations."""


def map_figures(methods: Sequence[Method], compared: Sequence[Compared]) -> list[Figure]:
    """A figure a score, a panel a method, a cell a point of the data's numeric settings that vary."""
    axes = _axes([settings_of(method.runs[0]) for method in methods])
    if axes is None:
        return []
    references = dict.fromkeys(one.reference.name for one in compared)
    figures: list[Figure] = []
    for score in scores_of(compared):
        panels = _panels(compared, axes, score)
        title, note = heading(score), _NOTE.format(" or ".join(references))
        figures.append(
            Figure(title=title, note=note, panels=panels, is_folded=bool(figures), is_in_text=False)
        )
    return figures


def _axes(flats: Sequence[Flat]) -> _Axes | None:
    """The axes for settings of all methods; None if no numeric setting of the data varies."""
    varied = [key for key in varied_keys(flats) if key.partition(".")[0] in TASK_SECTIONS]
    numeric = [
        key for key in varied if key.startswith("data.") and all(_is_number(one, key) for one in flats)
    ]
    numeric.sort(key=lambda key: _FIRST.index(key) if key in _FIRST else len(_FIRST))
    if not numeric:
        return None
    column, row = [*numeric, ""][:2]
    return _Axes(column=column, row=row, others=tuple(key for key in varied if key not in {column, row}))


def _is_number(flat: Flat, key: str) -> bool:
    return finite(flat.get(key)) is not None


def _panels(compared: Sequence[Compared], axes: _Axes, score: str) -> list[Panel]:
    names = short_names(settings_of(compared[0].method.runs[0]))
    found: dict[tuple[str, ...], dict[str, dict[tuple[Any, Any], Difference]]] = {}
    for one in compared:
        flat = settings_of(one.method.runs[0])
        others = tuple(f"{names.get(key, key)}={value_text(flat[key])}" for key in axes.others if key in flat)
        point = flat[axes.column], flat.get(axes.row)
        if score in one.differences:
            found.setdefault(others, {}).setdefault(one.method.name, {})[point] = one.differences[score]
    order = list(dict.fromkeys(name for by_name in found.values() for name in by_name))
    panels = {
        " · ".join([name, *others]): by_name[name]
        for others, by_name in found.items()
        for name in order
        if name in by_name
    }
    tables = {title: _table(title, points, axes, score, names) for title, points in panels.items()}
    limits = range_of(list(tables.values()))
    return [
        heat(
            title,
            table,
            limits,
            is_signed=True,
            less_is_darker=less_is_better(score),
            outlined=_findings(panels[title]),
        )
        for title, table in tables.items()
    ]


def _places(points: Mapping[tuple[Any, Any], Difference]) -> tuple[list[Any], list[Any]]:
    columns, rows = ({point[place] for point in points} for place in (0, 1))
    return sorted(columns), sorted(rows, key=lambda value: value or 0)


def _table(
    title: str,
    points: Mapping[tuple[Any, Any], Difference],
    axes: _Axes,
    score: str,
    names: Mapping[str, str],
) -> Table:
    columns, rows = _places(points)
    found = [[points.get((column, row)) for column in columns] for row in rows]
    means = [[one.mean if one else None for one in own] for own in found]
    written = [["–" if one is None else signed_text(score, one) for one in own] for own in means]
    head = f"{names.get(axes.row, '')} / {names[axes.column]}"
    return make_table(
        f"{title}: {heading(score)}",
        [head, *map(value_text, columns)],
        [[value_text(row) if axes.row else "", *own] for row, own in zip(rows, written, strict=True)],
        values=tuple(map(cells, means)),
        path=score,
    )


def _findings(points: Mapping[tuple[Any, Any], Difference]) -> frozenset[tuple[int, int]]:
    columns, rows = _places(points)
    return frozenset(
        (rows.index(row), columns.index(column)) for (column, row), one in points.items() if one.is_finding
    )
