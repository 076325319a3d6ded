"""Heat maps as SVG: one hue whose opacity is the value, so that it reads on light and on dark ground."""

import base64
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedexperts.report.charts import is_crowded, name_every, shorten
from fedexperts.report.markup import Markup, element

_MAX_CELLS = 2500
_HUE = (31, 111, 178)
Values = Sequence[Sequence[float | None]]


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Values by row and column; None is a cell without a value."""

    title: str
    row_title: str
    column_title: str
    row_names: tuple[str, ...]
    column_names: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    text: Callable[[float], str]
    """How a value is written in its cell, where there is room, and on hover."""
    outlined: frozenset[tuple[int, int]] = frozenset()
    darker_is_less: bool = False


@dataclass(frozen=True, kw_only=True)
class _Grid:
    left: float
    top: float
    right: float
    cell_width: float
    cell_height: float


def value_range(maps: Sequence[HeatMap]) -> tuple[float, float]:
    """The least and greatest value of all ``maps``, so that they can share a scale."""
    present = [value for one in maps for row in one.values for value in row if value is not None]
    return (min(present), max(present)) if present else (0.0, 1.0)


def heat_map(one: HeatMap, *, low: float, high: float, show_text: bool) -> Markup:
    """The map with ``low`` as the ground and ``high`` as the full hue; a very large one as an image."""
    grid = _grid(one, show_text=show_text)
    width = grid.left + grid.cell_width * len(one.column_names) + grid.right
    height = grid.top + grid.cell_height * len(one.row_names) + 20
    is_large = len(one.row_names) * len(one.column_names) > _MAX_CELLS
    shares = [[_share(value, low, high, flip=one.darker_is_less) for value in row] for row in one.values]
    cells = [_image(shares, grid)] if is_large else _cells(one, shares, grid, show_text=show_text)
    outlines = [_outline(row, column, grid) for row, column in sorted(one.outlined)]
    middle = grid.left + grid.cell_width * len(one.column_names) / 2
    x_title = element("text", one.column_title, x=middle, y=height - 4, text_anchor="middle", class_="axis")
    return element(
        "svg",
        *_row_names(one, grid),
        *_column_names(one, grid),
        *cells,
        *outlines,
        x_title,
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        width=width,
        height=height,
        role="img",
        aria_label=f"{one.title}: {len(one.row_names)} rows ({one.row_title}) by {len(one.column_names)} "
        f"columns ({one.column_title}), from {one.text(low)} to {one.text(high)}",
    )


def _grid(one: HeatMap, *, show_text: bool) -> _Grid:
    num_columns, num_rows = len(one.column_names), len(one.row_names)
    longest_row = min(max((len(name) for name in one.row_names), default=0), 24)
    longest_column = min(max((len(name) for name in one.column_names), default=0), 16)
    wide = 38.0 if show_text else max(min(440.0 / max(num_columns, 1), 27.0), 4.0)
    high = 24.0 if show_text else max(min(460.0 / max(num_rows, 1), 19.0), 4.0)
    is_slanted = is_crowded(longest_column, wide)
    top = 12.0 + 4.4 * longest_column if is_slanted else 20.0
    right = 5.0 * longest_column if is_slanted else 10.0
    return _Grid(left=12 + 6.4 * longest_row, top=top, right=right, cell_width=wide, cell_height=high)


def _share(value: float | None, low: float, high: float, *, flip: bool) -> float | None:
    if value is None:
        return None
    if high <= low:
        return 0.0
    share = (value - low) / (high - low)
    return 1.0 - share if flip else share


def _row_names(one: HeatMap, grid: _Grid) -> list[Markup]:
    every = max(1, round(13.0 / grid.cell_height))
    return [
        element(
            "text",
            shorten(name, 24),
            x=grid.left - 6,
            y=grid.top + grid.cell_height * (number + 0.5) + 4,
            text_anchor="end",
        )
        for number, name in enumerate(one.row_names)
        if number % every == 0
    ]


def _column_names(one: HeatMap, grid: _Grid) -> list[Markup]:
    longest = min(max((len(name) for name in one.column_names), default=0), 16)
    is_slanted = is_crowded(longest, grid.cell_width)
    every = name_every(longest, grid.cell_width)
    parts = []
    for number, name in enumerate(one.column_names):
        if number % every:
            continue
        x, y = grid.left + grid.cell_width * (number + 0.5), grid.top - 6
        turn = f"rotate(-40 {x:.1f} {y:.1f})" if is_slanted else None
        anchor = "start" if is_slanted else "middle"
        parts.append(element("text", shorten(name, 16), x=x, y=y, text_anchor=anchor, transform=turn))
    return parts


def _cells(
    one: HeatMap, shares: Sequence[Sequence[float | None]], grid: _Grid, *, show_text: bool
) -> list[Markup]:
    parts = []
    for row, (values, row_shares) in enumerate(zip(one.values, shares, strict=True)):
        for column, (value, share) in enumerate(zip(values, row_shares, strict=True)):
            x, y = grid.left + grid.cell_width * column, grid.top + grid.cell_height * row
            tip = _tip(one, row, column, value)
            parts.append(
                element(
                    "rect",
                    element("title", tip),
                    class_="cell" if share is not None else "cell none",
                    x=x + 0.5,
                    y=y + 0.5,
                    width=grid.cell_width - 1,
                    height=grid.cell_height - 1,
                    fill_opacity=share,
                )
            )
            if show_text and value is not None and share is not None:
                parts.append(_cell_text(one.text(value), x, y, grid, share))
    return parts


def _tip(one: HeatMap, row: int, column: int, value: float | None) -> str:
    place = f"{one.row_title} {one.row_names[row]}, {one.column_title} {one.column_names[column]}"
    return f"{place}: {'no value' if value is None else one.text(value)}"


def _cell_text(text: str, x: float, y: float, grid: _Grid, share: float) -> Markup:
    kind = "in-cell on-dark" if share > 0.72 else "in-cell zero" if text == "0" else "in-cell"
    return element(
        "text",
        text,
        x=x + grid.cell_width / 2,
        y=y + grid.cell_height / 2 + 4,
        text_anchor="middle",
        class_=kind,
    )


def _outline(row: int, column: int, grid: _Grid) -> Markup:
    return element(
        "rect",
        class_="outline",
        x=grid.left + grid.cell_width * column + 1,
        y=grid.top + grid.cell_height * row + 1,
        width=grid.cell_width - 2,
        height=grid.cell_height - 2,
    )


def _image(shares: Sequence[Sequence[float | None]], grid: _Grid) -> Markup:
    levels = [bytes(round(255 * (share or 0.0)) for share in row) for row in shares]
    return element(
        "image",
        class_="pixels",
        x=grid.left,
        y=grid.top,
        width=grid.cell_width * len(levels[0]),
        height=grid.cell_height * len(levels),
        preserveAspectRatio="none",
        href="data:image/png;base64," + base64.b64encode(opacity_png(levels)).decode("ascii"),
    )


def opacity_png(levels: Sequence[bytes]) -> bytes:
    """A PNG (one byte a pixel) of one hue whose opacity at each pixel is the level, 0 to 255."""
    header = struct.pack(">IIBBBBB", len(levels[0]), len(levels), 8, 3, 0, 0, 0)
    chunks = (
        (b"IHDR", header),
        (b"PLTE", bytes(_HUE) * 256),
        (b"tRNS", bytes(range(256))),
        (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in levels), 9)),
        (b"IEND", b""),
    )
    written = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def colour_scale(low: str, high: str, *, darker_is_less: bool) -> Markup:
    """The legend of a heat map: the ground's value, a ramp, the full hue's value."""
    ends = (high, low) if darker_is_less else (low, high)
    return element(
        "span",
        element("span", ends[0]),
        element("span", class_="ramp"),
        element("span", ends[1]),
        class_="scale",
    )
