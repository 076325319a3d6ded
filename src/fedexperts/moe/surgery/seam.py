"""Replace transformers' call of a layer's experts: the one place that knows its insides.

Since transformers 5 every MoE block of the decorated families calls ``experts(hidden_TD, top_k_index_TK,
top_k_weights_TK)`` on a module with fused weights, and the implementation that runs is looked up by name. We
register one implementation under :data:`IMPLEMENTATION` and keep its state on the experts module itself. The
module is never replaced, so the names that ``save_pretrained`` writes stay as they were.

Shape suffixes: ``T`` tokens, ``D`` hidden, ``E`` experts, ``K`` top-k, ``F`` expert inner size.
"""

import re
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from fedexperts.errors import UserError
from fedexperts.moe.surgery.undo import active_stack, push_undo
from fedexperts.tensors import Tensors, copy_of

IMPLEMENTATION = "fedexperts"
"""Name under which :func:`experts_forward` is registered with transformers."""

_MARKS = ("is_transposed", "has_bias", "has_gate", "is_concatenated")
_ADDITION = "graft"
_SLOTS = "slots"
_GRADIENT_WATCH = "_fedexperts_gradient_watch"
_EXPERT_NAME = re.compile(r"^(?P<layer>.+\.experts)\.(?P<expert>\d+)\.(?P<parameter>[a-z_]+)$")
_DECODE_ROWS = 64


class Addition(Protocol):
    """Module beside a layer's experts: it sees what they saw and gave, and returns the new output."""

    def __call__(self, experts: nn.Module, hidden_TD: Tensor, routed_TD: Tensor) -> Tensor:
        """The layer's routed output with the addition, shape (T, D)."""


@dataclass(frozen=True, kw_only=True)
class MoeLayer:
    """One MoE layer of a model, seen from the seam."""

    index: int
    """Position among the MoE layers, from 0 (dense layers are not counted)."""
    name: str
    """Module path of the experts, e.g. ``model.layers.3.mlp.experts``."""
    experts: nn.Module
    router: nn.Module
    num_experts: int
    hidden_size: int
    expert_size: int

    def parameter_names(self) -> tuple[str, ...]:
        """Names of the fused parameters, each with the expert as its first dimension."""
        return fused_parameter_names(self.experts)

    def expert(self, expert: int) -> dict[str, Tensor]:
        """Views of the weights that run for one expert, by parameter name.

        Raises:
            UserError: ``expert`` is not one of the layer's, or has been dropped.
        """
        self._refuse_unknown_expert(expert)
        return _weights_of(self.experts, expert)

    def _refuse_unknown_expert(self, expert: int) -> None:
        if not 0 <= expert < self.num_experts:
            raise UserError(f"expert {expert} of layer {self.name}: must be from 0 to {self.num_experts - 1}")

    def device(self) -> torch.device:
        """Return the device of the layer."""
        return next(self.router.parameters()).device

    def router_row(self, expert: int) -> Tensor:
        """The router's weight vector for ``expert``, shape (D,).

        A router of several layers has no such weight and gives rows of its own.

        Raises:
            UserError: ``expert`` is not one of the layer's, or the router has no such weight.
        """
        self._refuse_unknown_expert(expert)
        if hasattr(self.router, "rows"):
            return cast(Tensor, cast(Any, self.router).rows()[expert])
        shape = (self.num_experts, self.hidden_size)
        for parameter in self.router.parameters():
            if parameter.shape == shape:
                return parameter[expert]
        raise UserError(f"the router of layer {self.name} has no weight of shape {shape}")


