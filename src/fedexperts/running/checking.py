"""Check an experiment before it is run: clients, parameters, bytes and memory."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from fedexperts.algorithms.api import ModelParts, ServerState, trained_names
from fedexperts.config.schema import RunConfig
from fedexperts.costs.dry_run import BatchShape
from fedexperts.costs.memory import MEMORY_PARTS, PredictedMemory, bytes_of_copies, predict_memory
from fedexperts.costs.privacy import describe_privacy
from fedexperts.costs.stopwatch import Stopwatch
from fedexperts.costs.traffic import PredictedBytes, predict_round
from fedexperts.data.batches import BatchCounts, encode_all
from fedexperts.data.prompts import Encoded
from fedexperts.data.split import SPLITS
from fedexperts.data.table import LabelRow, label_table
from fedexperts.federation.cohort import draw_cohort
from fedexperts.federation.personal import PersonalStore
from fedexperts.models.held_experts import quantised_experts
from fedexperts.report.tables import make_table
from fedexperts.report.terminal import terminal_table
from fedexperts.running.predicted_clock import PredictedClock, predict_clock
from fedexperts.running.predicted_roles import PredictedRole, predict_roles, role_table
from fedexperts.running.privacy import privacy_of_run
from fedexperts.running.result import describe_parameters
from fedexperts.running.retention_time import PredictedRetention, predict_retention
from fedexperts.running.workbench import Workbench, open_workbench, refuse_processes
from fedexperts.tensors import num_bytes
from fedexperts.training.settings import TrainingSettings


@dataclass(frozen=True, kw_only=True)
class CheckedClient:
    """One client's row."""

    row: LabelRow
    """Its id, the sizes of its splits, and its labels."""
    counts: BatchCounts
    """Of its training examples: tokens, labels, truncated, without label."""
    num_usable_tests: int
    """Test examples, of those that are scored, that have a label."""
    num_test_trained_elsewhere: int
    """Test examples whose prompt another client trains on."""
    fullest_batch: BatchShape
    """No batch that it draws is longer or has more labels."""


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """Everything that ``fedexperts check`` shows."""

    clients: tuple[CheckedClient, ...]
    cohort_size: int
    num_rounds: int
    parameters: dict[str, int]
    """By group, then ``travelling``, ``personal`` and ``trained``."""
    bytes: tuple[PredictedBytes, ...]
    """Of each client of the first round."""
    memory: PredictedMemory
    """Of one client's turn."""
    server_bytes: int
    """Of tensors that the server keeps from round to round, and of the uploads that its mean holds."""
    retention: PredictedRetention | None
    """Questions that models are asked outside the clients' tasks; None where nothing is."""
    clock: PredictedClock | None = None
    """Simulated seconds of the first round; None without a clock."""
    under_way_bytes: int | None = None
    """Most bytes on disk of uploads under way and of what they began from; None where rounds wait for all."""
    uploads_by_arrival: int = 0
    """Uploads of a step that counts them as they come; 0 where the cohort or a clock says whose they are."""
    process_bytes: int | None = None
    """Largest plan of a client's process in the first round; None where clients are resident."""
    roles: Mapping[str, PredictedRole] = field(default_factory=dict)
    """Roles of the first round by client; empty for a method without roles."""
    privacy: Mapping[str, Any] | None = None
    """Privacy after all rounds; None without ``[privacy]``."""
    quantised: str = ""
    """Sentence about experts in few bits; empty where none is."""

    def render(self) -> list[RenderableType]:
        """Tables for a terminal."""
        warnings = [Text(sentence, style="bold yellow") for sentence in self.warnings()]
        tables = [self._client_table(), self._label_table(), self._parameter_table(), self._cost_table()]
        tables[2:2] = [self._cluster_table()] if any(facts.row.clusters for facts in self.clients) else []
        tables += [role_table(self.roles)] if self.roles else []
        tables += [self.clock.time_line()] if self.clock else []
        return [*tables, *warnings]

    def _client_table(self) -> RenderableType:
        counts = [
            (facts.counts.num_truncated, facts.counts.num_without_label, facts.num_test_trained_elsewhere)
            for facts in self.clients
        ]
        rows = [
            [
                facts.row.client_id,
                facts.row.name,
                *(str(getattr(facts.row, f"num_{split}")) for split in SPLITS),
                *map(str, warned),
            ]
            for facts, warned in zip(self.clients, counts, strict=True)
        ]
        titles = ["client", "name", *SPLITS, "cut", "no label", "test trained elsewhere"]
        first = len(titles) - 3
        marked = frozenset((r, first + c) for r, row in enumerate(counts) for c, one in enumerate(row) if one)
        table = make_table("Clients and their examples", titles, rows, num_text=2, marked=marked)
        return terminal_table(table, style="bold yellow")

    def _label_table(self) -> RenderableType:
        rows = []
        for facts in self.clients:
            found = sorted(facts.row.labels.items(), key=lambda item: -item[1])
            rows.append(
                [facts.row.client_id, ", ".join(f"{label} {count:,}" for label, count in found if count)]
            )
        caption = "Labels of the clients' examples, the most frequent first"
        return terminal_table(make_table(caption, ["client", "labels and examples"], rows, num_text=2))

    def _cluster_table(self) -> RenderableType:
        rows = [
            [facts.row.client_id, ", ".join(f"{number}: {count:,}" for number, count in found)]
            for facts in self.clients
            if (found := sorted(facts.row.clusters.items(), key=lambda item: -item[1]))
        ]
        caption = "Clusters of inputs, by number, and the clients' examples of each, the largest first"
        return terminal_table(make_table(caption, ["client", "clusters and examples"], rows, num_text=2))

    def _parameter_table(self) -> RenderableType:
        roles = ("trained", "travelling", "personal")
        total = sum(count for group, count in self.parameters.items() if group not in roles)
        rows = [
            [name, f"{count:,}", f"{count / total:.2%}"]
            for name, count in self.parameters.items()
            if count or name in roles
        ]
        caption = "Parameters of the model as a client has it; the last three rows are parts of those above"
        return terminal_table(make_table(caption, ["parameters", "number", "share"], rows))

    def _cost_table(self) -> RenderableType:
        rows = []
        for direction in ("upload", "download"):
            sizes = [getattr(one, direction) for one in self.bytes]
            least = f"{min(sizes):,} to " if min(sizes) < max(sizes) else ""
            rows.append([f"{direction}, one client, one round", f"{least}{max(sizes):,} bytes"])
        rows.append(self._both_row())
        for name in (*MEMORY_PARTS, "total"):
            about = "about " if name in ("activations", "total") else ""
            rows.append([f"memory: {name}", f"{about}{getattr(self.memory, name) / 2**20:,.1f} MiB"])
        if self.memory.offloaded:
            rows.append(["experts off the device", f"{self.memory.offloaded / 2**20:,.1f} MiB"])
        if self.process_bytes is not None:
            planned = f"about {self.process_bytes / 2**20:,.1f} MiB"
            rows.append(["memory of a client's process, planned", planned])
        rows.append(["memory of the server", f"{self.server_bytes / 2**20:,.1f} MiB"])
        if self.under_way_bytes is not None:
            at_most = f"at most {self.under_way_bytes / 2**20:,.1f} MiB"
            rows.append(["uploads under way, on the server's disk", at_most])
        if self.uploads_by_arrival:
            rows.append(["staleness of uploads", "not predicted: uploads count as they come"])
        if self.quantised:
            rows.append(["experts in few bits", self.quantised])
        if self.retention is not None:
            rows.append(_retention_row(self.retention))
        if self.privacy is not None:
            rows.append(describe_privacy(self.privacy).split(": ", 1))
        if self.clock is not None:
            rows += self.clock.rows()
        caption = (
            "Bytes, memory and time; memory is that of tensors, a process and its allocator take more "
            "(docs/planning.md)"
        )
        return terminal_table(make_table(caption, ["predicted", "amount"], rows))

    def _both_row(self) -> list[str]:
        sizes = [one.upload + one.download for one in self.bytes]
        steps = self.clock.steps if self.clock else None
        if self.uploads_by_arrival:
            number = self.uploads_by_arrival * self.num_rounds
            least = f"{number * min(sizes):,} to " if min(sizes) < max(sizes) else ""
            told = f"{least}{number * max(sizes):,} bytes"
            return [f"both, {number:,} uploads, {self.num_rounds} rounds", told]
        if steps is None:
            who, both = f"{self.cohort_size} clients", sum(sizes) * self.num_rounds
            return [f"both, {who}, {self.num_rounds} rounds", f"{both:,} bytes"]
        counts = steps.uploads_by_client.values()
        both = sum(size * count for size, count in zip(sizes, counts, strict=True))
        return [f"both, {sum(counts):,} uploads, {self.num_rounds} rounds", f"{both:,} bytes"]

    def warnings(self) -> list[str]:
        """Return a sentence for each client that cannot train, or that nothing can be scored for."""
        limit = "within data.max_tokens"
        found = [
            f"{facts.row.client_id} has no {what} example with a label {limit}: {then}"
            for facts in self.clients
            for what, usable, then in (
                ("training", facts.counts.num_labels, "its rounds will fail"),
                ("test", facts.num_usable_tests, "it will have no scores"),
            )
            if not usable
        ] + [
            f"{facts.row.client_id} is tested on {facts.num_test_trained_elsewhere} examples whose prompt "
            "another client trains on"
            for facts in self.clients
            if facts.num_test_trained_elsewhere
        ]
        return found + (self.clock.warnings() if self.clock else [])

    def as_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "clients": {
                facts.row.client_id: {
                    "name": facts.row.name,
                    "train": facts.row.num_train,
                    "validation": facts.row.num_validation,
                    "test": facts.row.num_test,
                    "labels": facts.row.labels,
                    **({"clusters": facts.row.clusters} if facts.row.clusters else {}),
                    "num_truncated": facts.counts.num_truncated,
                    "num_without_label": facts.counts.num_without_label,
                    "num_test_trained_elsewhere": facts.num_test_trained_elsewhere,
                }
                for facts in self.clients
            },
            "warnings": self.warnings(),
            "cohort_size": self.cohort_size,
            "rounds": self.num_rounds,
            "parameters": self.parameters,
            "bytes_by_client_of_round_1": [
                {"upload": one.upload, "download": one.download} for one in self.bytes
            ],
            "memory_bytes": asdict(self.memory) | {"total": self.memory.total},
            "server_memory_bytes": self.server_bytes,
            "process_memory_bytes": self.process_bytes,
            **({} if self.under_way_bytes is None else {"under_way_bytes": self.under_way_bytes}),
            **({"uploads_by_arrival": self.uploads_by_arrival} if self.uploads_by_arrival else {}),
            **({"roles": {name: asdict(role) for name, role in self.roles.items()}} if self.roles else {}),
            "retention": None if self.retention is None else asdict(self.retention),
            **({} if self.privacy is None else {"privacy": dict(self.privacy)}),
            **({"quantised_experts": self.quantised} if self.quantised else {}),
        } | ({} if self.clock is None else {"clock": asdict(self.clock)})


