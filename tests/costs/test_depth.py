"""The memory of a deep model, counted from its first layers, is that of a dry run of all of them."""

from typing import Any

import pytest

from fedexperts.costs.depth import find_repeats, peak_by_depth
from fedexperts.costs.dry_run import BatchShape, peak_of_local_steps
from fedexperts.models.adapters import AdapterSettings, add_lora
from fedexperts.models.held_experts import run_in_rows
from fedexperts.models.tiny import tiny_model
from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.graft import GraftForm, graft
from fedexperts.training.settings import TrainingSettings

SHAPES = (
    BatchShape(examples=2, length=24, labels=10),
    BatchShape(examples=1, length=8, labels=1),
)
"""In the first the logits are the fullest moment of some models; in the second the gradients are."""
FAMILIES = {"qwen2_moe": 6, "deepseek": 6, "gpt_oss": 10, "qwen3_moe": 7, "mixtral": 7, "granitemoe": 7}
"""Layers by family: deepseek's first is dense, gpt_oss's alternate."""
FAST = {("qwen2_moe", "with_grafts"), ("qwen2_moe", "with_all_experts")}


def deep(family: str) -> Any:
    model = tiny_model(family, num_hidden_layers=FAMILIES[family]).requires_grad_(False)
    seam.install_implementation(model)
    return model


def with_grafts(model: Any) -> list[str]:
    names, layers = add_lora(model, AdapterSettings(), 0), seam.find_moe_layers(model)
    return [*names, *graft(layers, [0] * len(layers), GraftForm(), 0)]


def with_all_experts(model: Any) -> list[str]:
    fused = [f"{one.name}.{name}" for one in seam.find_moe_layers(model) for name in one.parameter_names()]
    return [*add_lora(model, AdapterSettings(), 0), *fused]


def in_rows(model: Any) -> list[str]:
    run_in_rows(seam.find_moe_layers(model))
    return list(add_lora(model, AdapterSettings(), 0))


CASES = [
    pytest.param(
        family,
        prepare,
        recomputes,
        marks=[] if (family, prepare.__name__) in FAST and not recomputes else [pytest.mark.slow],
    )
    for family in FAMILIES
    for prepare in (with_grafts, with_all_experts, in_rows)
    for recomputes in (False, True)
]


@pytest.mark.parametrize(("family", "prepare", "recomputes"), CASES)
def test_few_layers_say_what_all_take(family: str, prepare: Any, recomputes: bool) -> None:
    model = deep(family)
    names = prepare(model)
    settings = TrainingSettings(gradient_checkpointing=recomputes)
    repeats = find_repeats(model, names)
    assert repeats is not None
    assert repeats.unlike + 3 * repeats.period < len(repeats.layers)
    for shape in SHAPES:
        wanted = peak_of_local_steps(model, names, shape, settings)
        assert peak_by_depth(model, names, shape, settings) == wanted
    assert len(repeats.layers) == model.config.num_hidden_layers, "the model has all its layers back"


def test_a_model_whose_layers_differ_is_run_whole() -> None:
    model = deep("qwen2_moe")
    layers = seam.find_moe_layers(model)
    names = graft(layers[2:4], [0, 1], GraftForm(), 0)
    assert find_repeats(model, names) is None
    assert peak_by_depth(model, names, SHAPES[0], TrainingSettings()) == peak_of_local_steps(
        model, names, SHAPES[0], TrainingSettings()
    )
