"""Simulated time in a report: curves over seconds and bytes, targets, and nothing without a clock."""

from synthetic_runs import make_result

from fedexperts.report.clock import clock_figures, clock_sentences, clock_table
from fedexperts.report.grouping import methods_of
from fedexperts.report.reading import Run, Suite
from fedexperts.report.sections import content_of
from fedexperts.report.staleness import staleness_figures, staleness_table

BYTES = {"upload_bytes": 30.0, "download_bytes": 10.0}


def run_of(method, seed, *, seconds, reached, scores):
    """A run of three rounds that take ``seconds`` each and are evaluated after the second and the last."""
    rounds = {number: {"simulated.end": number * seconds, **BYTES} for number in (1, 2, 3)}
    rounds[2]["evaluation.rougeL_after"] = scores[0]
    result = make_result(method, seed, num_clients=2, rounds=3)
    result["mean"]["rougeL_after"] = scores[1]
    result["clock"] = {
        "simulated": True,
        "seconds": 3 * seconds,
        "bytes": 120,
        "measured_seconds": 9.0,
        "devices": {"client-000": "l20", "client-001": "phone"},
        "target": "rougeL_after",
        "target_value": 0.5,
        "seconds_to_target": 2 * seconds if reached else None,
        "bytes_to_target": 80 if reached else None,
        "round_of_target": 2 if reached else None,
        # Transfers run beside work here: the total is less than the sum.
        "seconds_by_phase": {"download": 5.0, "train": 3.0, "merge": 0.5, "upload": 1.0, "total": 6.0}
        | {"profile_overlapped": 2.0},
    }
    return Run(name=result["name"], result=result, rounds=rounds)


RUNS = (
    run_of("flex", 0, seconds=100.0, reached=True, scores=(0.6, 0.7)),
    run_of("flex", 1, seconds=120.0, reached=True, scores=(0.5, 0.7)),
    run_of("fedavg", 0, seconds=10.0, reached=False, scores=(0.3, 0.4)),
)


def test_scores_are_drawn_over_mean_seconds_and_over_bytes():
    (figure,) = clock_figures(methods_of(RUNS))
    over_seconds, over_bytes, *_ = (panel.table for panel in figure.panels)
    assert over_seconds.titles[0] == "simulated seconds"
    places = [float(row[0]) for row in over_seconds.rows]
    assert places == [20.0, 30.0, 220.0, 330.0]
    flex = over_seconds.titles.index("flex") - 1
    means = [row[flex].mean if row[flex] else None for row in over_seconds.values]
    assert means == [None, None, 0.55, 0.7]
    assert [float(row[0]) for row in over_bytes.rows] == [80.0, 120.0]
    assert "<svg" in figure.panels[0].draw("salt")


def test_a_method_that_never_reached_the_target_has_a_dash():
    table, _ = clock_table(methods_of(RUNS))
    rows = {row[0]: row for row in table.rows}
    assert rows["flex"][3].startswith("3.67")
    assert rows["flex"][3].endswith("min")
    assert rows["fedavg"][3:6] == ("–", "–", "–")
    assert rows["fedavg"][6:] == ("0 of 1", "9.00 s")


def test_the_mean_to_the_target_names_the_seeds_that_it_is_of():
    late = run_of("flex", 2, seconds=90.0, reached=False, scores=(0.1, 0.2))
    table, _ = clock_table(methods_of((*RUNS, late)))
    rows = {row[0]: row for row in table.rows}
    assert table.titles[6] == "seeds that reached it"
    assert rows["flex"][6] == "2 of 3"


def test_a_mean_turn_is_parted_into_transfers_and_work():
    _, turns = clock_table(methods_of(RUNS))
    assert turns.titles[1:] == ("download", "work", "upload", "wait", "overlapped, beside other turns")
    assert turns.rows[0][1:] == ("5.00 s", "3.50 s", "1.00 s", "0 s", "2.00 s")


def test_the_section_says_that_time_is_simulated_on_which_devices_and_the_target():
    first, second = clock_sentences(methods_of(RUNS))
    assert "simulated" in first
    assert "l20, phone" in first
    assert second == "Target: rougeL_after of 0.5."


def test_runs_without_a_clock_have_no_such_section():
    plain = Run(name="flex", result=make_result("flex"), rounds={1: dict(BYTES)})
    titles = [section.title for section in content_of(Suite(title="", runs=(plain,))).sections]
    assert "Simulated time" not in titles
    titles = [section.title for section in content_of(Suite(title="", runs=RUNS)).sections]
    assert "Simulated time" in titles


def test_the_age_of_uploads_is_told_for_servers_that_do_not_wait_and_for_no_other():
    late = run_of("fedavg", 0, seconds=5.0, reached=True, scores=(0.6, 0.7))
    for number, line in late.rounds.items():
        line |= {
            "asynchronous.staleness_mean": number / 2,
            "asynchronous.staleness_max": float(number),
            "asynchronous.weight_mean": 0.5,
            "asynchronous.num_at_work": 4.0,
        }
    late.result["refused"] = {"stale": 2}
    waits = run_of("flex", 0, seconds=100.0, reached=True, scores=(0.6, 0.7))
    methods = methods_of((late, waits))
    (table,) = staleness_table(methods)
    assert table.rows == (("fedavg", "3", "1.000", "3.000", "0.500", "2", "4.000"),)
    (figure,) = staleness_figures(methods)
    assert [panel.table.titles[-1] for panel in figure.panels] == ["fedavg", "fedavg"]
    assert "<svg" in figure.panels[0].draw("salt")
    assert staleness_table(methods_of((waits,))) == []
    assert staleness_figures(methods_of((waits,))) == []
