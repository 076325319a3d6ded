"""``result.json``: every figure of one run, from what the run left behind. Schema: docs/run_directory.md."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedexperts.algorithms.api import Algorithm, ModelParts, ServerState
from fedexperts.evaluation.routing import balance_std, normalised_entropy
from fedexperts.models.groups import count_parameters
from fedexperts.moe.surgery.seam import tensor_views
from fedexperts.run_directory import SCHEMA_VERSION
from fedexperts.tensors import sha256_of

Json = dict[str, Any]

ROUTINGS = ("base", "global", "personalised")
"""Models whose routing is measured: untouched, the server's, and each client's own after local steps."""


@dataclass(frozen=True, kw_only=True)
class ResultParts:
    """What a result is made from."""

    name: str
    config: Json
    state: ServerState
    scores: Mapping[str, Json]
    """By client: ``metrics`` and ``report`` of the last evaluation."""
    base: Json
    exam_global: Json
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


def build_result(parts: ResultParts) -> Json:
    """The object that ``result.json`` holds."""
    clients = {client_id: _client(client_id, parts) for client_id in parts.scores}
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
        "mean": mean_metrics(list(clients.values())),
        "exam": _exam(parts, clients),
        "matrix": _matrix(parts.scores),
        "bytes": _bytes(parts.clients),
        **_routing(parts),
        "server_state_sha256": sha256_of(parts.state.tensors),
        "personal_sha256": {
            client_id: score["report"]["personal_sha256"] for client_id, score in parts.scores.items()
        },
        "parameters": dict(parts.parameters),
        "frozen_unchanged": parts.frozen_unchanged,
        "failures": [failure for line in parts.rounds for failure in line["failures"]] + [*parts.unscored],
        "seconds": dict(parts.seconds),
    }


def mean_metrics(clients: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Unweighted mean over clients of every score that all of them have."""
    scores = [
        {name: value for name, value in client.items() if name.endswith(("_base", "_before", "_after"))}
        for client in clients
    ]
    names = [name for name in scores[0] if all(name in other for other in scores)] if scores else []
    return {name: math.fsum(client[name] for client in scores) / len(scores) for name in names}


def _client(client_id: str, parts: ResultParts) -> Json:
    score = parts.scores[client_id]
    lines = [line for line in parts.clients if line["client"] == client_id]
    facts = {name: value for name, value in score["report"].items() if name.startswith("num_")}
    totals = {name: sum(line[name] for line in lines) for name in ("upload_bytes", "download_bytes")}
    counts = {name: lines[-1][name] for name in ("num_truncated", "num_without_label") if lines}
    base = parts.base["clients"][client_id]["metrics"]
    scores: Json = {n: value for n, value in base.items() if n.endswith("_base")} | score["metrics"]
    extra = (
        {"chosen_experts": score["report"]["chosen_experts"]} if "chosen_experts" in score["report"] else {}
    )
    known = {"name": parts.names.get(client_id, ""), "labels": dict(parts.labels.get(client_id, {}))}
    return scores | totals | facts | counts | known | extra


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
        "num_questions": base["num_questions"],
    }


def _matrix(scores: Mapping[str, Json]) -> Json | None:
    """Client-model by client-test; only where one process had every test split."""
    rows = {client_id: score["report"].get("matrix") for client_id, score in scores.items()}
    if any(row is None or row["clients"] != list(scores) for row in rows.values()):
        return None
    return {
        "clients": list(scores),
        "loss": [row["loss"] for row in rows.values() if row],
        "rougeL": [row["rougeL"] for row in rows.values() if row],
    }


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
    for client_id, score in parts.scores.items():
        tables["base"][client_id] = parts.base["clients"][client_id]["report"]["routing_base"]
        for name in ("global", "personalised"):
            tables[name][client_id] = score["report"][f"routing_{name}"]
    totals = {name: _sum_tables(list(by_client.values())) for name, by_client in tables.items()}
    first = totals["base"]
    return {
        "routing": {
            "layers": len(first),
            "experts": max(len(row) for row in first),
            "tokens_per_expert": totals | tables["personalised"],
        },
        "expert_balance_std": {name: balance_std(table) for name, table in totals.items()},
        "routing_entropy": {name: normalised_entropy(table) for name, table in totals.items()},
    }


def _sum_tables(tables: Sequence[list[list[int]]]) -> list[list[int]]:
    return [
        [sum(counts) for counts in zip(*(table[layer] for table in tables), strict=True)]
        for layer in range(len(tables[0]))
    ]


def describe_parameters(algorithm: Algorithm, parts: ModelParts) -> dict[str, int]:
    """Numbers of parameters of the model as a client has it: by group, travelling, personal, and trained."""
    travelling = tensor_views(parts.model, algorithm.upload_names(parts))
    personal = tensor_views(parts.model, algorithm.personal_names(parts))
    num_travelling = sum(tensor.numel() for tensor in travelling.values())
    num_personal = sum(tensor.numel() for tensor in personal.values())
    return count_parameters(parts.model) | {
        "travelling": num_travelling,
        "personal": num_personal,
        "trained": num_travelling + num_personal,
    }
