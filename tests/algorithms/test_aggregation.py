"""The weighted mean per tensor, and what the server refuses to put into it."""

import math

import pytest
import torch

from fedexperts.algorithms.aggregation import average, check_upload
from fedexperts.algorithms.api import ServerState
from fedexperts.errors import UserError
from fedexperts.messages import Upload


def state(**tensors: torch.Tensor) -> ServerState:
    return ServerState(round=4, tensors=tensors)


def test_each_tensor_is_averaged_over_those_who_sent_it_only():
    """a: (1·2 + 3·6)/4 = 5; b: from the second alone; c: from nobody, so it stays."""
    start = state(a=torch.zeros(1), b=torch.zeros(1), c=torch.full((1,), 7.0))
    uploads = [
        Upload(tensors={"a": torch.full((1,), 2.0)}, weights={"a": 1.0}),
        Upload(
            tensors={"a": torch.full((1,), 6.0), "b": torch.full((1,), 9.0)}, weights={"a": 3.0, "b": 2.0}
        ),
    ]
    after = average(start, iter(uploads))
    assert {name: tensor.item() for name, tensor in after.tensors.items()} == {"a": 5.0, "b": 9.0, "c": 7.0}
    assert after.round == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_upload_comes_back_bit_for_bit(dtype):
    value = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    after = average(
        state(a=torch.zeros(1000, dtype=dtype)), [Upload(tensors={"a": value}, weights={"a": 97.0})]
    )
    assert torch.equal(after.tensors["a"], value)


def test_uploads_are_taken_one_at_a_time():
    """The mean never asks for the next upload before it has done with the last."""
    alive = []

    def uploads():
        for value in range(3):
            alive.append(value)
            yield Upload(tensors={"a": torch.full((1,), float(value))}, weights={"a": 1.0})
            assert alive == list(range(value + 1))

    assert average(state(a=torch.zeros(1)), uploads()).tensors["a"].item() == 1.0


@pytest.mark.parametrize(
    ("tensor", "weight", "complaint"),
    [
        (torch.full((2,), math.nan), 1.0, "not finite"),
        (torch.full((2,), math.inf), 1.0, "not finite"),
        (torch.zeros(1), 1.0, r"shape \(1,\)"),
        (torch.zeros(2, dtype=torch.float64), 1.0, "float64"),
        (torch.zeros(2), 0.0, "must be above 0"),
        (torch.zeros(2), -5.0, "must be above 0"),
        (torch.zeros(2), math.nan, "must be above 0"),
        (torch.zeros(2), math.inf, "must be above 0"),
    ],
)
def test_what_could_harm_the_mean_is_refused(tensor, weight, complaint):
    with pytest.raises(UserError, match=complaint):
        check_upload(Upload(tensors={"a": tensor}, weights={"a": weight}), state(a=torch.zeros(2)))


def test_a_tensor_that_does_not_travel_is_refused():
    with pytest.raises(UserError, match="not one that travels"):
        check_upload(Upload(tensors={"b": torch.zeros(2)}, weights={"b": 1.0}), state(a=torch.zeros(2)))
