"""A table in a terminal that keeps every cell whole at any width."""

from collections.abc import Iterator
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, JustifyMethod
from rich.table import Table as RichTable
from rich.text import Text

from fedexperts.report.tables import Table

_GAP = 2


@dataclass(frozen=True)
class TerminalTable:
    """A table that rich can print.

    Where the columns do not fit side by side, those that are left follow below, each time behind the first
    one, so that no name or number is cut. Text wraps between words.
    """

    table: Table
    style: str = "bold green"
    """Of the marked cells."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RichTable | Text]:
        """Give rich the caption, then one table after the other."""
        yield Text(self.table.caption, style="italic")
        least = [self._least_width(place, options.max_width) for place in range(len(self.table.titles))]
        head = [0, 1] if self.table.titles[0] == "task" else [0]
        group = list(head)
        for place in range(len(head), len(least)):
            if group != head and _total(least, [*group, place]) > options.max_width:
                yield from (self._part(group, least, options.max_width), Text(""))
                group = list(head)
            group.append(place)
        yield from (self._part(group, least, options.max_width), Text(""))

    def _least_width(self, place: int, width: int) -> int:
        """A column's longest word and longest number; of longer text a third of the terminal."""
        cells = [row[place] for row in self.table.rows]
        is_text = place < self.table.num_text
        words = " ".join([self.table.titles[place], *(cells if is_text else [])]).split()
        whole = max(map(len, cells), default=1)
        return max(*map(len, words), 1, min(whole, width // 3) if is_text else whole)

    def _part(self, places: list[int], least: list[int], width: int) -> RichTable:
        part = RichTable(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, _GAP - 1, 0, 0), pad_edge=False)
        widths, room = {place: least[place] for place in places}, width - _total(least, places)
        columns = list(zip(self.table.titles, *self.table.rows, strict=True))
        wanted = {place: max(map(len, columns[place])) - least[place] for place in places}
        for place in sorted(places, key=lambda one: (one >= self.table.num_text, -wanted[one])):
            widths[place] += max(0, min(room, wanted[place]))
            room -= widths[place] - least[place]
        for place, size in widths.items():
            justify: JustifyMethod = "left" if place < self.table.num_text else "right"
            part.add_column(Text(columns[place][0]), justify=justify, width=size, overflow="fold")
        for number, row in enumerate(self.table.rows):
            part.add_row(*(Text(row[place], style=self._style(number, place)) for place in places))
        return part

    def _style(self, row: int, place: int) -> str:
        return self.style if (row, place) in self.table.marked else ""


def _total(widths: list[int], places: list[int]) -> int:
    return sum(widths[place] for place in places) + _GAP * (len(places) - 1)


def terminal_table(table: Table, *, style: str = "bold green") -> TerminalTable:
    """``table`` for a rich console; cells are text and never markup, the marked ones in ``style``."""
    return TerminalTable(table, style)
