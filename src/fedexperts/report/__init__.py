"""Make reports from run directories alone; torch is not imported, and matplotlib only to draw."""

from fedexperts.report.tables import ResultRow, headline_table, result_table
from fedexperts.report.terminal import terminal_table
from fedexperts.report.write import write_report

__all__ = ["ResultRow", "headline_table", "result_table", "terminal_table", "write_report"]
