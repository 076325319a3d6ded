"""Predict the differential privacy of a run, and refuse one in which there is nothing to protect."""

from collections.abc import Sequence
from typing import Any

from fedexperts.config.schema import RunConfig
from fedexperts.costs.privacy import privacy_of
from fedexperts.errors import UserError
from fedexperts.federation.cohort import draw_cohort
from fedexperts.messages import Expected


def privacy_of_run(config: RunConfig, client_ids: Sequence[str], expected: Expected) -> dict[str, Any]:
    """Return the privacy after all rounds.

    Args:
        config: of the run, with ``[privacy]``.
        client_ids: all clients.
        expected: what a client sends in a round.

    Raises:
        UserError: that is more, or less, than clipping and noise cover; or the accountant is not installed.
    """
    if expected.beside or not expected.tensors:
        found = f"send {sorted(expected.beside)[0]!r} beside them" if expected.beside else "send no tensors"
        raise UserError(
            f"[privacy] covers the mean of uploaded tensors, but this algorithm's clients {found}"
        )
    rounds = range(1, config.rounds + 1)
    cohorts = [draw_cohort(client_ids, config.cohort, config.seed, number) for number in rounds]
    return privacy_of(config.privacy, cohorts)
