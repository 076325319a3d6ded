"""Transport over Flower's Grid: who the nodes are, whom a round waits for, and the order of answers."""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from flwr.serverapp import Grid

from fedexperts.algorithms.api import ClientFacts
from fedexperts.errors import UserError
from fedexperts.federation.edge import read_answer
from fedexperts.federation.flower_nodes import (
    ONE_OF_ONE,
    Node,
    Sites,
    count_of,
    known_node,
    node_of,
    refuse_mixed_counts,
)
from fedexperts.federation.flower_post import Post
from fedexperts.federation.flower_sent import Patience, SentDownload
from fedexperts.federation.spool import Spool
from fedexperts.federation.transport import Delivery, Finished
from fedexperts.messages import Download, Sent, Upload, brings_tensors, encode_download

logger = logging.getLogger(__name__)

MOST_UNANSWERED = 32
"""Downloads sent ahead of the answer that is next in order: what Flower, and in the worst case the server,
holds of a cohort at one time. A smaller cohort is sent all at once."""

POLL_SECONDS = 0.1
POLLS_PER_SWEEP = 10
"""The answer that is next in order is asked for at every poll, the later ones at every so many: those that
are there are taken in before Flower drops them. Where none is next, all are asked for after as many polls as
there are answers, but no more than these."""

NOT_CONNECTED = "its node is not connected"
FIRST_SAID_SECONDS = 5.0
"""Seconds after which sites that are not connected are named for the first time."""
SAID_SECONDS = 30.0
"""Seconds between two sentences that name the sites that are not connected."""


