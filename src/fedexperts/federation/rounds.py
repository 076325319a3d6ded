"""Run the rounds of a federation over any transport."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from fedexperts.algorithms.api import Algorithm, MemoryPlan, ModelParts, ServerState
from fedexperts.costs.traffic import PredictedBytes, predict_round
from fedexperts.costs.work import from_figures
from fedexperts.errors import UserError
from fedexperts.federation.checkpoint import Checkpoint, state_sha256
from fedexperts.federation.clock import Clock
from fedexperts.federation.cohort import CohortSettings, draw_cohort
from fedexperts.federation.edge import refusal
from fedexperts.federation.fencing import fenced_by_clock, turn_of
from fedexperts.federation.ledger import EXPECTED, NO_FAILURES, Ledger
from fedexperts.federation.norm_guard import Judged, guarded, norms_of
from fedexperts.federation.transport import Delivery, Transport
from fedexperts.federation.under_way import TurnUnderWay
from fedexperts.messages import LARGEST_ANSWER, Download, Expected, Upload, predict_upload_bytes
from fedexperts.tensors import first_non_finite

logger = logging.getLogger(__name__)

LARGEST_FACTOR = 2
"""An upload of more than so many times the bytes that are due is not decoded. One of a little more is: then
its refusal names the tensor."""

PLANNED = "memory_planned_bytes"
"""In a client's line, beside what a transport measured: bytes of the turn by the algorithm's own plan."""


@dataclass(kw_only=True)
class RoundRecord:
    """One round's line of rounds.jsonl, its lines of clients.jsonl, and its failures."""

    round_number: int
    cohort: tuple[str, ...]
    clients: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    lr: float = 0.0
    refused: dict[str, int] = field(default_factory=dict)
    """Uploads that did not count whatever they brought, by the names of ``federation.ledger.FENCES``."""
    simulated: dict[str, Any] | None = None
    """Figures of the clock for the round; None without one."""
    asynchronous: dict[str, Any] | None = None
    """Figures of the uploads' age; None where rounds wait for all."""
    taken: list[dict[str, float]] = field(default_factory=list)
    """Measured seconds by phase of the turns that were taken in this round."""
    under_way: tuple[TurnUnderWay, ...] = ()
    """Turns that outlast the round."""

    def line(self, state: ServerState) -> dict[str, Any]:
        """Return the round's line in rounds.jsonl."""
        losses = [client["train_loss"] for client in self.clients]
        parts = {"simulated": self.simulated, "asynchronous": self.asynchronous}
        return {
            "round": self.round_number,
            "cohort": list(self.cohort),
            "train_loss": math.fsum(losses) / len(losses) if losses else None,
            "lr": self.lr,
            "upload_bytes": sum(client["upload_bytes"] for client in self.clients),
            "download_bytes": sum(client["download_bytes"] for client in self.clients),
            "num_failed": len(self.failures),
            "failures": self.failures,
            "refused": self.refused,
            "seconds": self.seconds,
            "server_state_sha256": state_sha256(state),
        } | {name: part for name, part in parts.items() if part is not None}


