"""Line and bar charts as SVG, written by hand rather than drawn by a plotting library.

Colours are style-sheet classes, so that one figure serves light, dark and print; text stays text; every mark
says its value on hover; equal numbers give equal bytes; and a report of many runs takes a second.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedexperts.report.markup import Markup, element, join
from fedexperts.report.quantities import Spread

_WIDTH, _HEIGHT = 545.0, 250.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 14.0, 12.0, 38.0
NUM_STYLES = 8
"""How many colours the style sheet has for methods and phases."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: its name, its number in the legend, and its (x, spread) points in order of x."""

    name: str
    style: int
    points: tuple[tuple[float, Spread], ...]


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One place on a bar chart's axis with a pale bar (before) and a full one (after)."""

    name: str
    before: Spread | None
    after: Spread | None


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A straight map from values to pixels; what lies outside (the end of a band) is held at the edge."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The pixel of ``value``."""
        held = min(max(value, self.low), self.high)
        return self.start + (held - self.low) / (self.high - self.low) * (self.end - self.start)


def ticks(low: float, high: float, *, about: int = 5, whole: bool = False) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten) that enclose ``low`` to ``high``."""
    if high <= low:
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    power = 10.0 ** math.floor(math.log10((high - low) / about))
    step = next(factor * power for factor in (1, 2, 5, 10) if (high - low) / (factor * power) <= about)
    if whole:
        step = max(1.0, round(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _y_ticks(low: float, high: float, *, points: bool) -> list[float]:
    """Ticks that do not leave 0 to 100 where the values are points of 100 and the marks stay within."""
    marks = ticks(low, high)
    if not points:
        return marks
    held = [mark for mark in marks if -1e-9 <= mark <= 100 + 1e-9]
    return held if len(held) > 1 else marks


def tick_text(value: float, step: float) -> str:
    """A tick with the decimals its step needs."""
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:,.{decimals}f}" if abs(value) > step / 2 else "0"


def style_class(style: int) -> str:
    """The style sheet's class of a method's number; colours come round after eight."""
    return f"s{style % NUM_STYLES}"


def marker(style: int, x: float, y: float, tip: str = "") -> Markup:
    """A method's mark: its shape tells it apart where its colour does not."""
    title = (element("title", tip),) if tip else ()
    kind = style % 4
    if kind == 0:
        path = f"M{x - 3.2:.1f},{y:.1f}a3.2,3.2 0 1,0 6.4,0a3.2,3.2 0 1,0 -6.4,0z"
    elif kind == 1:
        path = f"M{x - 2.9:.1f},{y - 2.9:.1f}h5.8v5.8h-5.8z"
    elif kind == 2:
        path = f"M{x:.1f},{y - 3.8:.1f}l3.7,6.6h-7.4z"
    else:
        path = f"M{x:.1f},{y - 4.1:.1f}l4.1,4.1l-4.1,4.1l-4.1,-4.1z"
    return element("g", *title, Markup(f'<path d="{path}"/>'), class_=f"mark {style_class(style)}")


def _text(x: float, y: float, text: str, anchor: str = "middle", **attributes: str) -> Markup:
    return element("text", text, x=x, y=y, text_anchor=anchor, **attributes)


def _svg(width: float, height: float, description: str, parts: Sequence[str]) -> Markup:
    return element(
        "svg",
        *parts,
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        width=width,
        height=height,
        role="img",
        aria_label=description,
    )


def _y_axis(marks: Sequence[float], scale: Scale, right: float) -> list[Markup]:
    step = marks[1] - marks[0]
    parts = []
    for value in marks:
        y = scale(value)
        parts.append(element("line", class_="grid", x1=_LEFT, x2=right, y1=y, y2=y))
        parts.append(_text(_LEFT - 6, y + 4, tick_text(value, step), "end"))
    return parts


