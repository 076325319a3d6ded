"""Draw the clients of a round from the seed and the round alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedexperts.errors import UserError, refuse_unknown
from fedexperts.seeds import derive_random


@dataclass(frozen=True, kw_only=True)
class CohortSettings:
    """Section ``[cohort]``: who takes part, and what a failure means."""

    size: int = 0
    """Clients in each round, drawn without replacement; 0 takes all."""
    over_select: int = 0
    """Clients that are asked beyond ``size``; the first ``size`` whose uploads arrive are taken, in the order
    of the cohort, and the others' are refused. In process the simulated clock says who is first."""
    min_uploads: int = 0
    """Fewest uploads with which a round counts; with fewer the server's state stays, and every client of the
    round is named. With ``on_failure = "continue"`` only; 0 for no limit."""
    on_failure: Literal["continue", "stop"] = "stop"
    """Go on without a client that fails or whose upload is refused, or stop. It is named either way."""
    max_change_norm: float = 0.0
    """Refuse an upload whose tensors differ from the server's by more than this L2 norm; 0 for no limit."""
    max_change_factor: float = 1000.0
    """Refuse an upload whose change is longer than this many times the tensors it started from, or, of three
    uploads or more, than the median change of the round so far; 0 for no limit."""
    memory_gb: tuple[float, ...] = ()
    """Memory of the clients' devices in 10^9 bytes, cycled over the clients; empty for no limit."""

    def __post_init__(self) -> None:
        """Refuse numbers outside their range."""
        refuse_unknown(self)
        if self.size < 0:
            raise UserError(f"size must be 0 (all clients) or more, not {self.size}")
        if self.over_select < 0 or self.min_uploads < 0:
            key = "over_select" if self.over_select < 0 else "min_uploads"
            raise UserError(f"{key} must not be negative, but is {getattr(self, key)}")
        if self.over_select and not self.size:
            raise UserError(
                f"over_select is {self.over_select}, but has no effect with size = 0 (all clients)"
            )
        if self.min_uploads and self.on_failure == "stop":
            raise UserError(
                f'min_uploads is {self.min_uploads}, but has no effect with on_failure = "stop": one failure '
                "stops the run"
            )
        if self.size and self.min_uploads > self.size:
            raise UserError(f"min_uploads is {self.min_uploads}, more than size = {self.size}")
        if not self.max_change_norm >= 0:
            raise UserError(f"max_change_norm must not be negative, but is {self.max_change_norm}")
        if not (self.max_change_factor == 0 or 1 < self.max_change_factor < math.inf):
            raise UserError(
                "max_change_factor must be 0 (no limit) or above 1 and finite, but is "
                f"{self.max_change_factor}"
            )
        if not all(memory > 0 for memory in self.memory_gb):
            raise UserError(f"memory_gb must have numbers above 0 only, but is {list(self.memory_gb)}")

    @property
    def wanted(self) -> int:
        """Uploads of a round after which no other is waited for; 0 to wait for all."""
        return self.size if self.over_select else 0

    def memory_bytes(self, position: int) -> int:
        """Return the memory of the client at ``position`` in the data; 0 for no limit."""
        return round(self.memory_gb[position % len(self.memory_gb)] * 1e9) if self.memory_gb else 0


def draw_cohort(
    client_ids: Sequence[str], settings: CohortSettings, seed: int, round_number: int
) -> tuple[str, ...]:
    """Return the clients that are asked in a round, in the order of ``client_ids``.

    Raises:
        UserError: the cohort, or the fewest uploads of it, are more than the federation has clients.
    """
    number = settings.size + settings.over_select
    if number > len(client_ids):
        more = f" and cohort.over_select {settings.over_select}" if settings.over_select else ""
        raise UserError(f"cohort.size is {settings.size}{more}, but there are only {len(client_ids)} clients")
    if settings.min_uploads > len(client_ids):
        raise UserError(
            f"cohort.min_uploads is {settings.min_uploads}, but there are only {len(client_ids)} clients: no "
            "round would count"
        )
    if number in (0, len(client_ids)):
        return tuple(client_ids)
    drawn = set(derive_random(seed, "cohort", round_number).sample(list(client_ids), number))
    return tuple(client_id for client_id in client_ids if client_id in drawn)
