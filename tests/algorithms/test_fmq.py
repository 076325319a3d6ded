"""FMQ: experts train in few bits, straight through their rounding or by LoRA on frozen ones."""

import pytest
import torch
from turns import ExpertsByRows, assert_same, make_batch, make_client, make_parts, planned, turn

from fedexperts.algorithms.api import Kept
from fedexperts.algorithms.fmq import Fmq
from fedexperts.errors import UserError
from fedexperts.messages import Sent
from fedexperts.models.tiny import tiny_model
from fedexperts.moe.compressing.quantize import quantize_experts, quantized_bank
from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.expert_lora import ExpertLoraForm, add_expert_lora
from fedexperts.moe.surgery.low_bit import LowBitForm, quantize
from fedexperts.moe.surgery.made_experts import AdaptedExperts, RoundedExperts, tune_all
from fedexperts.moe.surgery.slots import full_weights
from fedexperts.moe.surgery.undo import undone
from fedexperts.training.local_steps import local_steps
from fedexperts.training.optimizers import ParameterGroup
from fedexperts.training.settings import TrainingSettings


def trained_once(algorithm, parts):
    state = planned(algorithm, parts, ("a", "b"))
    uploads = [(name, turn(algorithm, parts, state, name)[0]) for name in "ab"]
    return algorithm.server_update(state, uploads).tensors


def test_straight_through_at_16_bits_is_fedavg_of_all_experts_bit_for_bit():
    assert_same(
        trained_once(Fmq(bits=16), make_parts()), trained_once(ExpertsByRows(experts=True), make_parts())
    )


def logits(parts, batch):
    with torch.no_grad():
        return parts.model(input_ids=batch.input_ids).logits


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("form", ["straight_through", "lora"])
def test_the_model_that_is_installed_runs_in_few_bits(form, bits):
    parts, algorithm, batch = make_parts(), Fmq(form=form, bits=bits), make_batch()
    with undone(parts.model, parts.layers):
        quantize_experts(parts.layers, LowBitForm(bits=bits))
        rounded = logits(parts, batch)
    with undone(parts.model, parts.layers):
        algorithm.install(make_client(parts), Kept(), Sent())
        assert torch.equal(logits(parts, batch), rounded)


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_gradients_pass_straight_through_the_rounding(family):
    model = tiny_model(family).requires_grad_(False)
    seam.install_implementation(model)
    (layer, *_), form = seam.find_moe_layers(model), LowBitForm(bits=3)
    bank, dense = quantized_bank(layer, form), RoundedExperts(layer, None)
    rounded = RoundedExperts(layer, form)
    for index in range(layer.num_experts):
        for name, weight in bank.expert(index).items():
            assert torch.equal(rounded.made(index)[name], weight)
            dense.weights[name].data[index] = weight
    hidden = torch.randn(9, layer.hidden_size, generator=torch.Generator().manual_seed(1))
    index = torch.arange(18).view(9, 2) % layer.num_experts
    found = {}
    for name, own in (("rounded", rounded), ("dense", dense)):
        with undone(model, [layer]):
            tune_all(layer, own)
            layer.experts(hidden, index, torch.full((9, 2), 0.5)).square().sum().backward()
            found[name] = {key: weight.grad.clone() for key, weight in own.weights.items()}
    assert_same(found["rounded"], found["dense"])
    assert all(grad.any() for grad in found["dense"].values())


def step(parts, names):
    settings = TrainingSettings(optimizer="sgd", gradient_clip=0.0)
    groups = [ParameterGroup(names=tuple(names), lr=0.5)]
    local_steps(parts.model, [make_batch(), make_batch(3)], groups, settings, seed=0)


@pytest.mark.parametrize("bits", [16, 4])
def test_lora_is_that_of_every_expert_by_itself_but_for_rounding(bits):
    parts, form = make_parts(), LowBitForm(bits=4)
    algorithm = Fmq(form="lora", bits=bits, lora_rank=3, lora_alpha=6.0)
    with undone(parts.model, parts.layers):
        algorithm.prepare(parts)
        started = {layer.index: seam.slots_of(layer).tuned for layer in parts.layers}
        start = {at: {n: a.detach().clone() for n, a in bank.lora_A.items()} for at, bank in started.items()}
        step(parts, [name for group in algorithm.trained(parts, Sent()) for name in group.names])
        made = [full_weights(layer) for layer in parts.layers]
    with undone(parts.model, parts.layers):
        if bits == 4:
            quantize_experts(parts.layers, form)
        names = []
        for layer in parts.layers:
            names += add_expert_lora(layer, ExpertLoraForm(ranks=dict.fromkeys(range(6), 3), alpha=6.0), 0)
            for expert, own in seam.slots_of(layer).tuned.lora_A.items():
                for name, matrix in own.items():
                    matrix.data.copy_(start[layer.index][name][int(expert)])
        before = [full_weights(layer) for layer in parts.layers]
        step(parts, names)
        expected = [full_weights(layer) for layer in parts.layers]
    for old, one, other in zip(before, made, expected, strict=True):
        for name, weight in other.items():
            assert (weight - old[name]).abs().max() > 1e-4
            # Gradients of the stacked product are summed in another order: rounding of float32.
            assert torch.allclose(one[name], weight, atol=1e-6), name


def test_no_dense_weight_lives_from_the_forward_to_the_backward_pass():
    parts = make_parts()
    layer = parts.layers[0]
    bank = AdaptedExperts(layer, quantized_bank(layer, LowBitForm()), rank=2, alpha=4.0, seed=0)
    with undone(parts.model, parts.layers):
        tune_all(layer, bank)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
            index = torch.arange(12).view(6, 2) % 6
            layer.experts(torch.randn(6, 32), index, torch.full((6, 2), 0.5))
    experts = {tuple(weight.shape) for weight in layer.expert(0).values()}
    assert saved
    assert not {tuple(shape[-2:]) for shape in saved} & experts


def test_lora_of_experts_starts_alike_for_all_clients_and_changes_nothing():
    algorithm = Fmq(form="lora")
    one, other = (planned(algorithm, make_parts()).tensors for _ in range(2))
    assert_same(one, other)
    assert {name.split(".")[-2] for name in one} == {"lora_A", "lora_B"}
    assert not any(tensor.any() for name, tensor in one.items() if "lora_B" in name)
    assert algorithm.download(planned(algorithm, make_parts()), "a").tensors == {}


def test_masters_keep_steps_that_are_too_small_for_a_code():
    parts, algorithm = make_parts(), Fmq(bits=2)
    upload, _ = turn(algorithm, parts, planned(algorithm, parts), num_steps=1)
    before, form = planned(algorithm, parts).tensors, LowBitForm(bits=2)
    name = "model.layers.0.mlp.experts.0.down_proj"
    codes = [quantize(tensors[name], form)[0] for tensors in (before, upload.tensors)]
    assert float((upload.tensors[name] != before[name]).float().mean()) > 0.9
    assert float((codes[0] == codes[1]).float().mean()) > 0.9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_rank": 4}, "lora_rank is 4, but has no effect"),
        ({"bits": 5}, "bits is 5; it must be one of 16, 8, 4, 3, 2"),
        ({"form": "qat"}, 'form is "qat"; it must be one of straight_through, lora'),
        ({"form": "lora", "lora_rank": 0}, "lora_rank must be above 0"),
        ({"experts_lr_scale": 0.0}, "experts_lr_scale must be above 0"),
    ],
)
def test_settings_out_of_range_or_without_effect_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Fmq(**settings)
