"""Draw differences with their intervals, and scores against bytes, as SVG with matplotlib."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedexperts.report.drawing import COLOURS, INK, MARKS, SOFT, axis_limits, cut_names, svg_of
from fedexperts.report.quantities import Spread, factor_of, heading, is_points, text
from fedexperts.report.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH, _HEIGHT = 4.6, 2.8
_LETTER, _LINE = 0.075, 0.15
"""Width and height of a label's letter in inches."""


def interval_chart(table: Table, styles: Sequence[int], salt: str) -> str:
    """A row for each difference: its mean and interval, clients as pale dots, and a line at 0.

    The columns are mean, low end, high end, then one for each client. The axis spans at least ten points of
    100, and 0 is on it.
    """
    factor, names = factor_of(table.path), [row[0] for row in table.rows]
    rows = [[factor * one.mean for one in row if one is not None] for row in table.values]
    ends = [value for row in rows for value in row]
    step = 0.26

    def draw(axes: "Axes") -> None:
        for place, ((mean, low, high, *clients), style) in enumerate(zip(rows, styles, strict=True)):
            colour = COLOURS[style % len(COLOURS)]
            axes.plot(clients, [place] * len(clients), "o", color=colour, alpha=0.35, ms=3, mew=0)
            axes.plot([low, high], [place, place], color=colour, lw=2.2)
            axes.plot([mean], [place], color=colour, marker=_mark(style), ms=6)
        axes.axvline(0, color=SOFT, lw=1)
        axes.set_yticks(range(len(names)), cut_names(names))
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(*_around_zero(min(ends), max(ends), least=10.0 if is_points(table.path) else 0.0))
        axes.grid(axis="x")

    return svg_of(draw, 3.6, step * len(names) + 0.1, salt)


def _mark(style: int) -> str:
    return list(MARKS)[style % len(MARKS)]


def _around_zero(low: float, high: float, *, least: float) -> tuple[float, float]:
    low, high = min(low, 0.0), max(high, 0.0)
    spare = max(least - (high - low), 0.0) / 2 + (0.05 * (high - low) or 0.05)
    return low - spare, high + spare


@dataclass(frozen=True, kw_only=True)
class _Label:
    """Place of a name, in inches from the lower left corner of the axes."""

    x: float
    y: float
    width: float

    def touches(self, other: "_Label") -> bool:
        beside = self.x + self.width < other.x or other.x + other.width < self.x
        return not beside and abs(self.y - other.y) < _LINE


def bytes_chart(table: Table, styles: Sequence[int], salt: str) -> str:
    """A named mark for each row: bytes on a logarithmic axis, and a score with its standard deviation.

    The columns are bytes and score. No bytes stand apart at the left, since the logarithm has no place for
    them.
    """
    factor = factor_of(table.path)
    pairs = [(size, score) for size, score in table.values if size and score]
    bytes_of = [size.mean for size, _ in pairs]
    decades = [math.log10(size) for size in bytes_of if size > 0]
    first, last = math.floor(min(decades, default=0.0)), math.ceil(max(decades, default=0.0))
    xs = [math.log10(size) if size > 0 else first - 1.0 for size in bytes_of]
    ys = [Spread(mean=factor * one.mean, std=factor * (one.std or 0.0), num_values=1) for _, one in pairs]
    ends = [one.mean + sign * (one.std or 0.0) for one in ys for sign in (-1, 1)]
    low, high = axis_limits(min(ends), max(ends), is_share=is_points(table.path))
    left, right = min(xs) - 0.2, max(last, first + 1) + 0.1
    unit = _WIDTH / (right - left), _HEIGHT / (high - low)
    corners = [((x - left) * unit[0], (y.mean - low) * unit[1]) for x, y in zip(xs, ys, strict=True)]
    labels = place_labels(corners, names := cut_names([row[0] for row in table.rows]))

    def draw(axes: "Axes") -> None:
        for name, x, y, style, label in zip(names, xs, ys, styles, labels, strict=True):
            colour = COLOURS[style % len(COLOURS)]
            axes.errorbar(x, y.mean, y.std or None, color=colour, marker=_mark(style), ms=6, elinewidth=1.2)
            place = left + label.x / unit[0], low + label.y / unit[1]
            thread = {"arrowstyle": "-", "color": SOFT, "lw": 0.5, "shrinkA": 0, "shrinkB": 3}
            axes.annotate(name, (x, y.mean), place, va="center", fontsize=8.5, color=INK, arrowprops=thread)
        has_none = 0.0 in bytes_of
        marks = [*[first - 1] * has_none, *range(first, last + 1)]
        axes.set_xticks(marks, [*["nothing"] * has_none, *(_size(power) for power in range(first, last + 1))])
        axes.set_xlim(left, right)
        axes.set_ylim(low, high)
        axes.set_xlabel(f"{table.titles[1]}, logarithmic")
        axes.set_ylabel(heading(table.path))
        axes.grid(axis="y")

    return svg_of(draw, _WIDTH, _HEIGHT, salt)


def _size(power: int) -> str:
    number, unit = text("bytes", 10.0**power).split()
    return f"{float(number.replace(',', '')):g} {unit}"


def place_labels(points: Sequence[tuple[float, float]], names: Sequence[str]) -> list[_Label]:
    """A place to the right of each point, moved up until it touches nothing; lower points come first."""
    marks = [_Label(x=x - 0.05, y=y, width=0.1) for x, y in points]
    placed: dict[int, _Label] = {}
    for number in sorted(range(len(points)), key=lambda one: points[one][1]):
        x, y = points[number]
        label = _Label(x=x + 0.14, y=y, width=_LETTER * len(names[number]))
        while any(label.touches(other) for other in (*marks, *placed.values())):
            label = _Label(x=label.x, y=label.y + _LINE / 4, width=label.width)
        placed[number] = label
    return [placed[number] for number in range(len(points))]
