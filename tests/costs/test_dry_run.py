"""Memory counted on tensors without storage is what a real run of the same steps takes."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from benchmarks.memory_plan import CASES, RETURNING, in_new_process
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fedexperts.costs.dry_run import BatchShape, Meter, peak_of_local_steps
from fedexperts.costs.memory import memory_before_activations, predict_memory
from fedexperts.data.batches import IGNORED_LABEL, Batch
from fedexperts.models.adapters import AdapterSettings, add_lora
from fedexperts.models.tiny import FAMILIES, tiny_model
from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.graft import GraftForm, graft
from fedexperts.moe.surgery.slots import SlotPlan, split_layer
from fedexperts.training.local_steps import local_steps
from fedexperts.training.optimizers import ParameterGroup
from fedexperts.training.settings import TrainingSettings

SHAPE = BatchShape(examples=2, length=24, labels=10)
DATA_DEPENDENT = {"deepseek_v4", "qwen4_exp_text"}
"""Families whose own code makes tensors as long as the data says: counted as if all were chosen."""


class RealMeter(Meter):
    """Counts operations on real tensors, each of which is run as it is."""

    def answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Nothing is made up."""
        return func(*args, **kwargs)


def with_lora_and_grafts(family: str, dtype: torch.dtype = torch.float32) -> tuple[Any, list[str]]:
    model = tiny_model(family, dtype=dtype).requires_grad_(False)
    seam.install_implementation(model)
    names = list(add_lora(model, AdapterSettings(), 0))
    layers = seam.find_moe_layers(model)
    return model, names + list(graft(layers, [0] * len(layers), GraftForm(), 0))


def with_slots(dtype: torch.dtype = torch.float32) -> tuple[Any, list[str]]:
    """Every token goes to two of six slots, so that the rows are as many as the dry run takes."""
    model = tiny_model("qwen2_moe", dtype=dtype).requires_grad_(False)
    seam.install_implementation(model)
    for layer in seam.find_moe_layers(model):
        split_layer(layer, SlotPlan(num_experts=6, tuned=(0, 3), kept=(1, 2, 4, 5)))
    return model, [name for name, _ in model.named_parameters() if ".tuned." in name]


def batch() -> Batch:
    ids = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, IGNORED_LABEL)
    labels[:, 10:15] = ids[:, 10:15]
    mask = torch.ones_like(ids)
    mask[:, 20:] = 0
    return Batch(
        input_ids=ids,
        attention_mask=mask,
        labels=labels,
        num_examples=2,
        num_labels=10,
    )


def real_peak(model: Any, names: list[str], settings: TrainingSettings) -> int:
    one, group, trained = batch(), ParameterGroup(names=tuple(names), lr=1e-3), copy.deepcopy(model)
    with RealMeter(FakeTensorMode()) as meter:
        local_steps(trained, [one, one], [group], settings, seed=0)
    return meter.peak


def settings(*, recomputes: bool = False, **more: Any) -> TrainingSettings:
    return TrainingSettings(gradient_checkpointing=recomputes, **more)


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize(
    "family",
    [
        "qwen2_moe",
        pytest.param("gpt_oss", marks=pytest.mark.slow),
        pytest.param("llama_moe", marks=pytest.mark.slow),
    ],
)
def test_dry_run_counts_what_a_real_run_takes_to_the_byte(family: str, recomputes: bool) -> None:
    model, names = with_lora_and_grafts(family)
    training = settings(recomputes=recomputes)
    assert peak_of_local_steps(model, names, SHAPE, training) == real_peak(model, names, training)


@pytest.mark.slow
@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_counted(family: str, recomputes: bool) -> None:
    model, names = with_lora_and_grafts(family)
    training = settings(recomputes=recomputes)
    predicted, real = peak_of_local_steps(model, names, SHAPE, training), real_peak(model, names, training)
    if family in DATA_DEPENDENT:
        assert real <= predicted <= 2 * real
    else:
        assert predicted == real


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_in_slots_are_counted(dtype: torch.dtype) -> None:
    model, names = with_slots(dtype)
    # The dry run's routing is even; this one is so uneven that its largest expert has twice its share.
    predicted, real = (
        peak_of_local_steps(model, names, SHAPE, settings()),
        real_peak(model, names, settings()),
    )
    assert predicted == pytest.approx(real, rel=0.15)


