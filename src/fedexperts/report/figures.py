"""The curves and bars of a report, from methods and their runs; heat maps are in ``figure_maps``."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fedexperts.report import charts, quantities
from fedexperts.report.clients import client_ids, client_spread, main_metric, short_client_names
from fedexperts.report.grouping import Method, tasks_of
from fedexperts.report.markup import Markup
from fedexperts.report.quantities import Spread, lookup, spread
from fedexperts.report.reading import Run

_CURVES = (
    ("train_loss", "Training loss"),
    ("evaluation.rougeL_after", "ROUGE-L after local steps"),
    ("evaluation.loss_after", "Test loss after local steps"),
    ("evaluation.exact_match_after", "Exact match after local steps"),
    ("evaluation.rougeL_before", "ROUGE-L before local steps"),
    ("evaluation.loss_before", "Test loss before local steps"),
    ("evaluation.exam_global", "Exam accuracy, global model"),
)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Panels under one title and legend; the title is empty where the section has no other figure."""

    title: str
    note: str
    panels: tuple[tuple[str, Markup], ...]
    legend: Markup = field(default_factory=lambda: Markup(""))
    is_folded: bool = False


def styles_of(methods: Sequence[Method]) -> dict[str, int]:
    """A number for the colour and mark of each method's name, the same in all figures of a report."""
    return {name: number for number, name in enumerate(dict.fromkeys(method.name for method in methods))}


def _legend(methods: Sequence[Method]) -> Markup:
    return charts.legend(list(styles_of(methods).items()))


def curves(methods: Sequence[Method]) -> list[Figure]:
    """Training loss, gates and evaluated scores by round: a figure a task, a panel a measure."""
    found = ((task, _task_curves(methods, group)) for task, group in tasks_of(methods).items())
    note = "Mean over seeds; the band is one standard deviation."
    return [
        Figure(title=task, note=note, panels=tuple(panels), legend=_legend(methods))
        for task, panels in found
        if panels
    ]


def _task_curves(methods: Sequence[Method], group: Sequence[Method]) -> list[tuple[str, Markup]]:
    measures: list[tuple[str, str, Callable[[Run], dict[int, float]]]] = [
        (path, title, _round_values(path)) for path, title in _CURVES
    ]
    measures.append(("gate", "Opening of the graft gates (0 shut, 1 open)", _gates))
    found = ((title, _curve(methods, group, path, title, read)) for path, title, read in measures)
    return [(title, drawing) for title, drawing in found if drawing is not None]


def _round_values(path: str) -> Callable[[Run], dict[int, float]]:
    def read(run: Run) -> dict[int, float]:
        values = ((int(record["round"]), lookup(record, path)) for record in run.rounds)
        known = {number: value for number, value in values if value is not None}
        return known | _ends(run, path) if known else known

    return read


def _ends(run: Run, path: str) -> dict[int, float]:
    """What the result adds to an evaluated curve: the last round; for the exam also round 0, the base."""
    section, _, metric = path.partition(".")
    if section != "evaluation":
        return {}
    is_exam = metric == "exam_global"
    last = lookup(run.result, "exam.global" if is_exam else f"mean.{metric}")
    first = lookup(run.result, "exam.base") if is_exam else None
    ends = {0: first, int(run.result.get("rounds", 0)): last}
    return {number: value for number, value in ends.items() if value is not None}


def _gates(run: Run) -> dict[int, float]:
    return run.ledger.gate_by_round if run.ledger else {}


def _curve(
    methods: Sequence[Method],
    group: Sequence[Method],
    path: str,
    title: str,
    read: Callable[[Run], dict[int, float]],
) -> Markup | None:
    styles = styles_of(methods)
    lines = []
    for method in group:
        by_run = [read(run) for run in method.runs]
        numbers = sorted({number for values in by_run for number in values})
        found = ((float(number), spread(values.get(number) for values in by_run)) for number in numbers)
        points = tuple((number, value) for number, value in found if value is not None)
        if points:
            lines.append(charts.Series(name=method.name, style=styles[method.name], points=points))
    if max((len(line.points) for line in lines), default=0) < 2:
        return None
    is_points = quantities.is_points(path)
    text = quantities.points_spread if is_points else quantities.plain_spread
    return charts.line_chart(lines, title=title, x_title="round", text=text, points=is_points)


def client_bars(methods: Sequence[Method]) -> list[Figure]:
    """A figure a task, a panel a method: each client's score before (pale) and after its local steps."""
    found = ((task, _task_bars(methods, group)) for task, group in tasks_of(methods).items())
    metric = main_metric(methods)
    kind = "ROUGE-L in points of 100" if metric == "rougeL" else "Test loss"
    note = (
        f"{kind} on the client's own test examples. Pale: before its local steps; full: after. "
        "The whisker is one standard deviation over seeds."
    )
    return [Figure(title=task, note=note, panels=tuple(panels)) for task, panels in found if panels]


