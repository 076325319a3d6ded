"""Commands: read the arguments, call the code that does the work, print its outcome.

Whatever needs torch is imported inside the commands, so that ``fedexperts --help`` answers at once.
"""

import json
import logging
import shlex
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from fedexperts.cli.exit_codes import NOTHING_FITS, OK, SOME_FAILED, Interrupted
from fedexperts.errors import UserError, needs_extra

if TYPE_CHECKING:
    from rich.console import Console

    from fedexperts.config.schema import RunConfig
    from fedexperts.plan.settings import PlanSettings
    from fedexperts.running.export import When
    from fedexperts.running.search import GroupSearch


def init(given: Namespace) -> int:
    """Write a commented example experiment, or with --suite an example suite, that runs as it stands."""
    from fedexperts.config.example_files import write_example

    name = "suite.toml" if given.suite else "experiment.toml"
    path = given.file or Path(name)
    write_example(name, path)
    shown = shlex.quote(str(path))
    print(f"wrote {path}; next:")
    for command in (f"compare {shown}",) if given.suite else (f"check {shown}", f"run {shown}"):
        print(f"  fedexperts {command}")
    return OK


def run(given: Namespace) -> int:
    """Run one experiment, or go on with one."""
    console = _log_to_stderr(is_quiet=given.quiet)
    if given.resume is None:
        config, directory = _new_run(given)
    else:
        config, directory = _old_run(given), given.resume
    with _told_when_interrupted(f"fedexperts run --resume {shlex.quote(str(directory))}"):
        from fedexperts.running.experiment import run_experiment
        from fedexperts.running.progress import choose_progress

        with choose_progress(console, is_quiet=given.quiet) as progress:
            run_experiment(config, directory, progress=progress, resume=given.resume is not None)
    _show_report(directory)
    return OK


def server(given: Namespace) -> int:
    """Serve an experiment to sites with data of their own, from their joining to the result."""
    from fedexperts.running.progress import choose_progress
    from fedexperts.running.serving import SERVER_OVERRIDES, run_server

    console = _log_to_stderr(is_quiet=given.quiet)
    given.overrides = [*given.overrides, *SERVER_OVERRIDES]
    config, directory = _new_run(given) if given.resume is None else (_old_run(given), given.resume)
    again = f"fedexperts server --resume {shlex.quote(str(directory))} --keys {shlex.quote(str(given.keys))}"
    with _told_when_interrupted(again), choose_progress(console, is_quiet=given.quiet) as progress:
        run_server(
            config,
            directory,
            keys=given.keys,
            listen=given.listen,
            progress=progress,
            resume=given.resume is not None,
        )
    _show_report(directory)
    return OK


def site(given: Namespace) -> int:
    """Take part in a federation as a site with its own data, until stopped."""
    _log_to_stderr(is_quiet=False)
    from fedexperts.federation.flower_link import check_node, run_node
    from fedexperts.running.serving import prepare_site

    name = given.name or given.keys.absolute().name
    folder = given.folder or Path(f"site-{name}")
    check_node(given.server, given.keys)
    path, data = prepare_site(name, given.data, folder, given.overrides)
    data.close()
    told = f"settings in {path}, log in {path.with_name('site.log')}, runs in {folder / 'runs'}"
    print(f"site {name}: {told}; Ctrl-C ends it", flush=True)
    run_node(path, given.server, given.keys)


def keys(given: Namespace) -> int:
    """Make the certificates and keys of a trial federation."""
    try:
        from fedexperts.federation.keys import AUTHORITY, SERVER, make_keys
    except ImportError as error:
        raise needs_extra("fedexperts keys", "cryptography", "flower") from error

    sites = [name for name in given.sites.split(",") if name]
    hosts = [name for name in given.hosts.split(",") if name]
    make_keys(given.folder, sites, hosts=hosts, days=given.days)
    print(f"{given.folder / SERVER} is for the server, {given.folder / AUTHORITY} for nobody; for the sites:")
    for name in sites:
        print(f"  {given.folder / name}")
    return OK


