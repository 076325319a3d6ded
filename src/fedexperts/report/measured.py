"""The section "Measured by the algorithm": show whatever an algorithm measured, by name.

An entry is a number, a list by MoE layer, or a list of lists, of a client in a round (``clients.jsonl``) or
at the end (``result.json``). A name that ends in ``_experts`` holds indices of experts by layer.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

from fedexperts.report.clients import by_layer, names_experts, short_client_names
from fedexperts.report.drawing import line_chart
from fedexperts.report.figures import Figure, Panel, cells, curve, heat, range_of, styles_of
from fedexperts.report.grouping import Method, tasks_of
from fedexperts.report.quantities import heading, mean_of, spread, text, title_of
from fedexperts.report.reading import Run
from fedexperts.report.roles import PROFILE_ERRORS
from fedexperts.report.tables import Table, make_table, number_table

_FEWEST_LAYERS = 2
_MEANS = "Mean over a round's clients, over layers where there are several, and over seeds."


def _names(methods: Sequence[Method]) -> list[str]:
    """All that algorithms measured and no section of its own shows, in order of appearance."""
    runs = [run for method in methods for run in method.runs]
    logged = [
        name for run in runs if run.ledger for name in run.ledger.measured if name not in PROFILE_ERRORS
    ]
    return list(
        dict.fromkeys([*logged, *(name for run in runs for own in _ends(run).values() for name in own)])
    )


def _ends(run: Run) -> dict[str, Mapping[str, Any]]:
    return {client: own.get("algorithm") or {} for client, own in run.result["clients"].items()}


def _logged(run: Run, name: str) -> dict[int, Any]:
    return run.ledger.measured.get(name, {}) if run.ledger else {}


def measured_table(methods: Sequence[Method]) -> list[Table]:
    """The numbers that results give for each client: mean and spread over clients and seeds."""
    columns = {}
    for name in _names(methods):
        found = {
            method.label: spread(
                own[name] for run in method.runs for own in _ends(run).values() if name in own
            )
            for method in methods
        }
        if any(found.values()):
            columns[title_of(f"algorithm.{name}")] = [text(name, value) for value in found.values()]
    labels = [method.label for method in methods]
    caption = "At the end of the run: mean ± standard deviation over clients and seeds together"
    rows = zip(labels, *columns.values(), strict=True)
    return [make_table(caption, ["method", *columns], rows)] if columns else []


def measured_figures(methods: Sequence[Method]) -> list[Figure]:
    """Curves over rounds in one figure; one for each entry by layer, and for each that names experts."""
    legend, figures, single = list(styles_of(methods).items()), [], []
    for name in _names(methods):
        title = heading(f"algorithm.{name}")
        if names_experts(name):
            panels = [one for method in methods for one in _choices(method, name)]
            note = "Number of clients and seeds that name an expert, by MoE layer."
            figures += [Figure(title=title, note=note, panels=panels, is_in_text=True)] if panels else []
            continue
        panels = list(_panels(methods, name))
        if len(panels) == 1 and panels[0].title == title:
            single += panels
        elif panels:
            figures.append(Figure(title=title, note=_MEANS, panels=panels, legend=legend, is_in_text=False))
    if single:
        title = "Over rounds" if figures else ""
        figures = [
            Figure(title=title, note=_MEANS, panels=single, legend=legend, is_in_text=False),
            *figures,
        ]
    return figures


def _panels(methods: Sequence[Method], name: str) -> Iterator[Panel]:
    for group in tasks_of(methods).values():
        yield from curve(
            methods,
            group,
            f"algorithm.{name}",
            lambda run: {n: _flat(v) for n, v in _logged(run, name).items()},
        )
        yield from _last_round(methods, group, name)
    reads: dict[str, Callable[[Method, str], Table | None]] = {
        "by round": _by_round,
        "at the end": _by_client,
    }
    for when, read in reads.items():
        tables = [(method, table) for method in methods if (table := read(method, name))]
        limits = range_of([table for _, table in tables])
        for method, table in tables:
            title = f"{method.label}, {when}"
            yield heat(title, table, limits)


def _last_round(methods: Sequence[Method], group: Sequence[Method], name: str) -> list[Panel]:
    """A line a method over the layers of a list in the last round, mean over seeds."""
    path = f"algorithm.{name}"
    lists = {method.name: [_last_list(run, name) for run in method.runs] for method in group}
    lists = {label: runs for label, runs in lists.items() if any(runs)}
    num_layers = max((len(layers) for runs in lists.values() for layers in runs), default=0)
    if num_layers < _FEWEST_LAYERS:
        return []
    rows = {
        str(layer): [
            spread(own[layer] if layer < len(own) else None for own in runs) for runs in lists.values()
        ]
        for layer in range(num_layers)
    }
    title = f"{heading(path)}, by layer after the last round"
    table = number_table(title, ["MoE layer", *lists], path, rows)
    draw = partial(line_chart, table, [styles_of(methods)[label] for label in lists])
    return [Panel(title=title, draw=draw, table=table)]


def _last_list(run: Run, name: str) -> list[Any]:
    """The numbers by layer of a run's last round; none where they are no plain list."""
    rounds = _logged(run, name)
    value = rounds[max(rounds)] if rounds else None
    is_plain = isinstance(value, list) and not any(isinstance(one, list) for one in value)
    return value if isinstance(value, list) and is_plain else []


