"""Optimizers: which one is made, and that its state by name is all that it needs to go on."""

import sys
from typing import Any

import pytest
import torch
from torch import nn

from fedexperts.errors import UserError
from fedexperts.tensors import sha256_of
from fedexperts.training.optimizers import (
    OptimizerState,
    ParameterGroup,
    blank_state,
    load_state,
    make_optimizer,
    state_of,
)
from fedexperts.training.settings import TrainingSettings

NAMES = ("experts.down.weight", "gate")
SETTINGS = {
    "adamw": TrainingSettings(weight_decay=0.1),
    "sgd": TrainingSettings(optimizer="sgd", weight_decay=0.1),
    "momentum": TrainingSettings(optimizer="sgd", momentum=0.9),
    "adafactor": TrainingSettings(optimizer="adafactor", weight_decay=0.1),
    "adamw8bit": TrainingSettings(optimizer="adamw8bit", weight_decay=0.1),
}


@pytest.fixture(params=SETTINGS)
def settings(request: Any) -> TrainingSettings:
    if request.param == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    return SETTINGS[request.param]


def make_parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    """A fused expert tensor, large enough to be kept in 8 bits, and a vector."""
    generator = torch.Generator().manual_seed(0)
    shapes = {NAMES[0]: (3, 80, 20), NAMES[1]: (5,)}
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in shapes.items()
    }


def make(parameters: dict[str, nn.Parameter], settings: TrainingSettings) -> torch.optim.Optimizer:
    # Groups in another order than the parameters, one of them empty.
    groups = [
        ParameterGroup(names=(NAMES[1],), lr=1e-2),
        ParameterGroup(names=(), lr=1.0),
        ParameterGroup(names=(NAMES[0],), lr=1e-3),
    ]
    return make_optimizer(parameters, groups, settings)


