"""Refit a merged expert's down projection by least squares on the outputs of its group.

MergeMoE (arXiv 2510.14436) keeps the averaged gate and up projections and solves for the down projection that
reproduces the group's outputs on calibration data. Here the outputs are those that the router asked for: with
``h`` the merged expert's gated activation for a token, ``w`` the token's summed routing weight for the group,
and ``y`` the routed sum of its members,

    min_W  Σ_tokens ‖ y - w · (W h + b) ‖²  +  ρ ‖ W - W0 ‖²

with ``W0`` and ``b`` the averaged down projection and bias. The pull towards ``W0`` instead of 0 keeps a
group that few tokens reach as it was.

Shape suffixes: ``R`` tokens routed to the group, ``F`` inner size, ``D`` hidden.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedexperts.errors import UserError
from fedexperts.moe.compressing.merge_error import share_of
from fedexperts.moe.observing.activations import LayerActivations
from fedexperts.moe.surgery import one_expert
from fedexperts.moe.surgery.seam import MoeLayer

RIDGE = 0.01
"""ρ as a share of the mean diagonal entry of Σ w² h hᵀ."""


@torch.no_grad()
def refit_down(
    layer: MoeLayer,
    group: Sequence[int],
    merged: Mapping[str, Tensor],
    activations: LayerActivations,
    *,
    ridge: float = RIDGE,
) -> dict[str, Tensor]:
    """Return ``merged`` with the least-squares down projection; unchanged if no token reaches the group.

    Raises:
        UserError: the family has a norm after the down projection, so that squares are not least.
    """
    if one_expert.has_norm(layer.experts):
        raise UserError(
            f"the experts of layer {layer.name} have a norm after their down projection, "
            "which least squares do not fit"
        )
    share = share_of(layer, group, activations)
    if len(share.token_R) == 0:
        return dict(merged)
    like = layer.expert(0)["down_proj"]
    own = {name: weight.to(like) for name, weight in merged.items()}
    inputs_RD = activations.hidden_TD[share.token_R].to(like)
    inner_RF = one_expert.gate_expert(layer.experts, one_expert.enter_expert(layer.experts, inputs_RD, own))
    weight_R1 = share.weight_R[:, None].to(like.device)
    scaled_RF = (weight_R1 * inner_RF.float()).double()
    wanted_RD = share.routed_RD.to(like.device).double()
    if "down_proj_bias" in merged:
        wanted_RD = wanted_RD - weight_R1.double() * own["down_proj_bias"].double()
    is_transposed = layer.experts.is_transposed
    start_DF = own["down_proj"].T if is_transposed else own["down_proj"]
    fitted_DF = _ridge(scaled_RF, wanted_RD, start_DF.double(), ridge)
    fitted = (fitted_DF.T if is_transposed else fitted_DF).to(merged["down_proj"])
    return {**merged, "down_proj": fitted.contiguous()}


def _ridge(input_RF: Tensor, wanted_RD: Tensor, start_DF: Tensor, ridge: float) -> Tensor:
    """Solve for the least-squares matrix (D, F) that is pulled towards ``start_DF``."""
    gram_FF = input_RF.T @ input_RF
    pull = ridge * gram_FF.diagonal().mean()
    if pull == 0:
        return start_DF
    left_FF = gram_FF + pull * torch.eye(len(gram_FF), dtype=gram_FF.dtype, device=gram_FF.device)
    residual_FD = input_RF.T @ (wanted_RD - input_RF @ start_DF.T)
    correction_FD: Tensor = torch.linalg.solve(left_FF, residual_FD)
    return start_DF + correction_FD.T