def compare(given: Namespace) -> int:
    """Run a matrix of experiments; what has a result is skipped, what is unfinished is resumed."""
    console = _log_to_stderr(is_quiet=given.quiet)
    from fedexperts.config.matrix import load_suite
    from fedexperts.running.progress import choose_progress, choose_rows
    from fedexperts.running.suite import compare as compare_suite

    suite = load_suite(given.suite, given.overrides)
    directory = given.to or Path("runs", suite.name)
    jobs = int(given.jobs) if given.jobs.isdecimal() else given.jobs
    one_by_one = nullcontext(lambda title: choose_progress(console, is_quiet=given.quiet, title=title))
    rows = one_by_one if jobs == 1 else choose_rows(console, is_quiet=given.quiet)
    with _told_when_interrupted("the same command"), rows as open_progress:
        outcome = compare_suite(suite, directory, open_progress, jobs=jobs)
    if outcome.search:
        _show_search(outcome.search)
    if outcome.finished:
        _show_report(directory)
    for name, reason in outcome.failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    return SOME_FAILED if outcome.failed else OK


def report(given: Namespace) -> int:
    """Make report.html and REPORT.md anew from what runs have left; show a run under way round by round."""
    if given.any_code and given.publish is None:
        raise UserError("--any-code has no effect without --publish FOLDER")
    from fedexperts.report import terminal_table
    from fedexperts.report.so_far import rounds_so_far

    so_far = None if given.publish or given.csv or given.pictures else rounds_so_far(given.directory)
    if so_far is not None:
        _stdout().print(terminal_table(so_far))
        print(f"no report is written before {given.directory} has its result.json")
        return OK
    _show_report(
        given.directory,
        against=given.against,
        has_samples=given.samples,
        csv=given.csv,
        pictures=given.pictures,
    )
    if given.publish is not None:
        from fedexperts.report.publishing import publish_report

        print(f"published: {publish_report(given.directory, given.publish, any_code=given.any_code)}")
    return OK


def check(given: Namespace) -> int:
    """Say what would run (clients, parameters, bytes, memory); nothing is trained or written."""
    _log_to_stderr(is_quiet=True)
    from fedexperts.config.load import load_config
    from fedexperts.running.checking import check_experiment

    console = _stdout()
    for part in check_experiment(load_config(given.experiment, given.overrides)).render():
        console.print(part)
    return OK


def plan(given: Namespace) -> int:
    """Say what a model takes under a method, and what fits in a memory; no weights are read."""
    _log_to_stderr(is_quiet=True)
    from fedexperts.plan.report import make_plan

    made = make_plan(*_asked_plan(given))
    if given.json:
        print(json.dumps(made.as_json(), indent=1))
    else:
        console = _stdout()
        for part in made.render():
            console.print(part)
    return OK if made.is_possible else NOTHING_FITS


def _asked_plan(given: Namespace) -> "tuple[str, PlanSettings]":
    """Return the model and the settings of a plan: of an experiment file, or of a model by name."""
    from fedexperts.config.load import build_settings, load_config, to_table
    from fedexperts.plan.settings import ExperimentPlan, PlanSettings

    if not given.model.endswith(".toml"):
        asked = {name: getattr(given, name) for name in ("method", "memory", "batch", "seq")}
        table = {name: value for name, value in asked.items() if value is not None}
        return given.model, build_settings(PlanSettings, table, "plan", given.overrides)
    keys = {"method": "algorithm.name", "batch": "training.batch_size", "seq": "data.max_tokens"}
    flags = [
        f"{key}={getattr(given, name)}" for name, key in keys.items() if getattr(given, name) is not None
    ]
    config = load_config(Path(given.model), [*given.overrides, *flags])
    method = to_table(config)["algorithm"]["name"]
    return config.model.name, ExperimentPlan.of(config, method, given.memory or "")


def generate(given: Namespace) -> int:
    """Let a client's personalised model, the server's or the untouched one answer a prompt."""
    _log_to_stderr(is_quiet=True)
    who = _asked_model(given)
    from fedexperts.running.export import generate_text

    when: When = given.when or "after"
    print(generate_text(given.run_dir, who, given.prompt, when=when, context=given.context))
    return OK


