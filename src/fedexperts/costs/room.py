"""Compute how many experts a client can tune in its memory: the account of ``plan`` and of Flux.

A turn holds the weights outside the routed experts, the frozen experts, 16 bytes for each parameter of a
tuned one (float32 weights and gradient, and AdamW's two numbers: papers.md B.12), and activations.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from fedexperts.costs.depth import peak_by_depth
from fedexperts.costs.dry_run import BatchShape
from fedexperts.errors import UserError
from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.low_bit import LowBitForm
from fedexperts.moe.surgery.low_bit_bank import ExpertShapes, QuantizedBank
from fedexperts.moe.surgery.seam import MoeLayer
from fedexperts.moe.surgery.slots import SlotPlan, install_slots
from fedexperts.tensors import num_bytes
from fedexperts.training.optimizers import blank_state
from fedexperts.training.settings import TrainingSettings

TUNED_BYTES = 16
"""Bytes of a tuned parameter: float32 weight, gradient, and AdamW's two numbers."""
FLOAT_BYTES = 4
"""Bytes of a tuned weight or of its gradient."""

_FEW = 10
"""Not fewer than a router chooses, or a token's choices would meet in one slot and be run once."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """Bytes of a client's turn by its numbers of tuned and frozen experts, in all layers together."""

    num_experts: int
    parameters_each: int
    other_bytes: int
    """Of all weights outside the routed experts."""
    frozen_bytes_each: int
    """Of one kept or merged expert."""
    activations: Callable[[int], int]
    """Of that many tuned experts: at the fullest moment of the forward and backward pass."""
    tuned_bytes: int = TUNED_BYTES
    """Of each parameter of a tuned expert."""

    @property
    def tuned_bytes_each(self) -> int:
        """Of one tuned expert: weights, gradient and AdamW's state, and what a method holds beside them."""
        return self.parameters_each * self.tuned_bytes

    def frozen(self, num_tuned: int, num_merged: int | None) -> int:
        """Return the frozen experts beside ``num_tuned``: merged, or with None each that is not tuned."""
        left = self.num_experts - num_tuned
        return left if num_merged is None else min(num_merged, left)

    def total(self, num_tuned: int, num_merged: int | None) -> int:
        """Return the bytes at the fullest moment."""
        return self.turn(num_tuned, self.frozen(num_tuned, num_merged))

    def turn(self, num_tuned: int, num_frozen: int) -> int:
        """Return the bytes at the fullest moment with so many experts of each kind in slots."""
        experts = num_frozen * self.frozen_bytes_each + num_tuned * self.tuned_bytes_each
        return self.other_bytes + experts + self.activations(num_tuned)

    def most_tuned(self, memory: int, num_merged: int | None) -> int | None:
        """Return how many experts can be tuned in ``memory``; None where not even the frozen ones fit."""
        # The total grows with every tuned expert, so the first that is too many is found by halving.
        number = bisect_right(range(self.num_experts + 1), memory, key=lambda n: self.total(n, num_merged))
        return number - 1 if number else None


def meta_model(config: Any, dtype: torch.dtype) -> Any:
    """Build the language model on the meta device, with our experts implementation, frozen.

    Raises:
        UserError: transformers has no language model of this kind, or it has no experts at the seam.
    """
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"no language model can be built from the configuration: {reason}") from error
    model.eval().requires_grad_(False)
    seam.find_moe_layers(model)
    seam.install_implementation(model)
    return model


def equal_experts(layers: Sequence[MoeLayer]) -> int:
    """Return the number of experts in all layers, which must be alike to be counted by number.

    Raises:
        UserError: the layers differ in their experts.
    """
    if len({(layer.num_experts, layer.expert_size) for layer in layers}) > 1:
        raise UserError("the MoE layers differ in number or size of experts, which a plan cannot express")
    return sum(layer.num_experts for layer in layers)


