"""Pad encoded examples into batches of similar length.

Shapes: B examples of a batch, T tokens of its longest.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import Final

import torch
from torch import Tensor

from fedexperts.data.examples import Example
from fedexperts.data.prompts import Encoded, PromptFormat
from fedexperts.errors import UserError

IGNORED_LABEL: Final = -100
"""The label that PyTorch's cross-entropy leaves out."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Right-padded token ids and labels; padding is known by length, never by a token's id."""

    input_ids: Tensor
    """Token ids, int64 [B, T]."""
    attention_mask: Tensor
    """1 for a token and 0 for padding, int64 [B, T]."""
    labels: Tensor
    """The token's own id (the model shifts them), or -100 for prompt and padding, int64 [B, T]."""
    num_examples: int
    num_labels: int

    def prompts(self) -> list[tuple[int, ...]]:
        """Return each example's tokens before its first label; all of them where there is none."""
        is_label = self.labels != IGNORED_LABEL
        lengths = torch.where(
            is_label.any(dim=1), is_label.int().argmax(dim=1), self.attention_mask.sum(dim=1)
        )
        rows = zip(self.input_ids.tolist(), lengths.clamp(min=1).tolist(), strict=True)
        return [tuple(ids[:length]) for ids, length in rows]

    def to(self, device: torch.device | str) -> "Batch":
        """Return the same batch with its tensors on ``device``."""
        return Batch(
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            labels=self.labels.to(device),
            num_examples=self.num_examples,
            num_labels=self.num_labels,
        )


@dataclass(frozen=True, kw_only=True)
class BatchCounts:
    """Counts of what encoding did to some examples; counts can be added."""

    num_examples: int = 0
    """Examples given, those left out included."""
    num_truncated: int = 0
    """Examples that were cut."""
    num_without_label: int = 0
    """Examples left out, because the prompt alone fills `data.max_tokens`."""
    num_tokens: int = 0
    """Tokens of the examples that are kept."""
    num_labels: int = 0
    """Tokens of these that are learnt."""

    def __add__(self, other: "BatchCounts") -> "BatchCounts":
        return BatchCounts(
            **{
                name: getattr(self, name) + getattr(other, name)
                for name in (field.name for field in fields(self))
            }
        )


def encode_all(format: PromptFormat, examples: Sequence[Example]) -> tuple[list[Encoded], BatchCounts]:
    """Encode the examples in their order; leave out and count those without any label."""
    encoded = format.encode_examples(examples)
    kept = [each for each in encoded if each.num_labels > 0]
    counts = BatchCounts(
        num_examples=len(encoded),
        num_truncated=sum(each.is_truncated for each in encoded),
        num_without_label=len(encoded) - len(kept),
        num_tokens=sum(len(each.input_ids) for each in kept),
        num_labels=sum(each.num_labels for each in kept),
    )
    return kept, counts


def draw_batches(
    encoded: Sequence[Encoded],
    *,
    num_batches: int,
    batch_size: int,
    rng: random.Random,
    pad_token_id: int,
    multiple_of: int = 1,
    beside: Iterable[Encoded] = (),
    num_beside: int = 0,
) -> list[Batch]:
    """Draw ``num_batches`` full batches without replacement; examples of similar length share a batch.

    If more are asked for than there are, all are drawn once, then again in a new order. Drawn examples are
    sorted by length and cut into batches, which keeps padding low; the batches are then shuffled, so that
    their order does not depend on length. ``multiple_of`` rounds the length of a batch up. Each batch takes
    ``num_beside`` of the examples ``beside`` on top, as they come.
    """
    if not encoded:
        raise UserError("There is no example with a label to train on; data.max_tokens may be too small.")
    drawn: list[Encoded] = []
    while len(drawn) < num_batches * batch_size:
        drawn += rng.sample(encoded, min(len(encoded), num_batches * batch_size - len(drawn)))
    groups, further = list(_by_length(drawn, batch_size)), iter(beside)
    rng.shuffle(groups)
    return [
        make_batch([*group, *islice(further, num_beside)], pad_token_id, multiple_of=multiple_of)
        for group in groups
    ]


def sequential_batches(
    encoded: Sequence[Encoded], *, batch_size: int, pad_token_id: int, multiple_of: int = 1
) -> Iterator[Batch]:
    """Yield every example once, the shortest first; the last batch may be smaller."""
    for group in _by_length(encoded, batch_size):
        yield make_batch(group, pad_token_id, multiple_of=multiple_of)


def _by_length(encoded: Sequence[Encoded], number: int) -> Iterator[Sequence[Encoded]]:
    """Yield all examples in groups of ``number``, the shortest first; the last group may be smaller."""
    by_length = sorted(encoded, key=lambda each: len(each.input_ids))
    for start in range(0, len(by_length), number):
        yield by_length[start : start + number]


def make_batch(encoded: Sequence[Encoded], pad_token_id: int, *, multiple_of: int = 1) -> Batch:
    """Make one batch, padded on the right to the longest, and on to a multiple of ``multiple_of``."""
    num_labels = sum(each.num_labels for each in encoded)
    if num_labels == 0:
        raise UserError(f"A batch with no label ({len(encoded)} examples); data.max_tokens may be too small.")
    longest = max(len(each.input_ids) for each in encoded)
    shape = (len(encoded), -(-longest // multiple_of) * multiple_of)
    input_ids = torch.full(shape, pad_token_id)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED_LABEL)
    for row, each in enumerate(encoded):
        length = len(each.input_ids)
        input_ids[row, :length] = torch.tensor(each.input_ids)
        attention_mask[row, :length] = 1
        for begin, end in (*each.earlier, (each.prompt_length, length)):
            labels[row, begin:end] = input_ids[row, begin:end]
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=labels,
        num_examples=len(encoded),
        num_labels=num_labels,
    )
