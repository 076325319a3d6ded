"""What goes where: tokens per expert, from forward passes that train nothing."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fedexperts.errors import UserError
from fedexperts.moe import seam
from fedexperts.moe.forward_pass import TokenBatch, evaluation_mode
from fedexperts.moe.seam import MoeLayer

TokensPerExpert = list[Tensor]
"""How many tokens each expert was chosen for: by MoE layer an int64 tensor (E,) in main memory."""


class _Counter:
    def __init__(self, layers: Iterable[MoeLayer], device: torch.device) -> None:
        self.tokens_LE = [
            torch.zeros(layer.num_experts, dtype=torch.int64, device=device) for layer in layers
        ]
        self.is_token_T: Tensor | None = None

    def see(self, layer: MoeLayer, hidden_TD: Tensor, top_k_index_TK: Tensor, *_: Tensor) -> None:
        assert self.is_token_T is not None, "set before each forward pass"
        assert len(hidden_TD) == len(top_k_index_TK) == len(self.is_token_T), "one row for each position"
        tokens_E = self.tokens_LE[layer.index]
        chosen = top_k_index_TK[self.is_token_T].reshape(-1).to(tokens_E.device)
        tokens_E += torch.bincount(chosen, minlength=layer.num_experts)


@torch.no_grad()
def count_tokens(model: nn.Module, batches: Iterable[TokenBatch]) -> TokensPerExpert:
    """Tokens that the routers send to each expert in one pass over ``batches``, padding left out.

    A layer's counts sum to top-k times the number of tokens. The model runs in evaluation mode, in which
    gradient checkpointing is off (no token is seen twice) and no router draws at random (PhiMoE's does in
    training).

    Raises:
        UserError: there is no batch, or the model has no MoE layer.
    """
    layers, device = seam.find_moe_layers(model), next(model.parameters()).device
    counter = _Counter(layers, device)
    num_batches = 0
    with evaluation_mode(model), seam.watch_experts(layers, counter.see):
        for batch in batches:
            mask = batch.attention_mask.to(device)
            counter.is_token_T = mask.reshape(-1).bool()
            model(
                input_ids=batch.input_ids.to(device), attention_mask=mask, use_cache=False, logits_to_keep=1
            )
            num_batches += 1
    if num_batches == 0:
        raise UserError("there is no batch to count tokens per expert on")
    return [tokens_E.cpu() for tokens_E in counter.tokens_LE]
