"""A model on the meta device to numbers: parameters, memory by method and precision, bytes per round.

Everything is asked of the code that runs: adapters and grafts are put on, experts are put in slots and into
few bits, the algorithm says what travels, and a dry run counts the rest.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch

from fedexperts.algorithms.api import Algorithm, Client, ClientFacts, ModelParts, ServerState, trained_names
from fedexperts.algorithms.flux_settings import FluxSettings
from fedexperts.costs.depth import forward_peak_by_depth
from fedexperts.costs.memory import (
    PredictedMemory,
    bytes_of_copies,
    memory_before_activations,
    predict_memory,
)
from fedexperts.costs.room import (
    TUNED_BYTES,
    Activations,
    Room,
    equal_experts,
    into_few_slots,
    meta_bank,
    meta_model,
)
from fedexperts.costs.traffic import PredictedBytes, predict_round
from fedexperts.errors import UserError
from fedexperts.messages import Sent
from fedexperts.models.adapters import ATTENTION, AdapterSettings, add_lora, find_targets
from fedexperts.models.groups import count_parameters
from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.low_bit import LowBitForm
from fedexperts.moe.surgery.seam import MoeLayer
from fedexperts.moe.surgery.undo import undone
from fedexperts.plan.settings import PlanSettings
from fedexperts.running.result import describe_parameters
from fedexperts.tensors import num_bytes

Precision = Literal["dense", "int8", "int4"]
"""Of frozen routed experts; ``dense`` is the model's own dtype."""
PRECISIONS: tuple[Precision, ...] = ("dense", "int8", "int4")
SETTINGS: dict[Precision, str] = {
    "dense": "",
    "int8": "model.experts_bits=8",
    "int4": "model.experts_bits=4",
}
"""Setting of ``run`` for each precision."""
_BITS: dict[str, Literal[8, 4]] = {"int8": 8, "int4": 4}


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The routed experts of a model."""

    num_layers: int
    per_layer: int
    parameters_each: int
    bytes_each: dict[str, int]
    """Of one frozen expert, by precision."""

    @property
    def number(self) -> int:
        """In all layers."""
        return self.num_layers * self.per_layer

    @property
    def tuned_bytes_each(self) -> int:
        """Of one tuned expert: weights, gradient and AdamW's state, 16 bytes a parameter (reading B.12)."""
        return self.parameters_each * TUNED_BYTES


def build(config: Any, settings: PlanSettings) -> Any:
    """Build the language model of ``settings``' dtype on the meta device (:func:`meta_model`)."""
    return meta_model(config, getattr(torch, settings.dtype))


def describe_experts(model: Any) -> Experts:
    """Sizes of the routed experts.

    Raises:
        UserError: the layers differ in their experts.
    """
    layers = seam.find_moe_layers(model)
    equal_experts(layers)
    one = layers[0].expert(0)
    return Experts(
        num_layers=len(layers),
        per_layer=layers[0].num_experts,
        parameters_each=sum(weight.numel() for weight in one.values()),
        bytes_each={"dense": num_bytes(one)}
        | {name: _bank_bytes(layers[0], name) for name in PRECISIONS if name != "dense"},
    )


def _bank_bytes(layer: MoeLayer, precision: Precision) -> int:
    return num_bytes(dict(meta_bank(layer, 1, LowBitForm(bits=_BITS[precision])).named_buffers()))


def adapter_for(model: Any, settings: AdapterSettings) -> AdapterSettings:
    """``settings``, with all linear modules of attention where the model lacks one of the targets."""
    try:
        find_targets(model, settings.target_modules)
    except UserError:
        return AdapterSettings(
            rank=settings.rank, alpha=settings.alpha, dropout=settings.dropout, target_modules=(ATTENTION,)
        )
    return settings


