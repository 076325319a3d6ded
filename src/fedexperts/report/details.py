"""The tables beside the headline one: clients, data, bytes, time, routing, settings, environment, runs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedexperts.report import quantities
from fedexperts.report.clients import (
    client_ids,
    client_spread,
    has_matrix,
    label_tables,
    main_metric,
    matrix_metric,
    mean_matrix,
    own_and_others,
    total,
)
from fedexperts.report.figures import phases_of
from fedexperts.report.grouping import Method, flatten, settings_of, value_text, varied_keys
from fedexperts.report.quantities import Spread, count_text, finite, lookup, spread
from fedexperts.report.reading import Suite
from fedexperts.report.summary import failures_of, unequal_bytes
from fedexperts.report.tables import Table, make_table

_METRIC_WORDS = {
    "rougeL": "ROUGE-L",
    "loss": "loss",
    "perplexity": "perplexity",
    "exact_match": "exact match",
    "validation_loss": "validation loss",
    "validation_rougeL": "validation ROUGE-L",
}
_MAX_FAILURES = 25
_MAX_LABELS = 20
_COUNTS = (
    ("num_train", "train"),
    ("num_validation", "validation"),
    ("num_test", "test"),
    ("num_truncated", "truncated"),
    ("num_test_truncated", "test, truncated"),
    ("num_without_label", "without label"),
    ("num_test_without_label", "test, without label"),
    ("num_prompts_cut", "test prompts cut"),
)


def all_metrics(methods: Sequence[Method]) -> Table | None:
    """Every metric of ``mean``, before and after local steps."""
    columns = [
        (f"{metric}_{when}", f"{words} {when}")
        for metric, words in _METRIC_WORDS.items()
        for when in ("base", "before", "after")
        if any(method.spread(f"mean.{metric}_{when}") for method in methods)
    ]
    if not columns:
        return None
    rows = [
        [m.label, *(quantities.metric_spread(key, m.spread(f"mean.{key}")) for key, _ in columns)]
        for m in methods
    ]
    titles = ["method", *(title for _, title in columns)]
    return make_table(
        "All metrics: untouched model, before and after local steps", titles, rows, is_folded=True
    )


def subjects(methods: Sequence[Method]) -> Table | None:
    """Exam accuracy by subject, for each model that was examined so."""
    columns: dict[tuple[str, str], dict[str, Spread | None]] = {}
    for method in methods:
        for kind in ("base", "global", "personalised"):
            trees = [(result.get("exam") or {}).get(f"{kind}_by_subject") for result in method.results]
            names = dict.fromkeys(name for tree in trees if isinstance(tree, dict) for name in tree)
            if names:
                columns[method.label, kind] = {
                    name: spread(tree.get(name) for tree in trees if isinstance(tree, dict)) for name in names
                }
    names = dict.fromkeys(name for values in columns.values() for name in values)
    if not names:
        return None
    rows = [[n, *(quantities.points_spread(values.get(n)) for values in columns.values())] for n in names]
    titles = ["subject", *(f"{label}, {kind}" for label, kind in columns)]
    return make_table("Exam accuracy by subject", titles, rows, is_folded=True)


def clients(methods: Sequence[Method]) -> Table | None:
    """Each client's score before and after, by method."""
    metric = main_metric(methods)
    ids = client_ids(methods)
    if not ids:
        return None
    titles = ["client", *(f"{method.label} {when}" for method in methods for when in ("before", "after"))]
    rows = [
        [
            client,
            *(
                quantities.metric_spread(metric, client_spread(method, client, f"{metric}_{when}"))
                for method in methods
                for when in ("before", "after")
            ),
        ]
        for client in ids
    ]
    caption = f"{_sentence(_METRIC_WORDS[metric])} of each client before and after its local steps"
    return make_table(caption, titles, rows, is_folded=True)


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:]


def matrix_means(methods: Sequence[Method]) -> Table | None:
    """For each method, how its models do on their own test examples and on those of others."""
    rows = []
    has = {metric: has_matrix(methods, metric) for metric in ("rougeL", "loss")}
    metrics = [metric for metric, is_there in has.items() if is_there]
    for method in methods:
        cells = []
        for metric in metrics:
            found = mean_matrix(method, metric)
            own, others = own_and_others(found[1]) if found else (None, None)
            cells += [quantities.metric_spread(metric, _mean_only(value)) for value in (own, others)]
        rows.append([method.label, *cells])
    if not metrics:
        return None
    titles = [f"{_METRIC_WORDS[metric]}, {whose}" for metric in metrics for whose in ("own", "others'")]
    return make_table("A client's model on its own test examples and on others'", ["method", *titles], rows)


def _mean_only(value: Spread | None) -> Spread | None:
    return None if value is None else Spread(mean=value.mean, std=None, num_values=value.num_values)


