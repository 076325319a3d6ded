"""Draw tables of numbers as SVG with matplotlib: line charts, bars and heat maps.

A drawing needs no style sheet, equal numbers give equal bytes, text stays text, and axes have a fixed size to
which names are added, so that long names never squeeze them.
"""

import io
import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fedexperts.report.quantities import Spread, factor_of, is_points, signed_text, text
from fedexperts.report.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import LinearSegmentedColormap

INK, SOFT, RULE, HEAT = "#1b2430", "#5b6776", "#dde3ea", "#1f6fb2"
GAIN, LOSS = HEAT, "#c8501e"
"""The two hues of differences, told apart by colour-blind readers."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b8528f", "#c98a00", "#3fa2dc", "#6f7782", "#5f4bb6")
"""Okabe and Ito's, safe for colour-blind readers, two of them darker, and two more."""
MARKS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼"}
"""A line's marks and, for legends, the characters that look like them."""
NEEDLESS_ID = r' id="[\w.]+_\d+"'
"""What matplotlib calls its parts, the same in each drawing; nothing refers to them."""
Cells = frozenset[tuple[int, int]]
Limits = tuple[float, float]

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.parse_math": False,
    "axes.axisbelow": True,
    "grid.linewidth": 0.8,
    "lines.markersize": 4.5,
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    **dict.fromkeys(("text.color", "axes.labelcolor"), INK),
    **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), SOFT),
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), RULE),
}


def svg_of(draw: Callable[["Axes"], None], width: float, height: float, salt: str) -> str:
    """SVG of ``draw`` on axes of ``width`` by ``height`` inches; ``salt`` keeps ids apart on one page."""
    import matplotlib.style
    from matplotlib.figure import Figure

    buffer, style = io.StringIO(), _STYLE | {"svg.hashsalt": salt}
    options: dict[str, Any] = {"transparent": True, "bbox_inches": "tight", "pad_inches": 0.05}
    with matplotlib.style.context(["default", style]), warnings.catch_warnings():
        # The reader's browser has the fonts; the one that text is measured with need not have every letter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(width, height))
        draw(figure.add_axes((0, 0, 1, 1)))
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=no_metadata, **options)
    return buffer.getvalue()


def cut_names(names: Sequence[str], every: int = 1) -> list[str]:
    """Every so many of ``names``, cut where they are long."""
    return [name if len(name) <= 28 else f"{name[:27]}…" for name in names[::every]]


def line_chart(table: Table, styles: Sequence[int], salt: str) -> str:
    """A line a column over the rows' numbers, with a band of one standard deviation, in ``styles``.

    The axis spans at least ten points of 100, or a tenth of the largest value: noise is no collapse. A line
    of one point is a mark with its value.
    """
    factor = factor_of(table.path)
    xs = [float(row[0]) for row in table.rows]
    present = [value for row in table.values for value in row if value is not None]
    ends = [factor * (one.mean + sign * (one.std or 0.0)) for one in present for sign in (-1, 1)]

    def draw(axes: "Axes") -> None:
        for place, style in enumerate(styles):
            pairs = zip(xs, (row[place] for row in table.values), strict=True)
            line = [(x, value) for x, value in pairs if value is not None]
            _line(axes, line, style, factor, text(table.path, line[0][1]) if len(line) == 1 else "")
        axes.set_ylim(*axis_limits(min(ends), max(ends), is_share=is_points(table.path)))
        if len(set(xs)) == 1:
            axes.set_xlim(max(xs[0] - 1, 0.0), xs[0] + 1)
        axes.locator_params(axis="x", integer=all(x.is_integer() for x in xs))
        axes.set_xlabel(table.titles[0])
        axes.grid(axis="y")

    return svg_of(draw, 5.2, 2.2, salt)


