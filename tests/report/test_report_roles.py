"""Roles, clusters, memory and the time line in a report; nothing of them for methods without."""

import json
from dataclasses import replace

import pytest
from synthetic_runs import make_result

from fedexperts.report.grouping import methods_of
from fedexperts.report.measured import measured_figures
from fedexperts.report.reading import Ledger, Run, Turn, read_run
from fedexperts.report.roles import role_figures, role_table
from fedexperts.report.time_line import time_lines

ROLES = {
    ("a", 1): [[2, 0, 1, 0]],
    ("b", 1): [[2, 2, 0, 0]],
    ("a", 2): [[0, 2, 0, 0]],
    ("b", 2): [[2, 0, 0, 0]],
}
SLOTS = {"a": [[2, 0, 1, 2]], "b": [[0, 1, 2, -1]]}
MB = 1_000_000


def turn(client, number, **options):
    return Turn(
        round_number=number,
        client=client,
        seconds={},
        simulated={},
        numbers={"memory_planned_bytes": 10.0 * MB, "memory_peak_bytes": number * 9.0 * MB},
        tables={"parts": ROLES[client, number], "slots": SLOTS[client]},
    )


TURNS = tuple(turn(client, number) for client, number in ROLES)


def methods_with(turns, method="flex", **numbers):
    ledger = Ledger(num_messages=0, num_unequal=0, measured=numbers, turns=tuple(turns))
    result = make_result(method, 0, num_clients=2, rounds=2)
    return methods_of([Run(name="one", result=result, ledger=ledger)])


def figure_of(figures, title):
    (found,) = [figure for figure in figures if figure.title.startswith(title)]
    assert all("<svg" in panel.draw("salt") for panel in found.panels)
    return found


def test_roles_tell_by_whom_each_expert_is_tuned_in_each_round():
    figure = figure_of(role_figures(methods_with(TURNS)), "Roles over rounds")
    (panel,) = figure.panels
    assert panel.table.rows == (("1", "a b", "b", "–", "–"), ("2", "b", "a", "–", "–"))
    assert [name for name, _ in figure.legend] == ["a", "b"]


def test_more_clients_than_colours_are_counted():
    many = [replace(TURNS[0], client=f"c{number}") for number in range(9)]
    figure = figure_of(role_figures(methods_with(many)), "Roles over rounds")
    (panel,) = figure.panels
    assert [cell.mean for cell in panel.table.values[0]] == [9, 0, 0, 0]
    assert "Number of clients" in figure.note


def test_clusters_are_those_of_the_last_round_by_the_slots_that_experts_share():
    (panel,) = figure_of(role_figures(methods_with(TURNS)), "Clusters").panels
    assert panel.table.rows == (("a", "1", "T", "2", "1"), ("b", "T", "1", "2", "–"))


def test_memory_is_that_of_each_clients_largest_turn():
    (panel,) = figure_of(role_figures(methods_with(TURNS)), "Memory").panels
    assert [[cell.mean for cell in row] for row in panel.table.values] == [[10, 18], [10, 18]]


def test_roles_in_numbers():
    (table,) = role_table(methods_with(TURNS))
    # Experts 0 and 1 of four; each by both clients; b keeps one of one, a none of one.
    assert table.rows == (("flex", "50.0", "2.0", "50.0"),)


def test_profile_errors_are_curves_here_and_nowhere_else():
    errors = {"profile_error": {1: 0.2, 2: 0.1}, "profile_error_fresh": {1: 0.2, 2: 0.05}}
    methods = methods_with((), **errors)
    used, fresh = figure_of(role_figures(methods), "Profile error").panels
    assert [row[0].mean for row in used.table.values] == [0.2, 0.1]
    assert [row[0].mean for row in fresh.table.values] == [0.2, 0.05]
    assert not [figure for figure in measured_figures(methods) if "rofile" in figure.title]


def test_methods_without_them_draw_nothing():
    plain = Turn(round_number=1, client="a", seconds={"train": 1.0}, simulated={}, numbers={}, tables={})
    methods = methods_with([plain])
    assert (role_figures(methods), role_table(methods), time_lines(methods)) == ([], [], [])


