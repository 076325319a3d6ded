"""FedSA-LoRA: Guo et al., ICLR 2025, arXiv 2410.01463, "Selective Aggregation for Low-Rank Adaptation".

Clients train both matrices of LoRA. A, which the paper finds to learn what clients have in common, is sent
and averaged; B, which learns what is each client's own, stays with the client.
"""

from dataclasses import dataclass

from fedexperts.algorithms.api import Algorithm, ModelParts, TrainedGroup
from fedexperts.algorithms.low_rank import pairs_of
from fedexperts.messages import Sent


@dataclass(frozen=True, kw_only=True)
class FedSALora(Algorithm):
    """Average LoRA's A; each client keeps its own B."""

    def shared_names(self, parts: ModelParts) -> tuple[str, ...]:
        """Return every A."""
        return tuple(pair.a for pair in pairs_of(parts.lora_names))

    def personal_names(self, parts: ModelParts) -> tuple[str, ...]:
        """Return every B."""
        return tuple(pair.b for pair in pairs_of(parts.lora_names))

    def trained(self, parts: ModelParts, sent: Sent) -> tuple[TrainedGroup, ...]:
        """Return A, and B, whose optimizer state may stay with the client."""
        return (
            TrainedGroup(names=self.shared_names(parts)),
            TrainedGroup(names=self.personal_names(parts), keeps_optimizer=True),
        )
