"""Letters to Flower's nodes: a download is sent, its answer taken in, and what is late or lost is told."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial

from flwr.app import Message
from flwr.serverapp import Grid

from fedexperts.federation.edge import failure_of, refuse_large
from fedexperts.federation.flower_sent import NodeLostError, Patience, SentDownload, blob_of, pulled
from fedexperts.federation.spool import Spool
from fedexperts.federation.wire import pack
from fedexperts.messages import Download, encode_download

logger = logging.getLogger(__name__)

IDENTIFY = "identify"
"""Task of the download that asks a node which client it is; its answer is a report and no tensor."""

FORGOTTEN = "its node has started anew, and has forgotten its turn"

MOST_LOSSES = 5
"""Times that one download may be lost with its node; a turn that kills the node each time is not asked for
for ever."""

GRACE_SECONDS = 10.0
"""A message lives so much longer than its answer is waited for: Flower must not be asked for a dead one."""


class Post:
    """One Grid, and how long its nodes' answers are waited for."""

    def __init__(
        self,
        grid: Grid,
        *,
        config_sha256: str,
        patience: Patience,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Send questions under ``config_sha256``, and go by ``clock``."""
        self._grid, self._config_sha256, self._patience, self._clock = grid, config_sha256, patience, clock

    def letter(
        self, client_id: str, download: Download, message: Callable[[], bytes], started: float = math.inf
    ) -> SentDownload:
        """Return a download to be sent now; a round's deadline counts from ``started``."""
        at = self._clock()
        deadline = at + self._patience.answer_seconds
        if download.task == "train" and self._patience.round_seconds:
            deadline = min(deadline, started + self._patience.round_seconds)
        return SentDownload(client_id=client_id, download=download, message=message, at=at, deadline=deadline)

    def question(self, node_id: int) -> SentDownload:
        """Return the question who a node is."""
        download = self._question()
        return self.letter(str(node_id), download, partial(encode_download, download))

    def _question(self) -> Download:
        return Download(round_number=0, task=IDENTIFY, config_sha256=self._config_sha256)

    def push(self, sent: SentDownload, node_id: int) -> None:
        """Send it to a node, maybe once more."""
        blob = sent.message()
        sent.node_id, sent.asked_at, sent.probe_id = node_id, self._clock(), ""
        sent.num_bytes, sent.message_id = len(blob), self._pushed(sent, sent.download, blob)
        if not sent.message_id:
            sent.failure = "Flower did not take its download"

    def _pushed(self, sent: SentDownload, download: Download, blob: bytes) -> str:
        """Return the id of a message to the node, or nothing if Flower does not take it."""
        message = Message(
            pack(blob),
            sent.node_id,
            "train",
            ttl=sent.deadline - self._clock() + GRACE_SECONDS,
            group_id=f"{download.task} {download.round_number}",
        )
        message_ids = list(self._grid.push_messages([message]))
        return (message_ids[0] if message_ids else None) or ""

    def take_in(self, sent: SentDownload, spool: Spool | None = None) -> None:
        """Take in what answers it, unless it is lost or settled.

        Flower is asked for one message id at a time: of several it would hold all answers that are there.
        With ``spool`` the answer waits on disk. One that is too large is dropped at once.
        """
        if sent.lost or sent.is_settled:
            return
        is_done = self._is_done_with(sent)
        for reply in self._replies(sent):
            sent.answered = self._clock()
            try:
                blob = blob_of(reply)
                refuse_large(len(blob), sent.download.largest_answer)
            except NodeLostError as error:
                self.lose(sent, str(error))
            except Exception as error:
                sent.failure = sent.failure or failure_of(error).failure
            else:
                sent.blobs.append(spool.keep(blob) if spool else partial(bytes, blob))
        if is_done and not (sent.lost or sent.is_settled):
            self.lose(sent, FORGOTTEN)

    def _is_done_with(self, sent: SentDownload) -> bool:
        """Whether the node has answered a probe that was sent after a long silence.

        A node answers one message after the other. One that was killed and came back before anybody missed it
        answers the probe alone.
        """
        if not sent.probe_id and self._clock() - sent.asked_at >= self._patience.probe_seconds:
            question = self._question()
            sent.probe_id = self._pushed(sent, question, encode_download(question))
        replies = list(self._grid.pull_messages([sent.probe_id])) if sent.probe_id else []
        if any(reply.has_error() for reply in replies):
            sent.probe_id, sent.asked_at = "", self._clock()
        return bool(replies and sent.probe_id)

    def _replies(self, sent: SentDownload) -> Sequence[Message]:
        """Return what answers a download now; lose it where its node goes while it sends its answer."""
        try:
            return pulled(self._grid, sent.message_id, sent.node_id)
        except NodeLostError as error:
            self.lose(sent, str(error))
            return []

    def lose(self, sent: SentDownload, reason: str) -> None:
        """Wait for a client that is lost until it is back, where all are needed; else it has failed."""
        sent.num_losses += 1
        is_waited_for = self._patience.needs_all and sent.download.task != IDENTIFY
        if is_waited_for and sent.num_losses < MOST_LOSSES:
            sent.lost = reason
            logger.warning("waiting for client %s: %s", sent.client_id, reason)
        else:
            sent.failure = reason

    def is_over(self, sent: SentDownload) -> bool:
        """Whether an answer is there, or will not count any more; one that is late by now will not."""
        if not sent.is_settled and self._clock() >= sent.deadline:
            self._give_up(sent)
        return sent.is_settled

    def _give_up(self, sent: SentDownload) -> None:
        if sent.lost:
            sent.failure, sent.lost = sent.lost, ""
            return
        patience = self._patience
        is_round = sent.deadline < sent.at + patience.answer_seconds
        key, value = (
            ("round_seconds", patience.round_seconds)
            if is_round
            else ("timeout_seconds", patience.answer_seconds)
        )
        sent.failure, sent.fenced = f"no answer within transport.{key} = {value:g}", "late"
