"""A report as one HTML page that needs nothing but itself: no script, no font, no request."""

import html
import re
from collections.abc import Iterator
from functools import partial
from importlib.resources import files
from itertools import count

from jinja2 import Environment, StrictUndefined

from fedexperts.report import drawing
from fedexperts.report.figures import Panel
from fedexperts.report.sections import Content

_ASSETS = files("fedexperts") / "assets" / "report"
_COLOURS = {
    **{colour: f"var(--c{number})" for number, colour in enumerate(drawing.COLOURS)},
    drawing.INK: "var(--ink)",
    drawing.SOFT: "var(--soft)",
    drawing.RULE: "var(--rule)",
}


def page(content: Content) -> str:
    """The whole page as text."""
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    template = environment.from_string((_ASSETS / "page.html").read_text(encoding="utf-8"))
    style = (_ASSETS / "style.css").read_text(encoding="utf-8")
    return template.render(
        content=content,
        style=style,
        inline=partial(_inline, count()),
        num_colours=len(drawing.COLOURS),
    )


def _inline(numbers: Iterator[int], panel: Panel) -> str:
    """A picture as part of the page: described, in the style sheet's colours, without what a file needs."""
    drawn = panel.draw(str(next(numbers))).partition("<svg")[2]
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawn)[0]
    body = re.sub(r"<style.*?</style>", "", drawn.partition(">")[2], flags=re.DOTALL)
    body = re.sub(drawing.NEEDLESS_ID + r'|font-family: [^;"]+(; )?', "", body)
    body = re.sub(r"#[0-9a-f]{6}", lambda match: _COLOURS.get(match[0], match[0]), body)
    last = zip(panel.table.titles, panel.table.rows[-1], strict=True)
    ends = ", ".join(f"{title} {cell}" for title, cell in last)
    label = html.escape(f"{panel.title}: {len(panel.table.rows)} rows; the last: {ends}")
    head = f'<svg viewBox="0 0 {width} {height}" width="{width}pt" role="img" aria-label="{label}">'
    return head + re.sub(r"\n\s*", "\n", body)
