"""Rounds of a run that has not finished, in a terminal."""

import json

from fedexperts.cli.program import main
from fedexperts.report.so_far import rounds_so_far


def line(number, **beside):
    counted = {"upload_bytes": 1000 * number, "download_bytes": 10, "num_failed": 0}
    return {"round": number, "train_loss": 1.5 / number, "seconds": {"total": 2.0}, **counted, **beside}


def written(tmp_path, *lines, tail=""):
    (tmp_path / "config.toml").write_text("rounds = 5\n")
    (tmp_path / "rounds.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines) + tail)
    return tmp_path


def test_each_whole_round_is_a_row_and_an_evaluation_adds_columns(tmp_path):
    run = written(tmp_path, line(1), line(2, evaluation={"rougeL_after": 0.5}), tail='{"round": 3')
    table = rounds_so_far(run)
    assert "2 of 5 rounds done" in table.caption
    assert [row[0] for row in table.rows] == ["1", "2"]
    assert table.titles[-1] == "ROUGE-L after local steps"
    assert [row[-1] for row in table.rows] == ["–", "50.0"]
    assert [row[1] for row in table.rows] == ["1.500", "0.750"]


def test_there_is_none_before_the_first_round_and_after_the_last(tmp_path):
    assert rounds_so_far(written(tmp_path)) is None
    run = written(tmp_path, line(1))
    (run / "result.json").write_text("{}")
    assert rounds_so_far(run) is None


def test_report_shows_it_and_writes_nothing(tmp_path, capsys):
    run = written(tmp_path, line(1))
    files = sorted(run.iterdir())
    assert main(["report", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "1.00 kB" in shown
    assert "before" in shown.splitlines()[-1]
    assert sorted(run.iterdir()) == files
