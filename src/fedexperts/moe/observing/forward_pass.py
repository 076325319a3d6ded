"""Run one pass over batches without training, with any number of observers at the experts.

Code that measures what a model does with data is an :class:`Observer`. Several share one pass, so that a
profile, a choice of experts and a check of a merge cost one forward pass together.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fedexperts.errors import UserError


class TokenBatch(Protocol):
    """Padded token ids."""

    @property
    def input_ids(self) -> Tensor:
        """Token ids, int64 (batch, length)."""

    @property
    def attention_mask(self) -> Tensor:
        """1 for a token and 0 for padding, int64 (batch, length)."""


class Observer(Protocol):
    """Interface of an observer of a pass over batches."""

    def watching(self) -> AbstractContextManager[None]:
        """Install hooks inside the ``with`` block and remove them after it."""

    def begin(self, is_token_BS: Tensor) -> None:
        """Announce the positions of the next forward pass: bool (batch, length), False for padding."""

    def end(self) -> None:
        """End the forward pass."""


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Run ``model.eval()`` inside the ``with`` block; what was in training mode is again afterwards."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def run_pass(model: Any, batches: Iterable[TokenBatch], observers: Sequence[Observer], purpose: str) -> int:
    """Call ``model`` on every batch while the observers observe; return the number of batches.

    The model runs in evaluation mode, in which gradient checkpointing is off (no token is counted twice) and
    no router draws at random (PhiMoE's does in training). Logits are computed for one position only.

    Args:
        purpose: what the batches are for, for the error: "there is no batch to ...".

    Raises:
        UserError: there is no batch.
    """
    device, num_batches = next(model.parameters()).device, 0
    with evaluation_mode(model), ExitStack() as stack:
        for observer in observers:
            stack.enter_context(observer.watching())
        for batch in batches:
            mask = batch.attention_mask.to(device)
            for observer in observers:
                observer.begin(mask.bool())
            model(
                input_ids=batch.input_ids.to(device), attention_mask=mask, use_cache=False, logits_to_keep=1
            )
            for observer in observers:
                observer.end()
            num_batches += 1
    if num_batches == 0:
        raise UserError(f"there is no batch to {purpose}")
    return num_batches