def check_experiment(config: RunConfig) -> CheckReport:
    """Load data and model as the run would, train nothing, write nothing.

    Raises:
        UserError: whatever would stop the run at its start.
    """
    with open_workbench(config, Stopwatch()) as bench:
        is_on_disk = config.transport.clients == "process"
        if is_on_disk:
            refuse_processes(bench)
        if config.asynchronous:
            config.asynchronous.refuse_too_few(len(bench.data.client_ids))
        runtime, algorithm, parts = (
            bench.scorer(PersonalStore(Path(os.devnull))).runtime,
            bench.algorithm,
            bench.parts,
        )
        clients = tuple(_facts(bench, row, runtime.replayed) for row in label_table(bench.data))
        retention = predict_retention(bench)
        cohort = draw_cohort(bench.data.client_ids, config.cohort, config.seed, 1)
        state = replace(algorithm.init(parts, runtime.facts()), seed=config.seed, num_rounds=config.rounds)
        state = algorithm.plan_round(state, cohort, 1)
        sent = algorithm.download(state, cohort[0])
        expected = algorithm.expected(parts, state, cohort[0])
        is_private = config.privacy.is_on
        privacy = privacy_of_run(config, bench.data.client_ids, expected) if is_private else None
        predicted = {
            client_id: predict_round(algorithm, parts, state, client_id, has_tables=not is_private)
            for client_id in cohort
        }
        is_limited = is_on_disk or (algorithm.fits_slots and any(bench.memory_bytes.values()))
        plan = algorithm.memory_plan(parts) if is_limited else None
        process_bytes = max(plan(state, client_id) for client_id in cohort) if plan and is_on_disk else None
        roles = predict_roles(algorithm, state, cohort, plan)
        with runtime.preview(sent) as (undo, kept):
            trained = trained_names(algorithm, parts, sent)
            # What came and what is kept lies on disk where clients are processes.
            memory = predict_memory(
                parts.model,
                trained,
                max(
                    (facts.fullest_batch for facts in clients),
                    key=lambda shape: (shape.length, shape.labels),
                ),
                config.training,
                0 if is_on_disk else bytes_of_copies(algorithm, parts, kept, sent, undo),
            )
            return CheckReport(
                clients=clients,
                cohort_size=len(cohort),
                num_rounds=config.rounds,
                parameters=describe_parameters(algorithm, parts, sent, expected),
                bytes=tuple(predicted.values()),
                retention=retention,
                memory=memory,
                server_bytes=algorithm.server_bytes(state) + _held_uploads(config, parts, state, cohort),
                quantised=quantised_experts(parts.model),
                clock=predict_clock(bench, runtime, trained, predicted, memory.total),
                under_way_bytes=_under_way_bytes(config, state, predicted.values()),
                uploads_by_arrival=_uploads_by_arrival(config),
                process_bytes=process_bytes,
                roles=roles,
                privacy=privacy,
            )


