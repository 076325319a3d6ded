"""Write a report as Markdown: the page's sentences and tables, and the numbers of its figures."""

import re
from collections.abc import Sequence

from fedexperts.report.sections import Content, Section
from fedexperts.report.tables import Table

_SPECIAL = re.compile(r"([\\`*\[\]<>|#~$]|(?<!\w)_|_(?!\w))")


def markdown(content: Content) -> str:
    """The whole report as text; it ends with a newline."""
    blocks = [f"# {escape(content.title)}", escape(content.what_ran)]
    if content.warnings:
        blocks += ["**Read this first**", _bullets(content.warnings)]
    if content.glance:
        blocks += ["**At a glance**", _bullets(content.glance)]
    blocks += [f"> {escape(text)}" for text in content.simulated]
    blocks.append("The figures (curves, bars, heat maps) are in [report.html](report.html).")
    for section in content.sections:
        blocks += _section(section)
    return "\n\n".join(blocks) + "\n"


def escape(text: str) -> str:
    """``text`` on one line with nothing that Markdown would read as its own."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _bullets(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {escape(sentence)}" for sentence in sentences)


def _section(section: Section) -> list[str]:
    behind = [table for figure in section.figures if figure.is_in_text for table in figure.tables]
    tables = [block for table in (*section.tables, *behind) for block in _table(table)]
    blocks = [*tables, *map(escape, section.sentences)]
    return [f"## {escape(section.title)}", *blocks] if blocks else []


def _table(table: Table) -> list[str]:
    rows = [
        [
            f"**{escape(cell)}**" if (row, place) in table.marked else escape(cell)
            for place, cell in enumerate(cells)
        ]
        for row, cells in enumerate(table.rows)
    ]
    rules = ["---" if place < table.num_text else "---:" for place in range(len(table.titles))]
    lines = [f"| {' | '.join(cells)} |" for cells in ([*map(escape, table.titles)], rules, *rows)]
    caption = escape(table.caption)
    return [f"{caption[:1].upper()}{caption[1:]}:", "\n".join(lines)]
