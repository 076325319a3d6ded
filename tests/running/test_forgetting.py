"""A client that is to be forgotten leaves nothing of its own in the run, which still can be read."""

import itertools
import os
import shutil
from contextlib import suppress

import pytest

from fedexperts import cli
from fedexperts.doctor import examine
from fedexperts.errors import UserError
from fedexperts.integrity import rewind
from fedexperts.report import write_report
from fedexperts.run_directory import RunDirectory, read_json, read_lines
from fedexperts.running.client_names import resolve_client
from fedexperts.running.experiment import run_experiment
from fedexperts.running.forgetting import forget
from fedexperts.running.progress import QuietProgress
from fedexperts.seals import read_sealed, write_sealed

GONE, LEFT = "client-000", "client-001"


def test_a_client_is_forgotten_by_name_and_the_run_still_reads(whole, capsys):
    write_report(whole)
    before = read_json(whole / "result.json")
    name = before["clients"][GONE]["name"]
    assert cli.main(["forget", str(whole), "--client", name]) == cli.OK
    told = capsys.readouterr().out
    assert f"removed {whole}/clients/{GONE}: 6 files, " in told
    assert "in 3 lines of client-000" in told
    assert not (whole / "clients" / GONE).exists()
    assert not (whole / "REPORT.md").exists()
    after = read_json(whole / "result.json")
    assert after["forgotten"] == [GONE]
    assert after["bytes"] == before["bytes"]
    assert after["clients"] == {LEFT: before["clients"][LEFT]}
    _, report = write_report(whole)
    assert "1 client forgotten" in report.read_text()
    assert examine(whole).problems == ()


def test_what_is_left_of_a_client_is_its_id_and_its_bytes(whole):
    figures = {line["train_loss"] for line in read_lines(whole / "clients.jsonl") if line["client"] == GONE}
    forget(whole, GONE)
    lines = [line for line in read_lines(whole / "clients.jsonl") if line["client"] == GONE]
    ways = [f"{way}_{how}" for way in ("upload", "download") for how in ("bytes", "predicted")]
    assert [line.keys() for line in lines] == [{"round", "client", *ways, "forgotten"}] * 3
    assert GONE not in read_json(whole / "base.json")["clients"]
    files = [path for path in whole.rglob("*") if path.is_file() and path.name != "rounds.jsonl"]
    for path in files:
        content = path.read_text(errors="ignore")
        assert not any(str(figure) in content for figure in figures), path
    holders = {path.name for path in files if GONE in path.read_text(errors="ignore")}
    assert holders == {"clients.jsonl", "result.json", "checkpoint.json", "checkpoint-round-00003.json"}


def test_a_matrix_loses_row_and_column(whole):
    result = read_sealed(whole / "result.json")
    matrix = {"clients": [GONE, LEFT], "loss": [[1.0, 2.0], [3.0, 4.0]], "rougeL": []}
    write_sealed(whole / "result.json", result | {"matrix": matrix})
    forget(whole, GONE)
    left = {"clients": [LEFT], "loss": [[4.0]], "rougeL": []}
    assert read_json(whole / "result.json")["matrix"] == left


def test_a_run_with_a_forgotten_client_is_not_gone_on_from(short_config, cut, whole):
    forget(cut, GONE)
    with pytest.raises(UserError, match=r"cannot resume .*: client-000 has been forgotten"):
        run_experiment(short_config, cut, progress=QuietProgress(), resume=True)
    forget(whole, GONE)
    with pytest.raises(UserError, match=r"cannot rewind .*: client-000 has been forgotten"):
        rewind(RunDirectory(whole), 3)
    assert (whole / "result.json").exists()
    with pytest.raises(UserError, match=r"'client-000' of .* has been forgotten"):
        resolve_client(whole, GONE)


def test_forgetting_that_was_killed_is_done_again(whole):
    shutil.rmtree(whole / "clients" / GONE)
    assert examine(whole).problems
    forget(whole, GONE)
    assert examine(whole).problems == ()


def content_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name[0] != "."}


@pytest.mark.parametrize("name", ["clients.jsonl", "rounds.jsonl", "base.json", "result.json"])
def test_nothing_is_forgotten_where_damage_would_get_a_new_hash(name, whole, capsys):
    (whole / name).write_bytes((whole / name).read_bytes()[:-20])
    before = content_of(whole)
    assert cli.main(["forget", str(whole), "--all"]) == cli.MISTAKE
    assert str(whole / name) in capsys.readouterr().err
    assert content_of(whole) == before


class _Killed(BaseException):
    pass


def killed_at(patch, place):
    """Raise at the ``place``-th time that something is about to be made to last."""
    sync, places = os.fsync, iter(range(place + 1))

    def dies(descriptor):
        if next(places) == place:
            raise _Killed
        sync(descriptor)

    patch.setattr(os, "fsync", dies)


def test_forgetting_that_was_killed_anywhere_is_done_again(runs, tmp_path):
    expected = forgotten(runs, tmp_path / "whole")
    for place in itertools.count():
        run = shutil.copytree(runs / "whole", tmp_path / f"{place}")
        with pytest.MonkeyPatch.context() as patch, suppress(_Killed):
            killed_at(patch, place)
            forget(run, GONE)
            break
        forget(run, GONE)
        assert examine(run).problems == ()
        assert relative(run) == expected
    assert place > 8


def forgotten(runs, folder):
    run = shutil.copytree(runs / "whole", folder)
    forget(run, GONE)
    return relative(run)


def relative(run):
    return {str(path.relative_to(run)): content for path, content in content_of(run).items()}


def test_all_clients_are_forgotten_and_the_report_says_so(whole):
    forget(whole, None)
    assert list((whole / "clients").iterdir()) == []
    with pytest.raises(UserError, match=r"every client of .* has been forgotten: there is nothing to report"):
        write_report(whole)


def test_a_node_forgets_its_client(whole, tmp_path):
    """On a node there are the clients' folders alone."""
    node = tmp_path / "node"
    shutil.copytree(whole / "clients", node)
    with pytest.raises(
        UserError, match=r"'client-007' is not in .*: it must be one of client-000, client-001"
    ):
        forget(node, "client-007")
    assert forget(node, GONE)[0].startswith(f"removed {node}/{GONE}: ")
    assert [path.name for path in node.iterdir()] == [LEFT]
    assert examine(node).problems == ()
    forget(node, None)
    with pytest.raises(UserError, match=r"holds no run"):
        forget(node, None)


@pytest.mark.parametrize("options", [[], ["--all", "--client", GONE]])
def test_whom_to_forget_must_be_said(options, whole, capsys):
    assert cli.main(["forget", str(whole), *options]) == cli.MISTAKE
    assert "give either --client NAME or --all" in capsys.readouterr().err