def _held_uploads(config: RunConfig, parts: ModelParts, state: ServerState, cohort: Sequence[str]) -> int:
    if not config.aggregation.holds_uploads:
        return 0
    expected = (config.algorithm.expected(parts, state, client_id) for client_id in cohort)
    return sum(num_bytes(one.tensors) for one in expected)


def _under_way_bytes(
    config: RunConfig, state: ServerState, predicted: Collection[PredictedBytes]
) -> int | None:
    if config.asynchronous is None:
        return None
    most = config.asynchronous.concurrency or len(state.clients)
    began_from, upload = most * num_bytes(state.tensors), max(one.upload for one in predicted)
    if not (by_arrival := _uploads_by_arrival(config)):
        return began_from + most * upload
    return began_from + by_arrival * upload + most * max(one.download for one in predicted)


def _uploads_by_arrival(config: RunConfig) -> int:
    is_simulated = config.transport.name == "inprocess"
    return 0 if config.asynchronous is None or is_simulated else config.asynchronous.buffer


def _retention_row(asked: PredictedRetention) -> list[str]:
    prompts = (
        f"{asked.num_free_questions} free questions and {asked.num_neutral} neutral instructions, "
        f"to {asked.num_models} models"
    )
    return [prompts, f"at most {asked.seconds_at_most:,.0f} s"]


