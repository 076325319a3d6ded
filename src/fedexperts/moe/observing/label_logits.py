"""Compute logits only at positions where a label follows, for comparisons of predictions inside ``moe``.

Shape suffixes: ``B`` sequences, ``T`` positions, ``M`` label tokens, ``V`` entries of the vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from fedexperts.moe.observing.forward_pass import TokenBatch

_IGNORED_LABEL: Final = -100


class LabelledBatch(TokenBatch, Protocol):
    """Padded token ids and labels."""

    @property
    def labels(self) -> Tensor:
        """The token's own id, or -100 where none is learnt, int64 (batch, length)."""


@contextmanager
def logits_only_where(is_asked: Tensor, model: Any) -> Iterator[None]:
    """Compute logits of the given positions (B, T) alone: shape (M, V) instead of (B, T, V).

    Most of a batch is prompt, whose logits are not used; with a large vocabulary they cost more time and
    memory than a layer.
    """
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][is_asked],))
    try:
        yield
    finally:
        handle.remove()


def label_logits(model: Any, batch: LabelledBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits (M, V) that predict the labels, the labels (M,), and the row of the batch of each (M,).

    All are on the model's device; the logits are differentiable and in the model's dtype.
    """
    device = next(model.parameters()).device
    next_labels = functional.pad(batch.labels[:, 1:], (0, 1), value=_IGNORED_LABEL).to(device)
    is_asked = next_labels != _IGNORED_LABEL
    with logits_only_where(is_asked, model):
        logits_MV = model(
            input_ids=batch.input_ids.to(device),
            attention_mask=batch.attention_mask.to(device),
            use_cache=False,
        ).logits
    return logits_MV, next_labels[is_asked], torch.nonzero(is_asked)[:, 0]
