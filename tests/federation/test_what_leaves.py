"""The list of what leaves a site is whole, and the page shows it."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from leaving import FIGURES, OPEN, QUIET, TENSORS, page_table

from fedexperts.federation.edge import REQUIRED_METRICS
from fedexperts.federation.site_settings import SiteSettings
from fedexperts.federation.site_telling import noisy_counts, told
from fedexperts.messages import Stamp, Upload

PAGE = Path(__file__).parents[2] / "docs" / "threat_model.md"
COUNTS = torch.tensor([[100, 0, 50], [7, 3, -1]])


def answer():
    metrics = dict.fromkeys(REQUIRED_METRICS, 1.0) | {"num_train": 40.0, "loss_after": 1.0}
    beside = {"routing_global": COUNTS, "exam_by_subject": torch.ones(2), "tokens": COUNTS}
    return Upload(
        tensors={"a": torch.zeros(1)},
        weights={"a": 40.0},
        metrics=metrics,
        beside=beside,
        tables={"chosen_experts": torch.tensor([4])},
    )


def test_every_field_of_an_answer_is_in_the_list():
    """The stamp repeats what the server said: run, round and client."""
    assert {item.name for item in fields(Upload)} == {*FIGURES, *TENSORS, "weights", "failure", "stamp"}
    assert {item.name for item in fields(Stamp)} == {"run", "round_number", "client_id"}


def test_the_page_has_the_table_of_the_list():
    assert page_table() in PAGE.read_text()


def test_a_site_tells_only_what_its_settings_name():
    sent = told(answer(), QUIET, 40)
    assert sent.weights == {"a": 1.0}
    assert set(sent.beside) == {"tokens"}, "what the method needs is sent"
    assert sent.tables == {}
    assert "num_train" not in sent.metrics
    assert "loss_after" in sent.metrics
    assert told(answer(), OPEN, 40).beside.keys() == answer().beside.keys()
    assert told(answer(), OPEN, 40).weights == {"a": 40.0}


def test_noise_is_new_each_time_on_routing_alone():
    noisy = SiteSettings(name="n", source="s", folder="f", tell=("routing",), routing_noise=30.0)
    one, two = (told(answer(), noisy, 40).beside for _ in range(2))
    assert not torch.equal(one["routing_global"], two["routing_global"])
    assert torch.equal(one["tokens"], COUNTS)


def test_noisy_counts_stay_counts_and_have_the_stated_scale():
    counts = torch.full((1000, 100), 10_000)
    counts[0, 0] = -1
    noised = noisy_counts(counts, 30.0, np.random.default_rng(1))
    assert (noised.dtype, int(noised[0, 0])) == (torch.int64, -1)
    moved = (noised - counts).double().flatten()[1:]
    # The mean size of Laplace noise is its scale; over 100,000 draws it deviates by 0.3 %, here four times.
    assert abs(float(moved.abs().mean()) - 30.0) < 30.0 * 0.013
    assert int(noisy_counts(torch.zeros(1000, dtype=torch.int64), 30.0, np.random.default_rng(2)).min()) == 0
