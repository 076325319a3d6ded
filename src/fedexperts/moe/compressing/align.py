"""The order of an expert's neurons: its output does not depend on it, an average of two experts does.

MC-SMoE (arXiv 2310.01334) therefore permutes the neurons of each expert of a group to fit those of the
group's most used one before it averages. Experts that were split from one checkpoint fit as they are (Flux
does not permute), so this is an option.

A neuron is one entry of what the gate gives: a row of the gate's and of the up projection, with their biases,
and a column of the down projection. How these lie in the fused parameters is the family's: transposed or not,
gate and up one after the other or in turns.

Shape suffixes: ``F`` neurons, ``X`` the weights of one neuron.
"""

from collections.abc import Mapping
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fedexperts.moe.surgery.seam import MoeLayer


def align_neurons(
    layer: MoeLayer, weights: Mapping[str, Tensor], reference: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """``weights`` of one expert with its neurons in the order that fits ``reference`` best.

    The order is the one of least squared difference between both experts' weights, found exactly.
    """
    own_FX, wanted_FX = (neurons(layer.experts, each) for each in (weights, reference))
    likeness_FF = (wanted_FX @ own_FX.T).double().cpu().numpy()
    _, order_F = linear_sum_assignment(likeness_FF, maximize=True)
    return permute_neurons(layer.experts, weights, torch.from_numpy(order_F))


def neurons(experts: Any, weights: Mapping[str, Tensor]) -> Tensor:
    """One row of weights for each neuron, float32 (F, X)."""
    columns = []
    for name, weight in sorted(weights.items()):
        axis = _neuron_axis(experts, name)
        if axis is not None:
            by_neuron = _unfold(experts, name, weight, axis).movedim(axis, 0)
            columns.append(by_neuron.flatten(1).float())
    return torch.cat(columns, dim=1)


def permute_neurons(experts: Any, weights: Mapping[str, Tensor], order_F: Tensor) -> dict[str, Tensor]:
    """The same expert with neuron ``order_F[i]`` in place ``i``."""
    permuted = {}
    for name, weight in weights.items():
        axis = _neuron_axis(experts, name)
        if axis is None:
            permuted[name] = weight
        else:
            unfolded = _unfold(experts, name, weight, axis)
            permuted[name] = unfolded.index_select(axis, order_F.to(weight.device)).reshape(weight.shape)
    return permuted


def _neuron_axis(experts: Any, name: str) -> int | None:
    """Which dimension of :func:`_unfold`'s tensor counts neurons; None where a parameter has none of them."""
    if name == "down_proj_bias":
        return None
    if name == "down_proj":
        return 0 if experts.is_transposed else 1
    first = 0 if name.endswith("_bias") or not experts.is_transposed else 1
    return first + 1 if experts.has_gate and experts.is_concatenated else first


def _unfold(experts: Any, name: str, weight: Tensor, axis: int) -> Tensor:
    """``weight`` with gate and up in a dimension of their own, before or after that of the neurons."""
    if not experts.has_gate or name.startswith("down"):
        return weight
    if experts.is_concatenated:
        return torch.unflatten(weight, axis - 1, (2, -1))
    return torch.unflatten(weight, axis, (-1, 2))
