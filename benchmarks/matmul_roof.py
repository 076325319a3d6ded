"""Time a step's matrix products alone, as if they were all the machine had to do.

Shape suffixes: ``B`` products in a batch, ``M`` rows, ``K`` inner, ``N`` columns.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
SQUARE = 2048
_SECONDS_PER_SHAPE = 0.15


class Product(NamedTuple):
    """B matrix products of (M, K) by (K, N)."""

    B: int
    M: int
    K: int
    N: int

    @property
    def flops(self) -> int:
        """Multiplications and additions, two for each."""
        return 2 * self.B * self.M * self.K * self.N


class ProductCounter(TorchDispatchMode):
    """Counts the matrix products of the code inside it, forward and backward, by their shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Product] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note the shapes, then do what was asked."""
        products = _PRODUCTS.get(func)
        if products is not None:
            self.counts.update(products(args))
        return func(*args, **(kwargs or {}))

    @property
    def flops(self) -> int:
        """Of all products together."""
        return sum(product.flops * count for product, count in self.counts.items())


def _mm(args: tuple[Any, ...]) -> list[Product]:
    left, right = args[-2:]
    return [Product(1, left.shape[0], left.shape[1], right.shape[1])]


def _bmm(args: tuple[Any, ...]) -> list[Product]:
    left, right = args[-2:]
    return [Product(left.shape[0], left.shape[1], left.shape[2], right.shape[2])]


def _grouped_mm(args: tuple[Any, ...]) -> list[Product]:
    """Tokens sorted by expert, times each expert's matrix: counted as if the experts got equally many."""
    left, right = args[:2]
    if right.dim() == 3:
        num_experts, inner, columns = right.shape
        return [Product(num_experts, -(-left.shape[0] // num_experts), inner, columns)]
    num_experts = args[2].shape[0]
    return [Product(num_experts, left.shape[0], -(-left.shape[1] // num_experts), right.shape[1])]


def _attention(query: Tensor, key: Tensor, *, forward: bool) -> list[Product]:
    """Scores and their product with the values; the backward pass recomputes the scores: 2 and 5 products."""
    batch, heads, rows, width = query.shape
    length = key.shape[2]
    scores, mixed = Product(batch * heads, rows, width, length), Product(batch * heads, rows, length, width)
    return [scores, mixed] if forward else [scores, scores, mixed, mixed, mixed]


_PRODUCTS: Mapping[Any, Callable[[tuple[Any, ...]], list[Product]]] = {
    _aten.mm.default: _mm,
    _aten.addmm.default: _mm,
    _aten.bmm.default: _bmm,
    _aten.baddbmm.default: _bmm,
    _aten._grouped_mm.default: _grouped_mm,
    _aten._scaled_dot_product_flash_attention_for_cpu.default: lambda args: _attention(
        args[0], args[1], forward=True
    ),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default: lambda args: _attention(
        args[1], args[2], forward=False
    ),
}


def seconds_of(product: Product) -> float:
    """Least seconds of torch's product at these shapes, operands warm and ready."""
    left, right = torch.randn(product.B, product.M, product.K), torch.randn(product.B, product.K, product.N)
    if product.B == 1:
        left, right = left[0], right[0]
    seconds: list[float] = []
    while sum(seconds) < _SECONDS_PER_SHAPE or len(seconds) < 5:
        started = time.perf_counter()
        torch.matmul(left, right)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def square_flops_per_second() -> float:
    """Rate that the machine reaches at its best: one big square product."""
    product = Product(1, SQUARE, SQUARE, SQUARE)
    return product.flops / seconds_of(product)


def seconds_at_own_shapes(counts: Mapping[Product, int], num_shapes: int = 16) -> float:
    """Seconds of the products at the shapes they have.

    The ``num_shapes`` with the most work are measured; the rest is taken to run as fast as these do together.
    """
    by_work = sorted(counts, key=lambda product: product.flops * counts[product], reverse=True)
    measured = by_work[:num_shapes]
    seconds = sum(seconds_of(product) * counts[product] for product in measured)
    flops = sum(product.flops * counts[product] for product in measured)
    return seconds * sum(product.flops * counts[product] for product in counts) / flops
