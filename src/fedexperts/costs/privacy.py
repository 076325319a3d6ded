"""Account for the differential privacy of a run: epsilon after its rounds."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedexperts.algorithms.privacy import PrivacySettings
from fedexperts.errors import needs_extra

_ORDERS = [1 + 10**exponent for exponent in np.linspace(-2, 4, 241).tolist()]
"""Orders of the Rényi divergences among which the accountant takes the best."""


def epsilon_of(settings: PrivacySettings, num_turns: int) -> float:
    """Return epsilon of a client that takes ``num_turns`` turns, by the accountant of Opacus.

    Neighbouring runs differ in one client, whose changes are all zero in one of them. Cohorts are drawn from
    the run's seed, which every client knows, so nothing is gained by sampling: each turn is a Gaussian
    mechanism.

    Raises:
        UserError: Opacus is not installed.
    """
    if not num_turns:
        return 0.0
    try:
        from opacus.accountants.analysis import rdp
    except ImportError as error:
        raise needs_extra("privacy.noise_multiplier", "opacus", "privacy") from error
    spent = rdp.compute_rdp(
        q=1.0, noise_multiplier=settings.noise_multiplier, steps=num_turns, orders=_ORDERS
    )
    epsilon, _ = rdp.get_privacy_spent(orders=_ORDERS, rdp=spent, delta=settings.delta)
    return float(epsilon)


def privacy_of(
    settings: PrivacySettings, turns: Mapping[str, int], num_repeated_rounds: int = 0
) -> dict[str, Any]:
    """Return what result.json says of a run's privacy; epsilon is None where there is no noise.

    Args:
        settings: section ``[privacy]``.
        turns: times that each client is asked, those of repeated rounds included.
        num_repeated_rounds: times that a round was begun again.
    """
    most = max(turns.values(), default=0)
    return {
        "epsilon": epsilon_of(settings, most) if settings.noise_multiplier else None,
        "delta": settings.delta,
        "clip_norm": settings.clip_norm,
        "noise_multiplier": settings.noise_multiplier,
        "noise": settings.noise,
        "turns_of_a_client": most,
        "num_repeated_rounds": num_repeated_rounds,
        "noise_is_secret": settings.noise_seed < 0,
    }


def describe_privacy(privacy: Mapping[str, Any]) -> str:
    """Say in one line what :func:`privacy_of` has found."""
    if privacy["epsilon"] is None:
        return f"privacy: none, changes are clipped to {privacy['clip_norm']:g} without noise"
    secret = "" if privacy["noise_is_secret"] else "; none for those who know privacy.noise_seed"
    return (
        f"privacy: epsilon {privacy['epsilon']:.3g} at delta {privacy['delta']:g} after "
        f"{privacy['turns_of_a_client']} turns of a client, noise by the {privacy['noise']}{secret}"
        f"{_repeated(privacy)}"
    )


def _repeated(privacy: Mapping[str, Any]) -> str:
    number = privacy["num_repeated_rounds"]
    return f"; rounds begun again, which count each time: {number}" if number else ""
