"""Transport interface: send downloads to clients and receive their uploads."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from fedexperts.algorithms.api import ClientFacts
from fedexperts.errors import UserError, refuse_unknown
from fedexperts.messages import Download, Upload


@dataclass(frozen=True, kw_only=True)
class TransportSettings:
    """Section ``[transport]``: what carries the messages."""

    name: Literal["inprocess", "flower"] = "inprocess"
    """``inprocess``: clients take turns in this process; ``flower``: a Flower federation."""
    connection: str = ""
    """Name, in Flower's configuration, of the connection to a running SuperLink; empty simulates locally."""
    timeout_seconds: float = 3600.0
    """Longest wait for one client's upload over Flower; a client that is later counts as failed."""
    round_seconds: float = 0.0
    """Deadline of a round: an upload that comes later is refused and counted; 0 for none. Over Flower in real
    seconds, in process in those of the simulated clock."""
    workers: int = 1
    """Processes that take clients' turns side by side, each with ``threads`` threads (in process only). The
    number changes no bit of a result, and may differ when a run is resumed."""
    clients: Literal["resident", "process"] = "resident"
    """``resident``: clients take turns on the whole model; ``process``: in ``workers`` processes of their own
    that never hold it, each turn within its client's memory (Flux in process only; the same bits)."""

    def __post_init__(self) -> None:
        """Refuse numbers outside their range, and settings without effect on this transport."""
        refuse_unknown(self)
        if self.clients == "process" and self.name == "flower":
            raise UserError(
                'transport.clients is "process", but with transport.name = "flower" the nodes hold the whole '
                'model: set transport.name to "inprocess", or leave transport.clients at "resident"'
            )
        if self.workers < 1:
            raise UserError(f"transport.workers must be at least 1, not {self.workers}")
        if not 0 < self.timeout_seconds < math.inf:
            raise UserError(
                f"transport.timeout_seconds must be above 0 and finite, not {self.timeout_seconds:g}"
            )
        if not 0 <= self.round_seconds < math.inf:
            raise UserError(
                f"transport.round_seconds must be 0 (none) or above and finite, not {self.round_seconds:g}"
            )
        if self.connection and self.name == "inprocess":
            raise UserError(
                f'transport.connection is "{self.connection}", but has no effect with transport.name = '
                '"inprocess": set transport.name to "flower"'
            )
        if self.workers > 1 and self.name == "flower":
            raise UserError(
                f'transport.workers is {self.workers}, but with transport.name = "flower" each client has a '
                "process of its own: leave it at 1"
            )


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """One client's answer, and the bytes of both messages."""

    client_id: str
    upload: Upload
    download_bytes: int
    upload_bytes: int
    seconds: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    """Measured by the transport of the process that took the turn, for the log and the report."""
    fenced: str = ""
    """Key of ``federation.ledger.FENCES`` for an upload that does not count, whatever it brings."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The end of a turn that went on after its upload."""

    client_id: str
    seconds: dict[str, float]
    """Seconds after the upload, by phase."""
    measured: dict[str, float] = field(default_factory=dict)
    """The same as a delivery's, of the whole turn."""
    failure: str = ""
    """Reason why what the client keeps is without the work after the upload; empty if all went well."""


class Transport(Protocol):
    """Carries one exchange at a time."""

    @property
    def clients(self) -> tuple[ClientFacts, ...]:
        """Everybody who can be reached, in a fixed order."""

    def exchange(self, downloads: Iterable[tuple[str, Download]]) -> Iterator[Delivery]:
        """Send each client its download; yield their answers **in the order of the downloads**.

        A client that does not answer, or answers with what cannot be read, is delivered as an Upload with a
        ``failure``. The server holds one delivery at a time, at the start of a round up to three.
        """

    def finish_round(self) -> Sequence[Finished]:
        """Wait for clients that work on after their uploads; afterwards what they keep is on disk.

        To be called once the answers of an exchange are added up, and before the round is made to last.

        Raises:
            UserError: a client's process ended before that, so that the round must not count.
        """


@runtime_checkable
class ArrivingTransport(Transport, Protocol):
    """A transport whose clients can be at work while the server goes on."""

    def begin(self, downloads: Iterable[tuple[str, Download]]) -> None:
        """Send each client its download, and wait for no answer; none may be at work already.

        An exchange may come in between.
        """

    def next_arrival(self) -> tuple[str, Iterator[Delivery]]:
        """Wait until a turn that was begun has ended; return its client, and its answer as in an exchange.

        Further answers to the same download come behind the first. Some turn must be under way.
        """
