"""Arithmetic on named tensors."""

import pytest
import torch

from fedexperts.tensors import first_non_finite, is_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_found(bad, dtype):
    tensor = torch.ones(50, dtype=dtype)
    tensor[7] = bad
    assert not is_finite(tensor)
    tensor[8] = -bad
    assert not is_finite(tensor)
    assert first_non_finite({"good": torch.ones(2), "bad": tensor}) == "bad"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_values_whose_sum_overflows_are_finite(dtype):
    largest = torch.finfo(dtype).max
    assert is_finite(torch.full((50,), largest, dtype=dtype))
    assert is_finite(torch.tensor([largest, largest, -largest, -largest], dtype=dtype))
    assert is_finite(torch.ones(3, dtype=torch.int64))
    assert is_finite(torch.ones(0, dtype=dtype))