@dataclass(frozen=True, kw_only=True)
class Federation:
    """One run's server side."""

    algorithm: Algorithm
    parts: ModelParts
    transport: Transport
    cohort: CohortSettings
    num_rounds: int
    seed: int
    config_sha256: str
    lr_of_round: Callable[[int], float]
    clock: Clock | None = None
    run_name: str = ""
    """Unlike any other run's: an upload must repeat it."""
    round_seconds: float = 0.0
    """Deadline of a round; 0 for none."""
    waits_by_clock: bool = False
    """Whether the clock says which uploads come in time; elsewhere the transport does."""
    spool_folder: Path | None = None
    """Folder on whose disk uploads wait, where the first of a round are taken."""
    memory_plan: MemoryPlan | None = None
    """Bytes that a turn should take, where clients are processes whose memory is measured."""
    of_sites: bool = False
    """Whether clients are sites, which may leave out an upload's tables."""
    is_private: bool = False
    """Whether uploads are clipped and noised, and come without tables."""

    def run(
        self,
        start: Checkpoint,
        *,
        before_round: Callable[[int, Sequence[str], int], None],
        after_client: Callable[[str], None],
        after_round: Callable[[Checkpoint, RoundRecord], None],
    ) -> Checkpoint:
        """Run all rounds after ``start``; ``after_round`` is where a round is made to last.

        ``before_round`` is told the round, its cohort and the number of uploads that it waits for, before any
        client is asked.

        Raises:
            UserError: a client failed and ``cohort.on_failure`` is ``stop``; the round does not count.
        """
        reached = start
        client_ids = [facts.client_id for facts in start.state.clients]
        for round_number in range(start.state.round_number + 1, self.num_rounds + 1):
            cohort = draw_cohort(client_ids, self.cohort, self.seed, round_number)
            before_round(round_number, cohort, self._num_awaited(cohort))
            record = RoundRecord(round_number=round_number, cohort=cohort, lr=self.lr_of_round(round_number))
            started = time.perf_counter()
            reached = self._round(reached, record, after_client)
            _add_seconds(record, time.perf_counter() - started)
            record.simulated = self.clock.end_round() if self.clock else None
            after_round(reached, record)
        return reached

    def _num_awaited(self, cohort: Sequence[str]) -> int:
        return len(cohort)

    def _round(
        self, start: Checkpoint, record: RoundRecord, after_client: Callable[[str], None]
    ) -> Checkpoint:
        planned = self.algorithm.plan_round(start.state, record.cohort, record.round_number)
        state = self.algorithm.server_update(planned, self._accepted(planned, start, record, after_client))
        self._finish(record)
        reason = self._void(state, record)
        if reason:
            self._fail(record, record.cohort, reason)
            record.clients.clear()
            state = start.state
        # A client names what it keeps by the round in which its turn began.
        accepted = {line["client"]: record.round_number - line.get("staleness", 0) for line in record.clients}
        state = replace(state, round_number=record.round_number)
        kept_rounds = {**start.kept_rounds, **accepted}
        return Checkpoint(state=state, kept_rounds=kept_rounds, under_way=record.under_way)

    def _void(self, state: ServerState, record: RoundRecord) -> str:
        """Return why a round does not count as a whole, or nothing."""
        number, fewest = len(record.clients), self.cohort.min_uploads
        if number < fewest:
            return f"only {number} uploads counted, where cohort.min_uploads is {fewest}"
        bad = first_non_finite({**state.tensors, **state.beside})
        return "" if bad is None else f"the server's tensor {bad!r} would not be finite after this round"

    def _accepted(
        self,
        planned: ServerState,
        start: Checkpoint,
        record: RoundRecord,
        after_client: Callable[[str], None],
    ) -> Iterator[tuple[str, Upload]]:
        """Yield the uploads that count; each download is made when its client's turn comes."""
        downloads = self.downloads(planned, start, record.cohort, record.round_number, "train")
        ledger = Ledger(run=self.run_name, round_number=record.round_number)
        deliveries = self.transport.exchange(downloads)
        judged = self._in_time(self._judged(planned, ledger, delivery) for delivery in deliveries)
        for delivery, reason in guarded(judged, self.cohort.max_change_factor):
            upload, client_id = delivery.upload, delivery.client_id
            if reason:
                self._refuse(record, delivery, reason)
            else:
                line = self._line(planned, ledger, delivery, record)
                record.clients.append(line | self._simulated(delivery))
                yield client_id, upload
            after_client(client_id)

    def _line(
        self, planned: ServerState, ledger: Ledger, delivery: Delivery, record: RoundRecord
    ) -> dict[str, Any]:
        """Return a client's line of clients.jsonl, its simulated part aside; count the turn's seconds."""
        client_id, has_tables = delivery.client_id, not self._leaves_tables_out(delivery.upload)
        predicted = predict_round(self.algorithm, self.parts, planned, client_id, has_tables=has_tables)
        line = client_line(delivery, record.round_number, predicted)
        line["upload_sha256"] = ledger.hashes[client_id]
        if self.memory_plan:
            line["algorithm"][PLANNED] = self.memory_plan(planned, client_id)
        record.taken.append(line["seconds"])
        return line

    def _finish(self, record: RoundRecord) -> None:
        """Wait until every client has what it keeps on disk; add to the lines what was done after uploads."""
        lines = {line["client"]: line for line in record.clients}
        for end in self.transport.finish_round():
            if end.failure:
                self._fail(record, [end.client_id], f"its upload counts, but afterwards: {end.failure}")
            if line := lines.get(end.client_id):
                line["seconds"] |= end.seconds
                line["algorithm"] |= end.measured

    def _in_time(self, judged: Iterable[Judged]) -> Iterator[Judged]:
        """Refuse uploads that would come too late by the clock."""
        wanted, limit = self.cohort.wanted, self.round_seconds
        if self.clock is None or not self.waits_by_clock or not (wanted or limit):
            return iter(judged)
        return fenced_by_clock(judged, self.clock, wanted=wanted, limit=limit, folder=self.spool_folder)

    def _judged(self, planned: ServerState, ledger: Ledger, delivery: Delivery) -> Judged:
        """Return an answer with the reason why it is refused, or else with its norms, if these are judged."""
        upload, client_id = delivery.upload, delivery.client_id
        if delivery.fenced or not upload.failure:
            kind, reason = ledger.fence(delivery)
            if kind:
                return replace(delivery, fenced=kind), reason, None
        expected = self._expected(planned, delivery)
        came = {**planned.tensors, **self.algorithm.download(planned, client_id).tensors}
        opened = partial(self.algorithm.opened, planned)
        reason = refusal(upload, expected, came, self.cohort, opened)
        if not reason and self.clock and not upload.work:
            reason = "upload refused: it does not say what work it took, by which the clock goes"
        is_guarded = not reason and self.cohort.max_change_factor > 0
        return delivery, reason, norms_of(opened(upload), came) if is_guarded else None

    def _expected(self, planned: ServerState, delivery: Delivery) -> Expected:
        expected = self.algorithm.expected(self.parts, planned, delivery.client_id)
        return replace(expected, tables={}) if self._leaves_tables_out(delivery.upload) else expected

    def _leaves_tables_out(self, upload: Upload) -> bool:
        return self.is_private or (self.of_sites and not upload.tables)

    def _simulated(self, delivery: Delivery) -> dict[str, Any]:
        """Let the clock count a turn; return what it adds to the client's line."""
        return {} if self.clock is None else simulated_part(delivery, self.clock.turn(**turn_of(delivery)))

    def downloads(
        self, state: ServerState, reached: Checkpoint, client_ids: Sequence[str], round_number: int, task: str
    ) -> Iterator[tuple[str, Download]]:
        """Yield what each client is sent, made when its turn comes."""
        for client_id in client_ids:
            download = Download(
                round_number=round_number,
                task=task,
                sent=self.algorithm.download(state, client_id),
                kept_round=reached.kept_rounds.get(client_id, 0),
                config_sha256=self.config_sha256,
                run=self.run_name,
                largest_answer=self._largest(state, client_id) if task == "train" else LARGEST_ANSWER,
            )
            yield client_id, download

    def _largest(self, state: ServerState, client_id: str) -> int:
        """Return the bytes above which a round's upload is refused undecoded."""
        due = predict_upload_bytes(self.algorithm.expected(self.parts, state, client_id))
        return LARGEST_FACTOR * due

    def _refuse(self, record: RoundRecord, delivery: Delivery, reason: str) -> None:
        """Count an upload that came late or twice; name every failure."""
        if delivery.fenced:
            record.refused[delivery.fenced] = record.refused.get(delivery.fenced, 0) + 1
        if delivery.fenced in NO_FAILURES:
            told = logger.info if delivery.fenced in EXPECTED else logger.warning
            told("round %d: client %s: %s", record.round_number, delivery.client_id, reason)
        else:
            self._fail(record, [delivery.client_id], reason)

    def _fail(self, record: RoundRecord, client_ids: Sequence[str], reason: str) -> None:
        round_number = record.round_number
        for client_id in client_ids:
            if self.cohort.on_failure == "stop":
                raise UserError(
                    f"round {round_number} is refused: client {client_id}: {reason} "
                    '(cohort.on_failure is "stop"; with "continue" the run goes on without it)'
                )
            logger.warning("round %d goes on without client %s: %s", round_number, client_id, reason)
            record.failures.append({"round": round_number, "client": client_id, "reason": reason})


