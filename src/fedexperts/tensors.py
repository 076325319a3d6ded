"""Arithmetic on named tensors."""

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
"""Tensors by name: what a client loads, sends or keeps."""


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the values, without names or shapes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def copy_of(tensors: Mapping[str, Tensor]) -> Tensors:
    """Return detached copies in main memory, contiguous; tensors on the meta device stay there."""
    return {
        name: tensor.detach() if tensor.is_meta else tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in tensors.items()
    }


def sha256_of(*groups: Mapping[str, Tensor]) -> str:
    """Hash names, dtypes, shapes and bits, group by group and in the order of names."""
    digest = hashlib.sha256()
    for tensors in groups:
        for name in sorted(tensors):
            tensor = tensors[name].detach().cpu().contiguous()
            digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def shapes_of(tensors: Mapping[str, Tensor]) -> Tensors:
    """Return tensors of the same shapes and dtypes without values, on the meta device."""
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}


def equal_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether dtype, shape and every bit are the same; NaN equals itself."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    bits = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(*bits)


def first_non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor with a NaN or an infinity, or None."""
    return next((name for name, tensor in tensors.items() if not is_finite(tensor)), None)


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; integers always are finite."""
    if not tensor.is_floating_point():
        return True
    # A sum is much faster, and finite only if every value is; one that overflows proves nothing.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


class WeightedMean:
    """Running weighted mean per name, over whoever brought the name.

    Sums are kept in float64, so that one contribution alone comes back bit for bit from float32 or bfloat16,
    and the result depends only on the order of :meth:`add`.
    """

    def __init__(self) -> None:
        """Start with nothing added."""
        self._sums: Tensors = {}
        self._weights: dict[str, float] = {}

    def add(self, tensors: Mapping[str, Tensor], weights: Mapping[str, float]) -> None:
        """Add each tensor with its weight, which must be positive."""
        for name, tensor in tensors.items():
            weighted = tensor.double() * weights[name]
            if name in self._sums:
                self._sums[name] += weighted
                self._weights[name] += weights[name]
            else:
                self._sums[name] = weighted
                self._weights[name] = weights[name]

    def mean(self, like: Mapping[str, Tensor]) -> Tensors:
        """Means in the dtypes of ``like``; a name that nobody brought keeps its value there."""
        return {
            name: self.exact(name).to(old.dtype) if name in self._sums else old for name, old in like.items()
        }

    def exact(self, name: str) -> Tensor:
        """Return the mean of one name that somebody brought, in float64."""
        return self._sums[name] / self._weights[name]

    def names(self) -> Iterable[str]:
        """Names that somebody brought."""
        return self._sums.keys()
