"""Logits where a label follows, for whoever compares predictions inside ``moe``.

Shape suffixes: ``M`` label tokens, ``V`` entries of the vocabulary.
"""

from typing import Any, Final, Protocol

import torch
from torch import Tensor

from fedexperts.moe.forward_pass import TokenBatch

_IGNORED_LABEL: Final = -100


class LabelledBatch(TokenBatch, Protocol):
    """Padded token ids and what is to be predicted."""

    @property
    def labels(self) -> Tensor:
        """The token's own id, or -100 where none is learnt, int64 (batch, length)."""


def label_logits(model: Any, batch: LabelledBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (M, V) that predict the labels, the labels (M,), and the row of the batch of each (M,).

    All are on the model's device; the logits are differentiable and in the model's dtype.
    """
    device = next(model.parameters()).device
    labels = batch.labels.to(device)
    logits = model(
        input_ids=batch.input_ids.to(device),
        attention_mask=batch.attention_mask.to(device),
        use_cache=False,
    ).logits
    row_M, column_M = torch.nonzero(labels[:, 1:] != _IGNORED_LABEL, as_tuple=True)
    return logits[row_M, column_M], labels[row_M, column_M + 1], row_M