def _flat(value: Any) -> Any:
    """The mean over layers."""
    return mean_of(map(_flat, value)) if isinstance(value, list) else value


def _by_round(method: Method, name: str) -> Table | None:
    """Layers by rounds; of lists of lists the last round's."""
    logs = [_logged(run, name) for run in method.runs]
    means = {
        number: mean_of(log.get(number) for log in logs)
        for number in sorted({n for log in logs for n in log})
    }
    return _layer_table(method, name, "round", means, lambda values: values[-1])


def _by_client(method: Method, name: str) -> Table | None:
    """Layers by clients; of lists of lists the mean over clients."""
    every = [_ends(run) for run in method.runs]
    names = short_client_names(list(dict.fromkeys(client for ends in every for client in ends)))
    means = {short: mean_of(ends.get(id, {}).get(name) for ends in every) for id, short in names.items()}
    return _layer_table(method, name, "client", means, mean_of)


def _layer_table(
    method: Method, name: str, column: str, entries: Mapping[Any, Any], join: Callable[..., Any]
) -> Table | None:
    """Layers by the keys of ``entries``; of lists of lists by the places in what ``join`` makes of them."""
    lists = {str(key): value for key, value in entries.items() if isinstance(value, list) and value}
    layers: Sequence[Sequence[Any]] = [*zip_longest(*lists.values())]
    if any(isinstance(one, list) for layer in layers for one in layer):
        layers = [own if isinstance(own, list) else [own] for own in join([*lists.values()])]
        column, lists = "place", {str(place): [] for place in range(max(map(len, layers)))}
    if not lists:
        return None
    rows = {str(layer): cells([*own, *[None] * (len(lists) - len(own))]) for layer, own in enumerate(layers)}
    caption, path = f"{method.label}: {title_of(f'algorithm.{name}')}", f"algorithm.{name}"
    return number_table(caption, [f"MoE layer / {column}", *lists], path, rows)


def _choices(method: Method, name: str) -> list[Panel]:
    """Count the clients of all runs that name each expert; the table says who names which."""
    found = [(id, run.seed, by_layer(own.get(name))) for run in method.runs for id, own in _ends(run).items()]
    counts = Counter((layer, expert) for *_, own in found for layer, every in own.items() for expert in every)
    if not counts:
        return []
    layers, experts = (range(max(places) + 1) for places in zip(*counts, strict=True))
    numbers = {str(layer): cells([counts[layer, expert] for expert in experts]) for layer in layers}
    drawn = number_table(method.label, ["MoE layer / expert", *map(str, experts)], "num_", numbers)
    panel = heat(method.label, drawn, (0.0, range_of([drawn])[1]), has_text=False)
    rows = [
        [id, str(seed), *(", ".join(map(str, own.get(layer, []))) or "–" for layer in layers)]
        for id, seed, own in found
    ]
    titles = ["client", "seed", *(f"layer {layer}" for layer in layers)]
    caption = f"{method.label}: {title_of(f'algorithm.{name}')}"
    return [Panel(title=method.label, draw=panel.draw, table=make_table(caption, titles, rows, num_text=2))]