def matrix_cells(methods: Sequence[Method]) -> list[Table]:
    """The matrices as text, where they are small enough to be read so."""
    metric = matrix_metric(methods)
    tables = []
    for method in methods:
        found = mean_matrix(method, metric)
        if found is None or len(found[0]) > 16:
            continue
        ids, values, _ = found
        rows = [
            [client, *(quantities.metric_spread(metric, spread([value])) for value in row)]
            for client, row in zip(ids, values, strict=True)
        ]
        caption = f"{method.label}: {_METRIC_WORDS[metric]} of the row's model on the column's test examples"
        tables.append(make_table(caption, ["model of", *ids], rows, is_drawn=True))
    return tables


def balance(methods: Sequence[Method]) -> Table | None:
    """Spread of tokens over experts, and entropy of routing, of base, global and personalised models."""
    fields = (("expert_balance_std", "std of tokens per expert"), ("routing_entropy", "routing entropy"))
    columns = [
        (f"{field}.{kind}", f"{words}, {kind}")
        for field, words in fields
        for kind in ("base", "global", "personalised")
        if any(method.spread(f"{field}.{kind}") for method in methods)
    ]
    if not columns:
        return None
    rows = [[m.label, *(quantities.plain_spread(m.spread(path)) for path, _ in columns)] for m in methods]
    caption = "Balance of experts (standard deviation of tokens per expert; entropy)"
    return make_table(caption, ["method", *(title for _, title in columns)], rows)


def label_counts(methods: Sequence[Method]) -> list[Table]:
    """Labels by client as text, for the partitions that the figure shows too."""
    tables = []
    found = label_tables(methods)
    for title, counts in found[:3]:
        labels = sorted({label for own in counts.values() for label in own})
        if len(labels) > _MAX_LABELS:
            continue
        rows = [
            [client, *(count_text(own.get(label, 0)) for label in labels)] for client, own in counts.items()
        ]
        where = f" ({title})" if len(found) > 1 else ""
        tables.append(
            make_table(f"Examples by client and label{where}", ["client", *labels], rows, is_drawn=True)
        )
    return tables


def example_counts(methods: Sequence[Method]) -> Table | None:
    """Examples of each split, by client, of the first run."""
    run = methods[0].runs[0]
    found = [
        (key, title) for key, title in _COUNTS if any(key in own for own in run.result["clients"].values())
    ]
    if not found:
        return None
    rows = [
        [client, *(count_text(lookup(own, key) or 0) for key, _ in found)]
        for client, own in run.result["clients"].items()
    ]
    rows.append(["all", *(count_text(total([run.result], key)[0]) for key, _ in found)])
    caption = f"Examples of each client by split ({methods[0].label}, seed {run.seed})"
    return make_table(caption, ["client", *(title for _, title in found)], rows, is_folded=True)


def bytes_table(methods: Sequence[Method]) -> Table | None:
    """Counted and predicted bytes of a whole run, both directions, and whether they are equal."""
    rows = []
    for method in methods:
        for direction in ("upload", "download"):
            counted = method.spread(f"bytes.{direction}_counted")
            if counted is None:
                continue
            per_round = method.spread(f"bytes.{direction}_per_client_round")
            predicted = method.spread(f"bytes.{direction}_predicted")
            rows.append(
                [
                    method.label,
                    direction,
                    quantities.bytes_spread(per_round),
                    _exact(counted),
                    _exact(predicted),
                    _equality(method, direction),
                ]
            )
    titles = [
        "method",
        "direction",
        "per client and round",
        "counted, whole run",
        "predicted, whole run",
        "equal",
    ]
    return make_table("Bytes counted and predicted", titles, rows, num_text=2) if rows else None


def _exact(value: Spread | None) -> str:
    if value is None:
        return "–"
    return f"{count_text(value.mean)} B" + (" (mean)" if value.std else "")


def _equality(method: Method, direction: str) -> str:
    differences = [unequal_bytes(result, direction) for result in method.results]
    known = [difference for difference in differences if difference is not None]
    if not known:
        return "not predicted"
    if any(known):
        return f"✗ off by up to {max(map(abs, known)):,} B"
    return f"✓ in {len(known)} of {len(differences)} runs" if len(differences) > 1 else "✓"


def ledger_sentence(methods: Sequence[Method]) -> str | None:
    """How the bytes ledger of every client and round compares with the prediction."""
    ledgers = [run.ledger for method in methods for run in method.runs if run.ledger and run.ledger.num_lines]
    if not ledgers:
        return None
    num_lines = sum(ledger.num_lines for ledger in ledgers)
    unequal = sum(ledger.num_unequal_uploads + ledger.num_unequal_downloads for ledger in ledgers)
    if unequal:
        return (
            f"✗ {unequal:,} of {2 * num_lines:,} messages in clients.jsonl differ from the predicted bytes."
        )
    return f"✓ All {2 * num_lines:,} messages in clients.jsonl have the bytes that were predicted."


def parameters(methods: Sequence[Method]) -> Table | None:
    """Parameters by group, a column a method."""
    flats = [flatten(method.results[0].get("parameters") or {}) for method in methods]
    groups = dict.fromkeys(
        key
        for flat in flats
        for key, value in flat.items()
        if isinstance(value, int) and not isinstance(value, bool)
    )
    if not groups:
        return None
    rows = [
        [_words(key), *(count_text(flat[key]) if key in flat else "–" for flat in flats)] for key in groups
    ]
    return make_table("Parameters", ["group", *(method.label for method in methods)], rows, is_folded=True)