def test_turns_are_read_from_disk_and_their_codes_are_not_averaged(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(make_result("flex", 0, num_clients=2)))
    line = {
        "round": 1,
        "client": "a",
        "seconds": {"train": 2.0},
        "algorithm": {"parts": [[2, 0]], "slots": [[0, 1]], "memory_peak_bytes": 5, "gate_mean": 0.5},
    }
    (tmp_path / "clients.jsonl").write_text(json.dumps(line) + "\n")
    ledger = read_run(tmp_path).ledger
    assert ledger.measured == {"gate_mean": {1: 0.5}}
    assert ledger.turns == (
        Turn(
            round_number=1,
            client="a",
            seconds={"train": 2.0},
            simulated={},
            numbers={"memory_peak_bytes": 5.0},
            tables={"parts": [[2, 0]], "slots": [[0, 1]]},
        ),
    )


def timed(client, **simulated):
    return replace(TURNS[0], client=client, tables={}, numbers={}, simulated=simulated)


def spans_of(turns):
    """Drawn spans by row as (start, seconds), and where the upright line is."""
    (figure,) = time_lines(methods_with(turns))
    (panel,) = figure.panels
    rows, ends = panel.draw.args
    assert "<svg" in panel.draw("salt")
    return {name: [(span.start, span.seconds) for span in own] for name, own in rows.items()}, ends


def test_phases_follow_each_other_and_the_overlapped_profile_follows_the_upload():
    fast = timed("a", upload=1.0, train=2.0, download=3.0, profile_overlapped=5.0, total=6.0)
    slow = timed("b", upload=1.0, train=9.0, download=3.0, total=13.0)
    rows, ends = spans_of([fast, slow])
    assert rows["a"] == [(0.0, 3.0), (3.0, 2.0), (5.0, 1.0), (6.0, 5.0)]
    assert rows["b"][-1] == (12.0, 1.0)
    assert ends == [13.0]
    assert rows["server"] == [(13.0, 0.0)]


def test_a_wait_is_a_gap():
    rows, _ = spans_of([timed("a", wait=4.0, download=1.0, train=1.0, upload=1.0, total=7.0)])
    assert rows["a"] == [(4.0, 1.0), (5.0, 1.0), (6.0, 1.0)]


def test_link_and_work_have_rows_of_their_own_where_they_run_side_by_side():
    rows, _ = spans_of([timed("a", download=1.0, train=5.0, upload=1.0, total=5.0)])
    assert rows["a, link"] == [(0.0, 1.0), (4.0, 1.0)]
    assert rows["a, work"] == [(0.0, 5.0)]


def test_measured_seconds_are_drawn_where_a_phase_is_overlapped():
    measured = replace(timed("a"), seconds={"train": 2.0, "profile_overlapped": 1.0})
    rows, ends = spans_of([measured])
    assert rows["a"] == [(0.0, 2.0), (2.0, 1.0)]
    assert ends == [2.0]


@pytest.mark.parametrize("num_clients", [20, 25])
def test_the_longest_turns_are_drawn(num_clients):
    turns = [timed(f"c{n:02}", train=1.0 + n, total=1.0 + n) for n in range(num_clients)]
    rows, _ = spans_of(turns)
    assert len(rows) == 21
    assert "c24" in rows or num_clients == 20


def test_where_the_server_does_not_wait_a_row_begins_when_its_turn_began():
    late = replace(timed("a", download=1.0, train=5.0, upload=1.0, total=7.0), started=3.0)
    fresh = replace(timed("b", download=1.0, train=1.0, upload=1.0, total=3.0), started=8.0)
    rows, ends = spans_of([late, fresh])
    assert rows["a"] == [(0.0, 1.0), (1.0, 5.0), (6.0, 1.0)]
    assert rows["b"] == [(5.0, 1.0), (6.0, 1.0), (7.0, 1.0)]
    assert ends == [8.0]
    (figure,) = time_lines(methods_with([late, fresh]))
    assert "each row begins when its turn began" in figure.note
