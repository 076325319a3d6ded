"""The contents of a report in order, before they are written as HTML or as Markdown."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedexperts.report import figures, summary
from fedexperts.report.clients import matrix_of, own_and_others, totals
from fedexperts.report.clock import clock_figures, clock_sentences, clock_table
from fedexperts.report.equal_terms import equal_tables
from fedexperts.report.extraction import method_extraction_table
from fedexperts.report.figures import Figure
from fedexperts.report.forgetting import forgetting_figures
from fedexperts.report.grouping import (
    Flat,
    Method,
    methods_of,
    paths_in,
    settings_of,
    value_text,
    varied_keys,
)
from fedexperts.report.map import map_figures
from fedexperts.report.measured import measured_figures, measured_table
from fedexperts.report.paired import on_pairs, paired_figures, paired_tables
from fedexperts.report.pairing import Compared, compare_methods
from fedexperts.report.quantities import finite, leaves, spread, text, title_of
from fedexperts.report.reading import Suite
from fedexperts.report.retention import retention_figures, retention_table
from fedexperts.report.roles import role_figures, role_table
from fedexperts.report.samples import sample_tables
from fedexperts.report.staleness import staleness_figures, staleness_table
from fedexperts.report.tables import Table, headline_table, make_table, method_table, rows_of, turned
from fedexperts.report.time_line import time_lines
from fedexperts.report.traffic import bytes_figures

_WHEN = ("base", "before", "after")
_COUNTS = (
    "num_train",
    "num_validation",
    "num_test",
    "num_truncated",
    "num_test_truncated",
    "num_without_label",
    "num_test_without_label",
    "num_test_trained_elsewhere",
    "num_prompts_cut",
)


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading with its figures, tables and sentences."""

    title: str
    sentences: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True, kw_only=True)
class Content:
    """A whole report."""

    title: str
    what_ran: str
    simulated: Sequence[str]
    glance: Sequence[str]
    warnings: Sequence[str]
    sections: Sequence[Section]


def content_of(suite: Suite, *, against: str = "", has_samples: bool = False) -> Content:
    """All that is said about the runs of ``suite``; sections that no run fills are left out.

    Args:
        suite: what was read.
        against: the method or algorithm that the others are compared with; if empty the strongest simple
            rival.
        has_samples: whether to show the answers that runs have kept, with prompts and responses of the data.

    Raises:
        UserError: no method is named ``against``, or there are samples to show and none was kept.
    """
    methods = methods_of(suite.runs)
    sections = list(_sections(suite, methods, compare_methods(methods, against)))
    sections += [Section(title="Sample answers", tables=sample_tables(methods))] if has_samples else []
    return Content(
        title=suite.title,
        what_ran=summary.what_ran(methods),
        simulated=summary.what_is_simulated(methods),
        glance=summary.at_a_glance(methods),
        warnings=summary.warnings(suite, methods),
        sections=[one for one in sections if one.sentences or one.figures or one.tables],
    )


def _sections(suite: Suite, methods: Sequence[Method], compared: Sequence[Compared]) -> Iterator[Section]:
    headline = headline_table(rows_of(methods))
    yield Section(
        title="Results",
        sentences=summary.on_results(methods),
        tables=[headline, *_all_metrics(methods), *_subjects(methods)],
    )
    yield Section(title="Equal terms", tables=equal_tables(suite, methods))
    yield Section(title="Retention", figures=retention_figures(methods), tables=retention_table(methods))
    yield Section(title="Memorisation", tables=method_extraction_table(methods))
    yield Section(title="Rounds", figures=figures.round_curves(methods))
    yield Section(
        title="Paired differences",
        sentences=on_pairs(methods, compared),
        figures=paired_figures(methods, compared),
        tables=paired_tables(compared),
    )
    yield Section(title="Map", figures=map_figures(methods, compared))
    yield Section(title="Score against bytes", figures=bytes_figures(methods))
    yield Section(title="Forgetting by subject", figures=forgetting_figures(methods))
    yield Section(title="Clients", figures=figures.client_bars(methods))
    yield Section(title="Personalisation", figures=figures.matrices(methods), tables=_matrix_means(methods))
    yield Section(
        title="Measured by the algorithm", figures=measured_figures(methods), tables=measured_table(methods)
    )
    yield Section(title="Compact models", figures=role_figures(methods), tables=role_table(methods))
    yield Section(title="Experts", figures=figures.routing(methods), tables=_balance(methods))
    yield Section(title="Data", figures=figures.partitions(methods), tables=_example_counts(methods))
    yield Section(
        title="Bytes",
        sentences=_ledger(methods),
        figures=figures.bytes_bars(methods),
        tables=[*method_table("Bytes", methods, paths_in(methods, "bytes")), *_parameters(methods)],
    )
    yield Section(title="Time", figures=figures.time_bars(methods))
    yield Section(title="Time line", figures=time_lines(methods))
    yield Section(
        title="Simulated time",
        sentences=clock_sentences(methods),
        figures=clock_figures(methods),
        tables=clock_table(methods),
    )
    yield Section(title="Age of uploads", figures=staleness_figures(methods), tables=staleness_table(methods))
    yield Section(
        title="Settings and environment",
        tables=[*_settings(methods), *_search(suite), *_environment(suite), _runs(suite, methods)],
    )