def line_chart(
    series: Sequence[Series], *, title: str, x_title: str, text: Callable[[Spread | None], str], points: bool
) -> Markup:
    """Lines with a band of one standard deviation; ``points`` writes shares of 1 as points of 100."""
    factor = 100.0 if points else 1.0
    xs = [x for line in series for x, _ in line.points]
    edges = [
        factor * (value.mean + sign * (value.std or 0.0))
        for line in series
        for _, value in line.points
        for sign in (-1, 1)
    ]
    marks = _y_ticks(min(edges), max(edges), points=points)
    x_marks = [mark for mark in ticks(min(xs), max(xs), whole=True) if min(xs) <= mark <= max(xs)]
    x_scale = Scale(low=min(xs), high=max(xs), start=_LEFT + 8, end=_WIDTH - _RIGHT)
    y_scale = Scale(low=marks[0], high=marks[-1], start=_HEIGHT - _BOTTOM, end=_TOP)
    parts = _y_axis(marks, y_scale, _WIDTH - _RIGHT)
    parts += [_text(x_scale(mark), _HEIGHT - _BOTTOM + 17, f"{mark:.0f}") for mark in x_marks]
    parts.append(_text((_LEFT + _WIDTH) / 2, _HEIGHT - 5, x_title, class_="axis"))
    parts += [_band(line, x_scale, y_scale, factor) for line in series]
    parts += [_line(line, x_scale, y_scale, factor, text) for line in series]
    return _svg(_WIDTH, _HEIGHT, f"{title}: {_last_values(series, text)}", parts)


def _band(line: Series, x_scale: Scale, y_scale: Scale, factor: float) -> Markup:
    held = [(x_scale(x), value.mean, value.std) for x, value in line.points if value.std is not None]
    if len(held) < 2:
        return Markup("")
    upper = [f"{x:.1f},{y_scale(factor * (mean + std)):.1f}" for x, mean, std in held]
    lower = [f"{x:.1f},{y_scale(factor * (mean - std)):.1f}" for x, mean, std in reversed(held)]
    return element("path", class_=f"band {style_class(line.style)}", d=f"M{'L'.join(upper + lower)}z")


def _line(
    line: Series, x_scale: Scale, y_scale: Scale, factor: float, text: Callable[[Spread | None], str]
) -> Markup:
    places = [(x_scale(x), y_scale(factor * value.mean)) for x, value in line.points]
    path = "L".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [element("path", class_=f"line {style_class(line.style)}", d=f"M{path}")]
    every = max(1, math.ceil(len(places) / 20))
    for number, ((x, value), place) in enumerate(zip(line.points, places, strict=True)):
        if number % every == 0 or number == len(places) - 1:
            parts.append(marker(line.style, *place, tip=f"{line.name}, round {x:.0f}: {text(value)}"))
    return element("g", *parts)


def _last_values(series: Sequence[Series], text: Callable[[Spread | None], str]) -> str:
    return "; ".join(
        f"{line.name} {text(line.points[-1][1])} at round {line.points[-1][0]:.0f}" for line in series
    )


def bar_top(bars: Sequence[Bar]) -> float:
    """The highest end of a bar with its whisker, for several charts to share an axis."""
    ends = [value.mean + (value.std or 0) for bar in bars for value in (bar.before, bar.after) if value]
    return max(ends, default=0.0)


def bar_chart(
    bars: Sequence[Bar],
    *,
    title: str,
    style: int,
    top: float,
    x_title: str,
    text: Callable[[Spread | None], str],
    points: bool,
) -> Markup:
    """Two bars, before and after, at each place, with whiskers of one standard deviation."""
    factor = 100.0 if points else 1.0
    longest = max(len(bar.name) for bar in bars)
    step = max((_WIDTH - _LEFT - _RIGHT) / len(bars), 26.0 if len(bars) <= 32 else 6.0)
    is_slanted = is_crowded(longest, step)
    width = _LEFT + step * len(bars) + _RIGHT
    bottom = _BOTTOM + (min(longest, 14) * 4.2 if is_slanted else 0)
    height = _HEIGHT - _BOTTOM + bottom
    marks = _y_ticks(0.0, factor * top or 1.0, points=points)
    scale = Scale(low=0.0, high=marks[-1], start=height - bottom, end=_TOP)
    parts = _y_axis(marks, scale, width - _RIGHT)
    every = name_every(longest, step)
    for number, bar in enumerate(bars):
        x = _LEFT + step * number
        parts.append(_pair(bar, x, step, style, scale, factor, text))
        if number % every == 0:
            parts.append(_name(bar.name, x + step / 2, height - bottom + 15, is_slanted=is_slanted))
    parts.append(_text((_LEFT + width) / 2, height - 5, x_title, class_="axis"))
    return _svg(width, height, f"{title}: {_bar_values(bars, text)}", parts)


