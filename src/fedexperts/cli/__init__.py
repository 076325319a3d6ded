"""The command line: a path and ``key=value`` pairs in, a call to what does the work."""

from fedexperts.cli.exit_codes import INTERRUPTED, MISTAKE, OK, SOME_FAILED
from fedexperts.cli.parser import build_parser
from fedexperts.cli.program import main

__all__ = ["INTERRUPTED", "MISTAKE", "OK", "SOME_FAILED", "build_parser", "main"]
