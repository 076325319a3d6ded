"""What a reader can ask a report for: sample answers, another reference, the numbers of its pictures."""

import csv
import json
import xml.etree.ElementTree as xml

import pytest
from synthetic_runs import make_result, write_run, write_suite

from fedexperts.errors import UserError
from fedexperts.report import write_report
from fedexperts.report.reading import read_suite
from fedexperts.report.sections import content_of

PROMPT, ANSWER = "Who is <Rosa>?", "Rosa | is a baker."


def keep_answers(run):
    folder = run / "clients" / "client-002"
    folder.mkdir(parents=True)
    kept = [{"prompt": PROMPT, "response": "A baker.", "prediction": ANSWER}]
    off = [{"prompt": "2 + 2?", "response": "4", "prediction": "A baker."}]
    answers = {"client": "client-002", "predictions": kept, "off_task": off}
    (folder / "predictions.json").write_text(json.dumps(answers))
    return run


def test_answers_are_shown_only_to_who_asks_for_them(run_directory):
    keep_answers(run_directory)
    for path in write_report(run_directory):
        assert "baker" not in path.read_text()
    page, text = (path.read_text() for path in write_report(run_directory, has_samples=True))
    assert "Who is &lt;Rosa&gt;?" in page
    assert "| client-002 | outside its task | 2 + 2? | 4 | A baker. |" in text
    assert "| client-002 | own test split | Who is \\<Rosa\\>? | A baker. | Rosa \\| is a baker. |" in text


def test_answers_are_of_the_first_seed_of_each_method(tmp_path):
    suite = write_suite(tmp_path / "suite", [make_result("flex", seed, rounds=1) for seed in range(2)])
    for seed in range(2):
        keep_answers(suite / "runs" / f"flex-seed{seed}")
    section = content_of(read_suite(suite), has_samples=True).sections[-1]
    assert [table.caption for table in section.tables] == [
        "flex, seed 0: answers of clients' own models after local steps"
    ]


def test_to_ask_for_answers_where_none_was_kept_is_a_mistake(run_directory):
    with pytest.raises(UserError, match=r"--samples has no effect: no run has kept answers"):
        write_report(run_directory, has_samples=True)
    assert not (run_directory / "report.html").exists()


@pytest.mark.slow
def test_a_mistaken_reference_leaves_the_old_report(run_directory):
    old = write_report(run_directory)[0].read_bytes()
    with pytest.raises(UserError, match="--against 'nobody' is no method"):
        write_report(run_directory, against="nobody")
    assert (run_directory / "report.html").read_bytes() == old


def test_every_picture_has_its_numbers_in_a_file(tmp_path):
    run = write_run(tmp_path / "run", make_result("flex", 0, rounds=2))
    write_report(run, csv=tmp_path / "numbers")
    sections = content_of(read_suite(run)).sections
    num_pictures = sum(len(figure.panels) for section in sections for figure in section.figures)
    files = sorted(path.name for path in (tmp_path / "numbers").iterdir())
    assert len(files) == num_pictures
    assert "rounds-1-training-loss.csv" in files


def test_every_figure_is_one_picture_with_its_titles_and_names(tmp_path):
    suite = write_suite(
        tmp_path / "suite", [make_result(method, 0, rounds=2) for method in ("flex", "fedavg")]
    )
    write_report(suite, pictures=tmp_path / "pictures")
    figures = [figure for section in content_of(read_suite(suite)).sections for figure in section.figures]
    drawn = [xml.parse(path) for path in sorted((tmp_path / "pictures").glob("*.svg"))]
    assert len(drawn) == len(figures)
    shown = {" ".join(one.getroot().itertext()) for one in drawn}
    for figure in figures:
        words = [
            figure.title,
            *(panel.title for panel in figure.panels),
            *(name for name, _ in figure.legend),
        ]
        assert any(all(word in one for word in words) for one in shown)
    ids = [node.get("id") for one in drawn for node in one.iter() if node.get("id")]
    assert len(ids) == len(set(ids)), "two pictures can stand on one page"


def test_the_numbers_are_whole(tmp_path):
    result = make_result("flex", 0, rounds=2)
    write_report(write_run(tmp_path / "run", result), csv=tmp_path / "numbers")
    with (tmp_path / "numbers" / "clients-1-flex.csv").open() as file:
        titles, *rows = csv.reader(file)
    assert titles == ["client", "before", "before, std", "after", "after, std"]
    assert float(rows[3][3]) == result["clients"]["client-003"]["rougeL_after"]