def export(given: Namespace) -> int:
    """Write a client's personalised model, or the server's, to a folder."""
    _log_to_stderr(is_quiet=True)
    who = _asked_model(given)
    from fedexperts.running.export import export_client

    when: When = given.when or "after"
    print(export_client(given.run_dir, who, given.to, when=when, as_checkpoint=given.checkpoint))
    return OK


def extract(given: Namespace) -> int:
    """Measure what the models of a run give away of the canaries that clients trained on."""
    _log_to_stderr(is_quiet=True)
    from fedexperts.evaluation.extraction import ExtractionSettings
    from fedexperts.report import terminal_table
    from fedexperts.report.extraction import extraction_table
    from fedexperts.run_directory import RunDirectory
    from fedexperts.running.extraction import extract_from_run

    settings = ExtractionSettings(prefix_tokens=given.prefix, num_generations=given.generations)
    found = extract_from_run(given.run_dir, settings)
    _stdout().print(terminal_table(extraction_table(found)))
    print(f"written: {RunDirectory(given.run_dir).extraction}")
    return OK


def merge(given: Namespace) -> int:
    """Merge the experts of a checkpoint folder into fewer, or drop some."""
    _log_to_stderr(is_quiet=True)
    from fedexperts.config.load import build_settings
    from fedexperts.running.compression import FolderMergeSettings, merge_folder

    print(
        merge_folder(
            given.folder, given.out, build_settings(FolderMergeSettings, {}, "merge", given.overrides)
        )
    )
    return OK


def quantise(given: Namespace) -> int:
    """Quantise the experts of a checkpoint folder to few bits, and nothing else."""
    _log_to_stderr(is_quiet=True)
    from fedexperts.config.load import build_settings
    from fedexperts.moe.surgery.low_bit import LowBitForm
    from fedexperts.running.compression import quantise_folder

    print(
        quantise_folder(given.folder, given.out, build_settings(LowBitForm, {}, "quantise", given.overrides))
    )
    return OK


def pretrain(given: Namespace) -> int:
    """Train the small model that the package ships, from nothing."""
    _log_to_stderr(is_quiet=False)
    from fedexperts.config.load import build_settings
    from fedexperts.pretrain import PretrainSettings
    from fedexperts.pretrain import pretrain as pretrain_model

    settings = build_settings(PretrainSettings, {}, "pretrain", given.overrides)
    pretrain_model(settings, given.to, lambda line: print(line, flush=True))
    return OK


def doctor(given: Namespace) -> int:
    """Verify the hash of every file of a run, or of a node's folder; say what is wrong and what to do."""
    from fedexperts.doctor import examine

    found = examine(given.run_dir)
    if not found.problems:
        print(f"all well: every file of {given.run_dir} is as it was written")
        return OK
    for problem in found.problems:
        print(f"wrong: {problem}")
    print(f"to do: {found.to_do}")
    return SOME_FAILED


def forget(given: Namespace) -> int:
    """Remove what a run, or a node's folder, holds of a client or of all: tensors, answers, figures."""
    if (given.client is None) == (not given.all):
        raise UserError("whom to forget is missing: give either --client NAME or --all")
    from fedexperts.running.forgetting import forget as forget_client

    removed = forget_client(given.run_dir, given.client)
    for sentence in removed or ["nothing was left to remove"]:
        print(sentence)
    print(
        "left: the server's tensors and all means, of which uploads are a part; reports and exports elsewhere"
    )
    return OK


def rewind(given: Namespace) -> int:
    """Go back to the state of an earlier round, from which run --resume goes on."""
    from fedexperts.integrity import rewind as rewind_run
    from fedexperts.run_directory import RunDirectory

    rewind_run(RunDirectory(given.run_dir), given.to_round)
    where = shlex.quote(str(given.run_dir))
    print(
        f"{given.run_dir} is at the end of round {given.to_round}; to go on: fedexperts run --resume {where}"
    )
    return OK


