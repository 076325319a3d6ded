"""Asynchronous rounds: the server makes a step as soon as a buffer of uploads is full (FedBuff).

Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022, arXiv 2106.06581,
Algorithm 1. In process the simulated clock says who comes when; over Flower uploads come when they come.
docs/asynchronous.md has the whole rule.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from fedexperts.algorithms.aggregation import start_of
from fedexperts.algorithms.api import ServerState
from fedexperts.federation.asynchronous_settings import AsynchronousSettings
from fedexperts.federation.buffer import Buffer, ByArrival, ByClock
from fedexperts.federation.checkpoint import Checkpoint
from fedexperts.federation.clock import Turn
from fedexperts.federation.fencing import turn_of
from fedexperts.federation.ledger import FENCES, Ledger
from fedexperts.federation.norm_guard import Judged, guarded
from fedexperts.federation.personal import read_tensors
from fedexperts.federation.rounds import Federation, RoundRecord, simulated_part
from fedexperts.federation.transport import ArrivingTransport, Delivery
from fedexperts.federation.under_way import TurnUnderWay, UploadFolder, UploadUnderWay
from fedexperts.messages import Upload
from fedexperts.tensors import Tensors

STALE = "stale"
"""Key in ``federation.ledger.FENCES``."""


@dataclass(frozen=True, kw_only=True)
class AsynchronousFederation(Federation):
    """A server that does not wait for all: each round is one step, of the first uploads to come."""

    asynchronous: AsynchronousSettings
    folder: UploadFolder
    """Folder of the uploads that make no step yet."""
    states: Callable[[int], Path]
    """Function that returns the file with the server's tensors after a round."""
    arriving: ArrivingTransport | None = None
    """The transport, where uploads come when they come; None where the clock says when."""

    def _num_awaited(self, cohort: Sequence[str]) -> int:
        return self.asynchronous.buffer

    def _accepted(
        self,
        planned: ServerState,
        start: Checkpoint,
        record: RoundRecord,
        after_client: Callable[[str], None],
    ) -> Iterator[tuple[str, Upload]]:
        """Yield the uploads of a full buffer, each as if its client had begun from the present state."""
        buffer = self._filled(planned, start, record)
        arrived = {one.turn.client_id: one for one in buffer.arrived}
        judged: Iterator[Judged] = (
            (_delivery(one, self.folder.read(one)), "", one.norms) for one in buffer.arrived
        )
        for delivery, reason in guarded(judged, self.cohort.max_change_factor):
            one = arrived[delivery.client_id]
            if reason:
                self._refuse(record, delivery, reason)
            else:
                staleness = buffer.staleness(one)
                weight = self.asynchronous.weight(staleness)
                late = {"staleness": staleness, "staleness_weight": weight}
                record.clients.append({**one.line, "round": record.round_number, **late})
                if self.clock:
                    self.clock.count(one.turn)
                yield delivery.client_id, self._fresh(delivery.upload, one, planned, weight)
            after_client(delivery.client_id)
        record.asynchronous = _figures(record.clients, len(buffer.source.under_way))

    def _fresh(self, upload: Upload, one: UploadUnderWay, planned: ServerState, weight: float) -> Upload:
        """Return an upload as it would be if its client had begun from the present state."""
        received = self._received(planned, one)
        if received is planned:
            return upload
        return replace(upload, tensors=rebased(upload.tensors, received.tensors, planned.tensors, weight))

    def _received(self, planned: ServerState, one: TurnUnderWay) -> ServerState:
        """Return the state that a client received at the beginning of its turn."""
        if one.received == planned.round_number:
            return planned
        return replace(planned, round_number=one.received, tensors=read_tensors(self.states(one.received)))

    def _filled(self, planned: ServerState, start: Checkpoint, record: RoundRecord) -> Buffer[UploadUnderWay]:
        by_clock = self._by_clock(planned, start, record) if self.arriving is None else None
        buffer = Buffer(
            settings=self.asynchronous,
            client_ids=[facts.client_id for facts in planned.clients],
            seed=self.seed,
            round_number=record.round_number,
            source=by_clock or self._by_arrival(planned, start, record),
        )
        buffer.fill()
        for one in buffer.too_old:
            reason = f"upload refused: {FENCES[STALE]}: {buffer.staleness(one)} steps"
            self._refuse(record, _delivery(one, Upload(), fenced=STALE), reason)
        if by_clock and self.clock:
            self.clock.wait_until(by_clock.now)
        record.cohort = tuple(one.turn.client_id for one in buffer.arrived)
        is_last = record.round_number == self.num_rounds
        record.under_way = () if is_last else tuple(buffer.source.under_way)
        return buffer

    def _by_clock(
        self, planned: ServerState, start: Checkpoint, record: RoundRecord
    ) -> ByClock[UploadUnderWay]:
        assert self.clock is not None, "refused with the settings"
        return ByClock(
            client_ids=[facts.client_id for facts in planned.clients],
            now=self.clock.now,
            under_way=start.uploads,
            begin=partial(self._begun, planned, start, record),
        )

    def _begun(
        self,
        planned: ServerState,
        start: Checkpoint,
        record: RoundRecord,
        client_ids: Sequence[str],
        now: float,
    ) -> Iterator[UploadUnderWay]:
        """Take turns that begin ``now`` and judge their uploads, which come later; tell failures at once."""
        downloads = self.downloads(planned, start, client_ids, record.round_number, "train")
        ledger = Ledger(run=self.run_name, round_number=record.round_number)
        for answer in self.transport.exchange(downloads):
            if one := self._taken(planned, ledger, record, answer, now):
                yield one

    def _by_arrival(
        self, planned: ServerState, start: Checkpoint, record: RoundRecord
    ) -> ByArrival[UploadUnderWay]:
        assert self.arriving is not None
        transport = self.arriving

        def begin(client_ids: Sequence[str]) -> Iterator[TurnUnderWay]:
            transport.begin(self.downloads(planned, start, client_ids, record.round_number, "train"))
            for client_id in client_ids:
                yield TurnUnderWay(turn=Turn(client_id=client_id), received=planned.round_number)

        def taken(one: TurnUnderWay, answers: Iterable[Delivery]) -> UploadUnderWay | None:
            received = self._received(planned, one)
            ledger = Ledger(run=self.run_name, round_number=one.received + 1)
            uploads = [self._taken(received, ledger, record, answer) for answer in answers]
            return next(filter(None, uploads), None)

        return ByArrival(
            under_way=list(start.under_way), begin=begin, next_arrival=transport.next_arrival, taken=taken
        )

    def _taken(
        self, received: ServerState, ledger: Ledger, record: RoundRecord, answer: Delivery, now: float = 0.0
    ) -> UploadUnderWay | None:
        """Judge the upload of a turn that began ``now``, by the clock, and keep it on disk.

        One that is refused is told, and None returned.
        """
        delivery, reason, norms = self._judged(received, ledger, answer)
        if reason:
            self._refuse(record, delivery, reason)
            return None
        turn, line = Turn(client_id=delivery.client_id), self._line(received, ledger, delivery, record)
        if self.clock:
            turn, seconds = self.clock.timed(**turn_of(delivery), start=now)
            line |= simulated_part(delivery, seconds) | {"simulated_start": now}
        begun = TurnUnderWay(turn=turn, received=received.round_number)
        return self.folder.write(delivery.upload, begun, line, norms)


def rebased(
    tensors: Mapping[str, Tensor],
    received: Mapping[str, Tensor],
    present: Mapping[str, Tensor],
    weight: float,
) -> Tensors:
    """Return ``present + weight * (tensors - received)`` by name, computed in float64."""
    return {
        name: (
            start_of(name, tensor, present) + weight * (tensor.double() - start_of(name, tensor, received))
        ).to(tensor.dtype)
        for name, tensor in tensors.items()
    }


def _delivery(one: UploadUnderWay, upload: Upload, *, fenced: str = "") -> Delivery:
    return Delivery(
        client_id=one.turn.client_id,
        upload=upload,
        download_bytes=one.line["download_bytes"],
        upload_bytes=one.line["upload_bytes"],
        fenced=fenced,
    )


def _figures(lines: Sequence[Mapping[str, Any]], num_at_work: int) -> dict[str, Any]:
    """Return what a round's line says of its uploads' age, and of the clients that work on."""
    ages = [line["staleness"] for line in lines]
    if not ages:
        return {"num_at_work": num_at_work}
    return {
        "staleness_mean": fmean(ages),
        "staleness_max": max(ages),
        "weight_mean": fmean(line["staleness_weight"] for line in lines),
        "num_at_work": num_at_work,
    }
