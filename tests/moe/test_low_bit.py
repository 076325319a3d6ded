"""Rounding to few bits: what comes back, and how far it may be off."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedexperts.errors import UserError
from fedexperts.moe.surgery.low_bit import LowBitForm, dequantize, pack, quantize, unpack

FORMS = st.builds(
    LowBitForm, bits=st.sampled_from([8, 4, 3, 2]), group_size=st.sampled_from([8, 16, 32, 64, 128])
)
ROUNDING = 2.0**-22
"""Float32's share of the error: a quotient and a product, each rounded, relative to the largest value."""


def values(rows, columns, magnitude, seed, kind):
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(rows, columns, generator=generator)
    if kind == "positive":
        made = made.abs() + 3
    elif kind == "outlier":
        made[:, 0] *= 1000
    elif kind == "constant":
        made = torch.full_like(made, -0.7)
    elif kind == "sparse":
        made *= torch.rand(rows, columns, generator=generator) < 0.2
    return made * 10.0**magnitude


MATRICES = st.builds(
    values,
    rows=st.integers(1, 5),
    columns=st.integers(1, 150),
    magnitude=st.integers(-40, 37),
    seed=st.integers(0, 1000),
    kind=st.sampled_from(["normal", "positive", "outlier", "constant", "sparse"]),
).filter(lambda matrix: bool(torch.isfinite(matrix).all()))


def round_trip(matrix, form, dtype=torch.float32):
    return dequantize(*quantize(matrix, form), form, matrix.shape[-1], dtype)


def steps(matrix, form):
    """The scale of each value's group."""
    scale = quantize(matrix, form)[1].float()
    return scale.repeat_interleave(form.group_of(matrix.shape[-1]), dim=-1)[:, : matrix.shape[-1]]


@given(matrix=MATRICES, form=FORMS)
def test_no_value_is_off_by_more_than_half_a_step(matrix, form):
    off = (round_trip(matrix, form).double() - matrix.double()).abs()
    slack = ROUNDING * matrix.abs().max().double()
    assert (off <= steps(matrix, form).double() / 2 + slack).all()


@given(matrix=MATRICES, form=FORMS)
def test_zeros_stay_zeros_and_padding_adds_nothing(matrix, form):
    matrix[:, ::2] = 0
    found = round_trip(matrix, form)
    assert found.shape == matrix.shape
    assert (found[:, ::2] == 0).all()


@given(matrix=MATRICES, form=FORMS)
def test_quantising_what_came_back_needs_no_larger_step(matrix, form):
    again = steps(round_trip(matrix, form), form)
    # the ends may round outwards by half a step each, and the step up to a bfloat16
    assert (again <= steps(matrix, form) * (1 + 1 / (2**form.bits - 1)) * (1 + 2**-7)).all()


@given(bits=st.sampled_from([8, 4, 3, 2]), rows=st.integers(0, 3), eights=st.integers(1, 20), data=st.data())
def test_packing_is_exact_and_packs(bits, rows, eights, data):
    seed = data.draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, eights * 8), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, eights * bits)
    assert torch.equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_every_code_at_every_place_survives(bits):
    codes = torch.arange(2**bits, dtype=torch.uint8).repeat(8).reshape(8, -1)
    codes = torch.stack([codes.flatten().roll(shift) for shift in range(8)])
    assert torch.equal(unpack(pack(codes, bits), bits), codes)


def test_four_bits_by_hand():
    # from -3 to 12 in steps of 1: the scale is 1, zero is code 3
    matrix = torch.tensor([[-3.0, 12.0, 0.0, 1.4, 1.6, -0.4, 7.0, 0.0]])
    form = LowBitForm(bits=4, group_size=8)
    packed, scale, zero = quantize(matrix, form)
    assert (scale.item(), zero.item()) == (1.0, 3)
    assert unpack(packed, 4).tolist() == [[0, 15, 3, 4, 5, 3, 10, 3]]
    # code 0 beside code 5 (the fifth), 15 beside 3, 3 beside 10, 4 beside 3
    assert packed.tolist() == [[0 | 5 << 4, 15 | 3 << 4, 3 | 10 << 4, 4 | 3 << 4]]
    assert round_trip(matrix, form).tolist() == [[-3, 12, 0, 1, 2, 0, 7, 0]]


@given(matrix=MATRICES, form=FORMS)
def test_bfloat16_is_float32_rounded_once(matrix, form):
    assert torch.equal(round_trip(matrix, form, torch.bfloat16), round_trip(matrix, form).to(torch.bfloat16))


@given(form=FORMS, columns=st.integers(1, 300))
def test_bytes_are_as_told(form, columns):
    packed, scale, zero = quantize(torch.ones(2, columns), form)
    assert packed.shape == (2, form.row_bytes(columns))
    assert scale.shape == zero.shape == (2, form.num_groups(columns))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(bad):
    matrix = torch.ones(2, 16)
    matrix[1, 3] = bad
    with pytest.raises(UserError, match="NaN or infinite"):
        quantize(matrix, LowBitForm())


@pytest.mark.parametrize(
    ("wrong", "told"),
    [({"bits": 5}, "bits is 5; it must be one of 8, 4, 3, 2"), ({"group_size": 20}, "group_size is 20")],
)
def test_forms_that_cannot_be_packed_are_refused(wrong, told):
    with pytest.raises(UserError, match=told):
        LowBitForm(**wrong)


@pytest.mark.parametrize(("bits", "at_most"), [(8, 0.92), (4, 0.86), (3, 0.79), (2, 0.65)])
def test_groups_from_end_to_end_beat_symmetric_codes(bits, at_most):
    weights = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    largest_code = 2 ** (bits - 1) - 1
    scale = weights.abs().amax(dim=-1, keepdim=True) / largest_code
    symmetric = (weights / scale).round() * scale
    ours = round_trip(weights, LowBitForm(bits=bits, group_size=64))
    assert (ours - weights).norm() <= at_most * (symmetric - weights).norm()
