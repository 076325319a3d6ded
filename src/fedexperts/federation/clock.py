"""Keep the simulated time of a run: each client's turn by phase, and rounds that wait for the slowest.

A turn is download, work, upload, one after the other. A phase whose name ends in ``_overlapped`` begins when
the upload is done and runs while the server waits for others and adds up; only what is left of it then
prolongs the round. docs/clock.md has the whole model.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedexperts.costs.devices import GIGA
from fedexperts.costs.work import PhaseWork
from fedexperts.federation.clock_settings import HOURS_OF_DAY, ClockSettings

OVERLAPPED = "_overlapped"
"""End of the name of a phase that runs while the server adds up."""
_HOUR = 3600.0
_PASSES = 3
"""Adding up reads an upload, reads the sum and writes it."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Simulated times of one client's turn, in seconds since the run's start."""

    client_id: str
    uploaded: float = math.inf
    """Infinite where no clock times the turn."""
    ready: float = math.inf
    """Time at which the client could begin the next round."""
    upload_bytes: int = 0


@dataclass(kw_only=True)
class Clock:
    """Simulated time, which passes from round to round."""

    settings: ClockSettings
    client_ids: Sequence[str]
    """All clients, in the order of the data."""
    seed: int
    now: float = 0.0
    """Start of the round under way, in seconds since the run's start."""
    _turns: list[Turn] = field(default_factory=list)
    _waited_until: float = 0.0
    """Time until which the server waited in the round under way, whoever came."""

    def __post_init__(self) -> None:
        """Draw each client's device, slowness and hours."""
        self._devices = self.settings.devices(self.client_ids, self.seed)
        self._slowness = self.settings.slowness(self.client_ids, self.seed)
        self._first_hours = self.settings.first_hours(self.client_ids, self.seed)

    def turn(
        self, client_id: str, work: Mapping[str, PhaseWork], *, download_bytes: int, upload_bytes: int
    ) -> dict[str, float]:
        """Return a turn's seconds by phase, and its ``total`` until the upload is done."""
        turn, seconds = self.timed(
            client_id, work, download_bytes=download_bytes, upload_bytes=upload_bytes, start=self.now
        )
        self.count(turn)
        return seconds

    def foreseen(
        self, client_id: str, work: Mapping[str, PhaseWork], *, download_bytes: int, upload_bytes: int
    ) -> dict[str, float]:
        """Return the same of a turn that may not count; nothing is recorded."""
        return self.timed(
            client_id, work, download_bytes=download_bytes, upload_bytes=upload_bytes, start=self.now
        )[1]

    def count(self, turn: Turn) -> None:
        """Let a turn's upload be one of the round under way."""
        self._turns.append(turn)

    def wait(self, seconds: float) -> None:
        """Let the round under way last so long at least: somebody did not come in time."""
        self.wait_until(self.now + seconds)

    def wait_until(self, time: float) -> None:
        """Let the round under way last until ``time`` at least."""
        self._waited_until = time

    def timed(
        self,
        client_id: str,
        work: Mapping[str, PhaseWork],
        *,
        download_bytes: int,
        upload_bytes: int,
        start: float,
    ) -> tuple[Turn, dict[str, float]]:
        """Return a turn that begins at ``start``, and its seconds as :meth:`turn` has them."""
        device, slowness = self._devices[client_id], self._slowness[client_id]
        down, up = device.link_seconds(download_bytes=download_bytes, upload_bytes=upload_bytes)
        phases = {phase: own.seconds for phase, own in work.items()}
        seconds = {n: s * slowness for n, s in {"download": down, **phases, "upload": up}.items()}
        later = math.fsum(s for name, s in seconds.items() if name.endswith(OVERLAPPED))
        busy = self._until_upload(seconds)
        waited = self._absence(client_id, start, busy)
        uploaded = start + waited + busy
        ready = uploaded + self._absence(client_id, uploaded, later) + later
        turn = Turn(client_id=client_id, uploaded=uploaded, ready=ready, upload_bytes=upload_bytes)
        waits = {"wait": waited} if self.settings.available_hours < HOURS_OF_DAY else {}
        return turn, {**seconds, **waits, "total": waited + busy}

    def _until_upload(self, seconds: Mapping[str, float]) -> float:
        transfer = seconds["download"] + seconds["upload"]
        busy = math.fsum(
            s for n, s in seconds.items() if n not in ("download", "upload") and not n.endswith(OVERLAPPED)
        )
        return max(transfer, busy) if self.settings.overlap_transfer else transfer + busy

    def _absence(self, client_id: str, start: float, seconds: float) -> float:
        """Return how long a client is away before work that begins at ``start`` is done."""
        hours = self.settings.available_hours
        if hours == HOURS_OF_DAY or not seconds:
            return 0.0
        day, window = HOURS_OF_DAY * _HOUR, hours * _HOUR
        into = (start - self._first_hours[client_id] * _HOUR) % day
        wait, into = (0.0, into) if into < window else (day - into, 0.0)
        days = max(math.ceil((into + seconds) / window) - 1, 0)
        return wait + days * (day - window)

    def end_round(self) -> dict[str, Any]:
        """Return the round's simulated seconds by what they went to, and go on to its end.

        The ``total`` of a round in which no upload counted is 0, or its deadline: when else the server
        gave up is not simulated.
        """
        turns, self._turns = self._turns, []
        start, waited, self._waited_until = self.now, max(self._waited_until, self.now), 0.0
        if not turns:
            self.now = waited
            return {"start": start, "seconds": {"total": waited - start}, "end": waited, "slowest": None}
        last = max(turns, key=lambda one: one.uploaded)
        added = _PASSES * sum(one.upload_bytes for one in turns) / (self.settings.server_gb_per_s * GIGA)
        gathered = max(last.uploaded, waited)
        served = gathered + added
        end = max(served, *(one.ready for one in turns))
        self.now = end
        return {
            "start": start,
            "seconds": {
                "turns": gathered - start,
                "aggregate": added,
                "overlapped_left": end - served,
                "total": end - start,
            },
            "end": end,
            "slowest": last.client_id,
        }

    def describe(self) -> dict[str, Any]:
        """Return what was drawn for each client, for the result."""
        return {
            "devices": self.settings.device_names(self.client_ids, self.seed),
            "stragglers": [client for client, times in self._slowness.items() if times > 1],
        }
