"""Compute the cross-entropy of labels, separately for each example.

Shapes: B examples of a batch, T tokens of its longest, V entries of the vocabulary, M label tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedexperts.data.batches import IGNORED_LABEL, Batch, sequential_batches
from fedexperts.data.prompts import Encoded
from fedexperts.errors import UserError
from fedexperts.models.prompts import prompts_are
from fedexperts.moe.observing.forward_pass import evaluation_mode

_CHUNK_BYTES = 2**26
"""Logits are converted to float32 in pieces of about this size; those of a whole batch may not fit."""


def mean_loss(model: Any, encoded: Sequence[Encoded], *, batch_size: int, pad_token_id: int) -> float:
    """Return the cross-entropy of the label tokens of all examples together, in nats per token.

    It is the mean over tokens, not over examples or batches, so that neither the batch size nor the order
    matters.

    Raises:
        UserError: no example is given, or a loss is not finite.
    """
    if not encoded:
        raise UserError(
            "there is no example with a label to take the loss of; data.max_tokens may be too small"
        )
    batches = sequential_batches(encoded, batch_size=batch_size, pad_token_id=pad_token_id)
    losses = torch.cat([label_losses(model, batch) for batch in batches])
    if not torch.isfinite(losses).all():
        num_bad = int((~torch.isfinite(losses)).sum())
        raise UserError(
            f"the loss of {num_bad} of {len(losses)} examples is not finite: training has diverged"
        )
    return float(losses.sum()) / sum(each.num_labels for each in encoded)


@torch.no_grad()
def label_losses(model: Any, batch: Batch) -> Tensor:
    """Return summed cross-entropy of each example's labels, in nats, float64 [B] in main memory.

    The log-softmax is taken in float32 whatever the model's dtype is; an example without label has 0.
    """
    device = next(model.parameters()).device
    labels = batch.labels.to(device)
    # Logits before the first label are not computed: with a large vocabulary they would fill the memory.
    first = max(int((labels != IGNORED_LABEL).any(dim=0).int().argmax()), 1)
    with evaluation_mode(model), prompts_are(batch.prompts):
        logits = model(
            input_ids=batch.input_ids.to(device),
            attention_mask=batch.attention_mask.to(device),
            use_cache=False,
            logits_to_keep=labels.shape[1] - first + 1,
        ).logits
    row_M, column_M = torch.nonzero(labels[:, first:] != IGNORED_LABEL, as_tuple=True)
    loss_M = _token_losses(logits, row_M, column_M, labels[row_M, first + column_M])
    sums = torch.zeros(len(labels), dtype=torch.float64)
    return sums.index_add_(0, row_M.cpu(), loss_M.double().cpu())


def _token_losses(logits: Tensor, row_M: Tensor, column_M: Tensor, label_M: Tensor) -> Tensor:
    """Return the losses of the labels that the logits [B, T, V] at (row, column) predict; float32 [M]."""
    size = max(_CHUNK_BYTES // (4 * logits.shape[-1]), 1)
    pieces = [slice(start, start + size) for start in range(0, len(label_M), size)]
    return torch.cat(
        [
            functional.cross_entropy(
                logits[row_M[piece], column_M[piece]].float(), label_M[piece], reduction="none"
            )
            for piece in pieces
        ]
    )
