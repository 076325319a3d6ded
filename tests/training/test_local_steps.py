"""Local steps: what moves, what does not, and what is refused."""

import math

import pytest
import torch

from families import each_family
from fedexperts.data.batches import Batch
from fedexperts.errors import UserError
from fedexperts.models.adapters import AdapterSettings, add_lora
from fedexperts.models.tiny import tiny_model
from fedexperts.moe.surgery import seam
from fedexperts.training.local_steps import (
    NonFiniteLossError,
    ParameterGroup,
    TrainingSettings,
    learning_rate_share,
    local_steps,
)


def make_model(family: str = "qwen2_moe", **overrides):
    model = tiny_model(family, **overrides).requires_grad_(False)
    seam.take_seat(model)
    return model


def make_batches(count: int = 3) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 100, (2, 10), generator=generator) for _ in range(count)]
    return [
        Batch(input_ids=x, attention_mask=torch.ones_like(x), labels=x, num_examples=2, num_labels=20)
        for x in ids
    ]


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def train(model, names, settings=None, batches=None, **more):
    settings = settings or TrainingSettings(weight_decay=0.1)
    groups = [ParameterGroup(names=tuple(names), lr=1e-2)]
    return local_steps(model, batches or make_batches(), groups, settings, seed=5, **more)


def test_only_what_is_named_moves():
    model = make_model()
    names = add_lora(model, AdapterSettings(rank=2), 0)
    before = snapshot(model)
    result = train(model, names)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == set(names)
    assert result.untrained == ()
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("family", each_family())
def test_loss_and_gradients_are_those_of_all_logits(family):
    """Logits are made at label positions only; the tolerance is the last bits of a sum of fewer zeros."""
    # LLaMA-MoE's router adds noise in training, and the two passes draw at different times.
    noise = {"gate_add_noise": False} if family == "llama_moe" else {}
    model = make_model(family, **noise).train()
    name = next(name for name, _ in model.named_parameters() if "norm" in name)
    ids = torch.randint(3, 100, (3, 14), generator=torch.Generator().manual_seed(1))
    attention_mask, labels = torch.ones_like(ids), ids.clone()
    attention_mask[1, 9:] = attention_mask[2, 12:] = 0
    labels[0, :5] = labels[1, :3] = labels[1, 9:] = labels[2, :9] = labels[2, 12:] = -100
    parameter = dict(model.named_parameters())[name].requires_grad_(True)
    loss = model(input_ids=ids, attention_mask=attention_mask, labels=labels, use_cache=False).loss
    (gradient,) = torch.autograd.grad(loss, parameter)
    num_labels = int((labels != -100).sum())
    batch = Batch(
        input_ids=ids, attention_mask=attention_mask, labels=labels, num_examples=3, num_labels=num_labels
    )
    result = train(model, [name], TrainingSettings(gradient_clip=0), [batch])
    assert result.losses[0] == pytest.approx(loss.item(), rel=1e-6)
    assert result.gradient_norms[0] == pytest.approx(gradient.norm().item(), rel=1e-5)


def test_gradient_checkpointing_changes_no_bit():
    models = [make_model() for _ in range(2)]
    for model, on in zip(models, (False, True), strict=True):
        names = add_lora(model, AdapterSettings(rank=2), 0)
        train(model, names, TrainingSettings(gradient_checkpointing=on))
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_moments_that_are_kept_make_two_calls_one():
    whole, split = make_model(), make_model()
    names = add_lora(whole, AdapterSettings(rank=2), 0)
    add_lora(split, AdapterSettings(rank=2), 0)
    train(whole, names)
    first = train(split, names, batches=make_batches()[:1], keep_moments_of=names)
    train(split, names, batches=make_batches()[1:], moments=first.moments)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), split.parameters(), strict=True))


def test_dropout_depends_on_the_seed_alone():
    results = []
    for disturbance in (0, 1):
        model = make_model()
        names = add_lora(model, AdapterSettings(rank=2, dropout=0.5), 0)
        torch.manual_seed(disturbance)
        before = torch.random.get_rng_state()
        train(model, names)
        assert torch.equal(torch.random.get_rng_state(), before)
        results.append(snapshot(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in names)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_loss_is_refused(bad):
    model = make_model()
    names = add_lora(model, AdapterSettings(rank=2), 0)
    with torch.no_grad():
        dict(model.named_parameters())["model.norm.weight"].fill_(bad)
    with pytest.raises(NonFiniteLossError, match="local step 1 is"):
        train(model, names)


def test_an_expert_without_gradient_is_counted():
    """A graft that nothing calls would train in silence; here it is a parameter outside the forward pass."""
    model = make_model()
    model.register_parameter("idle", torch.nn.Parameter(torch.ones(2)))
    names = (*add_lora(model, AdapterSettings(rank=2), 0), "idle")
    assert train(model, names).untrained == ("idle",)


def test_the_load_balancing_loss_is_added_and_not_reported():
    plain, balanced = make_model("qwen2_moe"), make_model("qwen2_moe")
    for model in (plain, balanced):
        names = tuple(name for name, _ in model.named_parameters() if name.endswith("mlp.gate.weight"))
    first = train(plain, names, TrainingSettings(), make_batches(1))
    second = train(balanced, names, TrainingSettings(router_aux_loss=0.5), make_batches(1))
    assert first.losses[0] == pytest.approx(second.losses[0], abs=1e-5)
    assert first.gradient_norms[0] != second.gradient_norms[0]


def test_a_family_without_load_balancing_loss_is_refused_by_name():
    model = make_model("deepseek_v3")
    names = add_lora(model, AdapterSettings(rank=2), 0)
    with pytest.raises(UserError, match=r"training\.router_aux_loss is 0.1, but DeepseekV3ForCausalLM"):
        train(model, names, TrainingSettings(router_aux_loss=0.1))


def test_the_rate_is_a_cosine_over_rounds():
    settings = TrainingSettings(lr_final_share=0.025)
    assert learning_rate_share(1, 100, settings) == 1.0
    assert learning_rate_share(100, 100, settings) == pytest.approx(0.025)
    assert learning_rate_share(101, 100, settings) == pytest.approx(0.025)
    assert learning_rate_share(3, 5, settings) == pytest.approx((1 + 0.025) / 2)


@pytest.mark.parametrize("key", ["num_local_steps", "batch_size", "lr"])
def test_numbers_out_of_range_are_refused(key):
    with pytest.raises(UserError, match=f"^{key} must be"):
        TrainingSettings(**{key: 0})
