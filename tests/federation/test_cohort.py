"""Who takes part in a round, and the limits of [cohort]."""

import pytest

from fedexperts.errors import UserError
from fedexperts.federation.cohort import CohortSettings, draw_cohort

CLIENTS = tuple("hgfedcba")


@pytest.mark.parametrize("size", [0, 8])
def test_all_clients_take_part_in_the_order_of_the_data(size):
    assert draw_cohort(list(CLIENTS), CohortSettings(size=size), 0, 1) == CLIENTS


def test_a_cohort_is_drawn_anew_in_each_round_by_the_seed_and_the_round_alone():
    def drawn(seed):
        return [draw_cohort(CLIENTS, CohortSettings(size=7), seed, number) for number in range(1, 9)]

    assert {len(set(cohort)) for cohort in drawn(0)} == {7}
    assert all(list(cohort) == sorted(cohort, reverse=True) for cohort in drawn(0))
    assert len(set(drawn(0))) > 2
    assert drawn(0) == drawn(0) != drawn(1)


def test_more_clients_than_there_are_cannot_be_drawn():
    with pytest.raises(UserError, match=r"cohort\.size is 9, but there are only 8 clients"):
        draw_cohort(CLIENTS, CohortSettings(size=9), 0, 1)


def test_more_uploads_than_there_are_clients_cannot_be_asked_for():
    settings = CohortSettings(min_uploads=9, on_failure="continue")
    with pytest.raises(UserError, match=r"cohort\.min_uploads is 9, but there are only 8 clients: no round"):
        draw_cohort(CLIENTS, settings, 0, 1)


def test_memory_is_cycled_over_the_clients_in_bytes():
    settings = CohortSettings(memory_gb=(0.5, 8))
    assert [settings.memory_bytes(position) for position in range(3)] == [5e8, 8e9, 5e8]
    assert CohortSettings().memory_bytes(3) == 0


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"size": -1}, "size must be 0 .* not -1"),
        ({"max_change_norm": -0.5}, r"max_change_norm must not be negative, but is -0\.5"),
        ({"max_change_norm": float("nan")}, "max_change_norm must not be negative, but is nan"),
        ({"memory_gb": (0.5, 0.0)}, r"memory_gb must have numbers above 0 only, but is \[0\.5, 0\.0\]"),
    ],
)
def test_numbers_out_of_range_are_refused(wrong, sentence):
    with pytest.raises(UserError, match=sentence):
        CohortSettings(**wrong)
    assert CohortSettings(max_change_norm=0.5).max_change_norm == 0.5
