"""LoRA on chosen experts: nothing at the start, only the chosen train, and the way back is exact."""

import pytest
import torch
from seated import Seated, assert_same_state, state

from fedexperts.errors import UserError
from fedexperts.moe import seam
from fedexperts.moe.expert_lora import (
    ExpertLoraForm,
    add_expert_lora,
    merge_expert_lora,
    remove_expert_lora,
)

FORM = ExpertLoraForm(ranks={4: 2, 1: 3, 0: 1, 2: 2}, alpha=8.0)


def train(seated: Seated, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """One step of gradient descent on the named parameters; their gradients."""
    parameters = dict(seated.model.named_parameters())
    wanted = [parameters[name] for name in names]
    gradients = torch.autograd.grad(seated.loss(), wanted, materialize_grads=True)
    with torch.no_grad():
        for parameter, gradient in zip(wanted, gradients, strict=True):
            parameter -= 10.0 * gradient
    return dict(zip(names, gradients, strict=True))


def test_lora_on_experts_starts_at_the_base_model_and_leaves_no_trace(seated: Seated) -> None:
    before = state(seated.model)
    for layer in seated.layers:
        names = add_expert_lora(layer, FORM, 0)
        assert {name.split(".")[-2] for name in names} == {"0", "1", "2", "4"}
    # float32: another order of the same sums
    torch.testing.assert_close(seated.logits(), seated.stock_logits, rtol=1e-4, atol=1e-5)
    for layer in seated.layers:
        remove_expert_lora(layer)
    assert_same_state(seated.model, before)


def test_merged_back_lora_is_the_model_it_was_merged_from(seated: Seated) -> None:
    before = [
        {name: weight.clone() for name, weight in seam.fused_weights(layer).items()}
        for layer in seated.layers
    ]
    names = tuple(name for layer in seated.layers for name in add_expert_lora(layer, FORM, 0))
    train(seated, names)
    found = seated.logits()
    assert (found - seated.stock_logits).abs().max() > 1e-4
    for layer in seated.layers:
        merge_expert_lora(layer)
    torch.testing.assert_close(seated.logits(), found, rtol=1e-4, atol=1e-5)
    for layer, fused in zip(seated.layers, before, strict=True):
        for name, weight in fused.items():
            now = getattr(layer.experts, name)
            assert torch.equal(now[[3, 5]], weight[[3, 5]]), "an expert without LoRA has moved"
        seam.set_fused(layer, fused)


def test_only_the_chosen_experts_have_parameters_and_all_of_them_learn(qwen: Seated) -> None:
    layer = qwen.layers[0]
    names = add_expert_lora(layer, FORM, 0)
    trained = {name for name, parameter in qwen.model.named_parameters() if parameter.requires_grad}
    assert trained == set(names)
    parameters = dict(qwen.model.named_parameters())
    ranks = {name.split(".")[-2]: parameters[name].shape[0] for name in names if ".lora_A." in name}
    assert ranks == {"4": 2, "1": 3, "0": 1, "2": 2}
    train(qwen, names)  # B leaves zero, so A gets a gradient too
    gradients = train(qwen, names)
    remove_expert_lora(layer)
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())


def test_the_update_is_scale_times_b_times_a(qwen: Seated) -> None:
    layer = qwen.layers[1]
    origin = layer.expert(1)["down_proj"].clone()
    names = add_expert_lora(layer, FORM, 0)
    train(qwen, names)
    bank = seam.slots_of(layer).tuned
    update = (8.0 / 3) * (bank.lora_B["1"]["down_proj"] @ bank.lora_A["1"]["down_proj"])
    assert torch.equal(layer.expert(1)["down_proj"], origin + update)
    remove_expert_lora(layer)


@pytest.mark.parametrize(
    ("ranks", "sentence"),
    [({}, "ranks names no expert"), ({2: 0}, "rank 0 of expert 2 must be at least 1")],
)
def test_a_form_that_means_nothing_is_refused(ranks: dict[int, int], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        ExpertLoraForm(ranks=ranks)


def test_an_expert_that_is_not_there_is_refused_and_nothing_changes(qwen: Seated) -> None:
    with pytest.raises(UserError, match="expert 6 of layer"):
        add_expert_lora(qwen.layers[0], ExpertLoraForm(ranks={6: 2}), 0)
