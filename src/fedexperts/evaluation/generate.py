"""Generate answers in batches, greedily or by sampling, with a key-value cache.

This loop replaces transformers' ``generate``. The tokens are the same, but a row that has ended leaves the
batch, so that one answer that never ends does not hold up thirty others (measured in docs/evaluation.md).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from fedexperts.errors import UserError
from fedexperts.models.prompts import prompts_are
from fedexperts.moe.observing.forward_pass import evaluation_mode

_KEPT_SHARE = 0.75
"""Ended rows leave batch and cache once at most this share is still running; each removal is a copy."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Tokens that a model generated after one prompt."""

    token_ids: tuple[int, ...]
    """Without the end-of-sequence token."""
    is_finished: bool
    """Whether the model ended the answer itself; if not, it was cut at the limit."""


def generate_greedily(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    eos_token_id: int,
    pad_token_id: int,
) -> list[Answer]:
    """Generate the likeliest next token until EOS or the limit, for each of ``prompts`` in their order.

    Prompts of similar length share a batch, padded on the left, with positions counted from the first real
    token. The answer therefore does not depend on the rest of the batch (except for ties within rounding).

    Raises:
        UserError: the model gives logits that are not finite.
    """
    limits = (max_new_tokens, batch_size, eos_token_id, pad_token_id)
    return _generate(model, prompts, _likeliest, *limits)


def generate_sampled(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    eos_token_id: int,
    pad_token_id: int,
    seed: int,
    top_k: int,
) -> list[Answer]:
    """Draw each next token among the ``top_k`` likeliest by their probabilities, until EOS or the limit.

    Raises:
        UserError: the model gives logits that are not finite.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(logits: Tensor) -> Tensor:
        best = logits.float().cpu().topk(min(top_k, logits.shape[-1]), dim=-1)
        places = torch.multinomial(best.values.softmax(dim=-1), 1, generator=generator)
        return best.indices.gather(1, places).squeeze(1).to(logits.device)

    return _generate(model, prompts, drawn, max_new_tokens, batch_size, eos_token_id, pad_token_id)


Choose = Callable[[Tensor], Tensor]
"""Function that returns the next token of each row from its logits."""


def _likeliest(logits: Tensor) -> Tensor:
    return torch.argmax(logits, dim=-1)


def _generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    choose: Choose,
    max_new_tokens: int,
    batch_size: int,
    eos_token_id: int,
    pad_token_id: int,
) -> list[Answer]:
    assert all(prompts), "a prompt has at least one token"
    answers: dict[int, Answer] = {}
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    with evaluation_mode(model):
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            batch = _Rows(model, [prompts[index] for index in chunk], pad_token_id, choose)
            answers |= zip(chunk, batch.answer(max_new_tokens, eos_token_id), strict=True)
    return [answers[index] for index in range(len(prompts))]


class _Rows:
    """One batch in progress: the rows still running, and the tokens of all rows."""

    def __init__(
        self, model: Any, prompts: Sequence[Sequence[int]], pad_token_id: int, choose: Choose
    ) -> None:
        self._model, self._choose = model, choose
        self._device = next(model.parameters()).device
        self._prompts = [tuple(prompt) for prompt in prompts]
        self._said: list[list[int]] = [[] for _ in prompts]
        self._rows = list(range(len(prompts)))
        self._inputs, self._mask = _pad_left(prompts, pad_token_id, self._device)
        self._positions = (self._mask.cumsum(dim=-1) - 1).clamp(min=0)
        self._cache: Any = None

    @torch.no_grad()
    def answer(self, max_new_tokens: int, eos_token_id: int) -> list[Answer]:
        """Run up to ``max_new_tokens`` forward passes; return the answers in the order of the prompts."""
        finished: set[int] = set()
        for _ in range(max_new_tokens):
            tokens = self._next_tokens()
            for row, token in zip(self._rows, tokens.tolist(), strict=True):
                if row not in finished and token == eos_token_id:
                    finished.add(row)
                elif row not in finished:
                    self._said[row].append(token)
            if len(finished) == len(self._said):
                break
            self._append(tokens)
            self._drop(finished)
        return [
            Answer(token_ids=tuple(said), is_finished=row in finished) for row, said in enumerate(self._said)
        ]

    def _next_tokens(self) -> Tensor:
        with prompts_are(lambda: [self._prompts[row] for row in self._rows]):
            output = self._model(
                input_ids=self._inputs,
                attention_mask=self._mask,
                position_ids=self._positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._cache = output.past_key_values
        logits: Tensor = output.logits[:, -1]
        if not torch.isfinite(logits).all():
            raise UserError("the model's logits are not finite while it answers: training has diverged")
        return self._choose(logits)

    def _append(self, tokens: Tensor) -> None:
        self._inputs = tokens[:, None]
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        self._positions = self._positions[:, -1:] + 1

    def _drop(self, finished: set[int]) -> None:
        kept = [place for place, row in enumerate(self._rows) if row not in finished]
        # A family's own kind of cache may hold state that reorder_cache does not touch (MiniMax's does).
        if len(kept) > _KEPT_SHARE * len(self._rows) or type(self._cache) is not DynamicCache:
            return
        index = torch.tensor(kept, device=self._device)
        self._cache.reorder_cache(index)
        self._inputs, self._mask = self._inputs[index], self._mask[index]
        self._positions = self._positions[index]
        self._rows = [self._rows[place] for place in kept]


def _pad_left(
    prompts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask, int64 (prompts, longest)."""
    shape = (len(prompts), max(len(prompt) for prompt in prompts))
    input_ids, mask = torch.full(shape, pad_token_id), torch.zeros(shape, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        input_ids[row, -len(prompt) :] = torch.tensor(prompt)
        mask[row, -len(prompt) :] = 1
    return input_ids.to(device), mask.to(device)