class FlowerTransport:
    """Implements :class:`~fedexperts.federation.transport.Transport`."""

    def __init__(
        self,
        grid: Grid,
        *,
        config_sha256: str,
        patience: Patience,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
        sites: Sites | None = None,
        spool_folder: Path | None = None,
        asks_again: Callable[[str], None] = lambda client_id: None,
    ) -> None:
        """Prepare to gather clients: of divided data, or ``sites`` that have their own.

        Answers that come before their turn wait on the disk of ``spool_folder``. ``asks_again`` is told a
        client before it is asked a second time for the upload of one round.
        """
        self._asks_again = asks_again
        self._sites = sites
        self._grid, self._patience, self._clock, self._pause = grid, patience, clock, pause
        self._post = Post(grid, config_sha256=config_sha256, patience=patience, clock=clock)
        self._timeout, self._spool_folder = patience.answer_seconds, spool_folder
        self._nodes: dict[str, Node] = {}
        self._begun: list[SentDownload] = []
        self._questions: dict[int, SentDownload] = {}
        self._strangers = set[int]()

    @property
    def clients(self) -> tuple[ClientFacts, ...]:
        """All clients, in the order of the data; the first use waits until there is a node for each."""
        return tuple(
            ClientFacts(client_id=node.client_id, num_train=node.num_train, memory_bytes=node.memory_bytes)
            for node in self._joined().values()
        )

    def _joined(self) -> dict[str, Node]:
        if not self._nodes:
            self._nodes = self._gather() if self._sites is None else self._gather_sites(self._sites)
        return self._nodes

    def exchange(self, downloads: Iterable[tuple[str, Download]]) -> Iterator[Delivery]:
        """See the protocol; at most :data:`MOST_UNANSWERED` downloads are sent ahead.

        Where enough uploads end a round (``wanted``), all are asked at once.
        """
        nodes, online = self._joined(), frozenset(self._grid.get_node_ids())
        items = ((name, known_node(name, nodes).node_id, download) for name, download in downloads)
        return self._exchange(items, online, self._begun)

    def begin(self, downloads: Iterable[tuple[str, Download]]) -> None:
        """See the protocol; downloads wait on disk, should one have to be sent again."""
        nodes, online = self._joined(), frozenset(self._grid.get_node_ids())
        spool = Spool(self._spool_folder)
        for name, download in downloads:
            message = spool.keep(encode_download(download))
            sent = self._post.letter(name, replace(download, sent=Sent()), message)
            self._send(sent, known_node(name, nodes).node_id, online)
            self._begun.append(sent)

    def next_arrival(self) -> tuple[str, Iterator[Delivery]]:
        """See the protocol; of two that are there the one that was asked first comes first."""
        while True:
            for place, sent in enumerate(self._begun):
                if self._is_over(sent):
                    del self._begun[place]
                    return sent.client_id, self._deliveries(sent)
            self._pause_for(self._begun)

    def _pause_for(self, asked: Collection[object]) -> None:
        """Pause before all of several answers are asked for again."""
        self._pause(POLL_SECONDS * min(max(len(asked), 1), POLLS_PER_SWEEP))

    def finish_round(self) -> tuple[Finished, ...]:
        """Return nothing: a node answers when its turn has ended."""
        return ()

    def _exchange(
        self,
        items: Iterable[tuple[str, int, Download]],
        online: Collection[int],
        begun: Collection[SentDownload] = (),
    ) -> Iterator[Delivery]:
        waiting, under_way, started = iter(items), deque[SentDownload](), self._clock()
        most = max(MOST_UNANSWERED, len(self._nodes) if self._patience.wanted else 0)
        spool = Spool(self._spool_folder)
        while True:
            while len(under_way) < most and (item := next(waiting, None)) is not None:
                name, node_id, download = item
                sent = self._post.letter(name, download, partial(encode_download, download), started)
                self._send(sent, node_id, online)
                under_way.append(sent)
            if not under_way:
                return
            if self._patience.wanted and under_way[0].is_training:
                self._settle_first(under_way, spool)
            first = under_way.popleft()
            self._await(first, (*under_way, *begun), spool)
            yield from self._deliveries(first)

    def _send(self, sent: SentDownload, node_id: int, online: Collection[int]) -> None:
        if node_id not in online:
            self._post.lose(sent, NOT_CONNECTED)
        elif not self._post.is_over(sent):
            self._post.push(sent, node_id)

    def _settle_first(self, under_way: Collection[SentDownload], spool: Spool) -> None:
        """Wait until enough uploads have come, or all that will; refuse the others as surplus."""
        wanted, open_ones, num_good = self._patience.wanted, list(under_way), 0
        while num_good < wanted and (open_ones := [sent for sent in open_ones if not sent.is_settled]):
            for sent in open_ones:
                if num_good < wanted and self._is_over(sent, spool) and sent.blobs:
                    num_good += brings_tensors(sent.blobs[0]())
            if num_good < wanted:
                self._pause(POLL_SECONDS)
        for sent in under_way:
            if not sent.is_settled:
                sent.failure, sent.fenced = f"upload refused: the first {wanted} had come", "surplus"

    def _await(self, first: SentDownload, later: Iterable[SentDownload], spool: Spool) -> None:
        """Wait for the answer to ``first``, or until it is too late; take in what answers later ones."""
        polls = 0
        while not self._is_over(first):
            polls += 1
            if polls % POLLS_PER_SWEEP == 0:
                for sent in later:
                    self._take_in(sent, spool)
            self._pause(POLL_SECONDS)

    def _is_over(self, sent: SentDownload, spool: Spool | None = None) -> bool:
        """Ask once for an answer; return whether it is there, or will not count any more."""
        self._take_in(sent, spool)
        return self._post.is_over(sent)

    def _take_in(self, sent: SentDownload, spool: Spool | None = None) -> None:
        """Take in what is there, with ``spool`` on disk; ask a client again that was lost and is back."""
        if sent.lost:
            self._ask_again(sent)
        self._post.take_in(sent, spool)

    def _ask_again(self, sent: SentDownload) -> None:
        """Send a download once more as soon as its client is there, maybe as another node."""
        online = frozenset(self._grid.get_node_ids())
        if self._nodes[sent.client_id].node_id not in online:
            self._take_back(online)
        node = self._nodes[sent.client_id]
        if node.node_id in online:
            sent.lost = ""
            logger.info("client %s is back and is asked again", sent.client_id)
            if sent.is_training and sent.message_id:
                self._asks_again(sent.client_id)
            self._post.push(sent, node.node_id)

    def _take_back(self, online: Collection[int]) -> None:
        """Ask nodes that are new who they are; one may be a client whose node is gone."""
        there = {name: node for name, node in self._nodes.items() if node.node_id in online}
        known = self._strangers | {node.node_id for node in there.values()}
        sites = self._sites or Sites(number=len(self._nodes))
        for question in self._answered(filter(sites.may_ask, online), known):
            try:
                node = self._node_of(question)
            except UserError as error:
                self._strangers.add(question.node_id)
                logger.warning("%s", error)
                continue
            reason = sites.refusal(node.node_id, node.client_id, there)
            if node.client_id in self._nodes and not reason:
                self._nodes[node.client_id] = there[node.client_id] = node
            else:
                self._strangers.add(node.node_id)
                logger.warning("Flower node %d is refused: %s", node.node_id, reason or "it is no client")

    def _deliveries(self, sent: SentDownload) -> Iterator[Delivery]:
        """Yield the answer, whatever came, and further ones of a training round, which do not count."""
        if not sent.blobs:
            yield self._delivery(sent, Upload(failure=sent.failure), 0)
            return
        blobs = sent.blobs if sent.is_training else sent.blobs[:1]
        while blobs:
            yield self._delivery(sent, *read_answer(blobs.pop(0), sent.download.largest_answer))

    def _delivery(self, sent: SentDownload, upload: Upload, num_bytes: int) -> Delivery:
        busy = math.fsum(upload.seconds.values())
        return Delivery(
            client_id=sent.client_id,
            upload=upload,
            download_bytes=sent.num_bytes,
            upload_bytes=num_bytes,
            seconds={"transport": max(sent.answered - sent.at - busy, 0.0)},
            fenced=sent.fenced,
        )

    def _gather(self) -> dict[str, Node]:
        """Nodes by client, in the order of the data; asks each node that appears until all are there."""
        started, done, found, wanted = self._clock(), set[int](), dict[int, Node](), 1
        while len(found) < wanted:
            if self._is_too_late(started, wanted - len(found)):
                raise UserError(
                    f"{count_of(found.values())} joined within transport.timeout_seconds = {self._timeout:g}"
                )
            for question in self._answered(self._grid.get_node_ids(), done):
                node = self._node_of(question)
                if node.position in found:
                    raise UserError(
                        f"Flower nodes {found[node.position].node_id} and {node.node_id} are both "
                        f"{node.client_id}: give each SuperNode its own partition-id"
                    )
                found[node.position], wanted = node, max(wanted, node.num_clients)
            if len(found) < wanted:
                self._pause_for(self._questions)
        return {found[position].client_id: found[position] for position in sorted(found)}

    def _gather_sites(self, sites: Sites) -> dict[str, Node]:
        """Sites by name; a node that claims a name that is not its own is left out, by name."""
        started, done, found = self._clock(), set[int](), dict[str, Node]()
        said = started + FIRST_SAID_SECONDS
        while len(found) < sites.number:
            missing = sites.missing(found, self._questions)
            if self._is_too_late(started, sites.number - len(found)):
                raise UserError(
                    f"{len(found)} of {sites.number} sites joined within transport.timeout_seconds = "
                    f"{self._timeout:g} (joined: {', '.join(sorted(found)) or 'none'}; {missing})"
                )
            if self._clock() >= said:
                said = self._clock() + SAID_SECONDS
                logger.warning("waiting for sites (%s)", missing)
            for question in self._answered(filter(sites.may_ask, self._grid.get_node_ids()), done):
                node = self._node_of(question)
                reason = sites.refusal(node.node_id, node.client_id, found)
                if reason:
                    logger.warning("Flower node %d is refused: %s", node.node_id, reason)
                elif len(found) < sites.number:
                    found[node.client_id] = node
            if len(found) < sites.number:
                self._pause_for(self._questions)
        refuse_mixed_counts(found)
        return {name: found[name] for name in sorted(found)}

    def _is_too_late(self, started: float, num_missing: int) -> bool:
        """Whether the time to join is over, and too few nodes were asked in time and may still answer."""
        return self._clock() - started >= self._timeout and len(self._questions) < num_missing

    def _answered(self, node_ids: Iterable[int], done: set[int]) -> list[SentDownload]:
        """Ask all nodes but those that are ``done`` who they are; return the questions that have an answer.

        This waits for nobody. A node that was lost with its question, or was silent for all its time to
        answer, is not done: it is asked again as long as it is there.
        """
        for node_id in sorted(set(node_ids) - done - self._questions.keys()):
            self._questions[node_id] = self._post.question(node_id)
            self._post.push(self._questions[node_id], node_id)
        over = [sent for sent in self._questions.values() if self._is_over(sent)]
        for sent in over:
            del self._questions[sent.node_id]
        answered = [sent for sent in over if not (sent.num_losses or sent.fenced)]
        done.update(sent.node_id for sent in answered)
        return answered

    def _node_of(self, question: SentDownload) -> Node:
        """Read a node's answer to the question who it is; raise UserError if it cannot take part."""
        node_id, upload = question.node_id, next(self._deliveries(question)).upload
        if upload.failure:
            name = self._sites.keys.get(node_id, "") if self._sites else ""
            told = f"site {name} (Flower node {node_id})" if name else f"Flower node {node_id}"
            raise UserError(f"{told}: {upload.failure}")
        node = node_of(node_id, upload.report if self._sites is None else {**ONE_OF_ONE, **upload.report})
        logger.info("Flower node %d is %s", node.node_id, node.client_id)
        return node
