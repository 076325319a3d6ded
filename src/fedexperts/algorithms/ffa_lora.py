"""FFA-LoRA: Sun et al., ICLR 2024, arXiv 2403.12313, "Improving LoRA in Privacy-preserving FL".

A is frozen at its random start, which is the same everywhere. Clients train and send B alone, so the mean of
the clients' B gives exactly the mean of their updates B A.
"""

from dataclasses import dataclass

from fedexperts.algorithms.api import Algorithm, ModelParts
from fedexperts.algorithms.low_rank import pairs_of


@dataclass(frozen=True, kw_only=True)
class FFALora(Algorithm):
    """Freeze LoRA's A at its start; train, send and average B."""

    def shared_names(self, parts: ModelParts) -> tuple[str, ...]:
        """Return every B."""
        return tuple(pair.b for pair in pairs_of(parts.lora_names))