def _new_run(given: Namespace) -> "tuple[RunConfig, Path]":
    from fedexperts.config.load import load_config
    from fedexperts.run_directory import unused_folder

    if given.experiment is None:
        raise UserError("run needs an EXPERIMENT.toml, or --resume RUN_DIR")
    if _is_override(given.experiment):
        raise UserError(f"the EXPERIMENT.toml must stand before {given.experiment}")
    file = Path(given.experiment)
    config = load_config(file, given.overrides)
    return config, given.to or unused_folder(Path("runs"), file.stem)


def _old_run(given: Namespace) -> "RunConfig":
    """The configuration that is asked for, which :func:`run_experiment` holds against the run's own."""
    from fedexperts.config.load import load_config
    from fedexperts.run_directory import RunDirectory

    if given.to is not None:
        raise UserError(f"--to {given.to} and --resume {given.resume} exclude each other")
    old = RunDirectory(given.resume)
    old.check_start(resume=True)
    if given.experiment is None:
        return load_config(old.config)
    if _is_override(given.experiment):
        return load_config(old.config, [given.experiment, *given.overrides])
    return load_config(Path(given.experiment), given.overrides)


def _asked_model(given: Namespace) -> str:
    """The id of the client that is asked for, or ``server`` or ``base``."""
    from fedexperts.running.client_names import only_client, resolve_client

    if given.model == "client":
        if given.client is None:
            return only_client(given.run_dir)
        return resolve_client(given.run_dir, given.client)
    for option in ("client", "when"):
        if getattr(given, option) is not None:
            raise UserError(f"--{option} {getattr(given, option)} has no effect with --model {given.model}")
    return str(given.model)


def _is_override(argument: str) -> bool:
    return "=" in argument and not Path(argument).exists()


@contextmanager
def _told_when_interrupted(how_to_go_on: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(f"interrupted: finished rounds are kept; to go on: {how_to_go_on}") from error


def _log_to_stderr(*, is_quiet: bool) -> "Console":
    """Send the package's log to stderr, above the bars where it is a terminal; returns its console."""
    from rich.console import Console
    from rich.logging import RichHandler

    console = Console(stderr=True)
    if console.is_terminal:
        handler: logging.Handler = RichHandler(console=console, show_path=False, show_time=False)
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    package = logging.getLogger("fedexperts")
    package.handlers = [handler]
    # A library that sets up the root logger, as absl does when it is imported, would repeat every line.
    package.propagate = False
    package.setLevel(logging.WARNING if is_quiet else logging.INFO)
    return console


def _stdout() -> "Console":
    """Standard output, as wide as a table needs where there is no terminal."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=240)


def _show_report(
    directory: Path,
    *,
    against: str = "",
    has_samples: bool = False,
    csv: Path | None = None,
    pictures: Path | None = None,
) -> None:
    """Write the report, print its main tables and say where it is."""
    from fedexperts.report import headline_table, terminal_table, write_report
    from fedexperts.report.grouping import methods_of
    from fedexperts.report.paired import paired_tables
    from fedexperts.report.pairing import compare_methods
    from fedexperts.report.reading import read_suite
    from fedexperts.report.retention import retention_table
    from fedexperts.report.tables import rows_of

    paths = write_report(directory, against=against, has_samples=has_samples, csv=csv, pictures=pictures)
    methods = methods_of(read_suite(directory).runs)
    paired = paired_tables(compare_methods(methods, against))
    for table in (headline_table(rows_of(methods)), *retention_table(methods), *paired):
        _stdout().print(terminal_table(table))
    for path in paths:
        print(f"report: {path}")


def _show_search(search: "dict[str, GroupSearch]") -> None:
    from fedexperts.config.toml import render_value
    from fedexperts.report import terminal_table
    from fedexperts.report.tables import make_table

    rows = [
        (
            group,
            ", ".join(f"{key}={render_value(value)}" for key, value in one.values.items()),
            "failed" if one.mean is None else f"{one.mean:.4f}",
            "chosen" if one.values == found.chosen else "",
        )
        for group, found in search.items()
        for one in found.tried
    ]
    titles = ("group", "tried", "validation", "")
    _stdout().print(terminal_table(make_table("Search on validation examples", titles, rows, num_text=2)))