def _line(axes: "Axes", line: Sequence[tuple[float, Spread]], style: int, factor: float, note: str) -> None:
    xs, means = [x for x, _ in line], [factor * value.mean for _, value in line]
    colour, marks = COLOURS[style % len(COLOURS)], list(MARKS)
    axes.plot(xs, means, color=colour, marker=marks[style % len(marks)], markevery=max(1, len(xs) // 20))
    if any(value.std for _, value in line):
        low, high = ([factor * (v.mean + sign * (v.std or 0.0)) for _, v in line] for sign in (-1, 1))
        axes.fill_between(xs, low, high, color=colour, alpha=0.16, linewidth=0)
    if note:
        axes.annotate(note, (xs[0], means[0]), (7, -3), textcoords="offset points")


def axis_limits(low: float, high: float, *, is_share: bool) -> Limits:
    """The ends of an axis for numbers from ``low`` to ``high``: ten points of 100 or a tenth at the least."""
    least = 10.0 if is_share else max(abs(low), abs(high)) / 10 or 1.0
    middle, half = (low + high) / 2, max(high - low, least) * 0.55
    low, high = middle - half, middle + half
    return (max(low, -half / 20), min(high, 100 + half / 20)) if is_share else (low, high)


def bar_chart(
    table: Table,
    looks: Sequence[tuple[str, float]],
    salt: str,
    *,
    ends: Sequence[str] = (),
    top: float | None = None,
) -> str:
    """Lying bars for each row: one a column side by side, or with ``ends`` stacked and these at their ends.

    ``looks`` are the columns' colours and opacities, ``top`` the end of the axis.
    """
    names, factor = [row[0] for row in table.rows], factor_of(table.path)
    step, thick = max(0.09, min(0.34, 14 / len(names))), 0.8 / (1 if ends else len(looks))

    def draw(axes: "Axes") -> None:
        left = [0.0] * len(names)
        for number, (colour, alpha) in enumerate(looks):
            column = [row[number] for row in table.values]
            means = [factor * one.mean if one else 0.0 for one in column]
            stds = [factor * (one.std or 0.0) if one else 0.0 for one in column]
            shift = 0.0 if ends else (number - (len(looks) - 1) / 2) * thick
            places, whiskers = [row + shift for row in range(len(names))], None if ends else stds
            drawn = axes.barh(
                places, means, thick, left, xerr=whiskers, color=colour, alpha=alpha, ecolor=SOFT
            )
            left = [a + b for a, b in zip(left, means, strict=True)] if ends else left
        every = math.ceil(0.13 / step)
        axes.set_yticks(range(0, len(names), every), cut_names(names, every))
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(0, top and factor * top)
        axes.grid(axis="x")
        if ends:
            axes.bar_label(drawn, ends, padding=4)
            axes.set_xticks([])

    return svg_of(draw, 4.2, step * len(names) + 0.1, salt)


_LEAST_SCALE = 0.55
"""Least height in inches of a colour scale, so that its labels stay apart."""


def heat_map(
    table: Table,
    salt: str,
    *,
    limits: Limits,
    outlined: Cells = frozenset(),
    less_is_darker: bool = False,
    has_text: bool = False,
    is_signed: bool = False,
) -> str:
    """One hue whose opacity is the value, readable on light and dark ground, with its scale beside.

    The first title is the rows' and the columns' names for themselves, parted by a slash. A scale
    that does not begin at 0 spans at least ten points of 100, or a tenth of the largest value. With
    ``is_signed`` there are two hues, one for gains and one for losses, as opaque as the value is far from 0;
    ``less_is_darker`` then makes less a gain.
    """
    rows, columns = [row[0] for row in table.rows], table.titles[1:]
    low, high = _scale(limits, table.path, is_signed=is_signed)
    wide = (0.5 if is_signed else 0.42) if has_text else max(0.04, min(0.26, 4.0 / len(columns)))
    tall = 0.25 if has_text else max(0.04, min(0.2, 5.0 / len(rows)))

    def draw(axes: "Axes") -> None:
        from matplotlib.patches import Rectangle

        ramp = _ramp(less_is_darker=less_is_darker, is_signed=is_signed)
        means = [[one.mean if one else float("nan") for one in row] for row in table.values]
        image = axes.imshow(means, ramp, vmin=low, vmax=high, aspect="auto", interpolation="none")
        share = max(1.0, _LEAST_SCALE / (tall * len(rows)))
        place = 1.03, (1 - share) / 2, 0.12 / (wide * len(columns)), share
        scale = axes.figure.colorbar(image, cax=axes.inset_axes(place))
        write, marks = (signed_text, (low, 0.0, high)) if is_signed else (text, (low, high))
        scale.set_ticks(marks, labels=[write(table.path, one) for one in marks])
        scale.outline.set_visible(False)
        for row, column in sorted(outlined):
            corner = column - 0.46, row - 0.46
            axes.add_patch(
                Rectangle(corner, 0.92, 0.92, fill=False, ec=INK if is_signed else COLOURS[1], lw=1.5)
            )
        if has_text:
            _cell_texts(axes, table, image, is_signed=is_signed)
        _names(axes, rows, columns, (tall, wide))
        axes.set_ylabel(table.titles[0].partition(" / ")[0])
        axes.set_xlabel(table.titles[0].partition(" / ")[2])
        axes.spines[:].set_visible(True)

    return svg_of(draw, wide * len(columns), tall * len(rows), salt)


def _scale(limits: Limits, path: str, *, is_signed: bool) -> Limits:
    low, high = limits
    largest = max(abs(low), abs(high))
    least = 0.1 if is_points(path) else largest / 10 or 1.0
    if is_signed:
        return -max(largest, least), max(largest, least)
    return low, high if low == 0 < high else max(high, low + least)


def _ramp(*, less_is_darker: bool, is_signed: bool) -> "LinearSegmentedColormap":
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    if not is_signed:
        ends = [to_rgba(HEAT, float(less_is_darker)), to_rgba(HEAT, float(not less_is_darker))]
        return LinearSegmentedColormap.from_list("heat", ends)
    low, high = (GAIN, LOSS) if less_is_darker else (LOSS, GAIN)
    stops = [(0.0, to_rgba(low, 1)), (0.5, to_rgba(low, 0)), (0.5, to_rgba(high, 0)), (1.0, to_rgba(high, 1))]
    return LinearSegmentedColormap.from_list("signed", stops)


def _cell_texts(axes: "Axes", table: Table, image: Any, *, is_signed: bool) -> None:
    write, dark = (signed_text, 0.8) if is_signed else (text, 0.6)
    for y, row in enumerate(table.values):
        for x, value in enumerate(row):
            if value is not None:
                colour = "#ffffff" if image.to_rgba(value.mean)[3] > dark else INK
                axes.text(
                    x, y, write(table.path, value.mean), color=colour, ha="center", va="center", fontsize=8.5
                )


def _names(axes: "Axes", rows: Sequence[str], columns: Sequence[str], size: tuple[float, float]) -> None:
    """Names of rows and columns; not every one where they would touch, slanted where they are long."""
    every = math.ceil(0.13 / size[0])
    axes.set_yticks(range(0, len(rows), every), cut_names(rows, every))
    longest = max(map(len, columns))
    is_slanted = longest > 4 and longest * 0.085 > size[1]
    every = max(1, round((0.16 if is_slanted else 0.1 + 0.08 * longest) / size[1]))
    turn: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if is_slanted else {}
    axes.set_xticks(range(0, len(columns), every), cut_names(columns, every), **turn)