def _all_metrics(methods: Sequence[Method]) -> list[Table]:
    paths = [path.rpartition("_") for path in paths_in(methods, "mean")]
    ordered = sorted((metric, _WHEN.index(when)) for metric, _, when in paths if when in _WHEN)
    caption = "All metrics: untouched model, before and after local steps"
    return method_table(caption, methods, [f"{m}_{_WHEN[i]}" for m, i in ordered], is_folded=True)


def _subjects(methods: Sequence[Method]) -> list[Table]:
    """Exam accuracy by subject, a column for each model that was examined so."""
    found = [path.partition("_by_subject.") for path in paths_in(methods, "exam") if "_by_subject." in path]
    if not found:
        return []
    columns = [(method, kind) for method in methods for kind in dict.fromkeys(kind for kind, _, _ in found)]
    rows = [
        [subject, *(text("exam", m.spread(f"{kind}_by_subject.{subject}")) for m, kind in columns)]
        for subject in dict.fromkeys(subject for _, _, subject in found)
    ]
    titles = ["subject", *(f"{m.label}, {kind.removeprefix('exam.')}" for m, kind in columns)]
    return [make_table("Exam accuracy by subject", titles, rows, is_folded=True)]


def _matrix_means(methods: Sequence[Method]) -> list[Table]:
    """For each method, the scores of its models on their own test examples and on those of others."""
    metrics = [one for one in ("rougeL", "loss") if any(matrix_of(method, one) for method in methods)]
    rows = []
    for method in methods:
        cells = []
        for metric in metrics:
            found = matrix_of(method, metric)
            cells += [text(metric, mean, has_std=False) for mean in own_and_others(found[1] if found else [])]
        rows.append([method.label, *cells])
    titles = [f"{title_of(metric)}, {whose}" for metric in metrics for whose in ("own", "others'")]
    caption = "A client's model on its own test examples and on others'"
    return [make_table(caption, ["method", *titles], rows)] if metrics else []


def _balance(methods: Sequence[Method]) -> list[Table]:
    paths = [*paths_in(methods, "expert_balance_std"), *paths_in(methods, "routing_entropy")]
    caption = "Balance of experts (standard deviation of tokens per expert; entropy, 1 is even)"
    return method_table(caption, methods, paths)


def _example_counts(methods: Sequence[Method]) -> list[Table]:
    """Examples of each split, by client, of the first run."""
    method, run = methods[0], methods[0].runs[0]
    clients = run.result["clients"]
    names = [name for name in _COUNTS if any(name in own for own in clients.values())]
    rows = [[id, *(text(name, finite(own.get(name))) for name in names)] for id, own in clients.items()]
    rows.append(["all", *(text(name, totals(method, name)[0]) for name in names)])
    caption = f"Examples of each client by split ({method.label}, seed {run.seed})"
    return [make_table(caption, ["client", *map(title_of, names)], rows, is_folded=True)] if names else []


