"""Train some experts of a layer where they are, in full or by LoRA; all others stay frozen.

Trained experts move to slots of their own (``slots.py``): only they get gradients and optimizer state.
"""

from collections.abc import Sequence

from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.expert_lora import ExpertLoraForm, add_expert_lora
from fedexperts.moe.surgery.seam import MoeLayer
from fedexperts.moe.surgery.slots import SlotPlan, split_layer
from fedexperts.seeds import derive_seed


def adapt_in_place(
    layers: Sequence[MoeLayer],
    chosen: Sequence[Sequence[int]],
    *,
    lora_rank: int,
    lora_alpha: float,
    seed: int,
) -> tuple[str, ...]:
    """Make experts ``chosen[i]`` of ``layers[i]`` trainable; return the names of their parameters.

    Args:
        layers: without slots.
        chosen: experts of each layer.
        lora_rank: rank of LoRA on each matrix of an expert; 0 trains its weights in float32.
        lora_alpha: LoRA scale; the update is multiplied by alpha / rank.
        seed: of LoRA's start.

    Raises:
        UserError: a chosen index is not an expert of its layer, or the layer has slots.
    """
    for layer, experts in zip(layers, chosen, strict=True):
        if lora_rank:
            form = ExpertLoraForm(ranks=dict.fromkeys(experts, lora_rank), alpha=lora_alpha)
            add_expert_lora(layer, form, derive_seed(seed, "in_place", layer.index))
        else:
            others = tuple(expert for expert in range(layer.num_experts) if expert not in experts)
            plan = SlotPlan(num_experts=layer.num_experts, tuned=tuple(experts), kept=others)
            split_layer(layer, plan)
    return adapted_names(layers)


def adapted_names(layers: Sequence[MoeLayer]) -> tuple[str, ...]:
    """Return the names of the parameters of experts in slots of their own: weights, or LoRA's halves."""
    return tuple(
        f"{seam.slots_name(layer)}.{name}"
        for layer in layers
        if seam.slots_of(layer) is not None
        for name, _ in seam.slots_of(layer).named_parameters()
    )
