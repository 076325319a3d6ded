"""Compute the squared losses of all subsets of experts at once, each as a small quadratic form.

A row (a token, or a whole batch) has a matrix ``a``. A subset ``C`` of experts has on it the squared loss

    ( const + Σ_{i∈C} Σ_{j∈C} a_ij ) / ( Σ_{i∈C} w_i )²

without the denominator if there are no ``w``. Everything is float64, and ``a`` is symmetric.

Shape suffixes: ``R`` rows, ``E`` experts, ``S`` subsets, ``P`` pairs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 24}
"""Elements of one intermediate tensor: a core's cache holds a few of them, and a GPU needs few launches."""


@dataclass(frozen=True, kw_only=True)
class QuadraticForms:
    """Quadratic forms of some rows, on one device."""

    a_REE: Tensor
    w_RE: Tensor | None = None
    """Weights that the loss divides by, all above zero."""
    const_R: Tensor | None = None
    top_k: int | None = None
    """Number of experts of a larger subset that count on a row, those of largest ``w``; None counts all."""

    def rows(self, rows: slice) -> "QuadraticForms":
        """Return some of the rows, as views."""
        return QuadraticForms(
            a_REE=self.a_REE[rows],
            w_RE=None if self.w_RE is None else self.w_RE[rows],
            const_R=None if self.const_R is None else self.const_R[rows],
            top_k=self.top_k,
        )

    def blocks(self, width: int) -> Iterator["QuadraticForms"]:
        """Yield the rows in blocks, so that ``width`` numbers for each row stay in the cache."""
        size = max(1, _BLOCK_ELEMENTS[self.a_REE.device.type] // width)
        for start in range(0, len(self.a_REE), size):
            yield self.rows(slice(start, start + size))

    def is_cut(self, size: int) -> bool:
        """Return whether only some of ``size`` experts count on a row."""
        return self.top_k is not None and size > self.top_k


def all_subsets(num_experts: int, size: int) -> Tensor:
    """Return all subsets in lexicographic order, int64 (S, size)."""
    return torch.combinations(torch.arange(num_experts), size)


def losses_of_all(forms: QuadraticForms, size: int) -> Tensor:
    """Return squared losses of all subsets of ``size`` (1 to 3) experts, summed over the rows: float64 (S,).

    The order is that of :func:`all_subsets`. A triple costs a few operations on each row: the pairs' sums are
    computed once, and one matrix product with a matrix of zeros and ones joins the first expert with all
    pairs behind it, adding each pair's two products to them.
    """
    assert 1 <= size <= 3
    num_experts = forms.a_REE.shape[-1]
    subsets_Sr = all_subsets(num_experts, size).to(forms.a_REE.device)
    if forms.is_cut(size):
        return losses_of(forms, subsets_Sr)
    total_S = forms.a_REE.new_zeros(len(subsets_Sr))
    for block in forms.blocks(max(num_experts**2, num_experts * (num_experts - 1) // 2)):
        if size == 1:
            total_S += _divided(_plus(torch.diagonal(block.a_REE, dim1=1, dim2=2), block), block.w_RE).sum(0)
        else:
            total_S += _pairs(block) if size == 2 else _triples(block)
    return total_S


def _plus(form_RS: Tensor, forms: QuadraticForms) -> Tensor:
    return form_RS if forms.const_R is None else form_RS + forms.const_R.unsqueeze(-1)


def _divided(form_RS: Tensor, weight_RS: Tensor | None) -> Tensor:
    return form_RS if weight_RS is None else form_RS / weight_RS.square()


def _pair_sums(forms: QuadraticForms) -> tuple[Tensor, Tensor | None]:
    """Return for all pairs the numerator and the sum of weights, each (R, P)."""
    first, second = all_subsets(forms.a_REE.shape[-1], 2).to(forms.a_REE.device).unbind(dim=1)
    diagonal_RE = torch.diagonal(forms.a_REE, dim1=1, dim2=2)
    both_RP = diagonal_RE[:, first] + diagonal_RE[:, second] + 2 * forms.a_REE[:, first, second]
    weight_RP = None if forms.w_RE is None else forms.w_RE[:, first] + forms.w_RE[:, second]
    return _plus(both_RP, forms), weight_RP


def _pairs(forms: QuadraticForms) -> Tensor:
    return _divided(*_pair_sums(forms)).sum(0)


def _triples(forms: QuadraticForms) -> Tensor:
    num_experts = forms.a_REE.shape[-1]
    pair_RP, weight_RP = _pair_sums(forms)
    belongs_EP = _membership(num_experts).to(pair_RP)
    found: list[Tensor] = []
    for first in range(num_experts - 2):
        behind = slice(_pairs_before(num_experts, first + 1), None)
        # the last row of ones adds the first expert's own term to every pair
        joins = torch.cat([2 * forms.a_REE[:, first, first + 1 :], forms.a_REE[:, first, first, None]], dim=1)
        form_RP = torch.addmm(pair_RP[:, behind], joins, belongs_EP[first + 1 :, behind])
        if weight_RP is not None and forms.w_RE is not None:
            form_RP /= (weight_RP[:, behind] + forms.w_RE[:, first, None]).square_()
        found.append(form_RP.sum(0))
    return torch.cat(found)


def _pairs_before(num_experts: int, first: int) -> int:
    """Count the pairs, in order, whose first expert is below ``first``."""
    return first * (2 * num_experts - first - 1) // 2


def _membership(num_experts: int) -> Tensor:
    """Return 1 where an expert belongs to a pair, and a last row of ones: (E + 1, P)."""
    pairs_P2 = all_subsets(num_experts, 2)
    belongs_EP = torch.zeros(num_experts + 1, len(pairs_P2), dtype=torch.float64)
    belongs_EP.scatter_(0, pairs_P2.T, 1.0)
    belongs_EP[-1] = 1.0
    return belongs_EP


def losses_of(forms: QuadraticForms, subsets_Sr: Tensor) -> Tensor:
    """Return squared losses of the given subsets, summed over the rows, float64 (S,); for few rows or
    subsets."""
    subsets_Sr = subsets_Sr.to(forms.a_REE.device)
    num_subsets, size = subsets_Sr.shape
    total_S = forms.a_REE.new_zeros(num_subsets)
    for block in forms.blocks(num_subsets * size**2):
        a_RSrr = block.a_REE[:, subsets_Sr.unsqueeze(-1), subsets_Sr.unsqueeze(-2)]
        weight_RS = None
        if block.w_RE is not None:
            w_RSr = block.w_RE[:, subsets_Sr]
            if forms.top_k is not None and forms.is_cut(size):
                counts_RSr = _largest(w_RSr, forms.top_k)
                w_RSr = w_RSr * counts_RSr
                a_RSrr = a_RSrr * counts_RSr.unsqueeze(-1) * counts_RSr.unsqueeze(-2)
            weight_RS = w_RSr.sum(-1)
        total_S += _divided(_plus(a_RSrr.sum((-2, -1)), block), weight_RS).sum(0)
    return total_S


def _largest(w_RSr: Tensor, count: int) -> Tensor:
    """Return 1 at the ``count`` largest of the last dimension, the first of equal ones, and 0 elsewhere."""
    order = w_RSr.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(w_RSr).scatter_(-1, order, 1.0)


def losses_with_one_more(forms: QuadraticForms, base: Sequence[int]) -> Tensor:
    """Return the squared losses of ``base`` with each expert added, summed over the rows: float64 (E,).

    Experts in ``base`` get infinity.
    """
    num_experts = forms.a_REE.shape[-1]
    held = torch.tensor(list(base), dtype=torch.int64, device=forms.a_REE.device)
    if forms.is_cut(len(base) + 1):
        everyone = torch.arange(num_experts, device=held.device).unsqueeze(-1)
        total_E = losses_of(forms, torch.cat([held.expand(num_experts, -1), everyone], dim=1))
    else:
        total_E = _joined(forms, held)
    total_E[held] = torch.inf
    return total_E


def _joined(forms: QuadraticForms, held: Tensor) -> Tensor:
    rows_Rr = forms.a_REE[:, held]
    own_R1 = rows_Rr[:, :, held].sum((-2, -1)).unsqueeze(-1)
    form_RE = own_R1 + torch.diagonal(forms.a_REE, dim1=1, dim2=2) + 2 * rows_Rr.sum(1)
    weight_RE = None if forms.w_RE is None else forms.w_RE + forms.w_RE[:, held].sum(1, keepdim=True)
    return _divided(_plus(form_RE, forms), weight_RE).sum(0)
