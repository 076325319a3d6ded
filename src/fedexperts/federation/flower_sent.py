"""Downloads on their way to Flower's nodes, how long a server waits for the answers, and lost ones."""

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field

from flwr.app import Message
from flwr.serverapp import Grid

from fedexperts.errors import UserError
from fedexperts.federation.wire import unpack
from fedexperts.messages import Download

LOST = {
    3: "its answer was lost: ",
    4: "its answer was lost: ",
    5: "its node is no longer connected: ",
    8: "its turn was killed: ",
}
"""Flower's error codes that stand for the answer of a node which may come back, and what each means."""

GONE_SENDING = "its node is no longer connected: it went while it sent its answer"
LOOK_SECONDS = 1.0
"""Seconds between two looks whether a node is there whose answer is being read."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Limits of a server's waiting."""

    answer_seconds: float
    """Longest wait until every client is there, and for one client's answer."""
    round_seconds: float = 0.0
    """Deadline of a training round; 0 for none."""
    wanted: int = 0
    """Uploads of a training round after which no other is waited for; 0 to wait for all."""
    probe_seconds: float = math.inf
    """Seconds of silence after which a node is asked whether it has started anew and forgotten its turn."""
    needs_all: bool = False
    """Whether a client whose node is lost is waited for, as for its answer; else it has failed at once."""


@dataclass(kw_only=True)
class SentDownload:
    """One download on its way, and its answer once it is there."""

    client_id: str
    download: Download
    """Without its tensors where the message lies on disk."""
    message: Callable[[], bytes]
    """Returns the download as it is sent, maybe more than once."""
    node_id: int = 0
    """Flower's node that was asked last."""
    message_id: str = ""
    asked_at: float = 0.0
    """Time when that node was asked."""
    probe_id: str = ""
    """Message behind it whose answer says that the node is done with it, or has forgotten it."""
    num_bytes: int = 0
    at: float
    deadline: float
    """Time after which its answer does not count."""
    answered: float = 0.0
    failure: str = ""
    lost: str = ""
    """Why the client has to be asked again, as soon as it is back; empty while its answer may come."""
    num_losses: int = 0
    fenced: str = ""
    blobs: list[Callable[[], bytes]] = field(default_factory=list)
    """Answers that came: one, unless a client sends more."""

    @property
    def is_settled(self) -> bool:
        """Whether nothing more is waited for."""
        return bool(self.blobs or self.failure)

    @property
    def is_training(self) -> bool:
        """Whether its answer is an upload of a round."""
        return self.download.task == "train"


class NodeLostError(UserError):
    """A node has gone with the message that it was to answer."""


def blob_of(reply: Message) -> bytes:
    """Return the bytes of an answer.

    Raises:
        NodeLostError: the node has gone, and may come back.
        UserError: there is none for another reason.
    """
    if not reply.has_error():
        return unpack(reply.content)
    reason = " ".join((reply.error.reason or "no reason given").split())
    told = f"Flower error {reply.error.code}: {reason[:500]}"
    lost = LOST.get(reply.error.code)
    raise NodeLostError(f"{lost}{told}") if lost else UserError(told)


def pulled(grid: Grid, message_id: str, node_id: int) -> Sequence[Message]:
    """Return the answers to a message that are there.

    If its node goes while it sends its answer, Flower waits three minutes for the rest: that is left to a
    thread that ends then.

    Raises:
        NodeLostError: the node has gone so.
    """
    found: Future[list[Message]] = Future()
    threading.Thread(target=_pull, args=(grid, message_id, found), daemon=True).start()
    while not wait([found], LOOK_SECONDS).done:
        if node_id not in set(grid.get_node_ids()):
            raise NodeLostError(GONE_SENDING)
    return found.result()


def _pull(grid: Grid, message_id: str, found: Future[list[Message]]) -> None:
    try:
        found.set_result(list(grid.pull_messages([message_id])))
    except BaseException as error:
        found.set_exception(error)
