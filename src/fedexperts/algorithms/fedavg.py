"""FedAvg: McMahan et al., AISTATS 2017, arXiv 1602.05629, Algorithm 1, on LoRA parameters.

With ``experts`` it is the naive federated MoE that FLEx argues against: every routed expert is trained in
full by every client, sent, and averaged.
"""

from dataclasses import dataclass

from fedexperts.algorithms.api import Algorithm, ModelParts, TrainedGroup, refuse_below
from fedexperts.errors import UserError
from fedexperts.messages import Sent
from fedexperts.moe.surgery import seam


@dataclass(frozen=True, kw_only=True)
class FedAvg(Algorithm):
    """Average what every client trains, by its number of examples."""

    experts: bool = False
    """Also train, send and average all routed experts."""
    experts_lr_scale: float = 1.0
    """Learning rate of the experts as a multiple of ``training.lr``."""

    def __post_init__(self) -> None:
        """Refuse an idle or impossible rate."""
        refuse_below(self, {"experts_lr_scale": 0})
        if self.experts_lr_scale != 1.0 and not self.experts:
            raise UserError(f"experts_lr_scale is {self.experts_lr_scale}, but has no effect without experts")

    def shared_names(self, parts: ModelParts) -> tuple[str, ...]:
        """Return LoRA, and each expert's tensors by name."""
        return parts.lora_names + (seam.expert_names(parts.layers) if self.experts else ())

    def trained(self, parts: ModelParts, sent: Sent) -> tuple[TrainedGroup, ...]:
        """Return LoRA, and the experts at a rate of their own."""
        fused = seam.fused_names(seam.expert_names(parts.layers)) if self.experts else ()
        return (
            TrainedGroup(names=parts.lora_names),
            TrainedGroup(names=tuple(sorted(fused)), lr_scale=self.experts_lr_scale),
        )