def _facts(bench: Workbench, row: LabelRow, replayed: Sequence[Encoded]) -> CheckedClient:
    encoded, counts = encode_all(bench.format, bench.data.examples(row.client_id, "train"))
    largest = bench.config.evaluation.max_test_examples
    tests = bench.data.examples(row.client_id, "test")
    return CheckedClient(
        row=row,
        counts=counts,
        num_test_trained_elsewhere=bench.data.client(row.client_id).num_test_trained_elsewhere,
        num_usable_tests=len(encode_all(bench.format, tests[:largest] if largest else tests)[0]),
        fullest_batch=_fullest_batch(encoded, replayed, bench.config.training),
    )


def _fullest_batch(
    encoded: Sequence[Encoded], replayed: Sequence[Encoded], training: TrainingSettings
) -> BatchShape:
    labels = _most_labels(encoded, training.batch_size) + _most_labels(replayed, training.num_replayed)
    return BatchShape(
        examples=training.examples_per_step,
        length=max((len(each.input_ids) for each in (*encoded, *replayed)), default=1),
        labels=max(1, labels),
    )


def _most_labels(encoded: Sequence[Encoded], number: int) -> int:
    labels = sorted((each.num_labels for each in encoded), reverse=True)
    return sum(islice(cycle(labels or [0]), number))
