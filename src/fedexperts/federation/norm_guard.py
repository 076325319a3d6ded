"""Refuse uploads that are absurdly far from all others, or from where they started."""

import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fedexperts.algorithms.aggregation import norm_of, start_of
from fedexperts.federation.transport import Delivery
from fedexperts.messages import Upload

FEWEST = 3
"""Uploads of which one is judged by their median: of two nobody can tell which is absurd."""


@dataclass(frozen=True, kw_only=True)
class Norms:
    """L2 norms of one upload."""

    change: float
    """Of the change of its tensors."""
    start: float
    """Of the tensors that they started from."""
    beside: float
    """Of what stands beside them, counts apart."""


Judged = tuple[Delivery, str, Norms | None]
"""An answer with the reason why it is refused, or else with its norms, if these are judged."""


def norms_of(upload: Upload, before: Mapping[str, Tensor]) -> Norms:
    """Return the norms of an upload of the form that is due; its tensors started from ``before``."""
    start = {name: start_of(name, tensor, before) for name, tensor in upload.tensors.items()}
    return Norms(
        change=norm_of(tensor.double() - start[name] for name, tensor in upload.tensors.items()),
        start=norm_of(start.values()),
        beside=norm_of(tensor for tensor in upload.beside.values() if tensor.is_floating_point()),
    )


@dataclass(frozen=True)
class _Seen:
    """Norms that have come in a round, in order: a median takes no sorting anew for each upload."""

    change: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)

    def add(self, norms: Norms) -> None:
        bisect.insort(self.change, norms.change)
        bisect.insort(self.beside, norms.beside)


def guarded(judged: Iterable[Judged], factor: float) -> Iterator[tuple[Delivery, str]]:
    """Yield each delivery with the reason why it is refused, or none.

    An upload is refused if its change is more than ``factor`` times as long as the tensors it started from,
    or as the median of the changes that have come in this round, its own among them, once they are three; and
    alike if what stands beside is. Until then the first ones are held, so the server holds three at most. A
    median or a start of 0 judges nothing.
    """
    held: list[tuple[Delivery, Norms]] = []
    seen = _Seen()
    for delivery, reason, norms in judged:
        if reason or norms is None:
            yield delivery, reason
            continue
        seen.add(norms)
        held.append((delivery, norms))
        if len(seen.change) >= FEWEST:
            yield from _judge(held, seen, factor)
            held = []
    yield from _judge(held, seen, factor)


def _judge(
    held: Iterable[tuple[Delivery, Norms]], seen: _Seen, factor: float
) -> Iterator[tuple[Delivery, str]]:
    for delivery, norms in held:
        yield delivery, _reason(norms, seen, factor)


def _reason(norms: Norms, seen: _Seen, factor: float) -> str:
    if norms.change > factor * norms.start > 0:
        return _refused(
            "its change", norms.change, factor, "that of the tensors it started from", norms.start
        )
    if len(seen.change) < FEWEST:
        return ""
    for what, norm, all_seen in (
        ("its change", norms.change, seen.change),
        ("what it sends beside its tensors", norms.beside, seen.beside),
    ):
        median = _median(all_seen)
        if norm > factor * median > 0:
            return _refused(what, norm, factor, "the median of the round's uploads", median)
    return ""


def _median(in_order: Sequence[float]) -> float:
    """Return the middle of numbers in order, or the mean of the two in the middle."""
    middle = len(in_order) // 2
    return in_order[middle] if len(in_order) % 2 else (in_order[middle - 1] + in_order[middle]) / 2


def _refused(what: str, norm: float, factor: float, than: str, measure: float) -> str:
    return (
        f"upload refused: {what} has norm {norm:.6g}, more than cohort.max_change_factor = {factor:g} times "
        f"{than}, {measure:.6g}"
    )
