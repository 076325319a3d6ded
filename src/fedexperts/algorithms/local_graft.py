"""Local graft: FLEx (arXiv 2506.00965) without federation, the row that its tables lack.

Each client trains the graft and the LoRA that FLEx gives it, and keeps both. The difference to FLEx is what
the federation gives; the difference to local-only training is what the graft gives.
"""

from dataclasses import dataclass, replace

from fedexperts.algorithms.api import ModelParts, TrainedGroup, refuse_idle
from fedexperts.algorithms.flex import Flex
from fedexperts.messages import Sent


@dataclass(frozen=True, kw_only=True)
class LocalGraft(Flex):
    """FLEx's graft and LoRA, trained alone; nothing travels."""

    uses_mean = False
    keeps_lora = True

    def __post_init__(self) -> None:
        """Refuse what FLEx refuses, and what would be shared."""
        super().__post_init__()
        refuse_idle(self, ("shared_graft", "experts", "own_model"), "where nothing is sent")

    def shared_names(self, parts: ModelParts) -> tuple[str, ...]:
        """Return nothing."""
        return ()

    def personal_names(self, parts: ModelParts) -> tuple[str, ...]:
        """Return LoRA, and what FLEx keeps."""
        return (*parts.lora_names, *super().personal_names(parts))

    def trained(self, parts: ModelParts, sent: Sent) -> tuple[TrainedGroup, ...]:
        """Return FLEx's groups, of which every optimizer state may stay with the client."""
        return tuple(replace(group, keeps_optimizer=True) for group in super().trained(parts, sent))
