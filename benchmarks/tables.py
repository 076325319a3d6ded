"""Figures to tables, in the terminal and in a document; the same figures always give the same text."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

Figures = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A title, the heads of the columns, and rows of text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def show(tables: Sequence[Table], console: Console) -> None:
    """Print them."""
    for table in tables:
        shown = RichTable(title=table.title, title_justify="left")
        for position, column in enumerate(table.columns):
            shown.add_column(column, justify="left" if position == 0 else "right")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)


def markdown(tables: Sequence[Table]) -> str:
    """The same as Markdown."""
    blocks = []
    for table in tables:
        lines = [table.columns, ("---", *["---:"] * (len(table.columns) - 1)), *table.rows]
        blocks.append(f"**{table.title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(blocks)


def put_into(document: str, name: str, text: str, command: str = "python -m benchmarks") -> str:
    """``document`` with ``text`` between the marks of ``name``."""
    begin, end = marks(name, command)
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    assert pattern.search(document), f"the document has no marks {begin} and {end}"
    return pattern.sub(lambda _: f"{begin}\n\n{text}\n\n{end}", document)


def marks(name: str, command: str = "python -m benchmarks") -> tuple[str, str]:
    """Where the figures of ``name``, made by ``command``, begin and end in a document."""
    return f"<!-- figures of {name}: by {command} -->", f"<!-- end of {name} -->"


def machine_text(machine: Mapping[str, Any]) -> str:
    """What a record was measured on, in one line."""
    packages = ", ".join(
        f"{name} {machine['packages'][name]}" for name in ("torch", "transformers", "peft", "trl")
    )
    return (
        f"{machine['processor']}, {machine['num_processors']} processors, {machine['threads']} threads, "
        f"{machine['memory_bytes'] / 1e9:.0f} GB; {packages}; commit {machine['commit'][:8]}; load average "
        f"beforehand {machine['load_average_before']:.2f}."
    )


def spread_texts(values: Mapping[str, Any], form: str) -> tuple[str, str, str]:
    """Median, least and most of :func:`benchmarks.timing.spread`, each in ``form``."""
    return form.format(values["median"]), form.format(values["min"]), form.format(values["max"])


def milliseconds(seconds: float) -> str:
    """With one digit after the point."""
    return f"{seconds * 1e3:.1f}"


def percent(share: float) -> str:
    """A share of 1 in per cent."""
    return f"{share:.1%}"
