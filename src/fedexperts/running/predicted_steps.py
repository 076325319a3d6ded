"""Predict the steps of an asynchronous server: their simulated seconds, and how late uploads are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

from fedexperts.federation.asynchronous_settings import AsynchronousSettings
from fedexperts.federation.buffer import Buffer, ByClock
from fedexperts.federation.clock import Clock
from fedexperts.federation.under_way import TurnUnderWay

Turns = Mapping[str, Mapping[str, Any]]
"""For each client, what the clock needs to time its turn."""


@dataclass(frozen=True, kw_only=True)
class PredictedSteps:
    """All steps of a run, as if every turn of a client did the same work."""

    first: Mapping[str, Any]
    """Figures of the clock for the first step."""
    run_seconds: float
    uploads_by_client: Mapping[str, int]
    """Uploads of each client that count."""
    staleness_mean: float
    """Steps that the server makes during the turn of an upload that counts."""
    staleness_max: int

    def rows(self) -> list[list[str]]:
        """Return what a table of predicted costs says."""
        fewest, most = min(self.uploads_by_client.values()), max(self.uploads_by_client.values())
        return [
            ["uploads of a client that count", f"about {fewest:,} to {most:,}"],
            ["staleness of uploads", f"about {self.staleness_mean:.3g} steps, {self.staleness_max} at most"],
        ]


def predict_steps(
    settings: AsynchronousSettings, clock: Clock, turns: Turns, num_rounds: int
) -> PredictedSteps:
    """Run the clock through all steps; ``turns`` are of all clients, in the order of the data."""
    uploads, ages, under_way = dict.fromkeys(turns, 0), [], list[TurnUnderWay]()
    first: Mapping[str, Any] = {}
    for round_number in range(1, num_rounds + 1):
        source = ByClock(
            client_ids=list(turns),
            now=clock.now,
            under_way=under_way,
            begin=partial(_begun, clock, turns, round_number - 1),
        )
        buffer = Buffer(
            settings=settings,
            client_ids=list(turns),
            seed=clock.seed,
            round_number=round_number,
            source=source,
        )
        buffer.fill()
        for one in buffer.arrived:
            clock.count(one.turn)
            uploads[one.turn.client_id] += 1
            ages.append(buffer.staleness(one))
        clock.wait_until(source.now)
        ended, under_way = clock.end_round(), source.under_way
        first = first or ended
    return PredictedSteps(
        first=first or clock.end_round(),
        run_seconds=clock.now,
        uploads_by_client=uploads,
        staleness_mean=fmean(ages or [0]),
        staleness_max=max(ages, default=0),
    )


def _begun(
    clock: Clock, turns: Turns, received: int, client_ids: Sequence[str], now: float
) -> list[TurnUnderWay]:
    timed = (clock.timed(**turns[client_id], start=now)[0] for client_id in client_ids)
    return [TurnUnderWay(turn=turn, received=received) for turn in timed]
