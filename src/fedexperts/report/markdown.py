"""A report as Markdown: the page's sentences and tables, without its figures."""

import re

from fedexperts.report.content import Content, Section
from fedexperts.report.tables import Table

_SPECIAL = re.compile(r"([\\`*\[\]<>|#~$]|(?<!\w)_|_(?!\w))")


def markdown(content: Content) -> str:
    """The whole report as text; it ends with a newline."""
    blocks = [f"# {escape(content.title)}", escape(content.what_ran)]
    if content.warnings:
        blocks += ["**Read this first**", _bullets(content.warnings)]
    if content.failures:
        blocks += _table(content.failures)
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


def _bullets(sentences: tuple[str, ...]) -> str:
    return "\n".join(f"- {escape(sentence)}" for sentence in sentences)


def _section(section: Section) -> list[str]:
    if not (section.tables or section.sentences):
        return []
    blocks = [f"## {escape(section.title)}"]
    for table in section.tables:
        blocks += _table(table)
    return blocks + [escape(sentence) for sentence in section.sentences]


def _table(table: Table) -> list[str]:
    marked = [
        [
            f"**{escape(cell)}**" if (row, place) in table.marked else escape(cell)
            for place, cell in enumerate(cells)
        ]
        for row, cells in enumerate(table.rows)
    ]
    lines = [
        _line([escape(column.title) for column in table.columns]),
        _line(["---:" if column.is_number else "---" for column in table.columns]),
        *(_line(cells) for cells in marked),
    ]
    return [f"{escape(table.caption)}:", "\n".join(lines)]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
