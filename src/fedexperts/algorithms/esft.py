"""ESFT: Wang et al., EMNLP 2024, arXiv 2407.01906, "Let the Expert Stick to His Last", federated.

Each client tunes, in every layer, the experts that together hold a share ``p`` of its routing scores; the
server averages each expert over the clients that tuned it. ``reading N`` points to docs/algorithms/esft.md.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedexperts.algorithms.api import ModelParts, ServerState
from fedexperts.algorithms.tuned_experts import TOKENS, TunedExperts
from fedexperts.errors import UserError
from fedexperts.messages import Expected, Upload
from fedexperts.moe.choosing.cumulative import cumulative_choice
from fedexperts.moe.observing.routing_use import UseMeter
from fedexperts.tensors import Tensors

GATES = "gates"
"""Beside an upload's tensors: sum of each expert's gate values over the local steps, float64 (L, E)."""


@dataclass(frozen=True, kw_only=True)
class Esft(TunedExperts):
    """Tune the experts that together hold a share of each layer's scores; average each by its use."""

    score: Literal["token", "gate"] = "token"
    """Score of an expert: its share of the tokens' choices, or of the gate values."""
    p: float = 0.2
    """Share of a layer's score that the tuned experts hold together, above 0 and at most 1."""

    def __post_init__(self) -> None:
        """Refuse numbers outside their range."""
        super().__post_init__()
        if not 0 < self.p <= 1:
            raise UserError(f"p must be above 0 and at most 1, not {self.p}")

    def choose(self, state: ServerState, position: int, score_E: Tensor) -> tuple[int, ...]:
        """Return the best experts until their scores sum to ``p``."""
        return cumulative_choice(score_E, self.p)

    def scores(self, upload: Upload) -> Tensor:
        """Return gate values or tokens; a layer's share follows when experts are chosen."""
        return upload.beside[GATES if self.score == "gate" else TOKENS].double()

    def report(self, meter: UseMeter) -> Tensors:
        """Return tokens per expert, and gate values if they are the score."""
        gates = {GATES: meter.routing_weights()} if self.score == "gate" else {}
        return super().report(meter) | gates

    def expected(self, parts: ModelParts, state: ServerState, client_id: str) -> Expected:
        """Return the same, and gate values if they are the score."""
        expected = super().expected(parts, state, client_id)
        if self.score == "token":
            return expected
        gates = torch.empty(expected.beside[TOKENS].shape, dtype=torch.float64, device="meta")
        return Expected(tensors=expected.tensors, beside={**expected.beside, GATES: gates})
