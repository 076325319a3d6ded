"""Predict the differential privacy of a run, and refuse one in which there is nothing to protect."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from fedexperts.config.schema import RunConfig
from fedexperts.costs.privacy import privacy_of
from fedexperts.errors import UserError
from fedexperts.federation.cohort import draw_cohort
from fedexperts.messages import Expected
from fedexperts.releases import Releases


def privacy_of_run(
    config: RunConfig,
    client_ids: Sequence[str],
    expected: Expected,
    *,
    released: Releases | None = None,
    reached: int = 0,
) -> dict[str, Any]:
    """Return the privacy after all rounds.

    Args:
        config: of the run, with ``[privacy]``.
        client_ids: all clients.
        expected: what a client sends in a round.
        released: what clients were asked already; None for nothing.
        reached: the last round that counts.

    Raises:
        UserError: that is more, or less, than clipping and noise cover; or the accountant is not installed.
    """
    if expected.beside or not expected.tensors:
        found = f"send {sorted(expected.beside)[0]!r} beside them" if expected.beside else "send no tensors"
        raise UserError(
            f"[privacy] covers the mean of uploaded tensors, but this algorithm's clients {found}"
        )
    released = released or Releases()
    turns = Counter(released.turns)
    for number in range(reached + 1, config.rounds + 1):
        turns.update(draw_cohort(client_ids, config.cohort, config.seed, number))
    return privacy_of(config.privacy, turns, released.num_repeated_rounds)