def _words(key: str) -> str:
    return key.replace(".", ": ").replace("_", " ")


def seconds(methods: Sequence[Method]) -> Table | None:
    """Seconds by phase."""
    phases = phases_of(methods)
    if not phases:
        return None
    keys = (*phases, "total")
    rows = [
        [m.label, *(quantities.seconds_spread(m.spread(f"seconds.{key}")) for key in keys)] for m in methods
    ]
    return make_table("Time by phase", ["method", *keys], rows, is_folded=True)


def settings(methods: Sequence[Method]) -> list[Table]:
    """First the settings in which methods differ, then those they share."""
    flats = [settings_of(method.runs[0]) for method in methods]
    varied = varied_keys(flats)
    tables = []
    if varied:
        rows = [[key, *(_setting(flat, key) for flat in flats)] for key in varied]
        rows.append(["seed", *(", ".join(str(run.seed) for run in method.runs) for method in methods)])
        titles = ["setting", *(method.label for method in methods)]
        tables.append(make_table("Settings that differ", titles, rows, num_text=len(titles)))
    shared = [[key, _setting(flats[0], key)] for key in flats[0] if key not in varied]
    if not varied:
        shared.append(["seed", ", ".join(str(run.seed) for run in methods[0].runs)])
    caption = "Settings that all runs share" if varied else "Settings"
    tables.append(make_table(caption, ["setting", "value"], shared, num_text=2, is_folded=True))
    return tables


def _setting(flat: Mapping[str, Any], key: str) -> str:
    return value_text(flat[key]) if key in flat else "–"


def _measured(flat: Mapping[str, Any], key: str) -> str:
    number = finite(flat.get(key))
    return quantities.bytes_text(number) if key.endswith("_bytes") and number else _setting(flat, key)


def environment(suite: Suite) -> Table | None:
    """Versions, commit, hardware and threads; where runs differ, all their values."""
    flats = [flatten(run.environment) for run in suite.runs]
    keys = dict.fromkeys(key for flat in flats for key in flat)
    rows = []
    for key in keys:
        values = list(dict.fromkeys(_measured(flat, key) for flat in flats))
        more = f" and {len(values) - 4} more" if len(values) > 4 else ""
        rows.append([key.replace("_", " "), " | ".join(values[:4]) + more])
    return make_table("Environment", ["what", "value"], rows, num_text=2, is_folded=True) if rows else None


def search(suite: Suite) -> Table | None:
    """Every point that was tried before the runs, by group, with its score and what was chosen."""
    metric = str(suite.search.get("metric", ""))
    rows = [
        [
            str(group),
            " ".join(f"{key}={value_text(value)}" for key, value in point.get("values", {}).items()) or "–",
            quantities.metric_spread(metric, spread(point.get("scores") or ())),
            _choice(found) if point.get("values") == found.get("chosen") else "",
        ]
        for group, found in (suite.search.get("groups") or {}).items()
        for point in found.get("tried") or ()
    ]
    if not rows:
        return None
    seeds = ", ".join(map(str, suite.search.get("seeds") or ()))
    caption = f"Search before the runs: {metric}, seeds {seeds}; the same points for every group"
    titles = ["group", "values", "score", ""]
    table = make_table(caption, titles, rows, num_text=2, is_folded=True)
    marked = frozenset((number, 2) for number, row in enumerate(rows) if row[-1])
    return replace(table, marked=marked)


def _choice(found: Mapping[str, Any]) -> str:
    edges = found.get("at_edge") or ()
    return f"chosen, at an end of the grid of {', '.join(edges)}" if edges else "chosen"


def failures(methods: Sequence[Method]) -> Table | None:
    """The turns of clients that were lost or refused; the first ones where there are very many."""
    found = failures_of(methods)
    if not found:
        return None
    more = f" (the first {_MAX_FAILURES} of {len(found)})" if len(found) > _MAX_FAILURES else ""
    titles = ["method", "seed", "round", "client", "reason"]
    return make_table(f"Lost or refused{more}", titles, found[:_MAX_FAILURES], num_text=5)


def runs(suite: Suite, methods: Sequence[Method]) -> Table:
    """Every run by name, those without result among them."""
    rows = []
    read: tuple[Callable[[dict[str, Any]], str], ...] = (
        lambda result: str(result.get("status", "finished")),
        lambda result: quantities.seconds_spread(spread([lookup(result, "seconds.total")])),
        lambda result: str(result.get("server_state_sha256") or "–")[:12],
    )
    for method in methods:
        rows += [
            [run.name, method.label, str(run.seed), *(one(run.result) for one in read)] for run in method.runs
        ]
    rows += [[run.name, "–", "–", run.reason, "–", "–"] for run in suite.absent]
    titles = ["run", "method", "seed", "status", "time", "server state (SHA-256)"]
    return make_table("Runs", titles, rows, num_text=6, is_folded=True)
