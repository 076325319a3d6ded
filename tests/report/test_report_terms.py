"""Equal terms: tables at equal budgets, stale searches, and what may be published."""

import copy
import hashlib
import json

import pytest
from synthetic_runs import make_result, write_suite

from fedexperts.errors import UserError
from fedexperts.report.equal_terms import equal_tables
from fedexperts.report.grouping import methods_of
from fedexperts.report.publishing import publish_report
from fedexperts.report.reading import read_suite
from fedexperts.report.summary import warnings

SUITE = b'[[equal]]\nby = "trained_parameters"\ngroups = ["flex", "fedavg"]\n'
METHODS = ("flex", "fedavg", "local_only")


def search_of(**changes):
    tried = [{"values": {"training.lr": rate}, "scores": [0.5, 0.6], "mean": 0.55} for rate in (0.1, 0.01)]
    found = {"chosen": {"training.lr": 0.1}, "at_edge": [], "tried": tried}
    head = {"metric": "validation_rougeL_after", "seeds": [8, 9], "groups": dict.fromkeys(METHODS, found)}
    return head | {"suite_sha256": hashlib.sha256(SUITE).hexdigest(), "code_sha256": "one"} | changes


@pytest.fixture
def directory(tmp_path):
    """A suite of committed code with a search and groups that it calls equal."""
    results = [copy.deepcopy(make_result(name, seed)) for name in METHODS for seed in (0, 1)]
    for result in results:
        result["name"] = f"{result['method']}-seed-{result['seed']}"
    results[2]["parameters"]["trained"] = results[3]["parameters"]["trained"] = 110_000
    folder = write_suite(tmp_path / "suite", results)
    for run in (folder / "runs").iterdir():
        change(run, code_sha256="one", has_uncommitted_changes=False)
    (folder / "suite.toml").write_bytes(SUITE)
    (folder / "search.json").write_text(json.dumps(search_of()))
    return folder


def change(run, **facts):
    file = run / "environment.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | facts))


def tables_of(directory):
    suite = read_suite(directory)
    return equal_tables(suite, methods_of(suite.runs))


def test_methods_stand_at_equal_budget_and_at_what_the_suite_calls_equal(directory):
    budget, equal = tables_of(directory)
    assert budget.titles[:3] == ("method", "runs searched", "trained parameters")
    assert {row[0]: row[1] for row in budget.rows} == dict.fromkeys(METHODS, "4")
    assert equal.caption == "At equal trained parameters: 98,304 to 110,000, 11.9 % apart"
    assert [row[0] for row in equal.rows] == ["flex", "fedavg"]
    assert [row[2] for row in equal.rows] == ["98,304 ± 0", "110,000 ± 0"]


def test_bytes_are_those_of_both_ways(directory):
    suite = SUITE.replace(b"trained_parameters", b"bytes")
    (directory / "suite.toml").write_bytes(suite)
    found = search_of(suite_sha256=hashlib.sha256(suite).hexdigest())
    (directory / "search.json").write_text(json.dumps(found))
    caption = "At equal bytes of a client and round, both ways: 282,640 to 282,640, 0.0 % apart"
    assert tables_of(directory)[1].caption == caption


def test_without_a_search_no_budget_is_claimed(directory):
    (directory / "search.json").unlink()
    budget, _ = tables_of(directory)
    assert budget.caption.startswith("Without a search")
    assert {row[1] for row in budget.rows} == {"0"}


@pytest.mark.parametrize(
    ("stale", "why"),
    [({"suite_sha256": "old"}, "another state of .*suite.toml"), ({"code_sha256": "old"}, "of other code")],
)
def test_a_stale_search_is_refused(directory, stale, why):
    (directory / "search.json").write_text(json.dumps(search_of(**stale)))
    with pytest.raises(UserError, match=rf"search\.json is stale: .*{why}"):
        read_suite(directory)


def test_runs_of_different_code_are_told_before_all_else(directory):
    (directory / "search.json").unlink()
    change(directory / "runs" / "flex-seed-1", code_sha256="two")
    suite = read_suite(directory)
    said = warnings(suite, methods_of(suite.runs))
    assert said == ["The runs are of 2 different states of the code: figures may not compare."]


def test_a_report_of_one_committed_code_is_published(directory, tmp_path):
    (tmp_path / "experiments").mkdir()
    own = {"rate": 0.5, "mean_best_similarity": 0.75}
    models = [{"model": "server", "planted": own, "not_planted": own}]
    (directory / "runs" / "flex-seed-0" / "extraction.json").write_text(json.dumps({"models": models}))
    path = publish_report(directory, tmp_path / "experiments")
    numbers = json.loads((tmp_path / "experiments" / "results.json").read_text())
    extracted = {one["name"]: one["numbers"].get("extraction.server.planted_rate") for one in numbers}
    assert {name: rate for name, rate in extracted.items() if rate} == {"flex-seed-0": 0.5}
    files = {file.parent.name: file for file in directory.glob("runs/*/result.json")}
    results = {name: json.loads(file.read_text()) for name, file in files.items()}
    assert {one["name"]: one["numbers"]["mean.rougeL_after"] for one in numbers} == {
        name: float(f"{result['mean']['rougeL_after']:.6g}") for name, result in results.items()
    }
    assert path == tmp_path / "experiments" / "REPORT.md"
    assert "equal search budget" in path.read_text()


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        ({"has_uncommitted_changes": True}, "1 of its runs are of uncommitted or unknown code"),
        ({"commit": ""}, "1 of its runs are of uncommitted or unknown code"),
        ({"code_sha256": "two"}, "1 of its runs are of other code than fedavg-seed-0"),
    ],
)
def test_uncommitted_and_mixed_code_is_published_only_if_asked_for(directory, tmp_path, facts, sentence):
    (directory / "search.json").unlink()
    change(directory / "runs" / "flex-seed-1", **facts)
    with pytest.raises(UserError, match=rf"{sentence} \(flex-seed-1\); .* --any-code"):
        publish_report(directory, tmp_path)
    assert not (tmp_path / "REPORT.md").exists()
    assert publish_report(directory, tmp_path, any_code=True).exists()