def step(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_going_on_from_a_state_is_an_uninterrupted_run(settings, dtype):
    whole, split = make_parameters(dtype), make_parameters(dtype)
    optimizer = make(whole, settings)
    for seed in range(4):
        step(optimizer, whole, seed)
    first = make(split, settings)
    step(first, split, 0)
    step(first, split, 1)
    state = state_of(first, split, NAMES)
    before = {name: sha256_of(values) for name, values in state.items()}
    second = make(split, settings)
    load_state(second, split, state, settings)
    step(second, split, 2)
    step(second, split, 3)
    assert [name for name in NAMES if not torch.equal(whole[name], split[name])] == []
    assert {name: sha256_of(values) for name, values in state.items()} == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_blank_state_is_the_state_after_a_step_without_its_bytes(settings, dtype):
    parameters = make_parameters(dtype)
    optimizer = make(parameters, settings)
    step(optimizer, parameters, 0)
    state, blank = state_of(optimizer, parameters, NAMES), blank_state(parameters, settings)
    assert {name: forms(values) for name, values in blank.items() if values} == {
        name: forms(values) for name, values in state.items()
    }
    assert all(value.is_meta or value.dim() == 0 for values in blank.values() for value in values.values())


def test_parameters_of_one_shape_and_two_dtypes_have_states_of_their_own():
    forms_of = {"a": torch.float32, "b": torch.bfloat16, "c": torch.float32}
    parameters = {name: nn.Parameter(torch.zeros(2, 3, dtype=dtype)) for name, dtype in forms_of.items()}
    state = blank_state(parameters, SETTINGS["momentum"])
    assert {name: values["momentum_buffer"].dtype for name, values in state.items()} == forms_of


def forms(values: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {key: (value.shape, value.dtype) for key, value in values.items()}


def test_keys_of_the_state_are_the_optimizer_s_own():
    keys = {
        name: set(blank_state(make_parameters(), SETTINGS[name])[NAMES[0]]) for name in ("adamw", "momentum")
    }
    assert keys == {"adamw": {"step", "exp_avg", "exp_avg_sq"}, "momentum": {"momentum_buffer"}}


def test_a_parameter_that_the_state_does_not_name_starts_anew():
    parameters = make_parameters()
    optimizer = make(parameters, SETTINGS["adamw"])
    step(optimizer, parameters, 0)
    state = state_of(optimizer, parameters, NAMES[:1])
    again = make(parameters, SETTINGS["adamw"])
    load_state(again, parameters, state, SETTINGS["adamw"])
    step(again, parameters, 1)
    assert [again.state[parameters[name]]["step"].item() for name in NAMES] == [2.0, 1.0]


def adamw_state() -> OptimizerState:
    return {
        name: {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in values.items()}
        for name, values in blank_state(make_parameters(), SETTINGS["adamw"]).items()
    }


@pytest.mark.parametrize("name", ["sgd", "momentum", "adafactor"])
def test_the_state_of_another_optimizer_is_refused(name):
    parameters = make_parameters()
    optimizer = make(parameters, SETTINGS[name])
    message = rf"state of experts\.down\.weight does not fit training\.optimizer {SETTINGS[name].optimizer}: "
    with pytest.raises(UserError, match=message + r"it is exp_avg \(3, 80, 20\)"):
        load_state(optimizer, parameters, adamw_state(), SETTINGS[name])


@pytest.mark.parametrize("change", [lambda value: value[:1], lambda value: value.bfloat16()])
def test_a_state_of_other_shapes_or_dtypes_is_refused(change):
    parameters, state = make_parameters(), adamw_state()
    state["gate"]["exp_avg"] = change(state["gate"]["exp_avg"])
    with pytest.raises(UserError, match=r"state of gate does not fit .* adamw: it is exp_avg"):
        load_state(make(parameters, SETTINGS["adamw"]), parameters, state, SETTINGS["adamw"])


def test_the_state_of_a_parameter_that_is_not_trained_is_refused():
    parameters, state = make_parameters(), adamw_state()
    state["other"] = state["gate"]
    with pytest.raises(UserError, match="the optimizer state has other, which is not trained"):
        load_state(make(parameters, SETTINGS["adamw"]), parameters, state, SETTINGS["adamw"])


@pytest.mark.parametrize("name", ["adamw", "adafactor", "adamw8bit"])
def test_weight_decay_is_decoupled_from_the_gradient(name):
    """Without a gradient w shrinks to w·(1 - lr·decay); tolerance: float32 rounding of the product."""
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    parameters = make_parameters()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    make(parameters, SETTINGS[name]).step()
    for key, rate in zip(NAMES, (1e-3, 1e-2), strict=True):
        torch.testing.assert_close(
            parameters[key].detach(), before[key] * (1 - rate * 0.1), rtol=1e-6, atol=0
        )


def test_sgd_with_momentum_and_decay_is_the_textbook_s():
    """v ← 0.9·v + g + 0.1·w, w ← w - lr·v; tolerance: float32 rounding over three steps."""
    settings = TrainingSettings(optimizer="sgd", momentum=0.9, weight_decay=0.1)
    parameters = make_parameters()
    weight, velocity = parameters["gate"].detach().clone(), torch.zeros(5)
    optimizer = make(parameters, settings)
    for seed in range(3):
        step(optimizer, parameters, seed)
        velocity = 0.9 * velocity + parameters["gate"].grad + 0.1 * weight
        weight = weight - 1e-2 * velocity
    torch.testing.assert_close(parameters["gate"].detach(), weight, rtol=1e-5, atol=1e-7)


def test_adamw_is_the_fused_one_of_torch():
    optimizer = make(make_parameters(), SETTINGS["adamw"])
    assert type(optimizer) is torch.optim.AdamW
    assert [group["fused"] for group in optimizer.param_groups] == [True, True]


def test_8_bit_moments_train_almost_as_32_bit_ones():
    """Tolerance: rounding a moment to 8 bits moves a weight by less than a fifth of a step on average."""
    pytest.importorskip("bitsandbytes")
    results = []
    for name in ("adamw", "adamw8bit"):
        parameters = make_parameters()
        optimizer = make(parameters, SETTINGS[name])
        for seed in range(3):
            step(optimizer, parameters, seed)
        results.append(parameters)
    for key, rate in zip(NAMES, (1e-3, 1e-2), strict=True):
        assert (results[0][key] - results[1][key]).abs().mean() < 0.2 * rate


def test_without_its_package_8_bit_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"bitsandbytes: run pip install -e '\.\[low-bit-optimizer\]'"):
        make(make_parameters(), SETTINGS["adamw8bit"])
