"""Estimate gradient utility without a backward pass: Flux's forward-only estimate for explored experts.

For Gaussian ``ξ`` of standard deviation ``σ`` the mean of ``(g · ξ / σ)²`` is ``‖g‖²``. Two forward passes
with ``W + ξ`` and ``W - ξ`` give ``g · ξ`` for the gradient ``g`` of a loss, up to third order, for every
sequence of a batch at once. (The paper's notes divide a loss by a vector; this is a reading that makes sense
and that utility needs.) One pair of passes is a single draw of a chi-squared variable of one degree of
freedom for each sequence: the estimate of one sequence has a standard deviation of 1.4 times its value, and
sums over sequences and pairs have less.

A gradient holds the choice of experts fixed, and noise does not: a token that changes its experts in a later
layer makes the loss jump, and a jump divided by a small ``σ`` is huge. A token whose choice changes is
therefore given the experts and weights of the pass without noise, and the size of ``σ`` hardly matters.

No weight is changed: the probed expert runs with a perturbed copy of its weights.

Shape suffixes: ``B`` sequences of a batch, ``E`` experts, ``L`` layers, ``T`` tokens, ``K`` top-k.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedexperts.errors import UserError
from fedexperts.moe.observing.forward_pass import evaluation_mode
from fedexperts.moe.observing.label_logits import LabelledBatch
from fedexperts.moe.observing.utility import Utility, run_by_rows, sample_losses
from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.rows import Bank
from fedexperts.moe.surgery.seam import MoeLayer
from fedexperts.moe.surgery.slots import FusedExperts, Slots
from fedexperts.seeds import derive_seed

RELATIVE_SIGMA = 0.05
"""σ as a share of the root mean square of the expert's weights."""


