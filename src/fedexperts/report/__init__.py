"""Reports made from run directories alone; nothing here imports torch or a plotting library."""

from fedexperts.report.tables import ResultRow, headline_table, result_table
from fedexperts.report.terminal import terminal_table
from fedexperts.report.write import write_report

__all__ = ["ResultRow", "headline_table", "result_table", "terminal_table", "write_report"]