def test_dry_run_leaves_the_model_as_it_is() -> None:
    model, names = with_lora_and_grafts("qwen2_moe")
    model.requires_grad_(False)
    before: dict[str, Tensor] = {name: p.clone() for name, p in model.named_parameters()}
    generator = torch.get_rng_state()
    peak_of_local_steps(model, names, SHAPE, settings())
    assert torch.equal(torch.get_rng_state(), generator)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert not parameter.requires_grad
        assert parameter.grad is None


@pytest.mark.parametrize(
    ("change", "least"),
    [
        (lambda shape: BatchShape(examples=4, length=24, labels=10), 1.5),
        (lambda shape: BatchShape(examples=2, length=48, labels=10), 1.5),
        (lambda shape: BatchShape(examples=2, length=24, labels=48), 1.02),
    ],
)
def test_more_of_anything_takes_more(change: Callable[[BatchShape], BatchShape], least: float) -> None:
    model, names = with_lora_and_grafts("qwen2_moe")
    usual = predict_memory(model, names, SHAPE, settings())
    more = predict_memory(model, names, change(SHAPE), settings())
    assert more.activations > least * usual.activations
    assert (more.weights, more.gradients, more.optimizer) == (
        usual.weights,
        usual.gradients,
        usual.optimizer,
    )


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd": {"optimizer": "sgd"},
    "momentum": {"optimizer": "sgd", "momentum": 0.9},
    "adafactor": {"optimizer": "adafactor"},
    "adamw8bit": {"optimizer": "adamw8bit"},
}


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_counted_to_the_byte_with_and_without_accumulation(
    name: str, accumulation: int
) -> None:
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    model, names = with_lora_and_grafts("qwen2_moe")
    training = settings(accumulation=accumulation, **OPTIMIZERS[name])
    # No meter sees what torch.tensor makes: Adafactor's steps, and the two tables of the 8-bit format.
    unseen = {"adafactor": 4 * len(names), "adamw8bit": 2 * 4 * 256}.get(name, 0)
    assert peak_of_local_steps(model, names, SHAPE, training) == real_peak(model, names, training) + unseen


def test_accumulation_takes_fewer_bytes() -> None:
    model, names = with_lora_and_grafts("qwen2_moe")
    whole, parts = (
        predict_memory(model, names, SHAPE, settings(accumulation=accumulation)) for accumulation in (1, 2)
    )
    assert parts.activations < 0.7 * whole.activations
    assert (parts.gradients, parts.optimizer) == (whole.gradients, whole.optimizer)


def test_gradients_and_optimizer_state_are_counted_exactly() -> None:
    model, names = with_slots(torch.bfloat16)
    shapes = [parameter.shape for name, parameter in model.named_parameters() if name in set(names)]
    trained, steps = sum(4 * shape.numel() for shape in shapes), 4 * len(shapes)
    # Adafactor keeps a row's and a column's mean for each matrix.
    factors = sum(4 * shape[0] * (shape[1] + shape[2]) for shape in shapes)
    expected = {
        "adamw": 2 * trained + steps,
        "sgd": 0,
        "momentum": trained,
        "adafactor": factors + steps,
    }
    for name, optimizer in expected.items():
        memory = predict_memory(model, names, SHAPE, settings(**OPTIMIZERS[name]))
        assert (memory.gradients, memory.optimizer) == (trained, optimizer), name


def test_8_bit_state_is_counted_in_bytes() -> None:
    pytest.importorskip("bitsandbytes")
    parameter = torch.nn.Linear(64, 80, bias=False)
    memory = memory_before_activations(parameter, ["weight"], settings(optimizer="adamw8bit"))
    # Two numbers of a byte each, a float32 for every block of 256, and the step.
    assert memory.optimizer == 2 * (64 * 80 + 4 * 64 * 80 // 256) + 8


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[:4], ids=lambda case: case.title)
def test_predicted_memory_is_within_a_tenth_of_a_process(case: Any) -> None:
    measured = in_new_process(case, RETURNING)
    assert measured["predicted"] == pytest.approx(measured["peak"], rel=0.1)
