"""Run and suite directories, whole and damaged."""

import json
from pathlib import Path

import pytest
from synthetic_runs import make_result, write_run, write_suite, write_unfinished

from fedexperts.errors import UserError
from fedexperts.report.reading import progress_of, read_run, read_suite
from fedexperts.report.sections import content_of


def change_result(directory: Path, **values: object) -> None:
    """Write other values into a run's result; None takes the key away."""
    path = directory / "result.json"
    result = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in result.items() if value is not None}))


def test_a_run_directory_is_a_suite_of_one(run_directory):
    suite = read_suite(run_directory)
    assert [run.name for run in suite.runs] == ["flex-seed0"]


def test_a_suite_has_every_run(suite_directory):
    suite = read_suite(suite_directory)
    assert len(suite.runs) == 9
    assert suite.title == "three-methods"
    assert suite.absent == {}


def test_an_unfinished_run_is_listed_with_how_far_it_came(tmp_path):
    directory = write_suite(tmp_path, [make_result()])
    write_unfinished(directory / "runs" / "slow", rounds=10, done=4)
    assert read_suite(directory).absent == {"slow": "unfinished, 4 of 10 rounds done"}


def test_a_half_written_line_is_no_round(tmp_path):
    assert progress_of(write_unfinished(tmp_path / "run", rounds=3, done=0)) == "unfinished, no round done"


def test_a_run_of_another_schema_is_refused_by_version(run_directory):
    change_result(run_directory, schema_version=0)
    with pytest.raises(UserError, match=r"result\.json has schema_version 0, and only 3 is read"):
        read_run(run_directory)


@pytest.mark.parametrize("key", ["schema_version", "method", "settings", "clients", "mean"])
def test_a_result_without_what_it_must_have_is_refused_by_key(run_directory, key):
    change_result(run_directory, **{key: None})
    with pytest.raises(UserError, match=f"'{key}' is missing"):
        read_run(run_directory)


def test_a_foreign_result_in_a_suite_is_listed_and_does_not_stop_the_report(tmp_path):
    directory = write_suite(tmp_path, [make_result(seed=0), make_result(seed=1)])
    change_result(directory / "runs" / "flex-seed1", schema_version=9)
    suite = read_suite(directory)
    assert [run.name for run in suite.runs] == ["flex-seed0"]
    assert "schema_version 9" in suite.absent["flex-seed1"]


def test_a_line_that_is_no_json_is_named_by_file_and_number(run_directory):
    path = run_directory / "rounds.jsonl"
    path.write_text(path.read_text() + "{oops\n")
    with pytest.raises(UserError, match=r"rounds\.jsonl line 5 is not JSON"):
        read_run(run_directory)


def test_bytes_that_are_no_text_are_named_by_file_and_number(run_directory):
    for name in ("rounds.jsonl", "clients.jsonl"):
        kept = (run_directory / name).read_bytes()
        (run_directory / name).write_bytes(kept + b'{"round": "\xff"}\n')
        with pytest.raises(UserError, match=rf"{name} line \d+ is not JSON"):
            read_run(run_directory)
        (run_directory / name).write_bytes(kept)


def test_a_folder_that_is_neither_is_refused(tmp_path):
    with pytest.raises(UserError, match="neither a run directory"):
        read_suite(tmp_path)
    with pytest.raises(UserError, match="not a directory"):
        read_suite(tmp_path / "nothing")


def test_a_run_without_result_is_refused_with_how_far_it_came(tmp_path):
    with pytest.raises(UserError, match="2 of 3 rounds done"):
        read_suite(write_unfinished(tmp_path / "run", rounds=3, done=2))


def test_a_suite_without_any_result_is_refused(tmp_path):
    write_unfinished(tmp_path / "runs" / "only", rounds=3, done=1)
    with pytest.raises(UserError, match="only, is unfinished, 1 of 3 rounds done"):
        read_suite(tmp_path)


def test_optional_files_may_be_absent(run_directory):
    for name in ("rounds.jsonl", "clients.jsonl", "environment.json"):
        (run_directory / name).unlink()
    run = read_run(run_directory)
    assert (run.rounds, run.environment, run.ledger) == ({}, {}, None)


def test_the_ledger_counts_messages_that_differ_from_their_prediction(tmp_path):
    directory = write_run(tmp_path / "run", make_result(rounds=2))
    path = directory / "clients.jsonl"
    first, *others = path.read_text().splitlines()
    changed = json.loads(first) | {"upload_bytes": 1}
    path.write_text("\n".join([json.dumps(changed), *others]) + "\n")
    ledger = read_run(directory).ledger
    assert (ledger.num_messages, ledger.num_unequal) == (32, 1)


def test_what_an_algorithm_measured_is_averaged_over_clients_place_by_place(run_directory):
    path = run_directory / "clients.jsonl"
    measured = [{"depth": 1, "gate": [1, 2]}, {"depth": 2, "gate": [3, None], "deep": [[1], [2, 4]]}]
    lines = [json.dumps({"round": 1, "algorithm": own}) for own in measured]
    path.write_text("\n".join([*lines, json.dumps({"round": 2})]) + "\n")
    assert read_run(run_directory).ledger.measured == {
        "depth": {1: 1.5},
        "gate": {1: [2.0, 2.0]},
        "deep": {1: [[1.0], [2.0, 4.0]]},
    }


def asked(model, rate, similarity):
    own = {"num_texts": 2, "num_extracted": 0, "rate": rate, "mean_best_similarity": similarity}
    return {"model": model, "planted": own, "not_planted": own | {"rate": 0.0, "mean_best_similarity": 0.25}}


def test_an_extraction_test_is_told_as_means_over_clients_and_beside_them_the_server(run_directory):
    models = [asked("a", 0.5, 0.8), asked("b", 1.0, 0.9), asked("server", 0.0, 0.3)]
    (run_directory / "extraction.json").write_text(json.dumps({"models": models}))
    suite = read_suite(run_directory)
    (table,) = next(one for one in content_of(suite).sections if one.title == "Memorisation").tables
    assert table.titles[1:3] == ("clients' own models", "best similarity, clients' own")
    assert table.rows[0][1:] == ("75.0", "0.850", "0.250", "0.0", "0.300", "0.250")
    (run_directory / "extraction.json").write_text('{"models": [{"model": "a"}]}')
    with pytest.raises(UserError, match=r"extraction\.json is not the file of an extraction test"):
        read_run(run_directory)
