"""The section "Time line": what each client and the server did in one round, and what overlapped what."""

import math
from collections.abc import Mapping, Sequence
from functools import partial

from fedexperts.report.clients import short_client_names
from fedexperts.report.figures import Figure, Panel
from fedexperts.report.grouping import Method
from fedexperts.report.quantities import heading, spread, title_of
from fedexperts.report.reading import Run, Turn
from fedexperts.report.schematics import Span, time_line
from fedexperts.report.tables import number_table

OVERLAPPED = "_overlapped"
_WAIT = "wait"
_FIRST = (_WAIT, "download", "load", "profile", "merge", "train")
_LAST = ("save", "transport", "upload")
_LINK = ("download", "upload")
_FILES = "load, save, transport"
_COLOURED_AS = {"load": _FILES, "save": _FILES, "transport": _FILES}
"""Phases that share a colour: there are more phases than colours that can be told apart."""
_SERVER, _AGGREGATE = "server", "aggregate"
_MOST_CLIENTS = 20
_NOTES = {
    "simulated": "Simulated seconds. The dashed line is the last upload: from then on the server adds up, "
    "and a client's overlapped profile runs beside it and beside the wait for slower clients.",
    "measured": "Measured seconds, as if each client had a machine to itself: a simulation takes turns one "
    "after the other. The dashed line is the last upload.",
}
Stretch = tuple[str, float, float]
"""Phase, start and seconds."""


def time_lines(methods: Sequence[Method]) -> list[Figure]:
    """Return the last round of the first seed, for each method with a clock or an overlapped phase."""
    figures: list[Figure] = []
    for method in methods:
        figures += _figure(method, is_folded=bool(figures))
    return figures


def _figure(method: Method, *, is_folded: bool) -> list[Figure]:
    run = method.runs[0]
    turns = run.ledger.turns if run.ledger else ()
    last = [turn for turn in turns if turn.round_number == max(one.round_number for one in turns)]
    kinds = ["simulated"] * all(turn.simulated for turn in last)
    kinds += ["measured"] * any(phase.endswith(OVERLAPPED) for turn in last for phase in turn.seconds)
    if not last or not kinds:
        return []
    lines = {kind: _lines(run, last, kind) for kind in kinds}
    phases = _phases([name for rows in lines.values() for own in rows.values() for name, *_ in own])
    groups = dict.fromkeys(_COLOURED_AS.get(phase, phase) for phase in phases if phase != _WAIT)
    styles = {group: place for place, group in enumerate(groups)}
    return [
        Figure(
            title=f"Round {last[0].round_number}: {method.label}",
            note=" ".join(_NOTES[kind] for kind in kinds) + _late(last) + _left_out(last),
            panels=[_panel(heading(kind), rows, phases, styles) for kind, rows in lines.items()],
            legend=[(title_of(group), style) for group, style in styles.items()],
            marks="■",
            is_folded=is_folded,
        )
    ]


def _late(turns: Sequence[Turn]) -> str:
    has_own_starts = len({turn.started for turn in turns}) > 1
    return " The server did not wait: each row begins when its turn began." if has_own_starts else ""


def _left_out(turns: Sequence[Turn]) -> str:
    return f" The {_MOST_CLIENTS} longest turns of {len(turns)}." if len(turns) > _MOST_CLIENTS else ""


def _phases(names: Sequence[str]) -> list[str]:
    """Return the phases in the order in which a turn has them."""
    others = sorted(
        name for name in set(names) if name not in {*_FIRST, *_LAST, _AGGREGATE} and OVERLAPPED not in name
    )
    after = sorted(name for name in set(names) if name.endswith(OVERLAPPED))
    return [name for name in (*_FIRST, *others, *_LAST, *after, _AGGREGATE) if name in names]


def _lines(run: Run, turns: Sequence[Turn], kind: str) -> dict[str, list[Stretch]]:
    """Return the stretches of each client's row and of the server's."""
    seconds = {turn.client: _own(turn, kind) for turn in turns}
    first = min(turn.started for turn in turns)
    starts = {turn.client: turn.started - first if kind == "simulated" else 0.0 for turn in turns}
    longest = sorted(seconds, key=lambda client: -_uploaded(seconds[client]))[:_MOST_CLIENTS]
    names = short_client_names([turn.client for turn in turns])
    rows: dict[str, list[Stretch]] = {}
    for client in (turn.client for turn in turns if turn.client in longest):
        rows |= _rows(names[client], seconds[client], starts[client])
    numbers = run.rounds.get(turns[0].round_number, {})
    prefix = "simulated.seconds." if kind == "simulated" else "seconds."
    start = max(starts[client] + _uploaded(own) for client, own in seconds.items())
    rows[_SERVER] = [(_AGGREGATE, start, numbers.get(f"{prefix}{_AGGREGATE}", 0.0))]
    return rows


def _own(turn: Turn, kind: str) -> Mapping[str, float]:
    return turn.simulated if kind == "simulated" else turn.seconds


def _uploaded(seconds: Mapping[str, float]) -> float:
    """Return when a client's upload is done: a clock's total, or the sum of what is not overlapped."""
    known = seconds.get("total")
    return known if known is not None else math.fsum(s for _, s in _until_upload(seconds))


def _until_upload(seconds: Mapping[str, float]) -> list[tuple[str, float]]:
    ordered = _phases([name for name in seconds if name != "total" and not name.endswith(OVERLAPPED)])
    return [(name, seconds[name]) for name in ordered]


def _rows(name: str, seconds: Mapping[str, float], start: float) -> dict[str, list[Stretch]]:
    """Return one row of a client, or two where its link and its work run side by side."""
    done, phases = start + _uploaded(seconds), _until_upload(seconds)
    later = [(phase, done, s) for phase, s in seconds.items() if phase.endswith(OVERLAPPED)]
    # Sums of floats differ in their last bits, whole phases do not.
    if math.fsum(s for _, s in phases) <= _uploaded(seconds) * (1 + 1e-9):
        return {name: _in_turn(phases, start) + later}
    link = [("download", start, seconds["download"]), ("upload", done - seconds["upload"], seconds["upload"])]
    work = _in_turn([(phase, s) for phase, s in phases if phase not in _LINK], start)
    return {f"{name}, link": link, f"{name}, work": work + later}


def _in_turn(phases: Sequence[tuple[str, float]], start: float) -> list[Stretch]:
    stretches, now = [], start
    for phase, seconds in phases:
        stretches.append((phase, now, seconds))
        now += seconds
    return stretches


def _panel(
    title: str, rows: Mapping[str, Sequence[Stretch]], phases: Sequence[str], styles: Mapping[str, int]
) -> Panel:
    """Return the rows as a picture, in which a wait is a gap, and as a table of seconds by phase."""
    spans = {
        name: [
            Span(start=start, seconds=s, style=styles[_COLOURED_AS.get(phase, phase)])
            for phase, start, s in own
            if phase != _WAIT
        ]
        for name, own in rows.items()
    }
    known = {name: {phase: s for phase, _, s in own} for name, own in rows.items()}
    written = {name: [spread([own.get(phase)]) for phase in phases] for name, own in known.items()}
    table = number_table(f"{title} seconds by phase", ["who", *map(title_of, phases)], "seconds", written)
    return Panel(title=title, draw=partial(time_line, spans, [rows[_SERVER][0][1]]), table=table)
