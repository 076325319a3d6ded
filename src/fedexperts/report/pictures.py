"""A report's figures as files: each one SVG with its titles, legend and panels, for a page or a paper."""

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedexperts.report.drawing import COLOURS, INK, NEEDLESS_ID, SOFT
from fedexperts.report.figures import Figure
from fedexperts.report.sections import Content

WIDTH = 900.0
"""Points after which panels and names begin a new row; one that is wider has its own width."""
_GAP, _LINE, _LETTER = 18.0, 14.0, 5.6
"""Points between panels, from line to line, and of a letter of nine points on average."""


@dataclass(frozen=True, kw_only=True)
class _Placed:
    """A panel's title and drawing without its frame, and their place."""

    title: str
    body: str
    x: float
    y: float


def pictures(content: Content, folder: Path) -> Iterator[tuple[Path, str]]:
    """The path and the SVG of every figure of ``content``: ``<section>-<number>-<title>.svg``."""
    for section in content.sections:
        for number, figure in enumerate(section.figures, start=1):
            words = re.findall("[a-z0-9]+", f"{section.title} {number} {figure.title}".lower())
            name = "-".join(words)[:60].rstrip("-")
            yield folder / f"{name}.svg", picture(figure, name)


def picture(figure: Figure, name: str) -> str:
    """One SVG of a figure on white; its ids are made from ``name``."""
    heads = [figure.title] if figure.title else []
    entries = [
        (f"{figure.marks[style % len(figure.marks)]} {text}", COLOURS[style % len(COLOURS)])
        for text, style in figure.legend
    ]
    lines, y = [], 0.0
    for head in heads:
        y += _LINE
        lines.append(_text(0, y, head, INK, weight="bold"))
    for row in _rows([len(text) * _LETTER + _GAP for text, _ in entries]):
        y += _LINE
        for place, x in row:
            lines.append(_text(x, y, *entries[place]))
    placed, width, height = _place_panels(figure, name, y + _GAP / 2)
    for one in placed:
        lines.append(_text(one.x, one.y, one.title, SOFT))
        lines.append(f'<g transform="translate({one.x:g} {one.y + _LINE / 2:g})">{one.body}</g>')
    width = max([width, *(len(head) * _LETTER for head in heads)])
    style = "<style>*{stroke-linejoin: round; stroke-linecap: butt}</style>"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="-8 -4 {width + 16:g} {height + 12:g}" width="{width + 16:g}pt" role="img">'
        f"<title>{html.escape(figure.title or name)}</title>{style}"
        f'<rect x="-8" y="-4" width="100%" height="100%" fill="#ffffff"/>\n' + "\n".join(lines) + "\n</svg>\n"
    )


def _place_panels(figure: Figure, name: str, top: float) -> tuple[list[_Placed], float, float]:
    """Return the panels row by row below ``top``, and the picture's width and height."""
    drawn = [panel.draw(f"{name}-{number}") for number, panel in enumerate(figure.panels)]
    sizes = [_size(one) for one in drawn]
    titles = [panel.title for panel in figure.panels]
    widths = [max(w, len(title) * _LETTER) + _GAP for (w, _), title in zip(sizes, titles, strict=True)]
    placed, wide = [], 0.0
    for row in _rows(widths):
        for place, x in row:
            body = drawn[place].partition("<svg")[2].partition(">")[2].rpartition("</svg>")[0]
            body = re.sub(
                r"<style.*?</style>|<metadata>.*?</metadata>|" + NEEDLESS_ID, "", body, flags=re.DOTALL
            )
            placed.append(_Placed(title=titles[place], body=body.strip(), x=x, y=top + _LINE))
            wide = max(wide, x + widths[place] - _GAP)
        top += _LINE * 1.5 + max(sizes[place][1] for place, _ in row) + _GAP / 2
    return placed, wide, top


def _size(svg: str) -> tuple[float, float]:
    ((width, height),) = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[:1]
    return float(width), float(height)


def _rows(widths: Sequence[float]) -> list[list[tuple[int, float]]]:
    """Return places with their x, row by row, none beyond :data:`WIDTH` unless it is alone."""
    rows: list[list[tuple[int, float]]] = []
    x = 0.0
    for place, width in enumerate(widths):
        if not rows or x + width - _GAP > WIDTH:
            rows.append([])
            x = 0.0
        rows[-1].append((place, x))
        x += width
    return rows


def _text(x: float, y: float, text: str, colour: str, weight: str = "normal") -> str:
    font = f"font: {weight} 9px 'DejaVu Sans', sans-serif"
    return f'<text x="{x:g}" y="{y:g}" fill="{colour}" style="{font}">{html.escape(text)}</text>'
