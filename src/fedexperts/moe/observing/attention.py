"""Measure how much attention each token receives, from the model's own attention while it runs.

A token's attention received in a layer is the mean, over heads and over the queries that can attend to it, of
the weight they give it. (Flux, arXiv 2508.19078, uses a token's attention without defining it; the plain
column mean would favour early tokens, to which more queries attend.) Of long sequences some queries are
sampled, one from each of equal stretches, to stand for its stretch.

Shape suffixes: ``B`` sequences, ``S`` positions, ``Q`` sampled queries, ``H`` query heads.
"""

import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from fedexperts.errors import UserError
from fedexperts.moe.surgery.seam import MoeLayer
from fedexperts.seeds import derive_random

_WATCHED = {"sdpa": "fedexperts_sdpa", "eager": "fedexperts_eager"}
"""Attention implementations that can be observed, and the names under which ours replace them."""
_METER = "fedexperts_attention_meter"


class AttentionMeter:
    """An observer that measures attention in the blocks that hold MoE layers.

    After a forward pass has reached a layer, :meth:`received` gives the attention that the layer's tokens
    received.
    """

    def __init__(self, model: Any, layers: Sequence[MoeLayer], *, num_queries: int, seed: int) -> None:
        """Sample ``num_queries`` from each longer sequence, by ``seed``.

        Raises:
            UserError: the model's attention implementation does not show its weights.
        """
        self._model, self._num_queries, self._seed = model, num_queries, seed
        self._stock = str(model.config._attn_implementation)
        if self._stock not in _WATCHED:
            raise UserError(
                f"attention received cannot be read from attention implementation {self._stock!r}: "
                f"load the model with one of {', '.join(_WATCHED)}"
            )
        self._modules = {layer.index: _attention_beside(model, layer) for layer in layers}
        self._found: dict[int, Tensor] = {}
        self._num_batches = 0
        self._is_exact = False
        self._queries_BQ = self._stretch_BQ = torch.empty(0)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Observe inside the ``with`` block, without changing the model's outputs by a bit."""
        modules = [module for found in self._modules.values() for module in found]
        for module in modules:
            setattr(module, _METER, self)
        self._model.set_attn_implementation(_WATCHED[self._stock])
        try:
            yield
        finally:
            self._model.set_attn_implementation(self._stock)
            for module in modules:
                delattr(module, _METER)

    def begin(self, is_token_BS: Tensor) -> None:
        self._is_exact = int(is_token_BS.sum(-1).max()) <= self._num_queries
        queries, stretches = self._sample(is_token_BS)
        self._queries_BQ = queries.to(is_token_BS.device)
        self._stretch_BQ = stretches.to(is_token_BS.device)
        self._num_batches += 1

    def end(self) -> None:
        self._found.clear()

    def received(self, layer: MoeLayer) -> Tensor | None:
        """Return the attention received by position, for each half of the sampled queries: float32 (2, B, S).

        The halves are equal if every query was sampled. NaN marks positions to which no sampled query
        attends, which a sliding window can bring about. None means that the layer's block ran no softmax
        attention.
        """
        for module in self._modules[layer.index]:
            if id(module) in self._found:
                return self._found[id(module)]
        return None

    def _sample(self, is_token_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Sample positions of queries and the number that each stands for; 0 fills up short sequences."""
        generator = derive_random(self._seed, "attention queries", self._num_batches)
        rows = [row.nonzero().squeeze(-1).tolist() for row in is_token_BS.cpu()]
        width = min(self._num_queries, max((len(row) for row in rows), default=0))
        queries, stretches = [], []
        for places in rows:
            count = min(width, len(places))
            edges = [place * len(places) // max(count, 1) for place in range(count + 1)]
            drawn = [generator.randrange(start, end) for start, end in itertools.pairwise(edges)]
            # the last query is the last token's, which alone attends to every token; it also fills up
            drawn[-1:] = [len(places) - 1] * (width - len(drawn) + 1)
            queries.append([places[one] for one in drawn] if places else [0] * width)
            lengths = [end - start for start, end in itertools.pairwise(edges)]
            stretches.append(lengths + [0] * (width - count))
        return torch.tensor(queries), torch.tensor(stretches, dtype=torch.float32)

    def record(self, module: nn.Module, weights_BHQS: Tensor, is_visible_BQS: Tensor) -> None:
        """Reduce the sampled queries' weights to what each position received."""
        num_heads, num_queries = weights_BHQS.shape[1:3]
        # 1 2 2 1 1 2 2 1: what grows or falls along a sequence is the same in both halves
        in_first_Q = torch.arange(num_queries, device=weights_BHQS.device) % 4 % 3 == 0
        stands_for_B2Q = self._stretch_BQ.unsqueeze(1) * torch.stack([in_first_Q, ~in_first_Q])
        # one product over heads and queries, which reads the weights once
        given_B2S = stands_for_B2Q.repeat(1, 1, num_heads) @ weights_BHQS.flatten(1, 2) / num_heads
        seen_B2S = stands_for_B2Q @ is_visible_BQS.float()
        whole_BS = given_B2S.sum(1) / seen_B2S.sum(1)
        # a token to which only one half attends has the whole's estimate in both
        is_split_BS = (seen_B2S > 0).all(dim=1) & (not self._is_exact)
        halves_2BS = (given_B2S / seen_B2S).transpose(0, 1)
        self._found[id(module)] = torch.where(is_split_BS, halves_2BS, whole_BS)

    def rows(self, mask: Tensor | None, is_causal: bool, length: int) -> tuple[Tensor, Tensor | None]:
        """Return where the sampled queries may attend, bool (B, Q, S), and what is added to their scores."""
        queries_BQ = self._queries_BQ
        if mask is None:
            places = torch.arange(length, device=queries_BQ.device)
            latest_BQ = queries_BQ if is_causal else torch.full_like(queries_BQ, length)
            return places <= latest_BQ.unsqueeze(-1), None
        mask = mask[..., :length].expand(len(queries_BQ), -1, -1, -1)
        index = queries_BQ[:, None, :, None].expand(-1, mask.shape[1], -1, length)
        rows = mask.gather(2, index)
        if rows.dtype == torch.bool:
            return rows[:, 0], None
        return rows[:, 0] > torch.finfo(rows.dtype).min / 2, rows

    def rows_of(self, weights_BSS: Tensor) -> Tensor:
        """Return the sampled queries' rows of all weights, (B, Q, S)."""
        index = self._queries_BQ.unsqueeze(-1).expand(-1, -1, weights_BSS.shape[-1])
        return weights_BSS.gather(1, index)

    def weights(
        self, query: Tensor, key: Tensor, scaling: float, seen_BQS: Tensor, added: Tensor | None
    ) -> Tensor:
        """Return softmax weights of the sampled queries: float32 (B, H, Q, S)."""
        num_sequences, num_heads, _, width = query.shape
        index = self._queries_BQ[:, None, :, None].expand(-1, num_heads, -1, width)
        # query heads that share a key head are one matrix, so that keys are not repeated
        grouped = query.gather(2, index).reshape(num_sequences, key.shape[1], -1, width)
        scores = ((grouped * scaling) @ key.mT).reshape(num_sequences, num_heads, *seen_BQS.shape[1:])
        if added is not None:
            scores += added
        hidden_BQS = torch.zeros(seen_BQS.shape, device=query.device).masked_fill_(~seen_BQS, -torch.inf)
        return torch.softmax(scores.float().add_(hidden_BQS.unsqueeze(1)), dim=-1)


def _attention_beside(model: Any, layer: MoeLayer) -> list[nn.Module]:
    """Return modules of the layer's decoder block that may be its attention; the one that runs is."""
    parts = layer.name.split(".")
    last = max(place for place, part in enumerate(parts) if part.isdigit())
    block = model.get_submodule(".".join(parts[: last + 1]))
    return [module for name, module in block.named_modules() if "attn" in name or "attention" in name]


def _watched_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Any:
    """Run stock SDPA and, beside it, the softmax of the sampled queries' scores."""
    meter = getattr(module, _METER, None)
    if meter is not None and kwargs.get("position_bias") is None:
        is_causal = kwargs.get("is_causal")
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        visible, added = meter.rows(attention_mask, bool(is_causal), key.shape[2])
        scaling = kwargs.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        meter.record(module, meter.weights(query, key, scaling, visible, added), visible)
    return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **kwargs)


def _watched_eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Any:
    """Run the family's own eager attention and take the sampled queries' rows of its weights."""
    stock = cast(Any, sys.modules[type(module).__module__]).eager_attention_forward
    output, weights = stock(module, query, key, value, attention_mask, **kwargs)
    meter = getattr(module, _METER, None)
    if meter is not None and weights is not None:
        visible, _ = meter.rows(attention_mask, True, key.shape[2])
        rows = meter.rows_of(weights.float().mean(1)[..., : key.shape[2]])
        meter.record(module, rows.unsqueeze(1), visible)
    return output, weights


for _stock, _function in (("sdpa", _watched_sdpa), ("eager", _watched_eager)):
    # Both by `register`: setting an item only reaches a local map, and the padding mask is silently dropped.
    AttentionInterface.register(_WATCHED[_stock], _function)
    AttentionMaskInterface.register(_WATCHED[_stock], AttentionMaskInterface()[_stock])
