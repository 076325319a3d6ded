"""Keep an optimizer's state among a client's personal tensors: ``optimizer.<key>.<parameter>``."""

from collections.abc import Mapping

from torch import Tensor

from fedexperts.tensors import Tensors
from fedexperts.training.optimizers import OptimizerState

_PREFIX = "optimizer"


def flatten(state: Mapping[str, Tensors]) -> Tensors:
    """One flat table of ``state``, for a file of personal tensors."""
    return {f"{_PREFIX}.{key}.{name}": value for name, kept in state.items() for key, value in kept.items()}


def unflatten(personal: Mapping[str, Tensor]) -> OptimizerState:
    """The optimizer's state that is among ``personal``."""
    state: OptimizerState = {}
    for full_name, value in personal.items():
        prefix, _, rest = full_name.partition(".")
        if prefix == _PREFIX:
            key, _, name = rest.partition(".")
            state.setdefault(name, {})[key] = value
    return state