def room_of(
    model: Any,
    layers: Sequence[MoeLayer],
    shape: BatchShape,
    training: TrainingSettings,
    add: Callable[[Sequence[MoeLayer]], None] | None = None,
) -> Room:
    """Return the account of ``model`` as it was loaded, its frozen experts in its own dtype.

    ``add`` puts what is trained beside the experts, such as grafts, into the layers of a model on the meta
    device: it counts too.

    Raises:
        UserError: the layers differ in their experts.
    """
    one = layers[0].expert(0)
    number, bytes_each = equal_experts(layers), num_bytes(one)
    parameters_each = sum(weight.numel() for weight in one.values())

    def make_model() -> Any:
        made = meta_model(model.config, next(iter(one.values())).dtype)
        if add is not None:
            add(seam.find_moe_layers(made))
        return made

    added = dict(make_model().named_parameters()) if add is not None else {}
    added = {name: parameter for name, parameter in added.items() if parameter.requires_grad}
    return Room(
        num_experts=number,
        parameters_each=parameters_each,
        other_bytes=num_bytes(dict(model.named_parameters()))
        - number * bytes_each
        + sum(parameter.numel() for parameter in added.values()) * TUNED_BYTES,
        frozen_bytes_each=bytes_each,
        activations=Activations(make_model, parameters_each, shape, training),
    )


class Activations:
    """Activations beside tuned experts, counted by a dry run when they are asked for, and once."""

    def __init__(
        self,
        make_model: Callable[[], Any],
        parameters_each: int,
        shape: BatchShape,
        training: TrainingSettings,
    ) -> None:
        """``make_model`` gives a model on the meta device, without slots, anew at each call; what requires a
        gradient in it trains."""
        self._make_model, self._parameters_each = make_model, parameters_each
        self._shape, self._training = shape, training

    def __call__(self, num_tuned: int) -> int:
        """Return the bytes beside ``num_tuned`` tuned experts.

        With few of them the fullest moment is when the logits are there and gradients are not yet; with many
        it is the end of the backward pass, when all gradients are. The larger of the two is an upper bound in
        between.
        """
        at_logits, at_the_end = self._moments
        return max(at_logits - num_tuned * self._parameters_each * FLOAT_BYTES, at_the_end)

    @cached_property
    def _moments(self) -> tuple[int, int]:
        (first, gradients), (every, _) = self._with_tuned(1, 0), self._with_tuned(2, 2)
        return first + gradients, every

    def _with_tuned(self, in_first: int, in_others: int) -> tuple[int, int]:
        """Return activations and gradients with so many tuned experts in each layer."""
        model = self._make_model()
        for layer in seam.find_moe_layers(model):
            into_few_slots(layer, num_tuned=in_others if layer.index else in_first)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        peak = peak_by_depth(model, list(trained), self._shape, self._training)
        state = sum(map(num_bytes, blank_state(trained, self._training).values()))
        tuned = num_bytes({name: p for name, p in trained.items() if ".tuned." in name})
        return max(0, peak - num_bytes(trained) - state), tuned


def into_few_slots(layer: MoeLayer, *, num_tuned: int) -> None:
    """Put the experts of a layer on the meta device into a few quantised slots, with as many rows in all.

    What is counted does not depend on how many there are, but the time that counting takes does.
    """
    others = list(range(num_tuned, layer.num_experts))
    groups = tuple(tuple(others[start::_FEW]) for start in range(min(_FEW, len(others))))
    plan = SlotPlan(num_experts=layer.num_experts, tuned=tuple(range(num_tuned)), merged=groups)
    tuned = {name: weight[:num_tuned] for name, weight in seam.fused_weights(layer).items()}
    install_slots(
        layer, plan, tuned if num_tuned else None, meta_bank(layer, len(groups), LowBitForm(bits=8))
    )


def meta_bank(layer: MoeLayer, num_experts: int, form: LowBitForm) -> QuantizedBank:
    """Return a bank for ``num_experts`` of the layer's experts, on the meta device."""
    with torch.device("meta"):
        return QuantizedBank(num_experts, ExpertShapes.of_layer(layer), form)