def _task_bars(methods: Sequence[Method], group: Sequence[Method]) -> list[tuple[str, Markup]]:
    metric = main_metric(methods)
    is_points = quantities.is_points(metric)
    names = short_client_names(client_ids(group))
    bars = {method.name: _bars(method, names, metric) for method in group}
    top = charts.bar_top([bar for own in bars.values() for bar in own])
    if top <= 0:
        return []
    text = quantities.points_spread if is_points else quantities.plain_spread
    styles = styles_of(methods)
    return [
        (
            name,
            charts.bar_chart(
                own, title=name, style=styles[name], top=top, x_title="client", text=text, points=is_points
            ),
        )
        for name, own in bars.items()
        if own
    ]


def _bars(method: Method, names: dict[str, str], metric: str) -> list[charts.Bar]:
    own = client_ids([method])
    return [
        charts.Bar(
            name=names[client],
            before=client_spread(method, client, f"{metric}_before"),
            after=client_spread(method, client, f"{metric}_after"),
        )
        for client in own
    ]


def bytes_bars(methods: Sequence[Method]) -> Figure | None:
    """Upload and download of one client in one round, by method."""
    panels = []
    for direction in ("upload", "download"):
        found = [(m, m.spread(f"bytes.{direction}_per_client_round")) for m in methods]
        rows = [_bytes_row(method, value, methods) for method, value in found if value is not None]
        if rows:
            panels.append((f"{direction.capitalize()} per client and round", charts.rows_of_bars(rows)))
    if not panels:
        return None
    return Figure(title="", note="Counted from the serialised messages.", panels=tuple(panels))


def _bytes_row(
    method: Method, value: Spread, methods: Sequence[Method]
) -> tuple[str, list[tuple[float, str, str]], str]:
    kind = charts.style_class(styles_of(methods)[method.name])
    text = quantities.bytes_spread(value)
    return method.label, [(value.mean, kind, f"{method.label}: {text}")], text


def phases_of(methods: Sequence[Method]) -> tuple[str, ...]:
    """The phases that any run timed, in order; without the two that contain others."""
    return tuple(
        dict.fromkeys(
            phase
            for method in methods
            for result in method.results
            for phase in (result.get("seconds") or {})
            if phase not in {"total", "rounds"} and lookup(result, f"seconds.{phase}") is not None
        )
    )


def _longest_phases(methods: Sequence[Method]) -> list[str]:
    """As many phases as there are colours beside ``other``; the shortest go into it."""
    phases = phases_of(methods)
    found = {phase: [method.spread(f"seconds.{phase}") for method in methods] for phase in phases}
    length = {phase: sum(value.mean for value in values if value) for phase, values in found.items()}
    kept = sorted(phases, key=lambda phase: -length[phase])[: charts.NUM_STYLES - 1]
    return [phase for phase in phases if phase in kept]


def time_bars(methods: Sequence[Method]) -> Figure | None:
    """Seconds by phase, stacked, mean over seeds; what the phases do not account for is ``other``."""
    phases = _longest_phases(methods)
    styles = {phase: number for number, phase in enumerate((*phases, "other"))}
    rows = [row for method in methods if (row := _time_row(method, styles)) is not None]
    if not rows:
        return None
    used = {kind for _, parts, _ in rows for length, kind, _ in parts if length > 0}
    entries = [(phase, number) for phase, number in styles.items() if charts.style_class(number) in used]
    return Figure(
        title="",
        note="Mean over seeds. The note at the top says what these times are.",
        panels=(("Seconds of a whole run", charts.rows_of_bars(rows)),),
        legend=charts.swatches(entries),
    )


def _time_row(method: Method, styles: dict[str, int]) -> tuple[str, list[tuple[float, str, str]], str] | None:
    whole = method.spread("seconds.total")
    means = {phase: method.spread(f"seconds.{phase}") for phase in styles if phase != "other"}
    seconds = {phase: value.mean for phase, value in means.items() if value is not None}
    known = sum(seconds.values())
    if whole is None and not seconds:
        return None
    if whole is not None and whole.mean > 1.005 * known:
        seconds["other"] = whole.mean - known
    parts = [
        (value, charts.style_class(styles[phase]), f"{phase}: {quantities.seconds_text(value)}")
        for phase, value in seconds.items()
    ]
    end = quantities.seconds_spread(whole) if whole else quantities.seconds_text(known)
    return method.label, parts, end
