"""The command line, called as a user does."""

import argparse
import errno
import os
import signal
import subprocess
import sys

import pytest

from fedexperts import __version__, cli

TINY = """
rounds = 1
threads = 1
[model]
name = "tiny/qwen2_moe"
[algorithm]
name = "flex"
calibration_examples = 2
[data.tinyworld]
examples_per_client = 8
[data.partition]
num_clients = 2
min_examples = 4
[training]
num_local_steps = 1
batch_size = 2
[evaluation]
max_new_tokens = 2
matrix = false
[evaluation.exam]
source = "none"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with the experiment tiny.toml and one finished run of it, runs/tiny-1."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "tiny.toml").write_text(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["run", "tiny.toml", "--quiet"]) == cli.OK
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def error_of(capsys, *arguments):
    """The one line on stderr of a command that exits with code 2."""
    assert cli.main(arguments) == cli.MISTAKE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").rstrip("\n")


def test_the_flags_are_exactly_these():
    parser = cli.build_parser()
    commands = next(one for one in parser._actions if isinstance(one, argparse._SubParsersAction)).choices
    flags = {
        name: [" ".join(action.option_strings) or action.dest for action in command._actions[1:]]
        for name, command in commands.items()
    }
    assert flags == {
        "init": ["file", "--suite"],
        "run": ["experiment", "overrides", "--to", "--resume", "--quiet"],
        "server": ["experiment", "overrides", "--keys", "--listen", "--to", "--resume", "--quiet"],
        "site": ["overrides", "--server", "--data", "--keys", "--name", "--folder"],
        "keys": ["folder", "--sites", "--hosts", "--days"],
        "compare": ["suite", "overrides", "--to", "--jobs", "--quiet"],
        "report": ["directory", "--publish", "--any-code", "--against", "--samples", "--csv", "--pictures"],
        "check": ["experiment", "overrides"],
        "plan": ["model", "overrides", "--method", "--memory", "--batch", "--seq", "--json"],
        "generate": ["run_dir", "prompt", "--client", "--model", "--context", "--when"],
        "export": ["run_dir", "--client", "--model", "--to", "--when", "--checkpoint"],
        "doctor": ["run_dir"],
        "extract": ["run_dir", "--prefix", "--generations"],
        "rewind": ["run_dir", "--to-round"],
        "forget": ["run_dir", "--client", "--all"],
        "merge": ["folder", "out", "overrides"],
        "quantise": ["folder", "out", "overrides"],
        "pretrain": ["overrides", "--to"],
    }


def test_help_needs_neither_torch_nor_rich():
    code = (
        "import sys; from fedexperts.cli import build_parser; text = build_parser().format_help(); "
        "heavy = {'torch', 'transformers', 'numpy', 'rich', 'flwr'} & sys.modules.keys(); "
        "assert 'compare' in text and not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "fedexperts", "--version"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == f"{__version__}\n"


def test_a_run_leaves_a_numbered_directory_with_a_report(here):
    assert {"config.toml", "result.json", "report.html", "REPORT.md"} <= {
        path.name for path in (here / "runs/tiny-1").iterdir()
    }


def test_report_prints_the_table_and_where_the_report_is(here, capsys):
    (here / "runs/tiny-1/report.html").unlink()
    assert cli.main(["report", "runs/tiny-1"]) == cli.OK
    printed = capsys.readouterr().out
    assert "flex" in printed
    assert "report: runs/tiny-1/report.html\n" in printed
    assert (here / "runs/tiny-1/report.html").exists()


def test_a_finished_run_that_is_resumed_is_reported_again(here, capsys):
    assert cli.main(["run", "--resume", "runs/tiny-1", "--quiet"]) == cli.OK
    assert "flex" in capsys.readouterr().out


def test_check_shows_clients_and_writes_nothing(here, capsys):
    before = sorted(here.rglob("*"))
    assert cli.main(["check", "tiny.toml", "data.partition.num_clients=3"]) == cli.OK
    assert "client-002" in capsys.readouterr().out
    assert sorted(here.rglob("*")) == before


def test_generate_answers_and_export_says_where(here, capsys):
    assert cli.main(["generate", "runs/tiny-1", "Where is the lamp?", "--client", "client-000"]) == cli.OK
    assert cli.main(["export", "runs/tiny-1", "--client", "client-000", "--to", "out"]) == cli.OK
    assert capsys.readouterr().out.endswith("out\n")
    assert (here / "out").is_dir()


def test_overrides_may_follow_an_option(here, capsys):
    message = error_of(capsys, "run", "tiny.toml", "rounds=2", "--to", "x", "training.lr=fast")
    assert message == 'command line: training.lr must be a finite number, not "fast"'


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "run needs an EXPERIMENT.toml, or --resume RUN_DIR"),
        (["run", "rounds=3"], "the EXPERIMENT.toml must stand before rounds=3"),
        (["run", "none.toml"], "none.toml: there is no such file"),
        (["compare", "none.toml"], "none.toml: there is no such file"),
        (["run", "--resume", "a", "--to", "b"], "--to b and --resume a exclude each other"),
        (["run", "--resume", "none"], "cannot resume none: it holds no run (no config.toml)"),
        (
            ["run", "tiny.toml", "trainig.lr=1"],
            "command line: trainig is not a setting; did you mean training?",
        ),
        (
            ["run", "--resume", "runs/tiny-1", "rounds=7"],
            "cannot resume runs/tiny-1: it was started with another configuration (rounds: 1 -> 7)",
        ),
        (["report", "none"], "none is not a directory; give a run directory or a suite directory"),
        (
            ["pretrain", "--to", "x", "num_step=3"],
            "command line: num_step is not a setting; did you mean num_steps?",
        ),
        (["run", "tiny.toml", "--rounds", "3"], "--rounds is not an option of run: write it as rounds=3"),
        (
            ["run", "tiny.toml", "--training.lr", "1e-3", "--to", "x"],
            "--training.lr is not an option of run: write it as training.lr=1e-3",
        ),
        (["check", "tiny.toml", "--lr=1"], "--lr is not an option of check: write it as training.lr=1"),
        (
            ["compare", "suite.toml", "--num-local-steps", "4"],
            "--num-local-steps is not an option of compare: write it as training.num_local_steps=4",
        ),
        (
            ["run", "tiny.toml", "--trainig.lr", "1"],
            "--trainig.lr is not an option of run: write it as training.lr=1",
        ),
        (
            ["plan", "tiny/qwen2_moe", "--adapter.rank"],
            "--adapter.rank is not an option of plan: write it as adapter.rank=VALUE",
        ),
        (
            ["generate", "runs/tiny-1", "?"],
            "whose model is meant is missing: give --client NAME, or --model server or base",
        ),
        (
            ["export", "runs/tiny-1", "--to", "x", "--model", "base", "--client", "herald"],
            "--client herald has no effect with --model base",
        ),
        (
            ["generate", "runs/tiny-1", "?", "--model", "server", "--when", "before"],
            "--when before has no effect with --model server",
        ),
        (["generate", "runs", "?", "--client", "herald"], "runs holds no run (no config.toml)"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, here, capsys):
    assert error_of(capsys, *arguments) == message


def test_jobs_that_are_no_number_are_refused(here, capsys):
    (here / "one.toml").write_text('base = "tiny.toml"\n[matrix]\nseed = [0]\n')
    for jobs in ("0", "-2", "many"):
        message = error_of(capsys, "compare", "one.toml", "--jobs", jobs)
        assert message == f"--jobs must be a whole number of at least 1, or auto, not {jobs}"


def test_a_folder_in_use_is_not_written_to(here, capsys):
    assert "runs/tiny-1 is already in use" in error_of(capsys, "run", "tiny.toml", "--to", "runs/tiny-1")


def test_an_unknown_client_is_told_with_those_there_are(here, capsys):
    message = error_of(capsys, "generate", "runs/tiny-1", "?", "--client", "client-9")
    assert "client-9" in message
    assert "client-000" in message


def asked_of(monkeypatch, *arguments):
    """Whose model, and when, the command asks for."""
    asked = []

    def answer(run_directory, who, *rest, when, **named):
        asked.append((who, when))

    for name in ("generate_text", "export_client"):
        monkeypatch.setattr(f"fedexperts.running.export.{name}", answer)
    assert cli.main(arguments) == cli.OK
    return asked[0]


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        (["--client", "client-001"], ("client-001", "after")),
        (["--client", "telegram"], ("client-001", "after")),
        (["--client", "telegram", "--when", "before"], ("client-001", "before")),
        (["--model", "server"], ("server", "after")),
        (["--model", "base"], ("base", "after")),
    ],
)
def test_a_model_is_asked_by_id_name_or_kind(options, asked, here, monkeypatch):
    assert asked_of(monkeypatch, "generate", "runs/tiny-1", "?", *options) == asked
    assert asked_of(monkeypatch, "export", "runs/tiny-1", "--to", "x", *options) == asked


@pytest.mark.parametrize("arguments", [["run", "x.toml", "--nope"], ["report", "a", "b=c"], ["nope"], []])
def test_an_unknown_argument_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == cli.MISTAKE
    assert "usage: fedexperts" in capsys.readouterr().err


def ends_with(monkeypatch, error):
    def run_experiment(*arguments, **named):
        raise error

    monkeypatch.setattr("fedexperts.running.experiment.run_experiment", run_experiment)


def test_an_interrupt_says_how_to_go_on(here, monkeypatch, capsys):
    ends_with(monkeypatch, KeyboardInterrupt())
    assert cli.main(["run", "tiny.toml", "--to", "my run"]) == cli.INTERRUPTED
    assert capsys.readouterr().err == (
        "interrupted: finished rounds are kept; to go on: fedexperts run --resume 'my run'\n"
    )


def test_a_full_disk_is_told_without_a_traceback(here, monkeypatch, capsys):
    ends_with(monkeypatch, OSError(28, "No space left on device"))
    assert error_of(capsys, "run", "tiny.toml", "--to", "full").startswith("the disk is full ([Errno 28]")


def test_a_spent_quota_is_a_full_disk(here, monkeypatch, capsys):
    ends_with(monkeypatch, OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert error_of(capsys, "run", "tiny.toml", "--to", "full").startswith("the disk is full (")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.EROFS, "Read-only file system", "full"), "full: Read-only file system"),
        (OSError(errno.EFBIG, "File too large"), "[Errno 27] File too large"),
        (
            RuntimeError("I/O error: Read-only file system (os error 30)"),
            "I/O error: Read-only file system (os e",
        ),
    ],
)
def test_a_disk_that_does_not_take_it_is_told_without_a_traceback(error, told, here, monkeypatch, capsys):
    ends_with(monkeypatch, error)
    assert error_of(capsys, "run", "tiny.toml", "--to", "full").startswith(told)


def test_a_folder_that_no_system_makes_is_told(here, capsys):
    assert error_of(capsys, "run", "tiny.toml", "--to", "x" * 300).endswith("x: File name too long")
    told = error_of(capsys, "run", "tiny.toml", "--to", "/proc/fedexperts")
    assert told == "folder /proc/fedexperts cannot be made: No such file or directory"
    assert error_of(capsys, "init", "/proc/x.toml") == "/proc/x.toml: No such file or directory"


def test_a_file_that_may_not_grow_is_named(here):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9, 9)); from pathlib import Path; "
    write = "from fedexperts.run_directory import append_lines; append_lines(Path('a'), [{'round': 1}])"
    ended = subprocess.run([sys.executable, "-c", limit + write], capture_output=True, text=True, timeout=60)
    assert ended.stderr.splitlines()[-1] == "OSError: [Errno 27] File too large: 'a'"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_that_ends_the_process_is_told_as_an_interrupt(number, code, here, monkeypatch, capsys):
    def run_experiment(*arguments, **named):
        os.kill(os.getpid(), number)

    monkeypatch.setattr("fedexperts.running.experiment.run_experiment", run_experiment)
    before = signal.signal(number, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        assert cli.main(["run", "tiny.toml", "--to", "my run"]) == code
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert capsys.readouterr().err == (
        "interrupted: finished rounds are kept; to go on: fedexperts run --resume 'my run'\n"
    )


def test_a_hang_up_that_nohup_ignores_stays_ignored(here, monkeypatch):
    def run_experiment(*arguments, **named):
        os.kill(os.getpid(), signal.SIGHUP)
        raise ZeroDivisionError

    monkeypatch.setattr("fedexperts.running.experiment.run_experiment", run_experiment)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pytest.raises(ZeroDivisionError):
            cli.main(["run", "tiny.toml", "--to", "my run"])
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_file_where_a_folder_is_to_be_is_told(here, capsys):
    assert error_of(capsys, "run", "tiny.toml", "--to", "tiny.toml") == "tiny.toml: File exists"


def test_our_own_fault_keeps_its_traceback(here, monkeypatch):
    ends_with(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli.main(["run", "tiny.toml", "--to", "fault"])


def test_a_suite_skips_what_it_has_and_fails_with_exit_code_1(here, capsys):
    suite = here / "suite.toml"
    suite.write_text(
        'base = "tiny.toml"\n[matrix]\nseed = [0]\n[[variant]]\nname = "small"\nrounds = 0\n'
        '[[variant]]\nname = "too-many"\ncohort.size = 99\n'
    )
    for _ in range(2):
        assert cli.main(["compare", "suite.toml", "--to", "out-suite", "--quiet"]) == cli.SOME_FAILED
        captured = capsys.readouterr()
        assert "report: out-suite/report.html" in captured.out
        assert "failed: too-many-seed-0: " in captured.err
    assert (here / "out-suite/runs/small-seed-0/result.json").exists()
