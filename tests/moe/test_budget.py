"""Eq. 1 with its bounds: nothing lost, nobody without a slot, nobody with more than can be used."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedexperts.errors import UserError
from fedexperts.moe.compressing.budget import LEAST_VARIATION, adaptive_shares, apportion, merge_budget

EVEN = torch.full((8,), 5)
SKEWED = torch.tensor([33, 1, 1, 1, 1, 1, 1, 1])

layers = st.integers(1, 6).flatmap(
    lambda count: st.tuples(
        st.lists(
            st.lists(st.integers(0, 1000), min_size=4, max_size=4).filter(any), min_size=count, max_size=count
        ),
        st.lists(st.integers(0, 9), min_size=count, max_size=count),
        st.integers(0, 30),
    )
)


@given(layers, st.sampled_from(["adaptive", "uniform"]))
def test_budget_is_spent_within_the_bounds(drawn, kind):
    counts, most, extra = drawn
    total = sum(number > 0 for number in most) + extra
    budget = merge_budget(kind, total, [torch.tensor(each) for each in counts], most)
    assert sum(budget) == min(total, sum(most))
    assert all(min(number, 1) <= given <= number for given, number in zip(budget, most, strict=True))


@given(
    st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=6).flatmap(
        lambda shares: st.tuples(
            st.just(shares), st.lists(st.integers(1, 9), min_size=len(shares), max_size=len(shares))
        )
    ),
    st.integers(0, 40),
)
def test_more_to_spend_takes_from_nobody_more_than_rounding_does(drawn, extra):
    shares, most = drawn
    less = apportion(len(most) + extra, shares, most)
    more = apportion(len(most) + extra + 1, shares, most)
    # Largest remainder may take one slot back when the total grows (the Alabama paradox), never two.
    assert all(after >= before - 1 for before, after in zip(less, more, strict=True))


@given(st.lists(st.floats(1, 10), min_size=1, max_size=6), st.integers(0, 500))
def test_free_of_bounds_it_is_the_paper_with_the_largest_remainder(shares, extra):
    total = len(shares) + extra
    quotas = [share / sum(shares) * total for share in shares]
    found = apportion(total, shares, [total] * len(shares))
    if min(quotas) >= 1:
        # a quota may lie on a whole number but for the rounding of these floats
        assert all(abs(number - quota) < 1 + 1e-9 for number, quota in zip(found, quotas, strict=True))


def test_paper_example_by_hand():
    # b = 3/1, 2/2, 1/1 of 20 slots: 12, 4, 4
    assert apportion(20, [3.0, 1.0, 1.0], [20, 20, 20]) == [12, 4, 4]
    # 22 slots: quotas 13.2, 4.4, 4.4; the one left goes to the earlier of the two equal remainders
    assert apportion(22, [3.0, 1.0, 1.0], [22, 22, 22]) == [13, 5, 4]


def test_what_a_full_layer_cannot_take_goes_to_the_others():
    assert apportion(12, [100.0, 1.0, 1.0], [4, 9, 9]) == [4, 4, 4]


def test_shares_are_eq_1():
    first, second = adaptive_shares([SKEWED, SKEWED])
    unevenness = float(SKEWED.double().var(correction=0) / SKEWED.double().mean() ** 2)
    assert first == 2 / (unevenness + LEAST_VARIATION)
    assert second == first / 2


def test_scale_of_the_counts_does_not_matter():
    assert adaptive_shares([SKEWED.double() / SKEWED.sum()]) == pytest.approx(
        adaptive_shares([SKEWED]), rel=1e-12
    )


def test_even_use_gets_more_than_skewed_use():
    assert merge_budget("adaptive", 6, [SKEWED, EVEN], [7, 7]) == [1, 5]


def test_earlier_layers_get_more_at_equal_use():
    assert merge_budget("adaptive", 12, [SKEWED] * 3, [8, 8, 8]) == [6, 4, 2]


def test_uniform_and_one_per_layer():
    assert merge_budget("uniform", 7, [SKEWED, EVEN, EVEN], [8, 8, 8]) == [3, 2, 2]
    assert merge_budget("one_per_layer", 7, [SKEWED, EVEN, EVEN], [8, 0, 8]) == [1, 0, 1]


def test_layer_without_candidates_gets_nothing():
    assert merge_budget("adaptive", 4, [EVEN, EVEN], [0, 8]) == [0, 4]


@pytest.mark.parametrize("kind", ["adaptive", "uniform", "one_per_layer"])
def test_budget_below_the_minimum_is_refused(kind):
    with pytest.raises(UserError, match="budget of 1 merged experts is below the minimum of 2"):
        merge_budget(kind, 1, [EVEN, EVEN], [8, 8])


@pytest.mark.parametrize("counts", [[0, 0], [1, -1], [1.0, float("nan")]])
def test_profile_without_tokens_is_refused(counts):
    with pytest.raises(UserError, match="profile of MoE layer 1 must count at least one token"):
        merge_budget("adaptive", 4, [EVEN, torch.tensor(counts)], [2, 2])
