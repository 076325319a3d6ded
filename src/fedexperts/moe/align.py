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

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedexperts.moe.seam import MoeLayer


def align_neurons(
    layer: MoeLayer, weights: Mapping[str, Tensor], reference: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """``weights`` of one expert with its neurons in the order that fits ``reference`` best.

    The order is the one of least squared difference between both experts' weights, found exactly.
    """
    own_FX, wanted_FX = (neurons(layer.experts, each) for each in (weights, reference))
    order_F = best_assignment((wanted_FX @ own_FX.T).double().cpu().numpy())
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


def best_assignment(gain_FF: NDArray[np.float64]) -> NDArray[np.int64]:
    """The permutation ``p`` of largest ``Σ_i gain[i, p[i]]``, exact, int64 (F,).

    Shortest augmenting paths (Jonker and Volgenant 1987, in the form of Crouse 2016 that SciPy has too), with
    each step over all columns at once. SciPy is no dependency: this option alone would ask for it.
    """
    cost_FF = -gain_FF
    price_row, price_column = cost_FF.min(axis=1), np.zeros(len(cost_FF))
    price_column = (cost_FF - price_row[:, None]).min(axis=0)
    column_of, row_of = _first_matches(cost_FF, price_row, price_column)
    for row in np.flatnonzero(column_of < 0):
        distance, came_from, is_done, sink, length = _shortest_path(
            cost_FF, price_row, price_column, row_of, int(row)
        )
        # A row on the path is that of a finished column; the sink's own column has none yet.
        passed = np.flatnonzero(is_done & (row_of >= 0))
        price_row[row] += length
        price_row[row_of[passed]] += length - distance[passed]
        price_column[is_done] -= length - distance[is_done]
        _turn_path(column_of, row_of, came_from, int(row), sink)
    return column_of


def _first_matches(
    cost_FF: NDArray[np.float64], price_row: NDArray[np.float64], price_column: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Give each row a free column at no reduced cost, where there is one."""
    column_of, row_of = np.full(len(cost_FF), -1), np.full(len(cost_FF), -1)
    for row, costs in enumerate(cost_FF):
        is_tight = (costs == price_row[row] + price_column) & (row_of < 0)
        column = int(is_tight.argmax())
        if is_tight[column]:
            column_of[row], row_of[column] = column, row
    return column_of, row_of


def _shortest_path(
    cost_FF: NDArray[np.float64],
    price_row: NDArray[np.float64],
    price_column: NDArray[np.float64],
    row_of: NDArray[np.int64],
    row: int,
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.bool_], int, float]:
    """Dijkstra over columns from ``row`` to the nearest free one, by reduced costs."""
    num = len(cost_FF)
    distance, came_from = np.full(num, np.inf), np.full(num, -1)
    is_done = np.zeros(num, dtype=bool)
    length = 0.0
    while True:
        reached = length + cost_FF[row] - price_row[row] - price_column
        is_nearer = ~is_done & (reached < distance)
        distance[is_nearer], came_from[is_nearer] = reached[is_nearer], row
        column = int(np.where(is_done, np.inf, distance).argmin())
        length = float(distance[column])
        is_done[column] = True
        if row_of[column] < 0:
            return distance, came_from, is_done, column, length
        row = int(row_of[column])


def _turn_path(
    column_of: NDArray[np.int64],
    row_of: NDArray[np.int64],
    came_from: NDArray[np.int64],
    start: int,
    column: int,
) -> None:
    """Along the path every row takes the next column, in place."""
    while True:
        row = int(came_from[column])
        row_of[column] = row
        column_of[row], column = column, int(column_of[row])
        if row == start:
            return
