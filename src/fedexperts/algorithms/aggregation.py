"""Means over uploads that a few bad ones cannot carry away, tensor by tensor and expert by expert.

Norm clipping is after Sun et al., 2019, arXiv 1911.07963; trimmed mean and median, coordinate by coordinate,
are those of Yin et al., ICML 2018, arXiv 1803.01498.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedexperts.errors import UserError, refuse_unknown
from fedexperts.tensors import Tensors, WeightedMean

_EXPERT = re.compile(r"(.*\.experts\.\d+)\..*")


@dataclass(frozen=True, kw_only=True)
class AggregationSettings:
    """Section ``[aggregation]``: the server's mean of each tensor over the uploads that bring it."""

    kind: Literal["mean", "clipped", "trimmed_mean", "median"] = "mean"
    """``mean``: weighted, as the method says. ``clipped``: the same, of changes no longer than ``clip_norm``.
    ``trimmed_mean``, ``median``: coordinate by coordinate, each upload counting once; the server holds all
    uploads of a round."""
    clip_norm: float = 0.0
    """Largest L2 norm of an upload's change of one tensor, or of all tensors of one expert; a longer change
    is scaled down to it. With ``clipped`` only."""
    trim_share: float = 0.0
    """Share of the uploads that is left out at each end of each coordinate, rounded up, so long as one or two
    are left; below 0.5. With ``trimmed_mean`` only."""

    def __post_init__(self) -> None:
        """Refuse numbers outside their range, and those that the kind does not use."""
        refuse_unknown(self)
        for name, kind, largest in (("clip_norm", "clipped", math.inf), ("trim_share", "trimmed_mean", 0.5)):
            value = getattr(self, name)
            if self.kind != kind and value != 0:
                raise UserError(f'{name} is {value:g}, but has no effect with kind = "{self.kind}"')
            if self.kind == kind and not 0 < value < largest:
                raise UserError(
                    f'{name} must be above 0 and below {largest:g} with kind = "{kind}", not {value:g}'
                )

    @property
    def holds_uploads(self) -> bool:
        """Whether the server holds all uploads of a round until the last has come."""
        return self.kind in ("trimmed_mean", "median")

    def start(self, before: Mapping[str, Tensor]) -> WeightedMean:
        """Return a mean to which nothing has been added; changes are measured from ``before``."""
        if self.kind == "clipped":
            return ClippedMean(before, self.clip_norm)
        if self.kind == "mean":
            return WeightedMean()
        return TrimmedMean(0.5 if self.kind == "median" else self.trim_share)


class ClippedMean(WeightedMean):
    """Weighted mean of changes whose norm is bounded, each tensor and each expert for itself."""

    def __init__(self, before: Mapping[str, Tensor], clip_norm: float) -> None:
        """Measure changes from ``before``; what is missing there changes from 0."""
        super().__init__()
        self._before, self._clip_norm = before, clip_norm

    def add(self, tensors: Mapping[str, Tensor], weights: Mapping[str, float]) -> None:
        """Add each tensor, its change scaled down where that of its group is too long."""
        groups: dict[str, list[str]] = {}
        for name in tensors:
            groups.setdefault(group_of(name), []).append(name)
        for names in groups.values():
            super().add(self._clipped({name: tensors[name] for name in names}), weights)

    def _clipped(self, group: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        start = {name: start_of(name, tensor, self._before) for name, tensor in group.items()}
        changes = {name: tensor.double() - start[name] for name, tensor in group.items()}
        norm = norm_of(changes.values())
        if norm <= self._clip_norm:
            return group
        return {name: start[name] + change * (self._clip_norm / norm) for name, change in changes.items()}


class TrimmedMean(WeightedMean):
    """Mean of each coordinate without its largest and smallest values; weights do not count."""

    def __init__(self, share: float) -> None:
        """Leave out this ``share`` at each end, rounded up; 0.5 gives the median."""
        super().__init__()
        self._share = share
        self._brought: dict[str, list[Tensor]] = {}

    def add(self, tensors: Mapping[str, Tensor], weights: Mapping[str, float]) -> None:
        """Hold each tensor."""
        for name, tensor in tensors.items():
            self._brought.setdefault(name, []).append(tensor)

    def mean(self, like: Mapping[str, Tensor]) -> Tensors:
        """Means in the dtypes of ``like``; a name that nobody brought keeps its value there."""
        return {
            name: self.exact(name).to(old.dtype) if name in self._brought else old
            for name, old in like.items()
        }

    def exact(self, name: str) -> Tensor:
        """Return the mean of one name that somebody brought, in float64."""
        brought = self._brought[name]
        num_out = min(math.ceil(self._share * len(brought)), (len(brought) - 1) // 2)
        ordered = torch.stack([tensor.double() for tensor in brought]).sort(dim=0).values
        return ordered[num_out : len(brought) - num_out].mean(dim=0)

    def names(self) -> Iterable[str]:
        """Names that somebody brought."""
        return self._brought.keys()


def group_of(name: str) -> str:
    """Return what the tensor ``name`` is clipped with: its expert, or itself alone."""
    found = _EXPERT.fullmatch(name)
    return found[1] if found else name


def start_of(name: str, tensor: Tensor, before: Mapping[str, Tensor]) -> Tensor:
    """Return in float64 where an uploaded tensor started: 0 if it is not in ``before`` in the same shape."""
    start = before.get(name)
    if start is None or start.shape != tensor.shape:
        return torch.zeros_like(tensor, dtype=torch.float64)
    return start.double()


def norm_of(tensors: Iterable[Tensor]) -> float:
    """Return the L2 norm of all values together."""
    return math.sqrt(math.fsum(float(tensor.double().square().sum()) for tensor in tensors))
