"""All subsets' losses at once, against each by itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedexperts.moe.choosing import quadratic
from fedexperts.moe.choosing.quadratic import (
    QuadraticForms,
    all_subsets,
    losses_of,
    losses_of_all,
    losses_with_one_more,
)


@st.composite
def some_forms(draw: st.DrawFn) -> QuadraticForms:
    num_rows, num_experts = draw(st.integers(1, 5)), draw(st.integers(3, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    vectors = torch.randn(num_rows, num_experts, 4, generator=generator, dtype=torch.float64)
    weights = torch.rand(num_rows, num_experts, generator=generator, dtype=torch.float64) + 0.01
    is_weighed = draw(st.booleans())
    return QuadraticForms(
        a_REE=vectors @ vectors.mT,
        w_RE=weights if is_weighed else None,
        const_R=None if is_weighed else weights[:, 0],
        top_k=draw(st.integers(1, 4)) if is_weighed else None,
    )


def one_loss(forms: QuadraticForms, subset: list[int]) -> float:
    """The form written out, row by row."""
    total = 0.0
    for row, a_EE in enumerate(forms.a_REE):
        held = subset
        if forms.top_k is not None and forms.w_RE is not None:
            held = sorted(subset, key=lambda expert: -float(forms.w_RE[row, expert]))[: forms.top_k]
        value = sum(float(a_EE[i, j]) for i in held for j in held)
        value += 0.0 if forms.const_R is None else float(forms.const_R[row])
        total += value if forms.w_RE is None else value / float(forms.w_RE[row, held].sum()) ** 2
    return total


def assert_same(found: Tensor, expected: list[float]) -> None:
    # float64 sums in another order, of terms that may cancel
    torch.testing.assert_close(found.tolist(), expected, rtol=1e-9, atol=1e-9)


@given(forms=some_forms(), size=st.integers(1, 3))
@settings(deadline=None, max_examples=60)
def test_all_subsets_have_the_losses_of_each_alone(forms: QuadraticForms, size: int) -> None:
    subsets_Sr = all_subsets(forms.a_REE.shape[1], size)
    expected = [one_loss(forms, subset) for subset in subsets_Sr.tolist()]
    assert_same(losses_of_all(forms, size), expected)
    assert_same(losses_of(forms, subsets_Sr), expected)


@given(forms=some_forms(), data=st.data())
@settings(deadline=None, max_examples=60)
def test_one_more_is_the_loss_with_it(forms: QuadraticForms, data: st.DataObject) -> None:
    num_experts = forms.a_REE.shape[1]
    base = data.draw(st.lists(st.integers(0, num_experts - 1), unique=True, max_size=num_experts - 1))
    found_E = losses_with_one_more(forms, base)
    for expert in range(num_experts):
        if expert in base:
            assert found_E[expert] == torch.inf
        else:
            assert_same(found_E[expert], one_loss(forms, [*base, expert]))


def test_blocks_of_rows_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = torch.randn(50, 7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    forms = QuadraticForms(a_REE=vectors @ vectors.mT, w_RE=vectors.square().sum(-1))
    whole = losses_of_all(forms, 3)
    monkeypatch.setitem(quadratic._BLOCK_ELEMENTS, "cpu", 100)
    torch.testing.assert_close(losses_of_all(forms, 3), whole, rtol=1e-12, atol=0)
