"""FedMoE: Mei et al., arXiv 2408.11304, "FedMoE: Personalized Federated Learning via Heterogeneous Mixture of
Experts", its second stage: sub-models by activation, and modular aggregation of experts.

Each client tunes the experts that its own data activate most, as many as its budget allows; the server
averages each expert over the clients that tuned it. ``reading N`` points to docs/algorithms/fedmoe.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedexperts.algorithms.api import ClientFacts, ModelParts, ServerState, refuse_below
from fedexperts.algorithms.tuned_experts import TunedExperts
from fedexperts.errors import UserError
from fedexperts.tensors import num_bytes

BUDGET = "budget"
"""Beside the server's tensors: experts per layer that each client tunes, int64 (C,)."""
TRAINING_BYTES = 16
"""Bytes per tuned parameter: float32 master, gradient and AdamW's two moments (papers.md B.12)."""


@dataclass(frozen=True, kw_only=True)
class FedMoE(TunedExperts):
    """Tune the most used experts of each layer within a budget; average each by its use."""

    experts_per_layer: int
    """Experts of each layer that a client tunes, fewer where its memory holds fewer; 0 for all."""

    uses_memory = True

    def __post_init__(self) -> None:
        """Refuse numbers outside their range."""
        super().__post_init__()
        refuse_below(self, {"experts_per_layer": 0}, exclusive=False)

    def init(self, parts: ModelParts, clients: Sequence[ClientFacts]) -> ServerState:
        """Return the state before the first round, with each client's budget."""
        largest = max(layer.num_experts for layer in parts.layers)
        if self.experts_per_layer > largest:
            raise UserError(
                f"algorithm.experts_per_layer is {self.experts_per_layer}, but the model has {largest} "
                "experts per layer: set fewer, or 0 for all"
            )
        most = self.experts_per_layer or largest
        budget_C = torch.tensor([min(most, experts_that_fit(parts, facts)) for facts in clients])
        state = super().init(parts, clients)
        return replace(state, beside=state.beside | {BUDGET: budget_C})

    def choose(self, state: ServerState, position: int, score_E: Tensor) -> tuple[int, ...]:
        """Return the experts that most tokens reached; of equals the lower index."""
        order_E = torch.sort(score_E, descending=True, stable=True).indices
        return tuple(order_E[: int(state.beside[BUDGET][position])].tolist())


def experts_that_fit(parts: ModelParts, facts: ClientFacts) -> int:
    """Return how many experts of each layer can be tuned in what the model's weights leave of the memory.

    Raises:
        UserError: not even one fits.
    """
    if not facts.memory_bytes:
        return max(layer.num_experts for layer in parts.layers)
    weights = num_bytes(dict(parts.model.named_parameters()))
    one_in_each = sum(tensor.numel() for layer in parts.layers for tensor in layer.expert(0).values())
    fitting = (facts.memory_bytes - weights) // (TRAINING_BYTES * one_in_each)
    if fitting < 1:
        raise UserError(
            f"client {facts.client_id} has {facts.memory_bytes / 1e9:g} GB (cohort.memory_gb), but one tuned "
            f"expert per layer takes {(weights + TRAINING_BYTES * one_in_each) / 1e9:.4g} GB: "
            f"{weights / 1e9:.4g} GB of weights, and {TRAINING_BYTES} bytes per tuned parameter"
        )
    return fitting
