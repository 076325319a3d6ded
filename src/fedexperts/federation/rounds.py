"""The round loop, over any transport."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedexperts.algorithms.aggregation import check_upload
from fedexperts.algorithms.api import Algorithm, ServerState
from fedexperts.costs.round import PredictedBytes
from fedexperts.errors import UserError
from fedexperts.federation.cohort import CohortSettings, draw_cohort
from fedexperts.federation.transport import Delivery, Transport
from fedexperts.messages import Download, Upload
from fedexperts.tensors import sha256_of

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class RoundRecord:
    """What one round was: a line of rounds.jsonl, lines of clients.jsonl, and the failures."""

    round: int
    cohort: tuple[str, ...]
    clients: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    lr: float = 0.0

    def line(self, state: ServerState) -> dict[str, Any]:
        """The round's line in rounds.jsonl."""
        losses = [client["train_loss"] for client in self.clients]
        return {
            "round": self.round,
            "cohort": list(self.cohort),
            "train_loss": math.fsum(losses) / len(losses) if losses else None,
            "lr": self.lr,
            "upload_bytes": sum(client["upload_bytes"] for client in self.clients),
            "download_bytes": sum(client["download_bytes"] for client in self.clients),
            "num_failed": len(self.failures),
            "failures": self.failures,
            "seconds": self.seconds,
            "server_state_sha256": sha256_of(state.tensors),
        }


@dataclass(frozen=True, kw_only=True)
class Federation:
    """One run's server side."""

    algorithm: Algorithm
    transport: Transport
    cohort: CohortSettings
    num_rounds: int
    seed: int
    config_sha256: str
    predicted_bytes: PredictedBytes
    lr_of_round: Callable[[int], float]

    def run(
        self,
        state: ServerState,
        *,
        before_round: Callable[[int, Sequence[str]], None],
        after_client: Callable[[str], None],
        after_round: Callable[[ServerState, RoundRecord], None],
    ) -> ServerState:
        """All rounds after ``state.round``; ``after_round`` is where a round is made to last.

        Raises:
            UserError: a client failed and ``cohort.on_failure`` is ``stop``; the round does not count.
        """
        for round in range(state.round + 1, self.num_rounds + 1):
            cohort = draw_cohort(self.transport.client_ids, self.cohort, self.seed, round)
            before_round(round, cohort)
            record = RoundRecord(round=round, cohort=cohort, lr=self.lr_of_round(round))
            started = time.perf_counter()
            uploads = self._accepted(state, record, after_client)
            state = self.algorithm.server_update(state, uploads)
            self._time(record, time.perf_counter() - started)
            after_round(state, record)
        return state

    def _time(self, record: RoundRecord, total: float) -> None:
        for client in record.clients:
            for phase, seconds in client["seconds"].items():
                record.seconds[phase] = record.seconds.get(phase, 0.0) + seconds
        record.seconds["aggregate"] = max(total - math.fsum(record.seconds.values()), 0.0)
        record.seconds["total"] = total

    def _accepted(
        self, state: ServerState, record: RoundRecord, after_client: Callable[[str], None]
    ) -> Iterator[Upload]:
        for delivery in self.transport.exchange(self.downloads(state, record.cohort, record.round, "train")):
            reason = delivery.upload.failure or _refusal(delivery.upload, state)
            if reason:
                self._fail(record, delivery.client_id, reason)
            else:
                record.clients.append(_client_line(delivery, record.round, self.predicted_bytes))
                yield delivery.upload
            after_client(delivery.client_id)

    def downloads(
        self, state: ServerState, client_ids: Sequence[str], round: int, task: str
    ) -> Iterator[tuple[str, Download]]:
        """What each client is sent, made when it is its turn."""
        for client_id in client_ids:
            tensors = self.algorithm.download(state, client_id)
            yield (
                client_id,
                Download(round=round, task=task, tensors=tensors, config_sha256=self.config_sha256),
            )

    def _fail(self, record: RoundRecord, client_id: str, reason: str) -> None:
        if self.cohort.on_failure == "stop":
            raise UserError(
                f"round {record.round} is refused: client {client_id}: {reason} "
                '(cohort.on_failure is "stop"; with "continue" the run goes on without that client\'s upload)'
            )
        logger.warning("round %d goes on without client %s: %s", record.round, client_id, reason)
        record.failures.append({"round": record.round, "client": client_id, "reason": reason})


def _refusal(upload: Upload, state: ServerState) -> str:
    try:
        check_upload(upload, state)
    except UserError as error:
        return f"upload refused: {error}"
    return ""


def _client_line(delivery: Delivery, round: int, predicted: PredictedBytes) -> dict[str, Any]:
    """The client's line in clients.jsonl."""
    upload = delivery.upload
    report = {key: value for key, value in upload.report.items() if key != "seconds"}
    return {
        "round": round,
        "client": delivery.client_id,
        **upload.metrics,
        **report,
        "upload_bytes": delivery.upload_bytes,
        "upload_predicted": predicted.upload,
        "download_bytes": delivery.download_bytes,
        "download_predicted": predicted.download,
        "seconds": {**upload.report.get("seconds", {}), **delivery.seconds},
    }
