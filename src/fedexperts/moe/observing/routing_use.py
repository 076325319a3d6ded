"""Meter the use of experts in passes that run anyway, such as local steps: tokens and routing weights.

Shape suffixes: ``T`` tokens, ``D`` hidden, ``E`` experts, ``K`` top-k, ``L`` layers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.padding import is_recomputed, is_token
from fedexperts.moe.surgery.seam import MoeLayer


class UseMeter:
    """Count each expert's tokens and sum its routing weights, without an additional forward pass.

    Padding is left out where the pass says which positions are tokens, and a forward pass that gradient
    checkpointing repeats counts once.
    """

    def __init__(self, layers: Sequence[MoeLayer]) -> None:
        """Prepare to meter ``layers``."""
        self._layers = layers
        size = (len(layers), max(layer.num_experts for layer in layers))
        self._row = {layer.index: row for row, layer in enumerate(layers)}
        self._tokens_LE = torch.zeros(size, dtype=torch.int64, device=layers[0].device())
        self._weights_LE = torch.zeros(size, dtype=torch.float64, device=layers[0].device())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Meter all passes inside the ``with`` block."""
        with seam.watch_experts(self._layers, self._see):
            yield

    @torch.no_grad()
    def _see(self, layer: MoeLayer, _: Tensor, index_TK: Tensor, weight_TK: Tensor, __: Tensor) -> None:
        if is_recomputed():
            return
        is_token_T = is_token(len(index_TK))
        if is_token_T is not None:
            index_TK, weight_TK = index_TK[is_token_T], weight_TK[is_token_T]
        row, num_experts = self._row[layer.index], self._tokens_LE.shape[1]
        chosen_E = torch.bincount(index_TK.reshape(-1), minlength=num_experts)
        # Spread out before it is summed: sums by index have no fixed order on an accelerator.
        weight_TE = weight_TK.new_zeros(len(index_TK), num_experts, dtype=torch.float64)
        weight_TE.scatter_(1, index_TK, weight_TK.double())
        self._tokens_LE[row] += chosen_E.to(self._tokens_LE.device)
        self._weights_LE[row] += weight_TE.sum(dim=0).to(self._weights_LE.device)

    def tokens(self) -> Tensor:
        """Return tokens per expert, int64 (L, E) in main memory; 0 where a layer has fewer experts."""
        return self._tokens_LE.cpu()

    def routing_weights(self) -> Tensor:
        """Return the sum of each expert's routing weights over its tokens, float64 (L, E)."""
        return self._weights_LE.cpu()
