"""FedPer: Arivazhagan, Aggarwal, Singh, Choudhary, "Federated Learning with Personalization Layers",
arXiv 1912.00818, Algorithms 1 and 2, on LoRA.

LoRA of the first transformer layers is averaged as in FedAvg; that of the last stays with its client. Both
train together. ``reading N`` points to docs/algorithms/fedper.md.
"""

from dataclasses import dataclass

from fedexperts.algorithms.api import Algorithm, ModelParts, TrainedGroup, refuse_below
from fedexperts.errors import UserError
from fedexperts.messages import Sent


@dataclass(frozen=True, kw_only=True)
class FedPer(Algorithm):
    """Shared lower layers, personal upper layers."""

    personal_layers: int
    """Transformer layers, counted from the last, whose LoRA stays with the client (the paper's K_P); 0 is
    FedAvg, all layers are local-only training."""

    def __post_init__(self) -> None:
        """Refuse a negative number of layers."""
        refuse_below(self, {"personal_layers": 0}, exclusive=False)

    def shared_names(self, parts: ModelParts) -> tuple[str, ...]:
        """Return LoRA of the lower layers."""
        personal = set(self.personal_names(parts))
        return tuple(name for name in parts.lora_names if name not in personal)

    def personal_names(self, parts: ModelParts) -> tuple[str, ...]:
        """Return LoRA of the last layers; a module after all layers goes with the last (reading 2).

        Raises:
            UserError: LoRA is on fewer layers.
        """
        layers = {name: _layer_of(name) for name in parts.lora_names}
        indices = sorted({layer for layer in layers.values() if layer is not None})
        if self.personal_layers > len(indices):
            raise UserError(
                f"algorithm.personal_layers is {self.personal_layers}, but must be at most the number of "
                f"layers with LoRA, which is {len(indices)}"
            )
        personal = {*indices[len(indices) - self.personal_layers :], None} if self.personal_layers else set()
        return tuple(name for name, layer in layers.items() if layer in personal)

    def trained(self, parts: ModelParts, sent: Sent) -> tuple[TrainedGroup, ...]:
        """Return both parts of LoRA; the optimizer's state of the personal one may stay."""
        return (
            TrainedGroup(names=self.shared_names(parts)),
            TrainedGroup(names=self.personal_names(parts), keeps_optimizer=True),
        )


def _layer_of(name: str) -> int | None:
    """Return the transformer layer that a parameter is in: the first number in its path."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)