def _ledger(methods: Sequence[Method]) -> list[str]:
    """The bytes of every client and round against their prediction, in a sentence."""
    ledgers = [run.ledger for method in methods for run in method.runs if run.ledger]
    total, unequal = sum(one.num_messages for one in ledgers), sum(one.num_unequal for one in ledgers)
    if unequal:
        return [f"✗ {unequal:,} of {total:,} messages in clients.jsonl differ from the predicted bytes."]
    return [f"✓ All {total:,} messages in clients.jsonl have the bytes that were predicted."] if total else []


def _parameters(methods: Sequence[Method]) -> list[Table]:
    found = method_table("Parameters", methods, paths_in(methods, "parameters"), is_folded=True)
    return [turned(table) for table in found]


def _settings(methods: Sequence[Method]) -> list[Table]:
    """First the settings in which methods differ, then those they share."""
    flats = [settings_of(method.runs[0]) for method in methods]
    varied, tables = varied_keys(flats), []
    seeds = ["seed", *(", ".join(str(run.seed) for run in method.runs) for method in methods)]
    if varied:
        rows = [[key, *(_setting(flat, key) for flat in flats)] for key in varied]
        titles = ["setting", *(method.label for method in methods)]
        tables.append(make_table("Settings that differ", titles, [*rows, seeds], num_text=len(titles)))
    shared = [[key, _setting(flats[0], key)] for key in flats[0] if key not in varied]
    shared += [] if varied else [seeds]
    caption = "Settings that all runs share" if varied else "Settings"
    return [*tables, make_table(caption, ["setting", "value"], shared, num_text=2, is_folded=True)]


def _setting(flat: Flat, key: str) -> str:
    return value_text(flat[key]) if key in flat else "–"


def _environment(suite: Suite) -> list[Table]:
    """Versions, commit, hardware and threads; where runs differ, all their values."""
    flats = [dict(leaves(run.environment)) for run in suite.runs]
    rows = []
    for key in dict.fromkeys(key for flat in flats for key in flat):
        number = finite(flats[0].get(key)) if key.endswith("_bytes") else None
        values = (
            [text("bytes", number)] if number else list(dict.fromkeys(_setting(one, key) for one in flats))
        )
        more = f" and {len(values) - 4} more" if len(values) > 4 else ""
        rows.append([key.replace("_", " "), " | ".join(values[:4]) + more])
    table = make_table("Environment", ["what", "value"], rows, num_text=2, is_folded=True)
    return [table] if rows else []


def _search(suite: Suite) -> list[Table]:
    """Every point that was tried before the runs, by group, with its score and what was chosen."""
    metric = str(suite.search.get("metric", ""))
    rows = [
        [
            str(group),
            " ".join(f"{key}={value_text(value)}" for key, value in point.get("values", {}).items()) or "–",
            text(metric, spread(point.get("scores") or ())),
            _choice(found) if point.get("values") == found.get("chosen") else "",
        ]
        for group, found in (suite.search.get("groups") or {}).items()
        for point in found.get("tried") or ()
    ]
    seeds = ", ".join(map(str, suite.search.get("seeds") or ()))
    caption = f"Search before the runs: {metric}, seeds {seeds}; the same points for every group"
    marked = frozenset((number, 2) for number, row in enumerate(rows) if row[-1])
    titles = ["group", "values", "score", ""]
    options: dict[str, Any] = {"num_text": 2, "marked": marked, "is_folded": True}
    return [make_table(caption, titles, rows, **options)] if rows else []


def _choice(found: Mapping[str, Any]) -> str:
    edges = found.get("at_edge") or ()
    return f"chosen, at an end of the grid of {', '.join(edges)}" if edges else "chosen"


def _runs(suite: Suite, methods: Sequence[Method]) -> Table:
    """Every run by name, those without result among them."""
    rows = [
        [
            run.name,
            method.label,
            str(run.seed),
            str(run.result.get("status", "finished")),
            text("seconds", run.numbers.get("seconds.total")),
            str(run.result.get("server_state_sha256") or "–")[:12],
        ]
        for method in methods
        for run in method.runs
    ]
    rows += [[name, "–", "–", reason, "–", "–"] for name, reason in suite.absent.items()]
    titles = ["run", "method", "seed", "status", "time", "server state (SHA-256)"]
    return make_table("Runs", titles, rows, num_text=6, is_folded=True)
