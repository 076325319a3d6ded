"""Transport to worker processes on this machine: clients take their turns side by side.

Answers are delivered in the order of the downloads, so the server adds them up in the order, and to the bits,
of :class:`~fedexperts.federation.inprocess.InProcess`; messages are serialised in the same way.
"""

import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from fedexperts.algorithms.api import ClientFacts
from fedexperts.errors import UserError
from fedexperts.federation.edge import failure_of, read_answer
from fedexperts.federation.runtime import ClientRuntime
from fedexperts.federation.transport import Delivery, Finished
from fedexperts.messages import Download, Upload, decode_download, encode_download, encode_upload
from fedexperts.processes import OpenState, Tell, WorkerEnded, Workers, relay_log

UPLOADED = "uploaded"
"""Event of a turn that goes on: its answer, and what was measured until then."""
MOST_AHEAD = 2
"""Downloads sent ahead of those that workers are busy with, so that none waits while the server adds up."""


class WorkerPool(Workers[ClientRuntime]):
    """Implements :class:`~fedexperts.federation.transport.Transport`."""

    def __init__(
        self, num_workers: int, open_runtime: OpenState[ClientRuntime], clients: tuple[ClientFacts, ...]
    ) -> None:
        """Start nothing yet; there will be no more workers than clients."""
        self.clients = clients
        self.num_workers = min(num_workers, len(clients))
        self._turns: list[Future[Finished | None]] = []
        super().__init__(self.num_workers, open_runtime)

    def start(self) -> Iterator[None]:
        """Start all processes at once; yield whenever one of them has loaded its model.

        Raises:
            UserError: a process ended before it had.
        """
        try:
            yield from super().start()
        except WorkerEnded as error:
            raise UserError(f"loading the model in {self.num_workers} workers: {_reason(error)}") from None

    def exchange(self, downloads: Iterable[tuple[str, Download]]) -> Iterator[Delivery]:
        """See the protocol; the server holds at most :data:`MOST_AHEAD` messages more than workers."""
        waiting, under_way, self._turns = iter(downloads), deque[Future[Delivery]](), []
        busy: list[Future[Finished | None]] = []
        while True:
            # A turn that goes on after its upload counts too; of more turns than workers one is undelivered.
            most = self.num_workers + MOST_AHEAD
            while max(len(under_way), len(busy := open_ones(busy))) < most and (item := next(waiting, None)):
                client_id, download = item
                delivery: Future[Delivery] = Future()
                message, largest = encode_download(download), download.largest_answer
                turn = self.submit(self._deliver, client_id, message, largest, delivery)
                self._turns.append(turn)
                busy.append(turn)
                under_way.append(delivery)
            if not under_way:
                return
            yield under_way.popleft().result()

    def finish_round(self) -> Sequence[Finished]:
        """See the protocol."""
        turns, self._turns = self._turns, []
        return [finished for turn in turns if (finished := turn.result())]

    def _deliver(
        self, client_id: str, message: bytes, largest: int, delivery: Future[Delivery]
    ) -> Finished | None:
        """Deliver an upload as soon as it is there; return how a turn ended that went on after it."""
        started = time.perf_counter()

        def deliver(answer: bytes, measured: dict[str, float]) -> None:
            upload, num_bytes = read_answer(lambda: answer, largest)
            busy = math.fsum(upload.seconds.values())
            delivery.set_result(
                Delivery(
                    client_id=client_id,
                    upload=upload,
                    download_bytes=len(message),
                    upload_bytes=num_bytes,
                    seconds={"transport": max(time.perf_counter() - started - busy, 0.0)},
                    measured=measured,
                )
            )

        def on_event(event: str, *values: Any) -> None:
            if event == UPLOADED:
                deliver(*values)
            else:
                relay_log(event, *values)

        try:
            answer, measured = self.ask(client_id, message, on_event)
        except WorkerEnded as error:
            if delivery.done():
                reason = f"client {client_id}: {_reason(error)}, after its upload"
                raise UserError(f"the round is refused: {reason}; resume the run to repeat it") from None
            answer, measured = encode_upload(Upload(failure=_reason(error))), {}
        except BaseException as error:
            if not delivery.done():
                delivery.set_exception(error)
            raise
        if not delivery.done():
            deliver(answer, measured)
            return None
        end = read_answer(lambda: answer, largest)[0]
        return Finished(client_id=client_id, seconds=end.seconds, measured=measured, failure=end.failure)

    def ask(self, client_id: str, message: bytes, on_event: Tell) -> tuple[bytes, dict[str, float]]:
        """Return a worker's answer to a download, and what was measured of the worker meanwhile: nothing."""
        return self.call(take_turn, client_id, message, on_event=on_event), {}

    def model_hashes(self) -> Sequence[str]:
        """Return the hash of each worker's resident model; nothing else may be going on."""
        return self.call_all(ClientRuntime.model_sha256)


def open_ones(turns: Iterable[Future[Finished | None]]) -> list[Future[Finished | None]]:
    """Return the turns that have not ended, to be asked for again: the others never."""
    return [turn for turn in turns if not turn.done()]


def take_turn(runtime: ClientRuntime, client_id: str, message: bytes) -> bytes:
    """Answer a download as ``client_id``; the part of :meth:`WorkerPool.exchange` inside a worker."""
    return answer_as(runtime, client_id, decode_download(message))


def answer_as(runtime: ClientRuntime, client_id: str, download: Download) -> bytes:
    """Return the bytes of the answer of ``client_id``."""
    return encoded(runtime.handle(client_id, download))


def encoded(upload: Upload) -> bytes:
    """Return an upload as bytes, or the failure to make them."""
    try:
        return encode_upload(upload)
    except Exception as error:
        return encode_upload(failure_of(error))


def hand_over_by(tell: Tell, measure: Callable[[], dict[str, float]]) -> Callable[[Upload], None]:
    """Return the function by which a worker's runtime delivers an upload before its turn has ended."""
    return lambda upload: tell(UPLOADED, encoded(upload), measure())


def _reason(error: WorkerEnded) -> str:
    is_killed = error.exit_code == -signal.SIGKILL
    return f"worker {error}" + ("; if memory ran out, fewer workers need less of it" if is_killed else "")
