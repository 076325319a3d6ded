"""The choice of experts by cumulative score, against numbers worked out by hand."""

import math

import pytest
import torch

from fedexperts.errors import UserError
from fedexperts.moe.choosing.cumulative import cumulative_choice


@pytest.mark.parametrize(
    ("scores", "p", "chosen"),
    [
        ([5, 1, 4], 0.5, (0,)),
        ([5, 1, 4], 0.51, (0, 2)),
        ([5, 1, 4], 0.9, (0, 2)),
        ([5, 1, 4], 0.91, (0, 2, 1)),
        ([5, 0, 4], 1.0, (0, 2)),
        ([0.7, 0.1, 0.2], 0.9, (0, 2)),
        ([0.1, 0.7, 0.1, 0.1], 0.8, (1, 0)),
        ([3, 3, 3], 0.2, (0,)),
        ([3, 3, 3], 0.34, (0, 1)),
        ([1e308, 1e308], 1.0, (0, 1)),
    ],
)
def test_experts_are_taken_in_descending_order_until_their_share_is_p(scores, p, chosen):
    """Of equal scores the lower index comes first; 0.7 + 0.1 is a little below 0.8 in binary."""
    assert cumulative_choice(torch.tensor(scores, dtype=torch.float64), p) == chosen


@pytest.mark.parametrize("p", [0.0, -0.1, 1.1, math.nan])
def test_a_share_out_of_range_is_refused(p):
    with pytest.raises(UserError, match="p must be above 0 and at most 1, not"):
        cumulative_choice(torch.ones(3), p)


@pytest.mark.parametrize("scores", [[0.0, 0.0], [1.0, -1.0], [1.0, math.nan], [1.0, math.inf]])
def test_scores_that_rank_nothing_are_refused(scores):
    with pytest.raises(UserError, match="scores of experts must be finite, none negative and not all 0"):
        cumulative_choice(torch.tensor(scores), 0.5)
