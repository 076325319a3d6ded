"""A table in a terminal."""

from rich.table import Table as RichTable
from rich.text import Text

from fedexperts.report.tables import Table


def terminal_table(table: Table) -> RichTable:
    """``table`` for a rich console; cells are text and never markup, the best are bold."""
    rich_table = RichTable(caption=Text(table.caption), caption_justify="left")
    for column in table.columns:
        rich_table.add_column(Text(column.title), justify="right" if column.is_number else "left")
    for number, row in enumerate(table.rows):
        cells = (
            Text(cell, style="bold green" if (number, i) in table.marked else "")
            for i, cell in enumerate(row)
        )
        rich_table.add_row(*cells)
    return rich_table
