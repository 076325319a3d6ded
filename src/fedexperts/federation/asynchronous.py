"""Asynchronous rounds: the server makes a step as soon as a buffer of uploads is full (FedBuff).

Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022, arXiv 2106.06581,
Algorithm 1, over the simulated clock: it says who comes when. docs/asynchronous.md has the whole rule.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Generic, TypeVar

from torch import Tensor

from fedexperts.algorithms.aggregation import start_of
from fedexperts.algorithms.api import ServerState
from fedexperts.federation.asynchronous_settings import AsynchronousSettings
from fedexperts.federation.checkpoint import Checkpoint
from fedexperts.federation.clock import Clock
from fedexperts.federation.fencing import turn_of
from fedexperts.federation.ledger import FENCES, Ledger
from fedexperts.federation.norm_guard import Judged, guarded
from fedexperts.federation.personal import read_tensors
from fedexperts.federation.rounds import Federation, RoundRecord, simulated_part
from fedexperts.federation.transport import Delivery
from fedexperts.federation.under_way import TurnUnderWay, UploadFolder, UploadUnderWay
from fedexperts.messages import Upload
from fedexperts.seeds import derive_random
from fedexperts.tensors import Tensors

STALE = "stale"
"""Key in ``federation.ledger.FENCES``."""

One = TypeVar("One", bound=TurnUnderWay)


@dataclass(kw_only=True)
class Buffer(Generic[One]):
    """One step's buffer, and how it fills: who is asked when, and whose uploads come first."""

    settings: AsynchronousSettings
    client_ids: Sequence[str]
    """All clients, in the order of the data."""
    seed: int
    round_number: int
    now: float
    """Simulated time: at first the end of the last step."""
    under_way: list[One]
    """Turns that have begun and whose uploads have not come."""
    ask: Callable[[Sequence[str], float], Iterable[One]]
    """Begins turns at a time, and returns those that did not fail."""
    arrived: list[One] = field(default_factory=list)
    """Uploads that make the step; once it is full in the order of the data."""
    too_old: list[One] = field(default_factory=list)
    _asked: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Number the clients."""
        self._places = {client_id: place for place, client_id in enumerate(self.client_ids)}

    def fill(self) -> None:
        """Let the clock run until the buffer is full, or nobody is left whose upload could come."""
        self._ask_free()
        while self.under_way and len(self.arrived) < self.settings.buffer:
            one = min(self.under_way, key=lambda each: (each.turn.uploaded, self._place(each)))
            self.under_way.remove(one)
            self.now = max(self.now, one.turn.uploaded)
            is_too_old = self.settings.is_too_old(self.staleness(one))
            (self.too_old if is_too_old else self.arrived).append(one)
            if len(self.arrived) < self.settings.buffer:
                self._ask_free()
        self.arrived.sort(key=self._place)

    def staleness(self, one: One) -> int:
        """Return the steps that the server has made since the client received its state."""
        return self.round_number - 1 - one.received

    def _place(self, one: One) -> int:
        return self._places[one.turn.client_id]

    def _ask_free(self) -> None:
        """Give work to free clients while there are places; a client that fails leaves its own to another."""
        while chosen := self._next_clients():
            self._asked.update(chosen)
            self.under_way += self.ask(chosen, self.now)

    def _next_clients(self) -> list[str]:
        """Return the clients that begin a turn now: of those not at work, without an upload in this step."""
        waiting = {one.turn.client_id for one in (*self.under_way, *self.arrived)} | self._asked
        free = [client_id for client_id in self.client_ids if client_id not in waiting]
        places = (self.settings.concurrency or len(self.client_ids)) - len(self.under_way)
        if places >= len(free):
            return free
        rng = derive_random(self.seed, "asynchronous", self.round_number, len(self._asked))
        drawn = set(rng.sample(free, max(places, 0)))
        return [client_id for client_id in free if client_id in drawn]


@dataclass(frozen=True, kw_only=True)
class AsynchronousFederation(Federation):
    """A server that does not wait for all: each round is one step, of the first uploads to come."""

    asynchronous: AsynchronousSettings
    folder: UploadFolder
    """Folder of the uploads under way."""
    states: Callable[[int], Path]
    """Function that returns the file with the server's tensors after a round."""

    @property
    def _clock(self) -> Clock:
        assert self.clock is not None, "refused with the settings"
        return self.clock

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
                self._clock.count(one.turn)
                yield delivery.client_id, self._fresh(delivery.upload, one, planned, weight)
            after_client(delivery.client_id)
        record.asynchronous = _figures(record.clients, len(buffer.under_way))

    def _fresh(self, upload: Upload, one: UploadUnderWay, planned: ServerState, weight: float) -> Upload:
        """Return an upload as it would be if its client had begun from the present state."""
        if one.received == planned.round_number:
            return upload
        received = read_tensors(self.states(one.received))
        return replace(upload, tensors=rebased(upload.tensors, received, planned.tensors, weight))

    def _filled(self, planned: ServerState, start: Checkpoint, record: RoundRecord) -> Buffer[UploadUnderWay]:
        ledger = Ledger(run=self.run_name, round_number=record.round_number)
        buffer = Buffer(
            settings=self.asynchronous,
            client_ids=[facts.client_id for facts in planned.clients],
            seed=self.seed,
            round_number=record.round_number,
            now=self._clock.now,
            under_way=list(start.under_way),
            ask=partial(self._begun, planned, start, record, ledger),
        )
        buffer.fill()
        for one in buffer.too_old:
            reason = f"upload refused: {FENCES[STALE]}: {buffer.staleness(one)} steps"
            self._refuse(record, _delivery(one, Upload(), fenced=STALE), reason)
        self._clock.wait_until(buffer.now)
        record.cohort = tuple(one.turn.client_id for one in buffer.arrived)
        record.under_way = () if record.round_number == self.num_rounds else tuple(buffer.under_way)
        return buffer

    def _begun(
        self,
        planned: ServerState,
        start: Checkpoint,
        record: RoundRecord,
        ledger: Ledger,
        client_ids: Sequence[str],
        now: float,
    ) -> Iterator[UploadUnderWay]:
        """Take turns that begin ``now`` and judge their uploads, which come later; tell failures at once."""
        downloads = self.downloads(planned, start, client_ids, record.round_number, "train")
        for answer in self.transport.exchange(downloads):
            delivery, reason, norms = self._judged(planned, ledger, answer)
            if reason:
                self._refuse(record, delivery, reason)
                continue
            turn, seconds = self._clock.timed(**turn_of(delivery), start=now)
            line = self._line(planned, ledger, delivery, record) | simulated_part(delivery, seconds)
            begun = TurnUnderWay(turn=turn, received=planned.round_number)
            yield self.folder.write(delivery.upload, begun, line | {"simulated_start": now}, norms)


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
