"""Figures of expert use, worked out by hand."""

from math import log

import pytest

from fedexperts.evaluation.routing import (
    balance_std,
    normalised_entropy,
    shares,
    total_variation,
)


def test_balance_std_is_the_populations_and_a_mean_over_layers() -> None:
    # Layer 1: mean 4, deviations 2, 2, 2, 2, so 2. Layer 2: all equal, so 0. The sample's would be 2.31.
    assert balance_std([[2, 6, 2, 6], [4, 4, 4, 4]]) == 1.0


def test_experts_without_a_token_count_in_the_balance() -> None:
    assert balance_std([[4, 0]]) == 2.0


def test_entropy_is_one_for_even_use_and_zero_for_one_expert() -> None:
    assert normalised_entropy([[5, 5, 5, 5]]) == pytest.approx(1.0)
    assert normalised_entropy([[0, 7, 0, 0]]) == 0.0
    assert normalised_entropy([[3]]) == 1.0


def test_entropy_of_uneven_use() -> None:
    # Shares 1/2, 1/4, 1/4: entropy 3/2 ln 2, of at most ln 3.
    assert normalised_entropy([[2, 1, 1]]) == pytest.approx(1.5 * log(2) / log(3))


def test_shares_sum_to_one_in_each_layer() -> None:
    assert shares([[1, 3], [2, 2]]) == [[0.25, 0.75], [0.5, 0.5]]


def test_a_layer_without_tokens_has_no_shares() -> None:
    with pytest.raises(AssertionError, match="no token was counted"):
        shares([[1, 3], [0, 0]])


def test_total_variation_is_zero_for_the_same_use_and_one_for_none_in_common() -> None:
    assert total_variation([[1, 3]], [[2, 6]]) == 0.0
    assert total_variation([[5, 0], [1, 1]], [[0, 2], [1, 1]]) == 0.5
