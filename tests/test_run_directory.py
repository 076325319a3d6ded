"""Run directories: when a folder is free, who holds it, and what a crash leaves."""

import os
import subprocess
import sys
from contextlib import suppress

import pytest

from fedexperts.errors import UserError
from fedexperts.run_directory import RunDirectory, append_lines, read_lines, write_atomically


def test_a_folder_with_files_is_not_taken(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="already in use"):
        RunDirectory(tmp_path).check_start(resume=False)


def test_what_a_kill_left_before_the_configuration_was_whole_does_not_count(tmp_path):
    for name in (".claim", ".lock", ".config.toml.partial"):
        (tmp_path / name).touch()
    RunDirectory(tmp_path).check_start(resume=False)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "result.json"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, None)
    assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [("result.json", b"old")]


def test_a_half_written_last_line_is_left_out(tmp_path):
    path = tmp_path / "rounds.jsonl"
    append_lines(path, [{"round": 1}])
    with path.open("a") as file:
        file.write('{"round": 2')
    assert read_lines(path) == [{"round": 1}]


def test_two_processes_do_not_run_one_directory(tmp_path):
    with (
        RunDirectory(tmp_path).lock(),
        pytest.raises(UserError, match="in use by another process"),
        RunDirectory(tmp_path).lock(),
    ):
        pass


def test_a_claimed_folder_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "run"
    with RunDirectory(path).claim(resume=False):
        for _ in range(2):
            with pytest.raises(UserError, match="in use by another process"), claimed(path):
                pass
        assert [one.name for one in path.iterdir()] == [".claim"]
        RunDirectory(path).config.touch()
        with pytest.raises(UserError, match="in use by another process"), claimed(path, resume=True):
            pass
        with pytest.raises(UserError, match="is already in use"), claimed(path):
            pass
    assert sorted(one.name for one in path.iterdir()) == [".claim", "config.toml"]


def claimed(path, *, resume=False):
    return RunDirectory(path).claim(resume=resume)


def fail_in(path, names, *, resume=False):
    with suppress(UserError), claimed(path, resume=resume):
        for name in names:
            (path / name).touch()
        raise UserError("seed must be at least 0, not -1")


def test_a_refused_start_leaves_no_folder(tmp_path):
    fail_in(tmp_path / "run", ["config.toml", "environment.json", "flower_token"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept", ["base.json", "flower.log", "thesis.tex"])
def test_a_failure_after_something_has_begun_keeps_the_folder(kept, tmp_path):
    fail_in(tmp_path / "run", ["config.toml", kept])
    assert (tmp_path / "run/config.toml").exists()


def test_a_run_that_cannot_be_resumed_is_kept(tmp_path):
    (tmp_path / "run").mkdir()
    fail_in(tmp_path / "run", ["config.toml"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.toml").touch()
    fail_in(tmp_path / "run", [], resume=True)
    assert (tmp_path / "run/config.toml").exists()


def test_a_folder_that_another_process_writes_is_not_cleaned_up(tmp_path):
    """Over Flower the server app holds the lock, and may outlive the process that submitted the run."""
    path = tmp_path / "run"
    claim = claimed(path)
    claim.__enter__()
    with RunDirectory(path).lock():
        assert not claim.__exit__(UserError, UserError("the connection broke"), None)
        assert path.exists()


CLAIMS = """
import os, sys
from contextlib import suppress
from pathlib import Path
from fedexperts.errors import UserError
from fedexperts.run_directory import RunDirectory

path, marker, won = Path(sys.argv[1]), Path(sys.argv[2]), 0
sys.stdin.readline()
while won < 200:
    with suppress(UserError), RunDirectory(path).claim(resume=False):
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        (path / "config.toml").touch()
        assert sorted(one.name for one in path.iterdir()) == [".claim", "config.toml"]
        won += 1
        marker.unlink()
        raise UserError("refused")
"""


def test_many_processes_that_claim_and_give_up_never_meet(tmp_path):
    command = [sys.executable, "-c", CLAIMS, str(tmp_path / "run"), str(tmp_path / "marker")]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, env=os.environ) for _ in range(4)]
    for process in processes:
        process.stdin.write(b"go\n")
        process.stdin.close()
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0, 0]
    assert list(tmp_path.iterdir()) == []


def test_what_a_writer_puts_in_place_of_the_file_is_what_is_synced(tmp_path, monkeypatch):
    """As safetensors does: a file of its own, renamed over the path that it is given."""
    synced, fsync = [], os.fsync

    def told(descriptor):
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def replaces(path):
        other = path.with_name("other")
        other.write_bytes(b"new")
        other.chmod(0o600)
        other.rename(path)

    monkeypatch.setattr(os, "fsync", told)
    (tmp_path / "plain").write_bytes(b"")
    for is_private in (False, True):
        path = tmp_path / f"private-{is_private}" / "file"
        write_atomically(path, replaces, is_private=is_private)
        assert path.read_bytes() == b"new"
        assert path.stat().st_ino in synced
        plain = (tmp_path / "plain").stat().st_mode & 0o777
        assert path.stat().st_mode & 0o777 == (0o600 if is_private else plain)