@dataclass(frozen=True)
class _Rows:
    """Some sequences of a batch, with the routing of their tokens without noise."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    routing: list[tuple[Tensor, Tensor]]
    """By layer the chosen experts and their weights, (B, S, K)."""


@torch.no_grad()
def probed_utility(
    model: Any,
    layers: Sequence[MoeLayer],
    batches: Sequence[LabelledBatch],
    chosen: Sequence[Sequence[int]],
    *,
    num_pairs: int,
    seed: int,
    relative_sigma: float = RELATIVE_SIGMA,
) -> Utility:
    """Estimate ``gradient_utility`` per sample for the chosen experts.

    It costs one pass, and two passes for each pair and chosen expert over the sequences that reach it.

    Args:
        model: called in evaluation mode.
        layers: those of ``model``, with or without slots.
        batches: padded, with labels.
        chosen: by layer the experts to probe; the others get 0.
        num_pairs: antithetic pairs of probes for each expert.
        seed: of the run; equal arguments give equal estimates.
        relative_sigma: see :data:`RELATIVE_SIGMA`.

    Raises:
        UserError: there is no batch, less than one pair, or a chosen expert has no weights of its own.
    """
    if not batches or num_pairs < 1:
        raise UserError(f"{num_pairs} pairs of probes on {len(batches)} batches: there must be one of each")
    squares = [torch.zeros(layer.num_experts, dtype=torch.float64) for layer in layers]
    counts = [torch.zeros(layer.num_experts, dtype=torch.int64) for layer in layers]
    with evaluation_mode(model), run_by_rows(layers):
        routed = [_RoutedBatch(model, layers, batch) for batch in batches]
        for at, layer in enumerate(layers):
            for expert in chosen[at]:
                reached = [each.reached(at, expert) for each in routed]
                parts = [part for part in reached if len(part.labels)]
                counts[at][expert] = sum(len(part.labels) for part in parts)
                for pair in range(num_pairs):
                    purpose = ("probe", layer.index, expert, pair)
                    probe = _Probe(layer, expert, relative_sigma, derive_seed(seed, *purpose))
                    for part in parts:
                        with _held_routing(layers, part):
                            squares[at][expert] += probe.squares(model, part) / num_pairs
    return Utility(squares_LE=squares, counts_LE=counts)


class _RoutedBatch:
    """A batch, with the experts to which its tokens are sent."""

    def __init__(self, model: Any, layers: Sequence[MoeLayer], batch: LabelledBatch) -> None:
        self._batch = batch
        found: dict[int, tuple[Tensor, Tensor]] = {}
        shape = (*batch.attention_mask.shape, -1)

        def record(layer: MoeLayer, _: Tensor, index_TK: Tensor, weight_TK: Tensor, __: Tensor) -> None:
            found[layer.index] = index_TK.reshape(shape), weight_TK.reshape(shape)

        with seam.watch_experts(layers, record):
            sample_losses(model, batch)
        self._routing = [found[layer.index] for layer in layers]

    def reached(self, at: int, expert: int) -> _Rows:
        """Return the sequences with a token that is sent to ``expert`` of the layer in place ``at``."""
        batch, (index_BSK, _) = self._batch, self._routing[at]
        is_token_BS = batch.attention_mask.bool().to(index_BSK.device)
        is_hit_B = ((index_BSK == expert).any(dim=-1) & is_token_BS).any(dim=-1)
        hit = is_hit_B.to(batch.labels.device)
        return _Rows(
            batch.input_ids[hit],
            batch.attention_mask[hit],
            batch.labels[hit],
            [(index[is_hit_B], weight[is_hit_B]) for index, weight in self._routing],
        )


@contextmanager
def _held_routing(layers: Sequence[MoeLayer], part: _Rows) -> Iterator[None]:
    """Route tokens that would change their experts to the experts of the pass without noise."""

    def hook(at: int) -> Any:
        held_TK, held_weight_TK = (each.flatten(0, 1) for each in part.routing[at])

        def hold(_: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            hidden_TD, index_TK, weight_TK = args
            is_same_T1 = (index_TK.sort(dim=1)[0] == held_TK.sort(dim=1)[0]).all(dim=1, keepdim=True)
            return (
                hidden_TD,
                torch.where(is_same_T1, index_TK, held_TK),
                torch.where(is_same_T1, weight_TK, held_weight_TK),
            )

        return hold

    handles = [layer.experts.register_forward_pre_hook(hook(at)) for at, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Probe:
    """One expert with noise on its weights, or with the noise's opposite."""

    def __init__(self, layer: MoeLayer, expert: int, relative_sigma: float, seed: int) -> None:
        self._layer = layer
        self._bank_name, self._index = _place(layer, expert)
        weights = {name: weight.detach().float() for name, weight in layer.expert(expert).items()}
        number = sum(weight.numel() for weight in weights.values())
        mean_square = sum(float(weight.square().sum()) for weight in weights.values()) / number
        self._sigma = relative_sigma * mean_square**0.5
        generator = torch.Generator().manual_seed(seed)
        self._noise = {
            name: self._sigma * torch.randn(weight.shape, generator=generator).to(weight.device)
            for name, weight in sorted(weights.items())
        }

    def squares(self, model: Any, part: _Rows) -> float:
        """Estimate the sum over sequences of the squared gradient norm."""
        above_B, below_B = (self._losses(model, part, sign) for sign in (1, -1))
        slope_B = (above_B - below_B) / (2 * max(self._sigma, 1e-30))
        return float(slope_B.square().sum())

    def _losses(self, model: Any, part: _Rows, sign: int) -> Tensor:
        noise = {name: sign * each for name, each in self._noise.items()}
        with _other_weights(self._layer, self._bank_name, self._index, noise):
            return sample_losses(model, part).double()


def _place(layer: MoeLayer, expert: int) -> tuple[str, int]:
    """Return the bank of the layer that holds an expert, and the expert's place in it."""
    slots: Slots = seam.slots_of(layer)
    singles = (*slots.plan.tuned, *slots.plan.kept)
    if expert not in singles:
        raise UserError(f"expert {expert} of layer {layer.name} cannot be probed: it has no slot of its own")
    slot, num_tuned = singles.index(expert), len(slots.plan.tuned)
    return ("tuned", slot) if slot < num_tuned else ("frozen", slot - num_tuned)


class _NoisyBank(nn.Module):
    """A bank that runs one expert with other weights."""

    def __init__(self, bank: Bank, index: int, noise: Mapping[str, Tensor]) -> None:
        super().__init__()
        # In a tuple, so that the bank is not registered as a submodule and its weights keep one name.
        self._bank, self._index, self._noise = (bank,), index, noise

    @property
    def num_experts(self) -> int:
        return self._bank[0].num_experts

    def expert(self, index: int) -> dict[str, Tensor]:
        weights = self._bank[0].expert(index)
        if index != self._index:
            return weights
        return {name: weight.float() + self._noise[name] for name, weight in weights.items()}

    def trained(self) -> dict[str, Tensor]:
        return {}


@contextmanager
def _other_weights(
    layer: MoeLayer, bank_name: str, index: int, noise: Mapping[str, Tensor]
) -> Iterator[None]:
    slots = seam.slots_of(layer)
    bank = getattr(slots, bank_name)
    setattr(slots, bank_name, _NoisyBank(bank or FusedExperts(layer.experts), index, noise))
    try:
        yield
    finally:
        setattr(slots, bank_name, bank)
