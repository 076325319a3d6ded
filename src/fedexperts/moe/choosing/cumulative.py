"""Choose the experts that together hold a given share of a layer's score (ESFT, arXiv 2407.01906).

Shape suffix: ``E`` experts.
"""

import torch
from torch import Tensor

from fedexperts.errors import UserError

_ROUNDING = 1e-12
"""Share of the total by which a sum may miss ``p``, so that 0.7 + 0.1 reaches 0.8."""


def cumulative_choice(score_E: Tensor, p: float) -> tuple[int, ...]:
    """Return the best experts, in descending order, until their scores sum to the share ``p`` of the total.

    Of equal scores the expert with the lower index comes first. The expert that reaches ``p`` is included, so
    there is at least one; with ``p = 1`` they are all experts with a score above 0.

    Args:
        score_E: scores of any scale, none negative.
        p: from above 0 to 1.

    Raises:
        UserError: ``p`` is out of range, a score is negative or not finite, or all scores are 0.
    """
    if not 0 < p <= 1:
        raise UserError(f"p must be above 0 and at most 1, not {p}")
    score_E = score_E.double()
    if not bool(torch.isfinite(score_E).all()) or bool((score_E < 0).any()) or not bool((score_E > 0).any()):
        raise UserError(
            f"scores of experts must be finite, none negative and not all 0, but are {score_E.tolist()}"
        )
    # Scaled first, because a sum of finite scores may overflow.
    sorted_E, order_E = torch.sort(score_E / score_E.max(), descending=True, stable=True)
    reached_E = sorted_E.cumsum(dim=0)
    is_before_E = reached_E < (p - _ROUNDING) * reached_E[-1]
    return tuple(order_E[: int(is_before_E.sum()) + 1].tolist())
