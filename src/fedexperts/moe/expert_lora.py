"""LoRA on chosen experts of a layer, each with its own rank, and the exact way back into their weights.

PEFT's ``target_parameters`` adapts all experts of a fused parameter with one rank and makes the update of
all of them in every forward pass. Here the chosen experts get slots of their own
(:mod:`fedexperts.moe.slots`), the others stay frozen in theirs, and only the chosen ones' updates are made.

    W' = W + (alpha / rank) B A,   B = 0 at the start
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedexperts.errors import UserError
from fedexperts.moe import seam
from fedexperts.moe.seam import MoeLayer
from fedexperts.moe.slots import SlotPlan, full_weights, install_slots, restore_layer
from fedexperts.seeds import derive_seed


@dataclass(frozen=True, kw_only=True)
class ExpertLoraForm:
    """Which experts of a layer get LoRA, and how much of it."""

    ranks: Mapping[int, int]
    """Rank by expert."""
    alpha: float = 16.0
    """LoRA scale; an expert's update is multiplied by alpha / rank."""

    def __post_init__(self) -> None:
        """Refuse a rank below 1 and an empty choice."""
        if not self.ranks:
            raise UserError("ranks names no expert; give a rank for each that shall have LoRA")
        for expert, rank in self.ranks.items():
            if rank < 1:
                raise UserError(f"rank {rank} of expert {expert} must be at least 1")


class LoraExperts(nn.Module):
    """Frozen weights of some experts and LoRA on their matrices: a :class:`fedexperts.moe.rows.Bank`."""

    def __init__(self, weights: Mapping[str, Tensor], form: ExpertLoraForm, seed: int) -> None:
        """``weights`` are stacked (experts, ...) by parameter name, in the order of ``form.ranks``; no
        copy."""
        super().__init__()
        self.form = form
        self._weights = {name: weight.detach() for name, weight in weights.items()}
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        for position, (expert, rank) in enumerate(form.ranks.items()):
            matrices = {name: w[position] for name, w in self._weights.items() if w[position].dim() == 2}
            generator = torch.Generator().manual_seed(derive_seed(seed, "expert_lora", expert))
            start = {name: _start(matrix, rank, generator) for name, matrix in matrices.items()}
            zero = {
                name: nn.Parameter(torch.zeros(matrix.shape[0], rank, device=matrix.device))
                for name, matrix in matrices.items()
            }
            self.lora_A[str(expert)] = nn.ParameterDict(start)
            self.lora_B[str(expert)] = nn.ParameterDict(zero)

    @property
    def num_experts(self) -> int:
        """How many there are."""
        return len(self.form.ranks)

    def expert(self, index: int) -> dict[str, Tensor]:
        """Weights of one with its update, float32."""
        expert, rank = list(self.form.ranks.items())[index]
        lora_A, lora_B = self.lora_A[str(expert)], self.lora_B[str(expert)]
        assert isinstance(lora_A, nn.ParameterDict)
        assert isinstance(lora_B, nn.ParameterDict)
        scale = self.form.alpha / rank
        return {
            name: weight[index].float() + scale * (lora_B[name] @ lora_A[name])
            if name in lora_A
            else weight[index].float()
            for name, weight in self._weights.items()
        }

    def origin(self, index: int) -> dict[str, Tensor]:
        """Weights of one without its update, as they were given."""
        return {name: weight[index] for name, weight in self._weights.items()}

    def trained(self) -> dict[str, Tensor]:
        """Updated weights of all, stacked; gradients reach A and B through them."""
        everyone = [self.expert(index) for index in range(self.num_experts)]
        return {name: torch.stack([weights[name] for weights in everyone]) for name in self._weights}


def _start(matrix: Tensor, rank: int, generator: torch.Generator) -> nn.Parameter:
    columns = matrix.shape[1]
    bound = columns**-0.5
    start = torch.empty(rank, columns).uniform_(-bound, bound, generator=generator)
    return nn.Parameter(start.to(matrix.device))


def add_expert_lora(layer: MoeLayer, form: ExpertLoraForm, seed: int) -> tuple[str, ...]:
    """Give the experts named in ``form.ranks`` LoRA; all others stay frozen. Returns the new parameters'
    names.

    The layer's output does not change until the update is trained. Raises UserError for an expert it does
    not have.
    """
    chosen = tuple(form.ranks)
    for expert in chosen:
        layer.expert(expert)
    others = tuple(expert for expert in range(layer.num_experts) if expert not in form.ranks)
    plan = SlotPlan(num_experts=layer.num_experts, tuned=chosen, kept=others)
    fused = seam.fused_weights(layer)
    bank = LoraExperts({name: weight[list(chosen)] for name, weight in fused.items()}, form, seed)
    install_slots(layer, plan, bank, {name: weight[list(others)] for name, weight in fused.items()})
    prefix = f"{seam.slots_name(layer)}.tuned"
    return tuple(f"{prefix}.{name}" for name, _ in bank.named_parameters())


def merge_expert_lora(layer: MoeLayer) -> None:
    """Write the updates into the experts' weights, in the model's dtype, and take the slots away."""
    restore_layer(layer, full_weights(layer))


def remove_expert_lora(layer: MoeLayer) -> None:
    """Take the slots away without the updates: the layer is again what it was, bit for bit."""
    slots = seam.slots_of(layer)
    bank = slots.tuned
    assert isinstance(bank, LoraExperts), f"layer {layer.name} has no LoRA on experts"
    fused = full_weights(layer)
    for position, expert in enumerate(slots.plan.tuned):
        for name, weight in bank.origin(position).items():
            fused[name][expert] = weight
    restore_layer(layer, fused)
