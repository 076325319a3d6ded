"""Arguments of every command, as an argparse parser."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedexperts import __version__
from fedexperts.cli.commands import check, compare, export, generate, plan, pretrain, report, run


def _argument(*names: str, **how: Any) -> Callable[[ArgumentParser], None]:
    def add(parser: ArgumentParser) -> None:
        parser.add_argument(*names, **how)

    return add


_EXPERIMENT = _argument("experiment", metavar="EXPERIMENT.toml", type=Path, help="an experiment file")
_OVERRIDES = _argument(
    "overrides", metavar="KEY=VALUE", nargs="*", help="settings over the file's, e.g. training.lr=3e-3"
)
_RUN_DIR = _argument("run_dir", metavar="RUN_DIR", type=Path, help="a run directory")
_CLIENT = _argument("--client", metavar="ID", required=True, help="the client, e.g. client-000")
_WHEN = _argument(
    "--when",
    choices=("before", "after"),
    default="after",
    help="its model before or after the last local steps (default: after)",
)
_QUIET = _argument("--quiet", action="store_true", help="no progress, only warnings and the result")

COMMANDS: tuple[tuple[Callable[[Namespace], int], tuple[Callable[[ArgumentParser], None], ...]], ...] = (
    (
        run,
        (
            _argument("experiment", metavar="EXPERIMENT.toml", nargs="?", help="an experiment file"),
            _OVERRIDES,
            _argument("--to", metavar="DIR", type=Path, help="run directory (default: runs/NAME-N)"),
            _argument(
                "--resume", metavar="RUN_DIR", type=Path, help="go on with this run; no file is needed then"
            ),
            _QUIET,
        ),
    ),
    (
        compare,
        (
            _argument("suite", metavar="SUITE.toml", type=Path, help="a suite file"),
            _OVERRIDES,
            _argument("--to", metavar="DIR", type=Path, help="suite directory (default: runs/NAME)"),
            _QUIET,
        ),
    ),
    (report, (_argument("directory", metavar="DIR", type=Path, help="a run or suite directory"),)),
    (check, (_EXPERIMENT, _OVERRIDES)),
    (
        plan,
        (
            _argument("model", metavar="MODEL", help="a built-in shape, a folder, or a hub name"),
            _argument(
                "overrides", metavar="KEY=VALUE", nargs="*", help="other settings, e.g. adapter.rank=8"
            ),
            _argument("--method", help="flex, flux, fedavg, fedavg_experts or local_only (default: flex)"),
            _argument("--memory", metavar="AMOUNT", help="what a client has, e.g. 24GB or 24GiB"),
            _argument("--batch", metavar="N", type=int, help="examples of a batch (default: 4)"),
            _argument("--seq", metavar="N", type=int, help="tokens of an example (default: 512)"),
            _argument("--json", action="store_true", help="plain data, in bytes"),
        ),
    ),
    (
        generate,
        (
            _RUN_DIR,
            _argument("prompt", metavar="PROMPT", help="what to ask"),
            _CLIENT,
            _argument("--context", metavar="TEXT", default="", help="a passage that the prompt refers to"),
            _WHEN,
        ),
    ),
    (
        export,
        (
            _RUN_DIR,
            _CLIENT,
            _argument("--to", metavar="DIR", type=Path, required=True, help="a new folder"),
            _WHEN,
            _argument(
                "--checkpoint",
                action="store_true",
                help="one plain checkpoint, where the family can express the model",
            ),
        ),
    ),
    (
        pretrain,
        (_OVERRIDES, _argument("--to", metavar="DIR", type=Path, required=True, help="a new folder")),
    ),
)
"""Each command with its arguments; the first line of a command's docstring is its help."""


def build_parser() -> ArgumentParser:
    """The parser of the whole command line."""
    parser = ArgumentParser(
        prog="fedexperts",
        description="Federated fine-tuning of Mixture-of-Experts language models.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command, arguments in COMMANDS:
        text = command.__doc__ or ""
        added = commands.add_parser(command.__name__, help=text, description=text, allow_abbrev=False)
        added.set_defaults(command=command)
        for add in arguments:
            add(added)
    return parser
