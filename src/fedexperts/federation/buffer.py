"""Fill the buffer of one asynchronous step: who is asked when, and whose uploads come first."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from fedexperts.federation.asynchronous_settings import AsynchronousSettings
from fedexperts.federation.transport import Delivery
from fedexperts.federation.under_way import TurnUnderWay
from fedexperts.seeds import derive_random

One = TypeVar("One", bound=TurnUnderWay)
Came_co = TypeVar("Came_co", bound=TurnUnderWay, covariant=True)


class Source(Protocol[Came_co]):
    """Begins turns, and tells whose upload comes next."""

    @property
    def under_way(self) -> Sequence[TurnUnderWay]:
        """Turns that have begun and whose uploads have not come."""

    def ask(self, client_ids: Sequence[str]) -> None:
        """Begin turns now; one that fails at once is not under way."""

    def next(self) -> Came_co | None:
        """Wait until one of the turns ends, and return it; None where it has failed."""


@dataclass(kw_only=True)
class ByClock(Generic[One]):
    """Source of a simulated clock, by which each turn's end is known when it begins."""

    client_ids: Sequence[str]
    """All clients, in the order of the data: of two uploads at the same time the first one's comes first."""
    now: float
    """Simulated time: at first the end of the last step."""
    under_way: list[One]
    begin: Callable[[Sequence[str], float], Iterable[One]]
    """Begins turns at a time, and returns those that did not fail."""

    def __post_init__(self) -> None:
        """Number the clients."""
        self._places = {client_id: place for place, client_id in enumerate(self.client_ids)}

    def ask(self, client_ids: Sequence[str]) -> None:
        """See the protocol."""
        self.under_way += self.begin(client_ids, self.now)

    def next(self) -> One:
        """See the protocol; time goes on until then."""
        one = min(self.under_way, key=lambda each: (each.turn.uploaded, self._places[each.turn.client_id]))
        self.under_way.remove(one)
        self.now = max(self.now, one.turn.uploaded)
        return one


@dataclass(kw_only=True)
class ByArrival(Generic[One]):
    """Source of a transport whose uploads come when they come."""

    under_way: list[TurnUnderWay]
    begin: Callable[[Sequence[str]], Iterable[TurnUnderWay]]
    """Begins turns, and returns them."""
    next_arrival: Callable[[], tuple[str, Iterable[Delivery]]]
    """See :meth:`fedexperts.federation.transport.ArrivingTransport.next_arrival`."""
    taken: Callable[[TurnUnderWay, Iterable[Delivery]], One | None]
    """Returns the upload among the answers to a turn; None where it is refused."""

    def ask(self, client_ids: Sequence[str]) -> None:
        """See the protocol."""
        self.under_way += self.begin(client_ids)

    def next(self) -> One | None:
        """See the protocol."""
        client_id, answers = self.next_arrival()
        (one,) = (each for each in self.under_way if each.turn.client_id == client_id)
        self.under_way.remove(one)
        return self.taken(one, answers)


@dataclass(kw_only=True)
class Buffer(Generic[One]):
    """One step's buffer."""

    settings: AsynchronousSettings
    client_ids: Sequence[str]
    """All clients, in the order of the data."""
    seed: int
    round_number: int
    source: Source[One]
    arrived: list[One] = field(default_factory=list)
    """Uploads that make the step; once it is full in the order of the data."""
    too_old: list[One] = field(default_factory=list)
    _asked: set[str] = field(default_factory=set)

    def fill(self) -> None:
        """Let uploads come until the buffer is full, or nobody is left whose upload could come."""
        self._ask_free()
        while self.source.under_way and len(self.arrived) < self.settings.buffer:
            one = self.source.next()
            if one is not None:
                is_too_old = self.settings.is_too_old(self.staleness(one))
                (self.too_old if is_too_old else self.arrived).append(one)
            if len(self.arrived) < self.settings.buffer:
                self._ask_free()
        self.arrived.sort(key=lambda one: self.client_ids.index(one.turn.client_id))

    def staleness(self, one: One) -> int:
        """Return the steps that the server has made since the client received its state."""
        return self.round_number - 1 - one.received

    def _ask_free(self) -> None:
        """Give work to free clients while there are places; a client that fails leaves its own to another."""
        while chosen := self._next_clients():
            self._asked.update(chosen)
            self.source.ask(chosen)

    def _next_clients(self) -> list[str]:
        """Return the clients that begin a turn now: of those not at work, without an upload in this step."""
        at_work = [one.turn.client_id for one in self.source.under_way]
        waiting = {*at_work, *(one.turn.client_id for one in self.arrived), *self._asked}
        free = [client_id for client_id in self.client_ids if client_id not in waiting]
        places = (self.settings.concurrency or len(self.client_ids)) - len(at_work)
        if places >= len(free):
            return free
        rng = derive_random(self.seed, "asynchronous", self.round_number, len(self._asked))
        drawn = set(rng.sample(free, max(places, 0)))
        return [client_id for client_id in free if client_id in drawn]
