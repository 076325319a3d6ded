"""Run one expert of a layer from its weights: its two products, gate and norm, and their gradients.

Layouts differ by family: transposed or not, with biases or without, gated or with a plain activation, with a
norm after the last product. The experts module defines the layout; its own fused weights are not used.

Shape suffixes: ``T`` tokens, ``R`` rows, ``D`` hidden, ``F`` expert inner size.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn


@torch.no_grad()
def run_expert(experts: Any, hidden_TD: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """Run one expert with ``weights`` (see :meth:`MoeLayer.expert`) on every token; output shape (T, D)."""
    return expert_output(experts, hidden_TD, weights)


def expert_output(experts: Any, hidden_TD: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """Run one expert as :func:`run_expert` does, with gradients; ``experts`` defines the layout."""
    gated = gate_expert(experts, enter_expert(experts, hidden_TD, weights))
    return norm_expert(experts, leave_expert(experts, gated, weights))


def enter_expert(experts: Any, rows: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """Compute the first product of one expert: (R, D) to its gate's input, (R, 2F), or (R, F) without a
    gate."""
    entry = _entry(experts)
    return _linear(rows, weights[entry], weights.get(f"{entry}_bias"), experts.is_transposed)


def gate_expert(experts: Any, inner: Tensor) -> Tensor:
    """Apply the gate or activation between the products, to (R, F): a tensor of its own, never ``inner``."""
    gated = cast(Tensor, experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner))
    return gated.clone() if gated is inner else gated


def leave_expert(
    experts: Any, gated: Tensor, weights: dict[str, Tensor], bias_scale: Tensor | None = None
) -> Tensor:
    """Compute the second product, to (R, D); ``bias_scale`` (R, 1) multiplies the bias of rows already
    scaled."""
    bias = weights.get("down_proj_bias")
    if bias is None or bias_scale is None:
        return _linear(gated, weights["down_proj"], bias, experts.is_transposed)
    return _linear(gated, weights["down_proj"], None, experts.is_transposed) + bias_scale * bias


def has_norm(experts: Any) -> bool:
    """Return whether the family has a norm after each expert's last product."""
    return bool(getattr(experts, "has_post_expert_norm", False))


def norm_expert(experts: Any, output: Tensor) -> Tensor:
    """Apply the norm after the expert's last product, if the family has one."""
    return cast(Tensor, experts.post_expert_norm(output)) if has_norm(experts) else output


def norm_parameters(experts: Any) -> tuple[nn.Parameter, ...]:
    """Return the parameters of the norm after the expert's last product."""
    return tuple(experts.post_expert_norm.parameters()) if has_norm(experts) else ()


def enter_back(experts: Any, grad_inner: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """Return gradient of :func:`enter_expert` with respect to its rows."""
    weight = weights[_entry(experts)]
    return grad_inner @ (weight.t() if experts.is_transposed else weight)


def leave_back(experts: Any, grad: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """Return gradient of :func:`leave_expert` with respect to ``gated``."""
    weight = weights["down_proj"]
    return grad @ (weight.t() if experts.is_transposed else weight)


def entry_gradients(experts: Any, rows: Tensor, grad_inner: Tensor) -> dict[str, Tensor]:
    """Return gradients of :func:`enter_expert` with respect to its weights, by parameter name."""
    entry = _entry(experts)
    found = {entry: _weight_gradient(experts, rows, grad_inner)}
    return found | ({f"{entry}_bias": grad_inner.sum(dim=0)} if experts.has_bias else {})


def exit_gradients(
    experts: Any, gated: Tensor, grad: Tensor, bias_scale: Tensor | None = None
) -> dict[str, Tensor]:
    """Return gradients of :func:`leave_expert` with respect to its weights, by parameter name."""
    found = {"down_proj": _weight_gradient(experts, gated, grad)}
    if experts.has_bias:
        found["down_proj_bias"] = (grad if bias_scale is None else bias_scale * grad).sum(dim=0)
    return found


def _entry(experts: Any) -> str:
    return "gate_up_proj" if experts.has_gate else "up_proj"


def _weight_gradient(experts: Any, rows: Tensor, grad: Tensor) -> Tensor:
    return rows.t() @ grad if experts.is_transposed else grad.t() @ rows


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None, is_transposed: bool) -> Tensor:
    weight = weight.transpose(-2, -1) if is_transposed else weight
    bias = None if bias is None else bias.to(input.dtype)
    return nn.functional.linear(input, weight.to(input.dtype), bias)
