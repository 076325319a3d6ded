"""Numbers as a reader sees them."""

import math
from statistics import stdev

import pytest

from fedexperts.report import quantities
from fedexperts.report.quantities import Spread, spread


def test_spread_is_mean_and_sample_standard_deviation():
    value = spread([0.5, 0.6, 0.7])
    assert value == Spread(mean=pytest.approx(0.6), std=stdev([0.5, 0.6, 0.7]), num_values=3)


def test_one_value_has_no_spread():
    assert spread([0.5]) == Spread(mean=0.5, std=None, num_values=1)


def test_missing_values_are_counted_and_shown():
    value = spread([0.5, None, math.nan])
    assert value == Spread(mean=0.5, std=None, num_values=1, num_missing=2)
    assert quantities.points_spread(value) == "50.0 (n = 1)"


def test_no_value_at_all_is_a_dash():
    assert spread([None, math.inf]) is None
    assert quantities.points_spread(None) == quantities.bytes_spread(None) == "–"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (934, "934 B"),
        (999.7, "1.00 kB"),
        (12_345, "12.3 kB"),
        (1_234_567, "1.23 MB"),
        (5e9, "5.00 GB"),
    ],
)
def test_bytes_have_three_digits_and_a_decimal_unit(number, text):
    assert quantities.bytes_text(number) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0.25, "0.25 s"), (42.04, "42 s"), (600, "10 min"), (7200, "2 h")]
)
def test_seconds_grow_into_minutes_and_hours(number, text):
    value, unit = text.split()
    written, written_unit = quantities.seconds_text(number).split()
    assert (float(written), written_unit) == (float(value), unit)


def test_shares_are_points_of_100_and_losses_are_not():
    value = Spread(mean=0.6123, std=0.0149, num_values=3)
    assert quantities.metric_spread("rougeL_after", value) == "61.2 ± 1.5"
    assert quantities.metric_spread("loss_after", value) == "0.612 ± 0.015"


def test_spread_of_bytes_is_in_the_unit_of_the_mean():
    assert quantities.bytes_spread(Spread(mean=2e6, std=1e5, num_values=2)) == "2.00 MB ± 0.100"
    assert quantities.bytes_spread(Spread(mean=2e6, std=0.0, num_values=2)) == "2.00 MB"


def test_spread_of_seconds_is_in_the_unit_of_the_mean():
    assert quantities.seconds_spread(Spread(mean=600.0, std=60.0, num_values=2)) == "10.0 ± 1.0 min"
