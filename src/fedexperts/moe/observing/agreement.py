"""Measure whether a changed model (quantised, merged) routes and predicts as the full one does.

Shape suffixes: ``T`` tokens, ``E`` experts, ``K`` top-k, ``L`` layers, ``P`` positions with logits, ``V``
words.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedexperts.errors import UserError
from fedexperts.moe.observing.forward_pass import TokenBatch, evaluation_mode
from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.seam import MoeLayer

KL_POSITIONS = 16
"""Positions of each example at which predictions are kept, evenly spread over the batch's length."""


@dataclass(frozen=True, kw_only=True)
class RoutingRecord:
    """Routing and predictions of a model, in main memory."""

    chosen_LTE: tuple[Tensor, ...]
    """By layer whether a token's top-k has an expert, bool."""
    log_probability_PV: Tensor
    """Predictions in float32, as logarithms."""


class _Choices:
    def __init__(self, layers: Sequence[MoeLayer]) -> None:
        self.chosen: dict[int, list[Tensor]] = {layer.index: [] for layer in layers}
        self.is_token_T: Tensor | None = None

    def record(self, layer: MoeLayer, hidden_TD: Tensor, top_k_index_TK: Tensor, *_: Tensor) -> None:
        assert self.is_token_T is not None, "set before each forward pass"
        index_TK = top_k_index_TK[self.is_token_T]
        chosen_TE = torch.zeros(len(index_TK), layer.num_experts, dtype=torch.bool, device=index_TK.device)
        self.chosen[layer.index].append(chosen_TE.scatter_(1, index_TK, True).cpu())


@torch.no_grad()
def record_routing(
    model: Any,
    layers: Sequence[MoeLayer],
    batches: Iterable[TokenBatch],
    *,
    kl_positions: int = KL_POSITIONS,
) -> RoutingRecord:
    """Record one pass of ``model`` over ``batches`` in evaluation mode, padding left out.

    Raises:
        UserError: there is no batch.
    """
    choices, device, predictions = _Choices(layers), next(model.parameters()).device, []
    with evaluation_mode(model), seam.watch_experts(layers, choices.record):
        for batch in batches:
            mask = batch.attention_mask.to(device)
            choices.is_token_T = mask.reshape(-1).bool()
            ends = torch.linspace(0, mask.shape[1] - 1, min(kl_positions, mask.shape[1]), device=device)
            position_P = torch.unique_consecutive(ends.round().long())
            output = model(
                input_ids=batch.input_ids.to(device),
                attention_mask=mask,
                use_cache=False,
                logits_to_keep=position_P,
            )
            logits = output.logits[mask[:, position_P].bool()]
            predictions.append(logits.float().log_softmax(dim=-1).cpu())
    if not predictions:
        raise UserError("there is no batch to record the routing on")
    return RoutingRecord(
        chosen_LTE=tuple(torch.cat(choices.chosen[layer.index]) for layer in layers),
        log_probability_PV=torch.cat(predictions),
    )


@dataclass(frozen=True, kw_only=True)
class RoutingAgreement:
    """Agreement of a model with the full one; 1, 1, 0, 0 if nothing has changed."""

    top_k_overlap_L: tuple[float, ...]
    """By layer the mean share of a token's experts that are the full model's."""
    exact_set_share_L: tuple[float, ...]
    """By layer the share of tokens whose experts are all the full model's."""
    frequency_distance_L: tuple[float, ...]
    """By layer the total variation between the experts' shares of all choices, from 0 to 1."""
    kl: float
    """Mean of KL(full || changed) over the positions kept, in nats."""
    num_tokens: int
    """Tokens on which the routing was compared."""
    num_kl_tokens: int
    """Tokens on which predictions were compared."""

    @property
    def top_k_overlap(self) -> float:
        return sum(self.top_k_overlap_L) / len(self.top_k_overlap_L)

    @property
    def exact_set_share(self) -> float:
        return sum(self.exact_set_share_L) / len(self.exact_set_share_L)

    @property
    def frequency_distance(self) -> float:
        return sum(self.frequency_distance_L) / len(self.frequency_distance_L)


def routing_agreement(full: RoutingRecord, changed: RoutingRecord) -> RoutingAgreement:
    """Compare two records of the same batches.

    Raises:
        UserError: the records are of different batches or models.
    """
    pairs = list(zip(full.chosen_LTE, changed.chosen_LTE, strict=False))
    shapes = [[tuple(chosen.shape) for chosen in record.chosen_LTE] for record in (full, changed)]
    if shapes[0] != shapes[1] or full.log_probability_PV.shape != changed.log_probability_PV.shape:
        raise UserError("the two records of routing are not of the same batches and layers")
    kl_P = torch.nn.functional.kl_div(
        changed.log_probability_PV, full.log_probability_PV, reduction="none", log_target=True
    ).sum(dim=-1)
    return RoutingAgreement(
        top_k_overlap_L=tuple(float((a & b).sum() / a.sum()) for a, b in pairs),
        exact_set_share_L=tuple(float((a == b).all(dim=1).double().mean()) for a, b in pairs),
        frequency_distance_L=tuple(_total_variation(a, b) for a, b in pairs),
        kl=float(kl_P.double().mean()),
        num_tokens=len(pairs[0][0]),
        num_kl_tokens=len(kl_P),
    )


def _total_variation(a_TE: Tensor, b_TE: Tensor) -> float:
    share_E, other_E = (chosen.sum(dim=0).double() / chosen.sum() for chosen in (a_TE, b_TE))
    return float((share_E - other_E).abs().sum() / 2)
