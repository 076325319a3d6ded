"""The heat maps of a report: models by test examples, labels by client, experts by client."""

from collections.abc import Sequence
from typing import Any

from fedexperts.report import heatmaps, quantities
from fedexperts.report.clients import (
    expert_shares,
    label_tables,
    matrix_metric,
    mean_matrix,
    short_client_names,
)
from fedexperts.report.figures import Figure
from fedexperts.report.grouping import Method, tasks_of
from fedexperts.report.heatmaps import HeatMap
from fedexperts.report.markup import Markup
from fedexperts.report.quantities import finite
from fedexperts.report.reading import Run

_MAX_LAYERS = 4
_MAX_PARTITIONS = 3
_MAX_CLIENTS_WITH_TEXT = 12


def matrices(methods: Sequence[Method]) -> list[Figure]:
    """A figure a task, a panel a method: the row's client's model on the column's client's test examples."""
    metric = matrix_metric(methods)
    found = (
        (task, [one for method in group if (one := _matrix_map(method, metric)) is not None])
        for task, group in tasks_of(methods).items()
    )
    return [_matrix_figure(task, maps, is_loss=metric == "loss") for task, maps in found if maps]


def _matrix_figure(task: str, maps: Sequence[HeatMap], *, is_loss: bool) -> Figure:
    low, high = heatmaps.value_range(maps)
    low = low if is_loss else 0.0
    kind = "Loss (darker is less)" if is_loss else "ROUGE-L in points of 100"
    outlined = " Outlined: its own." if maps[0].outlined else ""
    return Figure(
        title=task,
        note=f"{kind}. Row: the client whose model it is; column: the client whose test examples. Mean over "
        f"seeds.{outlined}",
        panels=tuple((one.title, _drawn(one, low, high)) for one in maps),
        legend=heatmaps.colour_scale(maps[0].text(low), maps[0].text(high), darker_is_less=is_loss),
    )


def _drawn(one: HeatMap, low: float, high: float) -> Markup:
    return heatmaps.heat_map(
        one, low=low, high=high, show_text=len(one.column_names) <= _MAX_CLIENTS_WITH_TEXT
    )


def _points_text(value: float) -> str:
    return f"{100 * value:.0f}"


def _loss_text(value: float) -> str:
    return f"{value:.2f}"


def _matrix_map(method: Method, metric: str) -> HeatMap | None:
    found = mean_matrix(method, metric)
    if found is None:
        return None
    clients, values, _ = found
    names = tuple(short_client_names(clients).values())
    return HeatMap(
        title=method.name,
        row_title="model of",
        column_title="test examples of client",
        row_names=names,
        column_names=names,
        values=tuple(map(tuple, values)),
        text=_loss_text if metric == "loss" else _points_text,
        outlined=frozenset((i, i) for i in range(len(clients))) if len(clients) <= 60 else frozenset(),
        darker_is_less=metric == "loss",
    )


def partitions(methods: Sequence[Method]) -> Figure | None:
    """How many examples of each label each client holds, for each different partition."""
    tables = label_tables(methods)
    if not tables:
        return None
    maps = [_partition_map(title, counts) for title, counts in tables[:_MAX_PARTITIONS]]
    high = heatmaps.value_range(maps)[1]
    panels = tuple(
        (
            one.title
            if len(tables) > 1
            else "All runs"
            if sum(len(m.runs) for m in methods) > 1
            else "This run",
            _drawn(one, 0.0, high),
        )
        for one in maps
    )
    left_out = len(tables) - len(maps)
    note = "Examples by label and client, all splits together."
    if left_out:
        note += f" {left_out} more of the {len(tables)} different partitions are not drawn."
    scale = heatmaps.colour_scale("0", quantities.count_text(high), darker_is_less=False)
    return Figure(title="", note=note, panels=panels, legend=scale)


def _partition_map(title: str, counts: dict[str, dict[str, int]]) -> HeatMap:
    labels = sorted({label for labels in counts.values() for label in labels})
    names = short_client_names(list(counts))
    return HeatMap(
        title=title,
        row_title="label",
        column_title="client",
        row_names=tuple(labels),
        column_names=tuple(names.values()),
        values=tuple(tuple(float(own.get(label, 0)) for own in counts.values()) for label in labels),
        text=quantities.count_text,
    )


def routing(methods: Sequence[Method]) -> list[Figure]:
    """A figure a method, of its first seed: a panel a layer, the share of tokens by client and expert."""
    figures: list[Figure] = []
    for method in methods:
        run = method.runs[0]
        shares = expert_shares(run.result)
        if shares:
            figures.append(_routing_figure(method, run, shares, is_folded=bool(figures)))
    return figures


def _routing_figure(
    method: Method, run: Run, shares: dict[str, list[list[float]]], *, is_folded: bool
) -> Figure:
    num_layers = min(len(layers) for layers in shares.values())
    shown = _spaced(num_layers, _MAX_LAYERS)
    chosen = _chosen_experts(run, list(shares))
    maps = [_routing_map(f"layer {layer}", shares, layer, chosen) for layer in shown]
    high = heatmaps.value_range(maps)[1]
    panels = tuple((one.title, heatmaps.heat_map(one, low=0.0, high=high, show_text=False)) for one in maps)
    num_experts = len(next(iter(shares.values()))[0])
    note = (
        f"Share of a client's tokens that its model sends to each of {num_experts} experts "
        f"(evenly: {100 / max(num_experts, 1):.3g} %), seed {run.seed}"
    )
    note += "; outlined: what the client chose to graft." if any(one.outlined for one in maps) else "."
    if len(shown) < num_layers:
        note += f" {len(shown)} of {num_layers} layers are drawn."
    return Figure(
        title=f"Experts by client: {method.label}",
        note=note,
        panels=panels,
        legend=heatmaps.colour_scale("0 %", _percent(high), darker_is_less=False),
        is_folded=is_folded,
    )


def _spaced(number: int, most: int) -> list[int]:
    """At most ``most`` of ``number`` layers, first and last among them."""
    if number <= most:
        return list(range(number))
    return sorted({round(i * (number - 1) / (most - 1)) for i in range(most)})


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def _chosen_experts(run: Run, models: Sequence[str]) -> dict[str, list[Any]]:
    """By client and layer the expert that was grafted, or a list of several."""
    clients = run.result["clients"]
    found = {name: clients.get(name, {}).get("chosen_experts") for name in models}
    return {name: experts for name, experts in found.items() if isinstance(experts, list)}


def _routing_map(
    title: str, shares: dict[str, list[list[float]]], layer: int, chosen: dict[str, list[Any]]
) -> HeatMap:
    clients = short_client_names([name for name in shares if name not in {"global", "base"}])
    names = [clients.get(name, name) for name in shares]
    outlined = {
        (row, int(expert))
        for row, name in enumerate(shares)
        if name in chosen and layer < len(chosen[name])
        for expert in (
            chosen[name][layer] if isinstance(chosen[name][layer], list) else [chosen[name][layer]]
        )
        if finite(expert) is not None
    }
    num_experts = len(next(iter(shares.values()))[layer])
    return HeatMap(
        title=title,
        row_title="client",
        column_title="expert",
        row_names=tuple(names),
        column_names=tuple(str(expert) for expert in range(num_experts)),
        values=tuple(tuple(layers[layer]) for layers in shares.values()),
        text=_percent,
        outlined=frozenset(outlined),
    )
