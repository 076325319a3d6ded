"""Draw what is no table of numbers: maps whose cells are parted by colour, and time lines."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedexperts.report.drawing import COLOURS, INK, RULE, SOFT, cut_names, svg_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell of a map: strips of colours side by side, and letters over them."""

    styles: Sequence[int] = ()
    letters: str = ""


def cell_map(
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Mapping[tuple[int, int], Cell],
    names: tuple[str, str],
    salt: str,
) -> str:
    """Cells by row and column, empty where ``cells`` has none; ``names`` are those of rows and columns."""
    has_letters = any(cell.letters for cell in cells.values())
    tall, wide = (0.2, 0.22) if has_letters else (0.17, max(0.1, min(0.26, 4.6 / len(columns))))

    def draw(axes: "Axes") -> None:
        from matplotlib.patches import Rectangle

        for (row, column), cell in sorted(cells.items()):
            width = 0.9 / max(len(cell.styles), 1)
            for place, style in enumerate(cell.styles):
                corner, colour = (column - 0.45 + place * width, row - 0.45), COLOURS[style % len(COLOURS)]
                axes.add_patch(
                    Rectangle(corner, width, 0.9, color=colour, alpha=0.45 if has_letters else 1, lw=0)
                )
            if cell.letters:
                axes.text(column, row, cell.letters, color=INK, ha="center", va="center", fontsize=8)
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(0, len(rows), every := math.ceil(0.13 / tall)), cut_names(rows, every))
        every = max(1, math.ceil((0.06 + 0.08 * max(map(len, columns))) / wide))
        axes.set_xticks(range(0, len(columns), every), cut_names(columns, every))
        axes.tick_params(length=0)
        axes.set_ylabel(names[0])
        axes.set_xlabel(names[1])
        axes.spines[:].set_visible(True)

    return svg_of(draw, wide * len(columns), tall * len(rows), salt)


@dataclass(frozen=True, kw_only=True)
class Span:
    """A stretch of a time line."""

    start: float
    seconds: float
    style: int


def time_line(rows: Mapping[str, Sequence[Span]], marks: Sequence[float], salt: str) -> str:
    """Rows of spans over seconds, with an upright line at each of ``marks``."""
    names = list(rows)

    def draw(axes: "Axes") -> None:
        for row, spans in enumerate(rows.values()):
            for span in spans:
                axes.barh(row, span.seconds, 0.7, span.start, color=COLOURS[span.style % len(COLOURS)])
        for mark in marks:
            axes.axvline(mark, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_yticks(range(len(names)), cut_names(names))
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(left=0)
        axes.grid(axis="x", color=RULE)
        axes.set_xlabel("seconds since the first of these turns began")

    return svg_of(draw, 6.4, 0.24 * len(names) + 0.1, salt)
