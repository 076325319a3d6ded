"""How far one expert is from its layer's output: FLEx's choice of the expert to copy (eq. 4).

    e* = argmin_e  Σ_b || Z_b - E_e(X_b) ||_F

over calibration batches ``b``, with ``X_b`` the layer's inputs and ``Z_b`` its routed sum (reading 3). The
norm is not squared, and the difference is taken in float64, as the selector it comes from does (NAEE, arXiv
2402.14800). All layers are judged in one forward pass of the unpruned model; every expert sees every token.
Several experts at once are chosen in :mod:`fedexperts.moe.subsets`.

Shape suffixes: ``T`` tokens, ``D`` hidden, ``L`` layers, ``E`` experts.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedexperts.errors import UserError
from fedexperts.moe import one_expert, seam
from fedexperts.moe.forward_pass import TokenBatch, run_pass
from fedexperts.moe.seam import MoeLayer


class _Losses:
    """An observer of a pass that adds up every expert's distance to its layer's output."""

    def __init__(self, layers: Sequence[MoeLayer]) -> None:
        self._layers = layers
        self.loss_E = {layer.index: torch.zeros(layer.num_experts, dtype=torch.float64) for layer in layers}
        self.is_token_T: Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See :class:`fedexperts.moe.forward_pass.Observer`."""
        with seam.watch_experts(self._layers, self.see):
            yield

    def begin(self, is_token_BS: Tensor) -> None:
        """See :class:`fedexperts.moe.forward_pass.Observer`."""
        self.is_token_T = is_token_BS.reshape(-1)

    def end(self) -> None:
        """See :class:`fedexperts.moe.forward_pass.Observer`."""
        self.is_token_T = None

    def see(self, layer: MoeLayer, hidden_TD: Tensor, *routing: Tensor) -> None:
        """``routing`` is top-k index, top-k weights, and the routed sum (T, D)."""
        routed_TD = routing[-1]
        assert self.is_token_T is not None, "set before each forward pass"
        inputs_TD, target_TD = hidden_TD[self.is_token_T], routed_TD[self.is_token_T].double()
        for expert in range(layer.num_experts):
            output_TD = one_expert.run_expert(layer.experts, inputs_TD, layer.expert(expert))
            distance = torch.linalg.vector_norm(target_TD - output_TD.double())
            self.loss_E[layer.index][expert] += float(distance)


def reconstruction_losses(
    model: nn.Module, layers: Sequence[MoeLayer], batches: Iterable[TokenBatch]
) -> list[Tensor]:
    """Loss of every expert as the stand-in for its whole layer, one tensor (E,) float64 for each layer.

    Args:
        model: called with ``input_ids`` and ``attention_mask`` of each batch, in evaluation mode.
        layers: those of ``model``, without grafts.
        batches: with ``input_ids`` and ``attention_mask``, shape (batch, length); padding is left out.

    Raises:
        UserError: there is no batch, or a loss is not finite.
    """
    losses = _Losses(layers)
    run_pass(model, batches, (losses,), "choose experts by: the client has no training example")
    for layer in layers:
        if not torch.isfinite(losses.loss_E[layer.index]).all():
            raise UserError(f"reconstruction loss of layer {layer.name} is not finite: check its weights")
    return [losses.loss_E[layer.index] for layer in layers]


def choose_experts(losses: Sequence[Tensor]) -> list[int]:
    """The expert of least loss for each layer; the lowest index on a tie."""
    return [int(torch.argmin(loss_E)) for loss_E in losses]
