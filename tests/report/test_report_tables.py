"""The headline table."""

import copy
import io
from statistics import fmean, stdev

import pytest
from rich.console import Console
from synthetic_runs import make_result

from fedexperts.report import headline_table, result_table, terminal_table
from fedexperts.report.tables import Table, make_table


@pytest.fixture(scope="module")
def results():
    return [make_result(method, seed) for method in ("fedavg", "flex") for seed in range(3)]


def texts_of(table: Table, column: str) -> list[str]:
    place = [one.title for one in table.columns].index(column)
    return [row[place] for row in table.rows]


def test_a_row_has_mean_and_sample_deviation_over_seeds(results):
    row = result_table(results)[0]
    scores = [result["mean"]["rougeL_after"] for result in results if result["method"] == "flex"]
    assert (row.method, row.seeds) == ("flex", (0, 1, 2))
    assert row.values["mean.rougeL_after"].mean == pytest.approx(fmean(scores))
    assert row.values["mean.rougeL_after"].std == pytest.approx(stdev(scores))


def test_every_headline_figure_has_a_column(results):
    titles = [column.title for column in headline_table(result_table(results)).columns]
    assert titles == [
        "method",
        "n",
        "ROUGE-L before",
        "ROUGE-L after",
        "loss after",
        "exam base",
        "exam global",
        "exam personalised",
        "upload per client and round",
        "time",
    ]


def test_the_best_of_a_column_is_marked(results):
    table = headline_table(result_table(results))
    assert table.rows[0][0] == "flex"
    marked = {(row, table.columns[place].title) for row, place in table.marked}
    assert marked == {(0, "ROUGE-L after"), (0, "loss after"), (0, "exam personalised")}


def test_methods_that_read_the_same_are_best_together_or_not_at_all(results):
    flex = make_result("flex", gate_init=1.0)
    twin = copy.deepcopy(flex)
    twin["settings"]["algorithm"]["gate_init"] = 2.0
    pair = headline_table(result_table([flex, twin]))
    assert pair.marked == frozenset()
    three = headline_table(result_table([flex, twin, make_result("fedavg")]))
    assert {row for row, _ in three.marked} == {0, 1}


def test_the_best_is_marked_within_each_task(results):
    other = [copy.deepcopy(result) for result in results]
    for result in other:
        result["settings"]["data"]["partition"]["kind"] = "iid"
    table = headline_table(result_table([*results, *other]))
    assert table.is_grouped
    assert [table.rows[row][:2] for row in sorted({row for row, _ in table.marked})] == [
        ("partition.kind=natural", "flex"),
        ("partition.kind=iid", "flex"),
    ]


def test_a_column_that_no_run_fills_is_left_out(results):
    bare = [copy.deepcopy(result) | {"exam": None} for result in results]
    titles = [column.title for column in headline_table(result_table(bare)).columns]
    assert not [title for title in titles if "exam" in title]


def test_a_value_that_one_run_lacks_says_so(results):
    lacking = [copy.deepcopy(result) for result in results]
    lacking[0]["mean"]["loss_after"] = None
    table = headline_table(result_table(lacking))
    assert texts_of(table, "loss after")[1].endswith("(n = 2)")


def test_a_cell_is_never_markup_in_the_terminal():
    table = make_table("caption", ["method", "score"], [["[red]flex[/red]", "1"]])
    console = Console(file=io.StringIO(), width=100)
    console.print(terminal_table(table))
    assert "[red]flex[/red]" in console.file.getvalue()