class Counter:
    """One configuration under one method; numbers are counted when they are asked for, and once."""

    def __init__(self, config: Any, settings: PlanSettings) -> None:
        """Nothing counted yet."""
        self._config, self.settings = config, settings

    @cached_property
    def _bare(self) -> Any:
        return build(self._config, self.settings)

    @cached_property
    def experts(self) -> Experts:
        """Its routed experts."""
        return describe_experts(self._bare)

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Of the pretrained model, by group; groups that it lacks are left out."""
        counts = count_parameters(self._bare)
        return {group: number for group, number in counts.items() if number}

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """Modules that get LoRA."""
        return adapter_for(self._bare, self.settings.adapter).target_modules

    @property
    def changes_experts(self) -> bool:
        """Whether the method changes experts, so that ``run`` refuses them in few bits."""
        return self.settings.algorithm.changes_experts

    @property
    def other_bytes(self) -> int:
        """Of all pretrained weights but the routed experts'."""
        others = sum(number for group, number in self.parameters.items() if group != "routed_experts")
        return others * int(getattr(torch, self.settings.dtype).itemsize)

    def _install(self, *, in_low_bits: bool = False) -> "_Installed":
        """Build the model as a client of the method has it, Flux apart.

        Experts in few bits are stood for by a few, with as many rows in all.
        """
        model, algorithm = build(self._config, self.settings), self.settings.algorithm
        if in_low_bits:
            for layer in seam.find_moe_layers(model):
                into_few_slots(layer, num_tuned=0)
        adapter = adapter_for(model, self.settings.adapter)
        lora_names = add_lora(model, adapter, 0)
        parts = ModelParts(
            model=model, layers=seam.find_moe_layers(model), lora_names=lora_names, adapter=adapter
        )
        client = _planned_client(parts, self.settings)
        facts = ClientFacts(client_id=client.client_id, num_train=1)
        state = algorithm.plan_round(algorithm.init(parts, (facts,)), (client.client_id,), 1)
        sent = algorithm.download(state, client.client_id)
        with undone(model, parts.layers) as undo:
            kept = algorithm.install(client, algorithm.blank(parts), sent)
            algorithm.prepare_steps(client, kept, sent)
            copies = bytes_of_copies(algorithm, parts, kept, sent, undo)
            undo.forget()
        return _Installed(parts=parts, algorithm=algorithm, state=state, sent=sent, copies=copies)

    @cached_property
    def _installed(self) -> "_Installed":
        return self._install()

    @cached_property
    def _in_low_bits(self) -> "_Installed":
        return self._install(in_low_bits=True)

    def with_batch(self, batch: int) -> "Counter":
        """Return one for another size of batch, of the same models as far as they are built."""
        other = Counter(self._config, replace(self.settings, batch=batch))
        built = {"_bare", "_installed", "_in_low_bits"} & vars(self).keys()
        vars(other).update({name: vars(self)[name] for name in built})
        return other

    @property
    def trains_all_experts(self) -> bool:
        """Whether the method trains the fused experts themselves, so that none of them is frozen."""
        installed = self._installed
        return not installed.trained.isdisjoint(
            f"{layer.name}.{name}" for layer in installed.parts.layers for name in layer.parameter_names()
        )

    @cached_property
    def trained(self) -> dict[str, int]:
        """Numbers of parameters that travel, stay with the client, and train."""
        one = self._installed
        expected = one.algorithm.expected(one.parts, one.state, _PLANNED)
        roles = describe_parameters(one.algorithm, one.parts, one.sent, expected)
        return {role: roles[role] for role in ("travelling", "personal", "trained")}

    @cached_property
    def bytes(self) -> PredictedBytes:
        """Of one client in one round."""
        one = self._installed
        return predict_round(one.algorithm, one.parts, one.state, _PLANNED)

    @cached_property
    def before_activations(self) -> PredictedMemory:
        """With frozen experts in the model's dtype; activations are left out."""
        one = self._installed
        return memory_before_activations(
            one.parts.model, sorted(one.trained), self.settings.training, one.copies
        )

    @cached_property
    def memory(self) -> PredictedMemory:
        """With frozen experts in the model's dtype."""
        return self._memory_of(self._installed)

    def _memory_of(self, one: "_Installed") -> PredictedMemory:
        settings = self.settings
        return predict_memory(
            one.parts.model, sorted(one.trained), settings.shape, settings.training, one.copies
        )

    def before_activations_in(self, precision: Precision) -> PredictedMemory:
        """Return :attr:`before_activations` with frozen experts in few bits, as ``run`` holds them."""
        one = self._in_low_bits
        without = memory_before_activations(
            one.parts.model, sorted(one.trained), self.settings.training, one.copies
        )
        few = sum(seam.slots_of(layer).frozen.num_bytes() for layer in one.parts.layers)
        every = self.experts.number * self.experts.bytes_each[precision]
        return replace(without, weights=without.weights - few + every)

    @cached_property
    def rows_activations(self) -> int:
        """Activations where experts run from few bits, one at a time, instead of in one product."""
        return self._memory_of(self._in_low_bits).activations

    @cached_property
    def profile(self) -> int:
        """Bytes while Flux profiles: every expert in the profile's bits, and a pass without gradients."""
        algorithm = self.settings.algorithm
        assert isinstance(algorithm, FluxSettings), "only Flux profiles"
        model = build(self._config, self.settings)
        layers = seam.find_moe_layers(model)
        held = num_bytes(layers[0].expert(0))
        if algorithm.profile_bits:
            form = LowBitForm(bits=algorithm.profile_bits)
            held = num_bytes(dict(meta_bank(layers[0], 1, form).named_buffers()))
            for layer in layers:
                into_few_slots(layer, num_tuned=0)
        activations = forward_peak_by_depth(model, self.settings.shape)
        return self.other_bytes + self.experts.number * held + activations

    @cached_property
    def tuned_activations(self) -> Activations:
        """Activations beside a number of tuned experts."""
        settings = self.settings
        return Activations(
            lambda: build(self._config, settings),
            self.experts.parameters_each,
            settings.shape,
            settings.training,
        )

    def room(self, precision: Precision) -> Room:
        """Return the account of experts in slots, the frozen ones in ``precision``."""
        algorithm = self.settings.algorithm
        return Room(
            num_experts=self.experts.number,
            parameters_each=self.experts.parameters_each,
            other_bytes=self.other_bytes,
            frozen_bytes_each=self.experts.bytes_each[precision],
            activations=self.tuned_activations,
            tuned_bytes=algorithm.tuned_bytes if isinstance(algorithm, FluxSettings) else TUNED_BYTES,
        )


_PLANNED = "client"
"""Name of the client that a plan is made for."""


@dataclass(frozen=True, kw_only=True)
class _Installed:
    """A model as a client has it, and the round that it is planned for."""

    parts: ModelParts
    algorithm: Algorithm
    state: ServerState
    sent: Sent
    copies: int
    """Bytes that the client holds beside the model."""

    @property
    def trained(self) -> set[str]:
        """Names of the parameters that local steps train."""
        return set(trained_names(self.algorithm, self.parts, self.sent))


def _planned_client(parts: ModelParts, settings: PlanSettings) -> Client:
    """A client without data: a plan looks at sizes alone."""
    return Client(
        client_id=_PLANNED,
        round_number=1,
        num_rounds=1,
        seed=0,
        parts=parts,
        training=settings.training,
        num_train=1,
        draw_batches=list,
        calibration_batches=lambda largest, **_: [],
    )
