"""What a run would do, before it is run: clients, parameters, bytes and memory."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedexperts.config.schema import RunConfig
from fedexperts.costs import (
    PredictedBytes,
    PredictedMemory,
    Stopwatch,
    predict_memory,
    predict_round,
    trained_tensors,
)
from fedexperts.data.batches import BatchCounts, encode_all
from fedexperts.federation.cohort import draw_cohort
from fedexperts.federation.personal import PersonalStore
from fedexperts.result import describe_parameters
from fedexperts.workbench import Workbench, open_workbench

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class ClientFacts:
    """One client's row."""

    client_id: str
    num_examples: dict[str, int]
    """By split."""
    labels: dict[str, int]
    counts: BatchCounts
    """Of its training examples: tokens, labels, truncated, without label."""


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """Everything that ``fedexperts check`` shows."""

    clients: tuple[ClientFacts, ...]
    cohort_size: int
    num_rounds: int
    parameters: dict[str, int]
    """By group, then ``travelling``, ``personal`` and ``trained``."""
    bytes: PredictedBytes
    """Per client and round."""
    memory: PredictedMemory
    """Of one client's turn."""

    def as_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "clients": {
                facts.client_id: {
                    **facts.num_examples,
                    "labels": facts.labels,
                    "num_truncated": facts.counts.num_truncated,
                    "num_without_label": facts.counts.num_without_label,
                }
                for facts in self.clients
            },
            "cohort_size": self.cohort_size,
            "rounds": self.num_rounds,
            "parameters": self.parameters,
            "bytes_per_client_and_round": {"upload": self.bytes.upload, "download": self.bytes.download},
            "memory_bytes": {
                "weights": self.memory.weights,
                "gradients": self.memory.gradients,
                "optimizer": self.memory.optimizer,
                "activations": self.memory.activations,
                "total": self.memory.total,
            },
        }


def check_experiment(config: RunConfig) -> CheckReport:
    """Load data and model as the run would, train nothing, write nothing.

    Raises:
        UserError: whatever would stop the run at its start.
    """
    with open_workbench(config, Stopwatch()) as bench:
        clients = tuple(_facts(bench, client_id) for client_id in bench.data.client_ids)
        cohort = draw_cohort(bench.data.client_ids, config.cohort, config.seed, 1)
        runtime = bench.runtime(PersonalStore(Path(os.devnull)))
        state = bench.algorithm.init(bench.parts)
        with runtime.preview():
            return CheckReport(
                clients=clients,
                cohort_size=len(cohort),
                num_rounds=config.rounds,
                parameters=describe_parameters(bench.algorithm, bench.parts),
                bytes=predict_round(bench.algorithm, state, bench.parts),
                memory=_memory(bench, clients),
            )


def _facts(bench: Workbench, client_id: str) -> ClientFacts:
    _, counts = encode_all(bench.format, bench.data.examples(client_id, "train"))
    return ClientFacts(
        client_id=client_id,
        num_examples={split: bench.data.num_examples(client_id, split) for split in SPLITS},  # type: ignore[misc]
        labels=bench.data.label_counts()[client_id],
        counts=counts,
    )


def _memory(bench: Workbench, clients: tuple[ClientFacts, ...]) -> PredictedMemory:
    names = (*bench.algorithm.upload_names(bench.parts), *bench.algorithm.personal_names(bench.parts))
    training = bench.config.training
    longest = max(facts.counts.num_tokens / max(facts.counts.num_examples, 1) for facts in clients)
    return predict_memory(
        bench.parts,
        trained_tensors(bench.parts, names),
        tokens_per_batch=round(training.batch_size * min(1.5 * longest, bench.config.data.max_tokens)),
        recomputes=training.gradient_checkpointing,
    )
