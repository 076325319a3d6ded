"""Measure what a merge changes: a layer's output on cached inputs, and the whole model's logits and loss.

Tuned and kept experts run as before, so a layer's error is that of its groups: for every token the routed sum
of the group's members, less the merged expert times their summed routing weight. A dropped expert's error is
its whole output. Every layer is judged on the inputs that it had in the full model; :func:`model_error`
measures how errors add up through the model.

Shape suffixes: ``T`` tokens, ``R`` tokens that are routed to some expert of a group, ``D`` hidden, ``K``
top-k, ``M`` label tokens, ``V`` entries of the vocabulary.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedexperts.errors import UserError
from fedexperts.moe.observing.activations import LayerActivations
from fedexperts.moe.observing.forward_pass import evaluation_mode
from fedexperts.moe.observing.label_logits import LabelledBatch, label_logits
from fedexperts.moe.surgery import one_expert
from fedexperts.moe.surgery.seam import MoeLayer
from fedexperts.moe.surgery.slots import SlotPlan


@dataclass(frozen=True)
class Share:
    """Part of a layer's routing that goes to some of its experts."""

    token_R: Tensor
    """Rows of the activations that are routed to at least one of them, ascending."""
    weight_R: Tensor
    """Sum of a token's routing weights for them, float32."""
    routed_RD: Tensor
    """Weighted sum of their outputs, float32."""


@torch.no_grad()
def share_of(layer: MoeLayer, experts: Sequence[int], activations: LayerActivations) -> Share:
    """Run ``experts`` on the tokens that the router sent them; the layer must have all its weights."""
    index_TK, weights_TK = activations.top_k_index_TK, activations.top_k_weights_TK.float()
    is_member_TK = torch.isin(index_TK, torch.tensor(experts, device=index_TK.device))
    token_R = torch.nonzero(is_member_TK.any(dim=1)).flatten()
    row_T = torch.full((len(index_TK),), -1, device=index_TK.device)
    row_T[token_R] = torch.arange(len(token_R), device=index_TK.device)
    routed_RD = activations.hidden_TD.new_zeros(len(token_R), layer.hidden_size, dtype=torch.float32)
    for expert in experts:
        token, slot = torch.nonzero(index_TK == expert, as_tuple=True)
        output = _run(layer, activations.hidden_TD[token], layer.expert(expert))
        routed_RD.index_add_(0, row_T[token], weights_TK[token, slot, None] * output)
    weight_R = (weights_TK * is_member_TK).sum(dim=1)[token_R]
    return Share(token_R, weight_R, routed_RD)


def _run(layer: MoeLayer, hidden_RD: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Run one expert; return its output, float32, on the inputs' device, which may differ from the
    layer's."""
    like = layer.expert(0)["down_proj"]
    own = {name: weight.to(like) for name, weight in weights.items()}
    return one_expert.run_expert(layer.experts, hidden_RD.to(like), own).float().to(hidden_RD.device)


@torch.no_grad()
def layer_error(
    layer: MoeLayer, plan: SlotPlan, merged: Sequence[Mapping[str, Tensor]], activations: LayerActivations
) -> float:
    """Return ‖routed sum - routed sum with the plan‖ / ‖routed sum‖ over all tokens (Frobenius norms).

    0 is a merge that changes nothing, 1 one that is as bad as a layer whose output is 0.

    Args:
        layer: with all its weights.
        plan: of this layer.
        merged: weights of ``plan.merged``'s groups, in their order.
        activations: of this layer, from the full model and without grafts.

    Raises:
        UserError: there is no token.
    """
    assert len(merged) == len(plan.merged), "weights for each group"
    if len(activations.hidden_TD) == 0:
        raise UserError(f"no token to judge the merge of layer {layer.name} by")
    error_TD = torch.zeros_like(activations.routed_TD, dtype=torch.float32)
    for group, weights in zip(plan.merged, merged, strict=True):
        share = share_of(layer, group, activations)
        output_RD = _run(layer, activations.hidden_TD[share.token_R], weights)
        error_TD.index_add_(0, share.token_R, share.routed_RD - share.weight_R[:, None] * output_RD)
    if plan.dropped:
        share = share_of(layer, plan.dropped, activations)
        error_TD.index_add_(0, share.token_R, share.routed_RD)
    norm = torch.linalg.vector_norm
    return float(norm(error_TD) / norm(activations.routed_TD.float()))


@dataclass(frozen=True, kw_only=True)
class ModelError:
    """Effect of a change of the model on its predictions of the label tokens, as means over them."""

    kl: float
    """Kullback-Leibler divergence of the changed model's distribution from the full one's, nats."""
    loss_before: float
    """Cross-entropy of the full model, nats."""
    loss_after: float
    """Cross-entropy of the changed model, nats."""


def model_error(
    model: Any, change: AbstractContextManager[object], batches: Sequence[LabelledBatch]
) -> ModelError:
    """Compare ``model`` with itself inside ``change``, e.g. ``merged_layers``.

    The full model's log-probabilities of all label tokens are held in main memory, 4 bytes times (M, V).

    Raises:
        UserError: the batches have no label.
    """
    before = list(_log_probabilities(model, batches))
    num_labels = sum(len(label_M) for _, label_M in before)
    if num_labels == 0:
        raise UserError("the batches to compare two models on have no label")
    kl = loss_before = loss_after = 0.0
    with change:
        for (full_MV, label_M), (changed_MV, _) in zip(
            before, _log_probabilities(model, batches), strict=True
        ):
            kl += float(functional.kl_div(changed_MV, full_MV, log_target=True, reduction="sum"))
            loss_before += float(functional.nll_loss(full_MV, label_M, reduction="sum"))
            loss_after += float(functional.nll_loss(changed_MV, label_M, reduction="sum"))
    return ModelError(
        kl=kl / num_labels, loss_before=loss_before / num_labels, loss_after=loss_after / num_labels
    )


@torch.no_grad()
def _log_probabilities(model: Any, batches: Iterable[LabelledBatch]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield by batch the log-probabilities where a label follows, float32 (M, V), and the labels (M,)."""
    for batch in batches:
        with evaluation_mode(model):
            logits_MV, label_M, _ = label_logits(model, batch)
        yield logits_MV.float().log_softmax(dim=-1).cpu(), label_M.cpu()