def _add_seconds(record: RoundRecord, total: float) -> None:
    for turn in record.taken:
        for phase, seconds in turn.items():
            record.seconds[phase] = record.seconds.get(phase, 0.0) + seconds
    record.seconds["aggregate"] = max(total - math.fsum(record.seconds.values()), 0.0)
    record.seconds["total"] = total


def client_line(delivery: Delivery, round_number: int, predicted: PredictedBytes) -> dict[str, Any]:
    """Return the client's line in clients.jsonl."""
    upload = delivery.upload
    tables = {name: table.tolist() for name, table in upload.tables.items()}
    own = {**upload.measured, **delivery.measured, **tables}
    return {
        "round": round_number,
        "client": delivery.client_id,
        **as_counts(upload.metrics),
        "algorithm": own,
        "upload_bytes": delivery.upload_bytes,
        "upload_predicted": predicted.upload,
        "download_bytes": delivery.download_bytes,
        "download_predicted": predicted.download,
        "seconds": {**upload.seconds, **delivery.seconds},
    }


def simulated_part(delivery: Delivery, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Return what a clock adds to a client's line: counted work, and simulated seconds by phase."""
    work = from_figures(delivery.upload.work)
    return {
        "work": {phase: asdict(own) for phase, own in work.items()},
        "simulated_seconds": dict(seconds),
    }


def as_counts(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return metrics with whole numbers where the name says that they are counts."""
    return {name: int(value) if name.startswith("num_") else value for name, value in metrics.items()}
