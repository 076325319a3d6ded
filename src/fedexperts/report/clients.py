"""What runs say client by client."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from fedexperts.report.grouping import Method
from fedexperts.report.quantities import Spread, finite, spread


def client_ids(methods: Iterable[Method]) -> tuple[str, ...]:
    """All clients of all runs, in order of first appearance."""
    return tuple(
        dict.fromkeys(
            client for method in methods for result in method.results for client in result["clients"]
        )
    )


def _common_start(first: str, last: str) -> str:
    """What two names begin with; of the least and the greatest of many, what all begin with."""
    length = next(
        (i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first)
    )
    return first[:length]


def client_spread(method: Method, client_id: str, metric: str) -> Spread | None:
    """The spread over the method's runs of one client's metric."""
    return spread(result["clients"].get(client_id, {}).get(metric) for result in method.results)


def short_client_names(ids: Sequence[str]) -> dict[str, str]:
    """Client ids without the beginning they share up to a separator: ``client-003`` becomes ``003``."""
    prefix = _common_start(min(ids), max(ids)) if len(ids) > 1 else ""
    cut = max((match.end() for match in re.finditer(r"[-_/:. ]", prefix)), default=0)
    return {client: client[cut:] or client for client in ids}


def total(results: Iterable[dict[str, Any]], field: str) -> list[int]:
    """``field`` summed over clients, one sum a run."""
    return [
        int(sum(finite(client.get(field)) or 0.0 for client in result["clients"].values()))
        for result in results
    ]


def main_metric(methods: Sequence[Method]) -> str:
    """ROUGE-L where any method has more than none of it, else the loss: what methods are compared by."""
    found = (method.spread("mean.rougeL_after") for method in methods)
    return "rougeL" if any(value is not None and value.mean > 0 for value in found) else "loss"


def matrix_metric(methods: Sequence[Method]) -> str:
    """What the matrices are drawn by: the main metric, or the loss where they have nothing else."""
    return "rougeL" if main_metric(methods) == "rougeL" and has_matrix(methods, "rougeL") else "loss"


def has_matrix(methods: Iterable[Method], metric: str) -> bool:
    """Whether any run has the matrix of ``metric``."""
    return any(
        isinstance(result.get("matrix"), dict) and bool(result["matrix"].get(metric))
        for method in methods
        for result in method.results
    )


def mean_matrix(method: Method, metric: str) -> tuple[tuple[str, ...], list[list[float | None]], int] | None:
    """Clients, the matrix (row: model of, column: test examples of) and over how many runs it is the mean.

    Runs whose matrix is absent or has other clients than the first's are left out of the mean.
    """
    found: list[tuple[tuple[str, ...], list[list[Any]]]] = []
    for result in method.results:
        matrix = result.get("matrix")
        if isinstance(matrix, dict) and isinstance(matrix.get(metric), list) and matrix.get("clients"):
            found.append((tuple(matrix["clients"]), matrix[metric]))
    if not found:
        return None
    clients = found[0][0]
    same = [values for ids, values in found if ids == clients and _is_square(values, len(clients))]
    if not same:
        return None
    places = range(len(clients))
    mean = [[_mean(values[row][column] for values in same) for column in places] for row in places]
    return clients, mean, len(same)


def _is_square(values: list[list[Any]], size: int) -> bool:
    return len(values) == size and all(isinstance(row, list) and len(row) == size for row in values)


def _mean(values: Iterable[Any]) -> float | None:
    present = [value for value in map(finite, values) if value is not None]
    return sum(present) / len(present) if present else None


def own_and_others(matrix: Sequence[Sequence[float | None]]) -> tuple[Spread | None, Spread | None]:
    """The mean of the diagonal (own test examples) and of the rest (others')."""
    places = range(len(matrix))
    own = spread(matrix[i][i] for i in places)
    others = spread(matrix[i][j] for i in places for j in places if i != j)
    return own, others


def label_tables(methods: Sequence[Method]) -> list[tuple[str, dict[str, dict[str, int]]]]:
    """The different partitions among the runs: (which run, client to label to number of examples)."""
    tables: list[tuple[str, dict[str, dict[str, int]]]] = []
    for method in methods:
        for run in method.runs:
            counts = _label_counts(run.result["clients"])
            if counts and all(counts != known for _, known in tables):
                task = f"{method.task}, " if method.task else ""
                tables.append((f"{task}seed {run.seed}", counts))
    return tables


def _label_counts(clients: dict[str, dict[str, Any]]) -> dict[str, dict[str, int]]:
    counts = {}
    for client_id, client in clients.items():
        labels = client.get("labels")
        if isinstance(labels, dict) and labels:
            counts[client_id] = {str(label): int(finite(number) or 0) for label, number in labels.items()}
    return counts


def expert_shares(result: dict[str, Any]) -> dict[str, list[list[float]]]:
    """Each model's (``base``, ``global``, a client id) share of tokens by layer and expert; rows sum to 1."""
    routing = result.get("routing")
    tokens = routing.get("tokens_per_expert") if isinstance(routing, dict) else None
    if not isinstance(tokens, dict):
        return {}
    return {
        str(name): [_to_shares(layer) for layer in layers]
        for name, layers in tokens.items()
        if layers and name != "personalised"
    }


def _to_shares(counts: list[Any]) -> list[float]:
    numbers = [finite(count) or 0.0 for count in counts]
    whole = sum(numbers)
    return [number / whole if whole else 0.0 for number in numbers]
