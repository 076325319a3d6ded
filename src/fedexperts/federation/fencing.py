"""Refuse uploads that come too late by the simulated clock: after the deadline, or after enough others."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from fedexperts.costs.work import from_figures
from fedexperts.federation.clock import Clock
from fedexperts.federation.norm_guard import Judged, Norms
from fedexperts.federation.spool import Spool
from fedexperts.federation.transport import Delivery
from fedexperts.messages import Upload, decode_upload, encode_upload

Sender = TypeVar("Sender")


@dataclass(frozen=True, kw_only=True)
class _Waiting:
    """An answer whose upload lies on disk."""

    delivery: Delivery
    reason: str
    norms: Norms | None
    read: Callable[[], bytes]
    seconds: float
    """Simulated, until it came; infinite for one that is refused anyway."""


def turn_of(delivery: Delivery) -> dict[str, Any]:
    """Return what the clock needs to time the turn of an answer."""
    return {
        "client_id": delivery.client_id,
        "work": from_figures(delivery.upload.work),
        "download_bytes": delivery.download_bytes,
        "upload_bytes": delivery.upload_bytes,
    }


def fenced_by_clock(
    judged: Iterable[Judged], clock: Clock, *, wanted: int, limit: float, folder: Path | None
) -> Iterator[Judged]:
    """Yield all answers in their order, those refused that are not among the first ``wanted`` in time.

    Args:
        judged: answers of a round.
        clock: times them.
        wanted: number of uploads to take; 0 for all.
        limit: seconds after the round's start at which it is too late; 0 for no limit.
        folder: where uploads wait on disk until all times are known.
    """
    spool = Spool(folder)
    waiting = [_waiting(one, clock, spool) for one in judged]
    good = {place: one.seconds for place, one in enumerate(waiting) if not one.reason}
    in_time = first_in_time(good, clock, wanted=wanted, limit=limit)
    taken = in_time[: wanted or None]
    for place, one in enumerate(waiting):
        if one.reason or place in taken:
            upload = decode_upload(one.read())
            yield replace(one.delivery, upload=upload), one.reason, one.norms
        else:
            kind = "surplus" if place in in_time else "late"
            yield replace(one.delivery, fenced=kind), _reason(kind, one.seconds, wanted, limit), None


def first_in_time(
    seconds: Mapping[Sender, float], clock: Clock, *, wanted: int, limit: float
) -> list[Sender]:
    """Return whose uploads come before the limit, the first in front; where they are too few, wait for it.

    Args:
        seconds: until each upload comes, in the order of the cohort.
        clock: of the round.
        wanted: number of uploads after which no other is waited for; 0 to wait for all.
        limit: seconds after the round's start at which it is too late; 0 for no limit.
    """
    in_time = [one for one in sorted(seconds, key=seconds.__getitem__) if not limit or seconds[one] <= limit]
    if len(in_time) < min(len(seconds), wanted or len(seconds)):
        clock.wait(limit)
    return in_time


def _waiting(judged: Judged, clock: Clock, spool: Spool) -> _Waiting:
    delivery, reason, norms = judged
    return _Waiting(
        delivery=replace(delivery, upload=Upload()),
        reason=reason,
        norms=norms,
        read=spool.keep(encode_upload(Upload(failure=reason) if reason else delivery.upload)),
        seconds=math.inf if reason else clock.foreseen(**turn_of(delivery))["total"],
    )


def _reason(kind: str, seconds: float, wanted: int, limit: float) -> str:
    told = f"upload refused: it came {seconds:.4g} simulated seconds after the round's start"
    if kind == "late":
        return f"{told}, transport.round_seconds is {limit:g}"
    return f"{told}, when {wanted} others had come (cohort.size)"
