"""Bytes and memory of a round before it is run, and seconds while it runs."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from fedexperts.algorithms.api import Algorithm, ModelParts, ServerState
from fedexperts.messages import predict_bytes
from fedexperts.moe import seam
from fedexperts.tensors import num_bytes

ADAM_BYTES = 2
"""AdamW keeps two numbers for each trained one, of the parameter's own dtype."""


@dataclass(frozen=True, kw_only=True)
class PredictedBytes:
    """Size of one client's messages in one round, to the byte."""

    upload: int
    download: int


def predict_round(algorithm: Algorithm, state: ServerState, parts: ModelParts) -> PredictedBytes:
    """What one client will send and receive in a round, from names, shapes and dtypes alone."""
    upload = {name: state.tensors[name] for name in algorithm.upload_names(parts)}
    return PredictedBytes(
        upload=predict_bytes(upload, is_upload=True),
        download=predict_bytes(algorithm.download(state, "any"), is_upload=False),
    )


@dataclass(frozen=True, kw_only=True)
class PredictedMemory:
    """Bytes that a client's turn needs, by what they hold."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Estimated: what the backward pass keeps of one batch, from the model's sizes; exact for none."""

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.gradients + self.optimizer + self.activations


def predict_memory(
    parts: ModelParts, trained: Mapping[str, Tensor], *, tokens_per_batch: int, recomputes: bool
) -> PredictedMemory:
    """Memory of a client's turn with the model as it stands, grafts included.

    Args:
        parts: the model with everything in place.
        trained: parameters that local steps train, by name.
        tokens_per_batch: tokens of one batch, padding included.
        recomputes: whether gradient checkpointing is on.
    """
    weights = sum(p.numel() * p.element_size() for p in parts.model.parameters())
    gradients = num_bytes(trained)
    return PredictedMemory(
        weights=weights,
        gradients=gradients,
        optimizer=ADAM_BYTES * gradients,
        activations=_activations(parts, tokens_per_batch, recomputes),
    )


def _activations(parts: ModelParts, tokens: int, recomputes: bool) -> int:
    """Per layer: about 16 hidden-size and, for each of top-k experts and the shared one, 4 inner-size rows.

    With recomputation one hidden-size row per layer stays, and one layer at a time is whole. The logits,
    their softmax and its gradient are kept in float32 in either case.
    """
    config: Any = cast(Any, parts.model).config.get_text_config()
    bytes_each = next(parts.model.parameters()).element_size()
    hidden, inner = parts.layers[0].hidden_size, parts.layers[0].expert_size
    top_k = int(getattr(config, "num_experts_per_tok", 0) or getattr(config, "moe_topk", 0) or 2)
    shared = getattr(config, "shared_expert_intermediate_size", None) or 0
    layer = tokens * bytes_each * (16 * hidden + top_k * (4 * inner + 3 * hidden) + 4 * shared)
    depth = config.num_hidden_layers
    kept = layer + depth * tokens * hidden * bytes_each if recomputes else depth * layer
    return int(kept + 3 * tokens * config.vocab_size * 4)


def parameter_table(parts: ModelParts, groups: Mapping[str, str]) -> dict[str, int]:
    """Number of parameters by group, where ``groups`` gives each parameter's."""
    table: dict[str, int] = {}
    for name, parameter in parts.model.named_parameters():
        table[groups[name]] = table.get(groups[name], 0) + parameter.numel()
    return table


class Stopwatch:
    """Seconds by phase; a phase may be entered many times, and not inside another."""

    def __init__(self) -> None:
        """Nothing measured yet."""
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block's wall-clock seconds to ``name``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - started)

    def add(self, name: str, seconds: float) -> None:
        """Count seconds that were measured elsewhere."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def total(self) -> float:
        """Seconds since the stopwatch was made."""
        return time.perf_counter() - self._started


def trained_tensors(parts: ModelParts, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The parameters that hold the tensors called ``names`` (an expert's is its fused parameter)."""
    return seam.tensor_views(parts.model, seam.fused_names(names))