def fused_parameter_names(experts: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of ``experts`` that have the expert as their first dimension."""
    stored = len(cast(Tensor, experts.down_proj))
    return tuple(
        name
        for name, parameter in experts.named_parameters(recurse=False)
        if parameter.dim() >= 2 and len(parameter) == stored
    )


def _weights_of(experts: nn.Module, expert: int) -> dict[str, Tensor]:
    slots: Any = getattr(experts, _SLOTS, None)
    if slots is not None:
        return dict(slots.expert(experts, expert))
    return {name: getattr(experts, name)[expert] for name in fused_parameter_names(experts)}


def _is_experts(module: nn.Module) -> bool:
    return all(hasattr(module, mark) for mark in _MARKS) and isinstance(
        getattr(module, "down_proj", None), nn.Parameter
    )


def _sibling_router(block: nn.Module, name: str) -> nn.Module:
    for attribute in ("gate", "router"):
        router = getattr(block, attribute, None)
        if isinstance(router, nn.Module):
            return router
    raise UserError(f"the MoE block of {name} has no router under the name 'gate' or 'router'")


def find_moe_layers(model: nn.Module) -> tuple[MoeLayer, ...]:
    """All MoE layers in the order of depth.

    Raises:
        UserError: the model has no MoE layer, or none that is called through the seam (llama4, for one).
    """
    modules = dict(model.named_modules())
    layers: list[MoeLayer] = []
    for name, module in modules.items():
        if not _is_experts(module):
            continue
        down = cast(Tensor, module.down_proj)
        stored, rows, columns = down.shape
        slots: Any = getattr(module, _SLOTS, None)
        hidden, inner = (columns, rows) if module.is_transposed else (rows, columns)
        layers.append(
            MoeLayer(
                index=len(layers),
                name=name,
                experts=module,
                router=_sibling_router(modules[name.rpartition(".")[0]], name),
                num_experts=stored if slots is None else slots.plan.num_experts,
                hidden_size=hidden,
                expert_size=inner,
            )
        )
    if not layers:
        raise UserError(_why_unsupported(model))
    return tuple(layers)


def _why_unsupported(model: nn.Module) -> str:
    kind = type(model).__name__
    kinds = {type(module).__name__ for module in model.modules()}
    suspects = sorted(name for name in kinds if "Experts" in name or name.endswith("MoE"))
    if suspects:
        return (
            f"model class {kind} is not supported: its experts ({', '.join(suspects)}) are not called "
            "through transformers' experts interface, so single experts cannot be addressed"
        )
    return f"model class {kind} has no MoE layers; a Mixture-of-Experts model is needed"


def experts_forward(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The registered implementation: the layer's slots, or transformers' grouped matmul where it has none;
    then whatever was added to the layer.

    Shapes: ``hidden_states`` (T, D), ``top_k_index`` and ``top_k_weights`` (T, K); returns (T, D). A few
    tokens on an accelerator take the batched matmul, as ``generate`` chooses for the stock implementation.
    """
    slots = getattr(experts, _SLOTS, None)
    run = _stock if slots is None else slots
    routed = run(experts, hidden_states, top_k_index, top_k_weights)
    addition = getattr(experts, _ADDITION, None)
    return routed if addition is None else addition(experts, hidden_states, routed)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


def _stock(experts: Any, hidden_TD: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor) -> Tensor:
    is_decoding = hidden_TD.device.type != "cpu" and top_k_index_TK.numel() <= _DECODE_ROWS
    stock = ALL_EXPERTS_FUNCTIONS["batched_mm" if is_decoding else "grouped_mm"]
    return cast(Tensor, stock(experts, hidden_TD, top_k_index_TK, top_k_weights_TK))


class _WithWeights:
    """An experts module with other weights than its own, for a function that only reads it."""

    def __init__(self, experts: Any, weights: dict[str, Tensor]) -> None:
        self._experts = experts
        self.__dict__.update(weights)
        self.num_experts = len(weights["down_proj"])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experts, name)


def run_stock(
    experts: Any, weights: dict[str, Tensor], hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor
) -> Tensor:
    """transformers' own function on fused ``weights`` (S, ...), of which ``index_TK`` chooses."""
    return _stock(_WithWeights(experts, weights), hidden_TD, index_TK, weight_TK)


