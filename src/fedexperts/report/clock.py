"""The section "Simulated time": scores over simulated seconds and bytes, and when a target was reached."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from statistics import fmean

from fedexperts.report.drawing import line_chart
from fedexperts.report.figures import Figure, Panel, styles_of
from fedexperts.report.grouping import Method, tasks_of
from fedexperts.report.quantities import Spread, heading, spread, text
from fedexperts.report.reading import Run
from fedexperts.report.tables import Table, make_table, number_table
from fedexperts.report.time_line import OVERLAPPED

_SCORES = ("rougeL_after", "exact_match_after", "loss_after")
"""Scores that are drawn beside the target's."""
_ELSEWHERE = {"exam_global": "exam.global"}
"""The result's figures by score, of those that are not among its means."""
_NOTE = (
    "Each point is an evaluation: mean score over seeds, against the mean of the seeds' simulated seconds or "
    "bytes until then. The band is one standard deviation of the score."
)
ReadPlace = Callable[[Run, int], float]
"""From a run and a round to a place on the horizontal axis."""


def clock_sentences(methods: Sequence[Method]) -> list[str]:
    """Say that these times are simulated, on which devices, and what the target is."""
    clocked = _clocked(methods)
    if not clocked:
        return []
    runs = [run for method in clocked for run in method.runs]
    devices = sorted({str(name) for run in runs for name in run.result["clock"]["devices"].values()})
    targets = {target for run in runs if (target := _target(run))}
    told = [
        "These seconds are simulated from counted operations and bytes, for clients that are "
        f"{', '.join(devices)}; measured time stands beside them."
    ]
    return told + [f"Target: {score} of {value:g}." for score, value in sorted(targets)]


def clock_table(methods: Sequence[Method]) -> list[Table]:
    """A row for each method with a clock; means to the target are those of the seeds that reached it."""
    names = ("seconds", "bytes", "seconds_to_target", "bytes_to_target", "round_of_target")
    clocked = _clocked(methods)
    has_target = any(_target(run) for method in clocked for run in method.runs)
    shown = names if has_target else names[:2]
    rows = [
        [
            method.label,
            *(text(name, method.spread(f"clock.{name}")) for name in shown),
            *([_reached(method)] if has_target else []),
            text("seconds", method.spread("clock.measured_seconds")),
        ]
        for method in clocked
    ]
    titles = ["simulated", "bytes", "simulated to target", "bytes to target", "round of target"]
    titles = [*titles[: len(shown)], *(["seeds that reached it"] if has_target else []), "measured"]
    caption = "Simulated time and bytes of all rounds, and until the first evaluation that reached the target"
    return [make_table(caption, ["method", *titles], rows), _turns(clocked)] if rows else []


def _reached(method: Method) -> str:
    num_reached = sum(run.numbers.get("clock.seconds_to_target") is not None for run in method.runs)
    return f"{num_reached} of {len(method.runs)}"


def _turns(methods: Sequence[Method]) -> Table:
    """A row for each method: the simulated seconds of a client's mean turn, by what they go to."""
    rows = []
    for method in methods:
        phases = [_phases(run) for run in method.runs]
        rows.append(
            [method.label, *(text("seconds", spread(own[part] for own in phases)) for part in phases[0])]
        )
    titles = ["method", "download", "work", "upload", "wait", "overlapped, beside other turns"]
    return make_table("Simulated time of a client's mean turn", titles, rows)


def _phases(run: Run) -> dict[str, float]:
    """Return seconds of a mean turn by what they go to; all that is not a transfer or waiting is work.

    Transfers may run beside work (``clock.overlap_transfer``), so the parts need not sum to the total.
    """
    parts = dict.fromkeys(("download", "work", "upload", "wait", "overlapped"), 0.0)
    for phase, seconds in run.result["clock"]["seconds_by_phase"].items():
        if phase != "total":
            part = "overlapped" if phase.endswith(OVERLAPPED) else phase if phase in parts else "work"
            parts[part] += seconds
    return parts


def clock_figures(methods: Sequence[Method]) -> list[Figure]:
    """A figure for each task: a panel for each score over simulated seconds, and one over bytes."""
    clocked, figures = _clocked(methods), []
    for task, group in tasks_of(clocked).items():
        wanted = [target[0] for method in group for run in method.runs if (target := _target(run))]
        panels = [
            panel for score in dict.fromkeys([*wanted, *_SCORES]) for panel in _panels(methods, group, score)
        ]
        legend = list(styles_of(methods).items())
        figures += [Figure(title=task, note=_NOTE, panels=panels, legend=legend)] if panels else []
    return figures


def _clocked(methods: Sequence[Method]) -> list[Method]:
    return [method for method in methods if all("clock" in run.result for run in method.runs)]


def _target(run: Run) -> tuple[str, float] | None:
    clock = run.result["clock"]
    return (str(clock["target"]), float(clock["target_value"])) if "target" in clock else None


def _panels(methods: Sequence[Method], group: Sequence[Method], score: str) -> Iterator[Panel]:
    places: Mapping[str, ReadPlace] = {"simulated seconds": _seconds, "bytes": _bytes}
    for axis, place in places.items():
        lines = {method.name: _line(method, score, place) for method in group}
        lines = {name: line for name, line in lines.items() if line}
        xs = sorted({x for line in lines.values() for x in line})
        if not xs:
            continue
        rows = {f"{x:.6g}": [line.get(x) for line in lines.values()] for x in xs}
        title = f"{heading(f'mean.{score}')} over {axis}"
        table = number_table(title, [axis, *lines], f"evaluation.{score}", rows)
        styles = [styles_of(methods)[name] for name in lines]
        yield Panel(title=title, draw=partial(line_chart, table, styles), table=table)


def _line(method: Method, score: str, place: ReadPlace) -> dict[float, Spread]:
    """Return the spread of a score over the runs of a method, by their mean place."""
    found = [_evaluated(run, score) for run in method.runs]
    line = {}
    for number in sorted({number for scores in found for number in scores}):
        runs = [run for run, scores in zip(method.runs, found, strict=True) if number in scores]
        value = spread(scores.get(number) for scores in found)
        if value:
            line[float(f"{fmean(place(run, number) for run in runs):.6g}")] = value
    return line


def _evaluated(run: Run, score: str) -> dict[int, float]:
    """Return a run's mean score by round; the last is the result's."""
    path = f"evaluation.{score}"
    known = {number: line[path] for number, line in run.rounds.items() if path in line}
    last = run.numbers.get(_ELSEWHERE.get(score, f"mean.{score}"))
    return known | ({max(run.rounds): last} if last is not None and run.rounds else {})


def _seconds(run: Run, number: int) -> float:
    return run.rounds[number]["simulated.end"]


def _bytes(run: Run, number: int) -> float:
    passed = [line for other, line in run.rounds.items() if other <= number]
    return math.fsum(line["upload_bytes"] + line["download_bytes"] for line in passed)
