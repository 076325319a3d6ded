"""Build the optimizer of local steps, and save and load its state by parameter name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedexperts.errors import UserError, needs_extra
from fedexperts.tensors import Tensors, copy_of
from fedexperts.training.settings import TrainingSettings

OptimizerState = dict[str, Tensors]
"""State of an optimizer, by parameter name and then by the optimizer's own name for it."""

_TABLES = ("qmap1", "qmap2")
"""Constants of the 8-bit format: the same for all parameters, so no state."""


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters that share a learning rate."""

    names: tuple[str, ...]
    lr: float


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], groups: Sequence[ParameterGroup], settings: TrainingSettings
) -> torch.optim.Optimizer:
    """Make the optimizer of ``settings``; groups without a parameter are left out.

    Raises:
        UserError: its package is not installed.
    """
    listed: list[dict[str, Any]] = [
        {"params": [parameters[name] for name in group.names], "lr": group.lr}
        for group in groups
        if group.names
    ]
    decay = settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(listed, momentum=settings.momentum, weight_decay=decay)
    if settings.optimizer == "adafactor":
        return torch.optim.Adafactor(listed, weight_decay=decay)
    if settings.optimizer == "adamw8bit":
        made: torch.optim.Optimizer = _bitsandbytes().optim.AdamW8bit(listed, weight_decay=decay)
        return made
    # The fused kernel does not exist on the meta device, where only the state's shapes are asked for.
    fused = not any(parameter.is_meta for parameter in parameters.values())
    return torch.optim.AdamW(listed, weight_decay=decay, fused=fused)


def _bitsandbytes() -> ModuleType:
    try:
        import bitsandbytes
    except ImportError as error:
        user = 'training.optimizer = "adamw8bit"'
        raise needs_extra(user, "bitsandbytes", "low-bit-optimizer") from error
    module: ModuleType = bitsandbytes
    return module


def state_of(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], names: Sequence[str]
) -> OptimizerState:
    """Copies in main memory of what the optimizer keeps for ``names``; a name without state is left out."""
    kept = {name: _tensors(optimizer.state[parameters[name]]) for name in names}
    return {name: copy_of(values) for name, values in kept.items() if values}


def blank_state(parameters: Mapping[str, Tensor], settings: TrainingSettings) -> OptimizerState:
    """Shapes and dtypes of the state after a step: what the optimizer itself makes on the meta device.

    Each parameter's state depends on its own form alone, so one parameter of each form takes the step.
    """
    if not parameters:
        return {}
    forms = {name: (value.shape, value.dtype) for name, value in parameters.items()}
    first = {form: name for name, form in reversed(forms.items())}
    blank = {name: nn.Parameter(torch.empty_like(parameters[name], device="meta")) for name in first.values()}
    optimizer = make_optimizer(blank, [ParameterGroup(names=tuple(blank), lr=1.0)], settings)
    for parameter in blank.values():
        parameter.grad = torch.empty_like(parameter)
    with _MadeUpNumbers():  # type: ignore[no-untyped-call]
        optimizer.step()
    return {name: _tensors(optimizer.state[blank[first[form]]]) for name, form in forms.items()}


def load_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    state: Mapping[str, Mapping[str, Tensor]],
    settings: TrainingSettings,
) -> None:
    """Go on from copies of ``state``; parameters that it does not name start anew.

    Raises:
        UserError: it names a parameter that is not trained, or is of another optimizer or other shapes.
    """
    for name in state:
        if name not in parameters:
            raise UserError(f"the optimizer state has {name}, which is not trained")
    expected = blank_state({name: parameters[name] for name in state}, settings)
    for name, values in state.items():
        if _forms(values) != _forms(expected[name]):
            raise UserError(
                f"the optimizer state of {name} does not fit training.optimizer {settings.optimizer}: it is "
                f"{_told(values)}, but must be {_told(expected[name])}"
            )
    names = {parameter: name for name, parameter in parameters.items()}
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            if names[parameter] in state:
                _load_one(optimizer, (group, parameter, group_index, index), state[names[parameter]])


def _load_one(
    optimizer: Any, place: tuple[Any, nn.Parameter, int, int], values: Mapping[str, Tensor]
) -> None:
    parameter = place[1]
    if hasattr(optimizer, "init_state"):
        # bitsandbytes: its tables come from here, and its step is a plain number.
        optimizer.init_state(*place)
    own = optimizer.state[parameter]
    for key, value in values.items():
        is_plain = isinstance(own.get(key), int)
        own[key] = int(value) if is_plain else value.to(parameter.device, copy=True)


def _tensors(state: Mapping[str, Any]) -> Tensors:
    return {
        key: torch.as_tensor(value)
        for key, value in state.items()
        if value is not None and key not in _TABLES
    }


def _forms(values: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {key: (value.shape, value.dtype) for key, value in values.items()}


def _told(values: Mapping[str, Tensor]) -> str:
    forms = (f"{key} {tuple(value.shape)} {value.dtype}" for key, value in sorted(values.items()))
    return ", ".join(forms) or "empty"


class _MadeUpNumbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answer 1 where an optimizer asks a tensor on the meta device for its number."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1.0
        return func(*args, **(kwargs or {}))
