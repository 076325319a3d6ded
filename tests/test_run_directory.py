"""Run directories: when a folder is free, and what a crash leaves."""

import pytest

from fedexperts.errors import UserError
from fedexperts.run_directory import RunDirectory, append_lines, read_lines, write_atomically


def test_a_folder_with_files_is_not_taken(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="already in use"):
        RunDirectory(tmp_path).create(resume=False)


def test_what_a_kill_left_before_the_configuration_was_whole_does_not_count(tmp_path):
    for name in (".lock", ".config.toml.partial"):
        (tmp_path / name).touch()
    RunDirectory(tmp_path).create(resume=False)


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
