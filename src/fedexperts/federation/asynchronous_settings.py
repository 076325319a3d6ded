"""Define the settings of asynchronous rounds."""

import math
from dataclasses import dataclass

from fedexperts.errors import UserError


@dataclass(frozen=True, kw_only=True)
class AsynchronousSettings:
    """Section `[asynchronous]`: make a step of the server as soon as a buffer of uploads is full, while other
    clients work on; without it a round waits for all its clients. In process the simulated clock says which
    uploads come first, over Flower they count as they come."""

    buffer: int
    """Uploads that make one step of the server (FedBuff's K); each step is a round."""
    concurrency: int = 0
    """Clients that are at work at once, at most; 0 for all."""
    staleness_exponent: float = 0.5
    """Exponent a of the weight (1 + τ)^-a of a change that began τ steps ago; 0 weighs all alike."""
    max_staleness: int = 0
    """Steps that the server may make during a client's turn; an older upload is refused and counted. 0 for no
    limit."""

    def __post_init__(self) -> None:
        """Refuse numbers outside their range."""
        if self.buffer < 1:
            raise UserError(f"buffer must be at least 1, not {self.buffer}")
        for name in ("concurrency", "max_staleness"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative, but is {getattr(self, name)}")
        if not 0 <= self.staleness_exponent < math.inf:
            raise UserError(
                "staleness_exponent must be 0 (no weighting) or more and finite, not "
                f"{self.staleness_exponent:g}"
            )

    def weight(self, staleness: int) -> float:
        """Return the weight of a change that began ``staleness`` steps ago: 1 for a fresh one."""
        return float((1 + staleness) ** -self.staleness_exponent)

    def is_too_old(self, staleness: int) -> bool:
        """Return whether an upload is refused for its age."""
        return 0 < self.max_staleness < staleness

    def refuse_too_few(self, num_clients: int) -> None:
        """Raise UserError where there are fewer clients than a buffer, or the places at work, ask for."""
        for name in ("buffer", "concurrency"):
            value = getattr(self, name)
            if value > num_clients:
                raise UserError(
                    f"asynchronous.{name} is {value}, but there are only {num_clients} clients, each with "
                    "one turn at a time and one upload in a step"
                )
