"""Tell padding from tokens, and a first forward pass from its repetition, so that each token counts once.

An experts module sees rows, one for each position of a batch, and no attention mask.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_masks: list[Tensor] = []
# Not a context variable: an accelerator's backward pass recomputes activations in a thread of its own.


@contextmanager
def tokens_are(attention_mask: Tensor) -> Iterator[None]:
    """Let experts modules know within the block which positions (B, T) are tokens."""
    _masks.append(attention_mask.reshape(-1).bool())
    try:
        yield
    finally:
        _masks.pop()


def is_token(num_rows: int) -> Tensor | None:
    """Return which of ``num_rows`` rows are tokens, bool (num_rows,), or None where nobody said so."""
    return _masks[-1] if _masks and len(_masks[-1]) == num_rows else None


def is_recomputed() -> bool:
    """Return whether a backward pass repeats a forward pass now, as gradient checkpointing does."""
    return torch._C._current_graph_task_id() != -1