def _pair(
    bar: Bar,
    x: float,
    step: float,
    style: int,
    scale: Scale,
    factor: float,
    text: Callable[[Spread | None], str],
) -> Markup:
    thick = min(step * 0.38, 26.0)
    middle = x + step / 2
    parts = [element("title", f"{bar.name}: before {text(bar.before)}, after {text(bar.after)}")]
    for value, left, kind in ((bar.before, middle - thick - 0.5, "pale"), (bar.after, middle + 0.5, "full")):
        if value is None:
            continue
        y = scale(factor * value.mean)
        classes = f"bar {kind} {style_class(style)}"
        parts.append(
            element("rect", class_=classes, x=left, y=y, width=thick, height=max(scale.start - y, 0.6))
        )
        if value.std:
            ends = [scale(factor * max(value.mean + sign * value.std, 0.0)) for sign in (-1, 1)]
            centre = left + thick / 2
            parts.append(element("line", class_="whisker", x1=centre, x2=centre, y1=ends[0], y2=ends[1]))
    return element("g", *parts)


def is_crowded(longest: int, step: float) -> bool:
    """Whether names of ``longest`` characters must be slanted: long ones that are wider than their place."""
    return longest > 4 and 6.6 * longest + 3 > step


def name_every(longest: int, step: float) -> int:
    """How many places ``step`` pixels apart there are to one name, so that names do not touch."""
    width = 17.0 if is_crowded(longest, step) else 6.6 * longest + 6
    return max(1, math.ceil((width - 3) / step))


def shorten(name: str, length: int) -> str:
    """``name`` cut to ``length`` characters with an ellipsis."""
    return name if len(name) <= length else f"{name[: length - 1]}…"


def _name(name: str, x: float, y: float, *, is_slanted: bool) -> Markup:
    if not is_slanted:
        return _text(x, y + 2, name)
    return _text(x + 3, y - 2, shorten(name, 14), "end", transform=f"rotate(-40 {x + 3:.1f} {y - 2:.1f})")


def _bar_values(bars: Sequence[Bar], text: Callable[[Spread | None], str]) -> str:
    shown = ", ".join(f"{bar.name} {text(bar.before)} to {text(bar.after)}" for bar in bars[:16])
    return f"{shown} and {len(bars) - 16} more" if len(bars) > 16 else shown


def legend(entries: Sequence[tuple[str, int]]) -> Markup:
    """Names beside their marks, as HTML that wraps."""
    items = [
        element(
            "span",
            element("svg", marker(style, 7, 7), viewBox="0 0 14 14", width=14, height=14, aria_hidden="true"),
            name,
            class_="key",
        )
        for name, style in entries
    ]
    return element("div", *items, class_="legend")


def swatches(entries: Sequence[tuple[str, int]]) -> Markup:
    """Names beside their colours, for the parts of lying bars."""
    items = [
        element("span", element("span", class_=f"swatch {style_class(style)}"), name, class_="key")
        for name, style in entries
    ]
    return element("div", *items, class_="legend")


def rows_of_bars(rows: Sequence[tuple[str, Sequence[tuple[float, str, str]], str]]) -> Markup:
    """Lying bars: (name, parts of (length, class, tip), text at the end), all on one scale from zero."""
    longest = max((sum(length for length, _, _ in parts) for _, parts, _ in rows), default=0.0) or 1.0
    lines = []
    for name, parts, end in rows:
        pieces = [
            element("i", class_=kind, style=f"width:{100 * length / longest:.2f}%", title=tip)
            for length, kind, tip in parts
            if length > 0
        ]
        lines.append(element("div", name, class_="bar-name"))
        lines.append(element("div", join(pieces), class_="bar-track"))
        lines.append(element("div", end, class_="bar-end"))
    return element("div", *lines, class_="bars")