def install_implementation(model: Any) -> None:
    """Make ``model`` call :func:`experts_forward` in every MoE layer; its numbers do not change by a bit.

    ``model.save_pretrained`` raises UserError from now on while a layer has slots or an addition: it would
    write a folder that loads with a warning or not at all.

    Raises:
        UserError: the model's class does not let its experts be called in another way.
    """
    model.set_experts_implementation(IMPLEMENTATION)
    for layer in find_moe_layers(model):
        if not _uses_implementation(layer):
            raise UserError(
                f"model class {type(model).__name__} does not let its experts implementation be set"
            )
    model.save_pretrained = _PlainSaving(model)


def remove_implementation(model: Any) -> None:
    """Give ``model`` back to transformers' own implementation.

    Raises:
        UserError: a layer has slots or an addition, which transformers would not run.
    """
    found = _first_modification(find_moe_layers(model))
    if found:
        raise UserError(f"{found}: remove it before the experts implementation")
    model.set_experts_implementation("grouped_mm")
    vars(model).pop("save_pretrained", None)


class _PlainSaving:
    """``save_pretrained`` of a model with our implementation; holds it weakly, so that it can be freed."""

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = cast(Any, self._model())  # whoever calls holds it
        found = _first_modification(find_moe_layers(model))
        if found:
            raise UserError(
                f"{found}, for which a plain checkpoint has no place: take it away first, or write slots as "
                "copies with fedexperts.models.plain_checkpoint.export_model"
            )
        return type(model).save_pretrained(model, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the model gets one of its own.
        return _PlainSaving, (self._model(),)


def _first_modification(layers: Iterable[MoeLayer]) -> str:
    """Return a description of the first layer with slots or a graft, or nothing."""
    for layer in layers:
        if slots_of(layer) is not None:
            return f"layer {layer.name} has slots instead of its experts"
        if addition_of(layer) is not None:
            return f"layer {layer.name} has a graft"
    return ""


def _uses_implementation(layer: MoeLayer) -> bool:
    implementation: str = cast(Any, layer.experts.config)._experts_implementation
    return implementation == IMPLEMENTATION


def _refuse_without_implementation(layer: MoeLayer) -> None:
    # transformers would run the fused weights alone, or in another order, without a word.
    if not _uses_implementation(layer):
        raise UserError(
            f"layer {layer.name} is of a model without our experts implementation: call "
            "install_implementation first"
        )


def add_to_layer(layer: MoeLayer, addition: nn.Module) -> None:
    """Put ``addition`` (see :class:`Addition`) beside the layer's experts, as a submodule of theirs.

    Raises:
        UserError: the layer's model lacks our experts implementation, or the layer has an addition already.
    """
    _refuse_without_implementation(layer)
    if hasattr(layer.experts, _ADDITION):
        raise UserError(f"layer {layer.name} has grafts already: take them away first, or graft all at once")
    layer.experts.add_module(_ADDITION, addition)
    push_undo(lambda: _remove_module(layer, _ADDITION, addition))


def take_from_layer(layer: MoeLayer) -> None:
    """Take away what :func:`add_to_layer` put there; the layer is again what it was, bit for bit."""
    addition = addition_of(layer)
    delattr(layer.experts, _ADDITION)
    push_undo(lambda: layer.experts.add_module(_ADDITION, addition))


def _remove_module(layer: MoeLayer, name: str, module: nn.Module) -> None:
    """Remove ``module`` from the layer's experts if it is still there under ``name``."""
    if getattr(layer.experts, name, None) is module:
        delattr(layer.experts, name)


def addition_of(layer: MoeLayer) -> Any:
    """Return what :func:`add_to_layer` put beside the layer's experts, or None."""
    return getattr(layer.experts, _ADDITION, None)


def addition_name(layer: MoeLayer) -> str:
    """Module path of a layer's addition; the prefix of its parameters' names."""
    return f"{layer.name}.{_ADDITION}"


def slots_of(layer: MoeLayer) -> Any:
    """The layer's :class:`fedexperts.moe.surgery.slots.Slots`, or None."""
    return getattr(layer.experts, _SLOTS, None)


def stores_experts(layer: MoeLayer) -> bool:
    """Return whether the layer's frozen experts are stored as they run, and not in few bits."""
    slots = slots_of(layer)
    return slots is None or slots.frozen is None


def set_slots(layer: MoeLayer, slots: nn.Module) -> None:
    """Let ``slots`` run instead of the layer's own function, as a submodule of the experts.

    Raises:
        UserError: the layer's model lacks our experts implementation.
    """
    _refuse_without_implementation(layer)
    layer.experts.add_module(_SLOTS, slots)
    push_undo(lambda: _remove_module(layer, _SLOTS, slots))


def drop_slots(layer: MoeLayer) -> None:
    """Take away what :func:`set_slots` put there."""
    slots = slots_of(layer)
    delattr(layer.experts, _SLOTS)
    push_undo(lambda: layer.experts.add_module(_SLOTS, slots))


def gradient_watch_of(experts: nn.Module) -> Any:
    """Return what :func:`watch_gradients` set, or None."""
    return getattr(experts, _GRADIENT_WATCH, None)


@contextmanager
def watch_gradients(layers: Iterable[MoeLayer], observe: Any) -> Iterator[None]:
    """Call ``observe(layer, bank, index, row_gradients)`` in the backward pass for each expert that ran.

    Only layers with slots call it; see :mod:`fedexperts.moe.surgery.rows` for the arguments.
    """
    layers = list(layers)
    for layer in layers:
        setattr(layer.experts, _GRADIENT_WATCH, partial(observe, layer))
    try:
        yield
    finally:
        for layer in layers:
            delattr(layer.experts, _GRADIENT_WATCH)


def slots_name(layer: MoeLayer) -> str:
    """Module path of a layer's slots; the prefix of its tuned parameters' names."""
    return f"{layer.name}.{_SLOTS}"


def fused_weights(layer: MoeLayer) -> dict[str, Tensor]:
    """Return what the layer's fused parameters hold now, by name; the experts are the first dimension."""
    return {name: getattr(layer.experts, name).detach() for name in layer.parameter_names()}


def set_fused(layer: MoeLayer, weights: Mapping[str, Tensor]) -> None:
    """Put other tensors into the layer's fused parameters; whether they train stays as it was."""
    stack = active_stack()
    if stack is not None:
        stack.will_change_experts(layer)
    for name, weight in weights.items():
        trains = getattr(layer.experts, name).requires_grad
        setattr(layer.experts, name, nn.Parameter(weight, requires_grad=trains))


@contextmanager
def watch_experts(layers: Iterable[MoeLayer], observe: Any) -> Iterator[None]:
    """Call ``observe(layer, hidden_TD, top_k_index_TK, top_k_weights_TK, routed_TD)`` after each layer.

    ``routed_TD`` is the experts' sum with any addition; an exception in ``observe`` ends the forward pass.
    """
    handles = []
    for layer in layers:

        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor, layer: MoeLayer = layer) -> None:
            observe(layer, args[0], args[1], args[2], output)

        handles.append(layer.experts.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def expert_name(layer: MoeLayer, expert: int, parameter: str) -> str:
    """Name of one expert's tensor on wire and disk, e.g. ``model.layers.3.mlp.experts.7.down_proj``."""
    return f"{layer.name}.{expert}.{parameter}"


def expert_names(layers: Iterable[MoeLayer]) -> tuple[str, ...]:
    """Names of all experts' tensors, layer by layer, expert by expert."""
    return tuple(
        expert_name(layer, expert, parameter)
        for layer in layers
        for expert in range(layer.num_experts)
        for parameter in layer.parameter_names()
    )


def tensor_views(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return views of ``model``'s tensors by name, where a name is a parameter's or :func:`expert_name`'s.

    Raises:
        UserError: the model has no such tensor; or it is of an expert in few bits or under LoRA, whose
            weights are made for each use.
    """
    return {name: view.detach() for name, (view, _) in _views(model, names).items()}


def current(model: nn.Module, names: Iterable[str]) -> Tensors:
    """Return copies of the model's tensors called ``names``, in main memory."""
    return copy_of(tensor_views(model, names))


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Write ``tensors`` into the model's parameters, or experts, of the same names.

    Raises:
        UserError: the model has no such tensor, or one of another shape; or it is of an expert in a merged
            group, where writing one expert would change the others.
    """
    views = _views(model, tensors)
    for name, (view, layer) in views.items():
        if view.shape != tensors[name].shape:
            raise UserError(
                f"tensor {name!r} has shape {tuple(tensors[name].shape)}, the model's {tuple(view.shape)}"
            )
        if layer is not None:
            _refuse_shared_slot(layer, name)
    stack = active_stack()
    if stack is not None:
        stack.will_write({fused_name(name): view for name, (view, _) in views.items()})
        stack.written |= dict.fromkeys(views)
    for name, (view, _) in views.items():
        view.detach().copy_(tensors[name])


def _refuse_shared_slot(experts: nn.Module, name: str) -> None:
    slots: Any = getattr(experts, _SLOTS, None)
    match = _EXPERT_NAME.match(name)
    if slots is not None and match is not None:
        shared = [group for group in slots.plan.merged if int(match["expert"]) in group]
        if shared:
            raise UserError(
                f"tensor {name!r} cannot be written: experts {', '.join(map(str, shared[0]))} share one "
                "merged expert"
            )


def _views(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[Tensor, nn.Module | None]]:
    """Each tensor, with the experts module that it belongs to if it is one expert's."""
    wanted, parameters = list(names), dict(model.named_parameters())
    are_experts = any(name not in parameters for name in wanted)
    modules = model.named_modules() if are_experts else ()
    layers = {name: module for name, module in modules if _is_experts(module)}
    found: dict[str, tuple[Tensor, nn.Module | None]] = {}
    for name in wanted:
        found[name] = (parameters[name], None) if name in parameters else _expert_view(layers, name)
    return found


def _expert_view(layers: dict[str, nn.Module], name: str) -> tuple[Tensor, nn.Module]:
    match = _EXPERT_NAME.match(name)
    if match is None or match["layer"] not in layers:
        raise UserError(f"the model has no tensor named {name!r}")
    experts = layers[match["layer"]]
    try:
        view = _weights_of(experts, int(match["expert"]))[match["parameter"]]
    except (IndexError, KeyError):
        raise UserError(f"the model has no tensor named {name!r}") from None
    stored = {parameter.untyped_storage().data_ptr() for parameter in experts.parameters()}
    if view.untyped_storage().data_ptr() not in stored:
        raise UserError(f"{name} is not stored as it is (few bits, or LoRA), so it cannot be loaded or sent")
    return view, experts


def names_in(layers: Iterable[MoeLayer], name: str) -> tuple[str, ...]:
    """Return the experts' tensors in a fused parameter called ``name``; for any other name, itself."""
    for layer in layers:
        for parameter in layer.parameter_names():
            if name == f"{layer.name}.{parameter}":
                return tuple(expert_name(layer, expert, parameter) for expert in range(layer.num_experts))
    return (name,)


def fused_name(name: str) -> str:
    """Return the name of the parameter that holds the tensor ``name``: an expert's is its fused parameter."""
    match = _EXPERT_NAME.match(name)
    return f"{match['layer']}.{match['parameter']}" if match else name


def fused_names(names: Iterable[str]) -> set[str]:
    """Return the names of the parameters that hold the tensors called ``names``."""
    return {fused_name(name) for name in names}


def fuse(layers: Iterable[MoeLayer], tensors: Mapping[str, Tensor]) -> Tensors:
    """Return ``tensors`` by the parameter that holds them: those of a layer's experts, all given, stacked."""
    members = {name: names_in(layers, name) for name in dict.fromkeys(map(fused_name, tensors))}
    return {
        name: tensors[name] if own == (name,) else torch.stack([tensors[one] for one in own])
        for name, own in members.items()
    }


def unfuse(layers: Iterable[MoeLayer], tensors: Mapping[str, Tensor]) -> Tensors:
    """Return ``tensors``, named for parameters, by the names under which they travel: one for each expert."""
    parts: Tensors = {}
    for name, tensor in tensors.items():
        members = names_in(layers, name)
        parts |= {name: tensor} if members == (name,) else dict(zip(members, tensor, strict=True))
    return parts
