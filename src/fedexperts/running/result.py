"""Make ``result.json``, every figure of one run, from what the run left behind (docs/run_directory.md)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedexperts.algorithms.api import Algorithm, ModelParts, ServerState, trained_names
from fedexperts.evaluation.retention import RETENTION_SCORES
from fedexperts.evaluation.routing import balance_std, normalised_entropy
from fedexperts.federation.checkpoint import state_sha256
from fedexperts.federation.client_processes import PEAK
from fedexperts.federation.clock import Clock
from fedexperts.federation.rounds import PLANNED
from fedexperts.messages import Expected, Sent
from fedexperts.models.groups import count_parameters
from fedexperts.moe.surgery.seam import tensor_views
from fedexperts.run_directory import SCHEMA_VERSION
from fedexperts.running.simulated import summary_of

Json = dict[str, Any]

ROUTINGS = ("base", "global", "personalised")
"""Models whose routing is measured: untouched, the server's, and each client's own after local steps."""


@dataclass(frozen=True, kw_only=True)
class ResultParts:
    """Everything that a result is made from."""

    name: str
    config: Json
    state: ServerState
    scores: Mapping[str, Json]
    """By client: metrics, routing, matrix row and the algorithm's own figures of the last evaluation."""
    base: Json
    subjects: Sequence[str]
    """Subjects of the exam that clients' own models took."""
    exam_global: Json
    retention_global: Json
    rounds: Sequence[Json]
    clients: Sequence[Json]
    """Lines of clients.jsonl."""
    unscored: Sequence[Json]
    """Failures of evaluations."""
    labels: Mapping[str, Mapping[str, int]]
    """Examples by client and label; empty where the server cannot see them."""
    names: Mapping[str, str]
    """Client names, as tables show them, by id; empty where the server cannot see them."""
    parameters: Mapping[str, int]
    frozen_unchanged: bool
    seconds: Mapping[str, float]
    clock: Clock | None = None
    """The simulated clock, if there is one."""
    privacy: Json | None = None
    """Privacy after all rounds; None without ``[privacy]``."""


def build_result(parts: ResultParts) -> Json:
    """The object that ``result.json`` holds."""
    lines = _by_client(parts.clients)
    clients = {client_id: _client(client_id, parts, lines.get(client_id, [])) for client_id in parts.scores}
    means, exam = (
        mean_metrics([client["algorithm"] | client for client in clients.values()]),
        _exam(parts, clients),
    )
    return {
        "schema_version": SCHEMA_VERSION,
        "status": "finished",
        "name": parts.name,
        "method": parts.config["algorithm"]["name"],
        "seed": parts.config["seed"],
        "rounds": parts.config["rounds"],
        "transport": parts.config["transport"]["name"],
        "simulated": parts.config["transport"]["connection"] == "",
        "settings": parts.config,
        "clients": clients,
        "mean": means,
        "exam": exam,
        "retention": _retention(parts, clients),
        "matrix": _matrix(parts.scores),
        "bytes": _bytes(parts.clients),
        **_routing(parts),
        "server_state_sha256": state_sha256(parts.state),
        "personal_sha256": {client_id: score["personal_sha256"] for client_id, score in parts.scores.items()},
        "parameters": dict(parts.parameters),
        "frozen_unchanged": parts.frozen_unchanged,
        "failures": [failure for line in parts.rounds for failure in line["failures"]] + [*parts.unscored],
        "refused": _added(line["refused"] for line in parts.rounds),
        "seconds": dict(parts.seconds),
        **({} if parts.privacy is None else {"privacy": parts.privacy}),
        **_clock(parts, means | ({"exam_global": exam["global"]} if exam else {})),
    }


