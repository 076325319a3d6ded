"""Arguments of every command, as an argparse parser."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedexperts import __version__
from fedexperts.cli.commands import (
    check,
    compare,
    doctor,
    export,
    extract,
    forget,
    generate,
    init,
    keys,
    merge,
    plan,
    pretrain,
    quantise,
    report,
    rewind,
    run,
    server,
    site,
)


def _argument(*names: str, **how: Any) -> Callable[[ArgumentParser], None]:
    def add(parser: ArgumentParser) -> None:
        parser.add_argument(*names, **how)

    return add


_EXPERIMENT = _argument("experiment", metavar="EXPERIMENT.toml", type=Path, help="an experiment file")
_OVERRIDES = _argument(
    "overrides", metavar="KEY=VALUE", nargs="*", help="settings over the file's, e.g. training.lr=3e-3"
)
_FOLDER = _argument("folder", metavar="FOLDER", type=Path, help="a checkpoint, as save_pretrained leaves it")
_OUT = _argument("out", metavar="OUT", type=Path, help="a new folder")
_RUN_DIR = _argument("run_dir", metavar="RUN_DIR", type=Path, help="a run directory")
_CLIENT = _argument("--client", metavar="NAME", help="the client by id or name, e.g. client-000 or herald")
_MODEL = _argument(
    "--model",
    choices=("client", "server", "base"),
    default="client",
    help="the client's, the server's, or the untouched one (default: client)",
)
_WHEN = _argument(
    "--when",
    choices=("before", "after"),
    help="the client's model before or after the last local steps (default: after)",
)
_QUIET = _argument("--quiet", action="store_true", help="no progress, only warnings and the result")


@dataclass(frozen=True)
class Command:
    """One command of the command line."""

    function: Callable[[Namespace], int]
    """Runs the command; the first line of its docstring is the help."""
    example: str
    arguments: tuple[Callable[[ArgumentParser], None], ...]

    @property
    def name(self) -> str:
        """As it is given on the command line."""
        return self.function.__name__


COMMANDS = (
    Command(
        init,
        "fedexperts init experiment.toml",
        (
            _argument(
                "file", metavar="FILE.toml", nargs="?", type=Path, help="a new file (default: by kind)"
            ),
            _argument("--suite", action="store_true", help="an example suite instead of an experiment"),
        ),
    ),
    Command(
        run,
        "fedexperts run experiment.toml rounds=10 seed=1",
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
    Command(
        server,
        "fedexperts server experiment.toml --keys keys/server",
        (
            _argument("experiment", metavar="EXPERIMENT.toml", nargs="?", help="an experiment file"),
            _OVERRIDES,
            _argument(
                "--keys",
                metavar="DIR",
                type=Path,
                required=True,
                help="the server's folder of fedexperts keys",
            ),
            _argument(
                "--listen",
                metavar="HOST:PORT",
                default="127.0.0.1:9092",
                help="where sites reach it (default: 127.0.0.1:9092)",
            ),
            _argument("--to", metavar="DIR", type=Path, help="run directory (default: runs/NAME-N)"),
            _argument(
                "--resume", metavar="RUN_DIR", type=Path, help="go on with this run; no file is needed then"
            ),
            _QUIET,
        ),
    ),
    Command(
        site,
        "fedexperts site --server 127.0.0.1:9092 --data my.jsonl --keys keys/north",
        (
            _argument(
                "overrides",
                metavar="KEY=VALUE",
                nargs="*",
                help="the site's own settings, e.g. fields.response=answer (docs/federation.md)",
            ),
            _argument("--server", metavar="HOST:PORT", required=True, help="the server's address"),
            _argument(
                "--data",
                metavar="PATH",
                required=True,
                help="the site's data: a file, a folder or a hub name",
            ),
            _argument(
                "--keys", metavar="DIR", type=Path, required=True, help="the site's folder of fedexperts keys"
            ),
            _argument("--name", metavar="NAME", help="the site's name (default: that of the folder of keys)"),
            _argument(
                "--folder", metavar="DIR", type=Path, help="where its runs are kept (default: site-NAME)"
            ),
        ),
    ),
    Command(
        keys,
        "fedexperts keys keys --sites north,south,west",
        (
            _argument("folder", metavar="DIR", type=Path, help="a new folder"),
            _argument("--sites", metavar="NAME,...", required=True, help="names of the sites"),
            _argument(
                "--hosts",
                metavar="NAME,...",
                default="",
                help="names and addresses of the server beside localhost and 127.0.0.1",
            ),
            _argument(
                "--days", metavar="N", type=int, default=365, help="how long they are valid (default: 365)"
            ),
        ),
    ),
    Command(
        compare,
        "fedexperts compare suite.toml --jobs auto",
        (
            _argument("suite", metavar="SUITE.toml", type=Path, help="a suite file"),
            _OVERRIDES,
            _argument("--to", metavar="DIR", type=Path, help="suite directory (default: runs/NAME)"),
            _argument(
                "--jobs",
                metavar="N",
                default="1",
                help="runs that go on at once, or auto for as many as the cores serve (default: 1)",
            ),
            _QUIET,
        ),
    ),
    Command(
        report,
        "fedexperts report runs/suite",
        (
            _argument("directory", metavar="DIR", type=Path, help="a run or suite directory"),
            _argument(
                "--publish",
                metavar="FOLDER",
                type=Path,
                help="also write REPORT.md there, if all runs are of one committed state of the code",
            ),
            _argument("--any-code", action="store_true", help="publish whatever code the runs are of"),
            _argument(
                "--against",
                metavar="NAME",
                default="",
                help="the method that the others are compared with (default: the strongest simple rival)",
            ),
            _argument("--samples", action="store_true", help="show the answers kept in clients/: shows data"),
            _argument("--csv", metavar="FOLDER", type=Path, help="also write the numbers of every picture"),
            _argument("--pictures", metavar="FOLDER", type=Path, help="also write every figure as an SVG"),
        ),
    ),
    Command(check, "fedexperts check experiment.toml", (_EXPERIMENT, _OVERRIDES)),
    Command(
        plan,
        "fedexperts plan Qwen/Qwen1.5-MoE-A2.7B --memory 24GB",
        (
            _argument(
                "model",
                metavar="MODEL",
                help="a built-in shape, a folder, a hub name, or an experiment file (.toml)",
            ),
            _argument(
                "overrides", metavar="KEY=VALUE", nargs="*", help="other settings, e.g. adapter.rank=8"
            ),
            _argument("--method", help="flex, flux, fedavg, fedavg_experts or local_only (default: flex)"),
            _argument(
                "--memory",
                metavar="AMOUNT",
                help="what a client has, e.g. 24GB or 24GiB; exit code 1 if nothing fits",
            ),
            _argument("--batch", metavar="N", type=int, help="examples of a batch (default: 4)"),
            _argument("--seq", metavar="N", type=int, help="tokens of an example (default: 512)"),
            _argument("--json", action="store_true", help="plain data, in bytes"),
        ),
    ),
    Command(
        generate,
        'fedexperts generate runs/experiment-1 "Which are people and which are hobbies? reading, Oskar." '
        "--client pirate",
        (
            _RUN_DIR,
            _argument("prompt", metavar="PROMPT", help="what to ask"),
            _CLIENT,
            _MODEL,
            _argument("--context", metavar="TEXT", default="", help="a passage that the prompt refers to"),
            _WHEN,
        ),
    ),
    Command(
        extract,
        "fedexperts extract runs/experiment-1",
        (
            _RUN_DIR,
            _argument(
                "--prefix",
                metavar="N",
                type=int,
                default=32,
                help="tokens of each text that the model is shown (default: 32)",
            ),
            _argument(
                "--generations",
                metavar="N",
                type=int,
                default=10,
                help="continuations that are sampled for each text (default: 10)",
            ),
        ),
    ),
    Command(
        export,
        "fedexperts export runs/experiment-1 --client herald --to herald",
        (
            _RUN_DIR,
            _CLIENT,
            _MODEL,
            _argument("--to", metavar="DIR", type=Path, required=True, help="a new folder"),
            _WHEN,
            _argument(
                "--checkpoint",
                action="store_true",
                help="one plain checkpoint, where the family can express the model",
            ),
        ),
    ),
    Command(doctor, "fedexperts doctor runs/experiment-1", (_RUN_DIR,)),
    Command(
        rewind,
        "fedexperts rewind runs/experiment-1 --to-round 9",
        (
            _RUN_DIR,
            _argument("--to-round", metavar="N", type=int, required=True, help="a round whose state is kept"),
        ),
    ),
    Command(
        forget,
        "fedexperts forget runs/experiment-1 --client herald",
        (
            _RUN_DIR,
            _CLIENT,
            _argument("--all", action="store_true", help="all clients; the run cannot be reported then"),
        ),
    ),
    Command(
        merge,
        "fedexperts merge model merged num_merged=48 weighting=mean budget=uniform",
        (
            _FOLDER,
            _OUT,
            _argument(
                "overrides",
                metavar="KEY=VALUE",
                nargs="*",
                help="num_merged, output, texts and the fields of MergeSettings (docs/merging.md)",
            ),
        ),
    ),
    Command(
        quantise,
        "fedexperts quantise model small bits=4",
        (
            _FOLDER,
            _OUT,
            _argument("overrides", metavar="KEY=VALUE", nargs="*", help="bits=8, 4, 3 or 2; group_size=64"),
        ),
    ),
    Command(
        pretrain,
        "fedexperts pretrain --to my-tinyworld num_steps=100",
        (_OVERRIDES, _argument("--to", metavar="DIR", type=Path, required=True, help="a new folder")),
    ),
)


def build_parser() -> ArgumentParser:
    """The parser of the whole command line."""
    parser = ArgumentParser(
        prog="fedexperts",
        description="Federated fine-tuning of Mixture-of-Experts language models.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        text = command.function.__doc__ or ""
        added = commands.add_parser(
            command.name,
            help=text,
            description=text,
            epilog=f"example: {command.example}",
            allow_abbrev=False,
        )
        added.set_defaults(command=command.function)
        for add in command.arguments:
            add(added)
    return parser
