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
    assert quantities.text("rougeL", value) == "50.0 (n = 1)"


def test_no_value_at_all_is_a_dash():
    assert spread([None, math.inf]) is None
    assert quantities.text("rougeL", None) == quantities.text("bytes", None) == "–"


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
    assert quantities.text("bytes", number) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0.25, "0.250 s"), (42.04, "42.0 s"), (600, "10.0 min"), (7200, "2.00 h")]
)
def test_seconds_grow_into_minutes_and_hours(number, text):
    assert quantities.text("seconds.total", number) == text


@pytest.mark.parametrize(
    ("path", "mean", "std", "text"),
    [
        ("mean.rougeL_after", 0.6123, 0.0149, "61.2 ± 1.5"),
        ("exam.global", 0.5, 0.0, "50.0 ± 0.0"),
        ("mean.loss_after", 0.6123, 0.0149, "0.612 ± 0.015"),
        ("num_train", 1234.0, None, "1,234"),
        ("bytes.upload_per_client_round", 2e6, 1e5, "2.00 ± 0.10 MB"),
        ("bytes.upload_per_client_round", 2e6, 0.0, "2.00 MB"),
        ("bytes.upload_counted", 1234567.0, 0.0, "1,234,567 B"),
        ("seconds.total", 600.0, 60.0, "10.0 ± 1.0 min"),
    ],
)
def test_the_path_says_how_a_number_is_written(path, mean, std, text):
    assert quantities.text(path, Spread(mean=mean, std=std, num_values=2)) == text


@pytest.mark.parametrize(
    ("path", "title"),
    [
        ("mean.rougeL_after", "ROUGE-L after"),
        ("exam.base", "exam base"),
        ("seconds.train", "train"),
        ("algorithm.gate_mean", "opening of the graft gates (0 shut, 1 open)"),
        ("algorithm.drift_norm", "drift norm"),
    ],
)
def test_a_path_is_a_title_in_words(path, title):
    assert quantities.title_of(path) == title