def _added(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return sums by name."""
    found: dict[str, int] = {}
    for one in counts:
        for name, number in one.items():
            found[name] = found.get(name, 0) + number
    return found


def _clock(parts: ResultParts, last: Mapping[str, float]) -> Json:
    """Return the clock's part of a result: nothing where there is none."""
    if parts.clock is None:
        return {}
    return {"clock": summary_of(parts.clock, parts.rounds, parts.clients, last)}


def mean_metrics(clients: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the unweighted mean of every score, own metrics included, over the clients that have it."""
    values: dict[str, list[float]] = {}
    for client in clients:
        for name, value in client.items():
            if name.endswith(("_base", "_before", "_after")) and isinstance(value, int | float):
                values.setdefault(name, []).append(value)
    return {name: math.fsum(scores) / len(scores) for name, scores in values.items()}


def _by_client(lines: Iterable[Json]) -> dict[str, list[Json]]:
    found: dict[str, list[Json]] = {}
    for line in lines:
        found.setdefault(line["client"], []).append(line)
    return found


def _client(client_id: str, parts: ResultParts, lines: Sequence[Json]) -> Json:
    score = parts.scores[client_id]
    totals = {name: sum(line[name] for line in lines) for name in ("upload_bytes", "download_bytes")}
    last = lines[-1] if lines else {}
    counts = {name: last[name] for name in ("num_truncated", "num_without_label") if name in last}
    base = parts.base["clients"].get(client_id, {"metrics": {}})["metrics"]
    scores: Json = {n: value for n, value in base.items() if n.endswith("_base")} | score["metrics"]
    known = {"name": parts.names.get(client_id, ""), "labels": dict(parts.labels.get(client_id, {}))}
    return scores | totals | counts | known | {"algorithm": score["algorithm"] | _fullest_turn(lines)}


def _fullest_turn(lines: Sequence[Json]) -> Json:
    """Return the memory of the client's fullest turn, measured and planned; nothing if not measured."""
    turns = [line["algorithm"] for line in lines if PEAK in line["algorithm"]]
    if not turns:
        return {}
    fullest = max(turns, key=lambda turn: turn[PEAK])
    return {name: fullest[name] for name in (PEAK, PLANNED)}


def _exam(parts: ResultParts, clients: Mapping[str, Json]) -> Json | None:
    base = parts.base["exam"]
    if not base:
        return None
    own = [client["exam_personalised"] for client in clients.values() if "exam_personalised" in client]
    return {
        "base": base["accuracy"],
        "global": parts.exam_global["accuracy"],
        "personalised": math.fsum(own) / len(own) if own else None,
        "base_by_subject": base["by_subject"],
        "global_by_subject": parts.exam_global["by_subject"],
        "personalised_by_subject": _own_by_subject(parts),
        "num_questions": base["num_questions"],
    }


def _retention(parts: ResultParts, clients: Mapping[str, Json]) -> Json | None:
    """Scores outside the clients' tasks by name and model, as the exam's."""
    base = parts.base.get("retention")
    if not base:
        return None
    means = mean_metrics(list(clients.values()))
    models = {
        name: {
            "base": base[name],
            "global": parts.retention_global[name],
            "before": means.get(f"{name}_before"),
            "personalised": means.get(f"{name}_after"),
        }
        for name in RETENTION_SCORES
        if name in base
    }
    return {**models, "num_free_questions": base["num_free_questions"], "num_neutral": base["num_neutral"]}


def _own_by_subject(parts: ResultParts) -> dict[str, float]:
    """Mean over the clients' models; without subjects of which no question was scored."""
    every = [score["exam_by_subject"] for score in parts.scores.values() if score["exam_by_subject"]]
    if not every:
        return {}
    means = [math.fsum(shares) / len(shares) for shares in zip(*every, strict=True)]
    return {subject: mean for subject, mean in zip(parts.subjects, means, strict=True) if mean >= 0}


def _matrix(scores: Mapping[str, Json]) -> Json | None:
    """Client-model by client-test; only where one process had every test split."""
    rows = [score["matrix"] for score in scores.values()]
    names = [name for name in rows[0] if all(len(row[name]) == len(scores) for row in rows)] if rows else []
    if not names:
        return None
    matrix: Json = {"clients": list(scores), "loss": [], "rougeL": []}
    for name in names:
        cells = [[None if cell < 0 else cell for cell in row[name]] for row in rows]
        matrix[name.removeprefix("matrix_")] = cells
    return matrix


def _bytes(lines: Sequence[Json]) -> Json:
    """Ledger of the training rounds; what evaluation took is not in it."""
    ledger: Json = {}
    for direction in ("upload", "download"):
        ledger[f"{direction}_counted"] = sum(line[f"{direction}_bytes"] for line in lines)
        ledger[f"{direction}_predicted"] = sum(line[f"{direction}_predicted"] for line in lines)
        ledger[f"{direction}_per_client_round"] = ledger[f"{direction}_counted"] / max(len(lines), 1)
    return ledger


def _routing(parts: ResultParts) -> Json:
    tables: dict[str, dict[str, list[list[int]]]] = {name: {} for name in ROUTINGS}
    base = parts.base["clients"]
    for client_id, score in parts.scores.items():
        measured = {**base.get(client_id, {"routing": {}})["routing"], **score["routing"]}
        for name in ROUTINGS:
            if f"routing_{name}" in measured:
                tables[name][client_id] = measured[f"routing_{name}"]
    totals = {name: _sum_tables(list(by_client.values())) for name, by_client in tables.items()}
    first = totals["global"]
    return {
        "routing": {
            "layers": len(first),
            "experts": max((len(row) for row in first), default=0),
            "tokens_per_expert": totals | tables["personalised"],
        },
        "expert_balance_std": {name: balance_std(table) for name, table in totals.items() if table},
        "routing_entropy": {name: normalised_entropy(table) for name, table in totals.items() if table},
    }


def _sum_tables(tables: Sequence[list[list[int]]]) -> list[list[int]]:
    return [
        [sum(counts) for counts in zip(*(table[layer] for table in tables), strict=True)]
        for layer in range(len(tables[0]) if tables else 0)
    ]


def describe_parameters(
    algorithm: Algorithm, parts: ModelParts, sent: Sent, expected: Expected
) -> dict[str, int]:
    """Return numbers of parameters of the model as a client has it: by group, then by role."""
    names = {"personal": algorithm.personal_names(parts), "trained": trained_names(algorithm, parts, sent)}
    numbers = {
        role: sum(tensor.numel() for tensor in tensor_views(parts.model, own).values())
        for role, own in names.items()
    }
    travelling = sum(tensor.numel() for tensor in expected.tensors.values())
    return count_parameters(parts.model) | {"travelling": travelling} | numbers
