"""docs/command_line.md: made from the parser, and current."""

import shlex
from pathlib import Path

import pytest

from fedexperts.cli.parser import COMMANDS, build_parser
from fedexperts.cli.reference import reference

PAGE = Path(__file__).parents[1] / "docs/command_line.md"


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == reference(), "run `python -m fedexperts.cli.reference`"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_an_example_is_a_call_of_its_command(command):
    program, *arguments = shlex.split(command.example)
    assert program == "fedexperts"
    assert build_parser().parse_args(arguments).command is command.function
