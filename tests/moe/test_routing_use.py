"""The meter of experts' use in local steps: each token once, padding never."""

import pytest
import torch

from fedexperts.data.batches import Batch
from fedexperts.models.tiny import tiny_model
from fedexperts.moe.observing.profile import count_tokens
from fedexperts.moe.observing.routing_use import UseMeter
from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.slots import SlotPlan, split_layer
from fedexperts.training.local_steps import local_steps
from fedexperts.training.optimizers import ParameterGroup
from fedexperts.training.settings import TrainingSettings

PLAN = SlotPlan(num_experts=6, tuned=(1, 4), kept=(0, 2, 3, 5))


def padded_batch():
    ids = torch.randint(3, 100, (4, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, 5:] = mask[2, 9:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return Batch(input_ids=ids, attention_mask=mask, labels=labels, num_examples=4, num_labels=30)


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"accumulation": 2}], ids=str)
def test_local_steps_count_as_a_pass_of_its_own_does(settings):
    """Padding counts nowhere; recomputation and micro-batches change nothing."""
    model = tiny_model("qwen2_moe").requires_grad_(False)
    seam.install_implementation(model)
    layers, batch = seam.find_moe_layers(model), padded_batch()
    counted = torch.stack(count_tokens(model, [batch]))
    weights = torch.zeros(2, 6, dtype=torch.float64)

    def see(layer, hidden, index, weight, routed):
        rows = batch.attention_mask.reshape(-1).bool()
        weights[layer.index].index_add_(0, index[rows].reshape(-1), weight[rows].reshape(-1).double())

    with torch.no_grad(), seam.watch_experts(layers, see):
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    for layer in layers:
        split_layer(layer, PLAN)
    names = tuple(name for name, _ in model.named_parameters() if ".tuned." in name)
    meter = UseMeter(layers)
    with meter.watching():
        groups = [ParameterGroup(names=names, lr=1e-3)]
        local_steps(model, [batch], groups, TrainingSettings(batch_size=4, **settings), seed=0)
    assert torch.equal(meter.tokens(), counted)
    for layer in layers:
        tuned = seam.slots_of(layer).tokens_of_tuned()
        assert tuned == tuple(counted[layer.index, list(PLAN.tuned)].tolist())
    # The routers' weights differ in their last bits where another number of rows is multiplied at once.
    torch.testing.assert_close(meter.routing_weights(), weights, rtol=1e-5, atol=1e-6)


def test_a_step_that_reaches_no_tuned_expert_is_taken_and_changes_nothing():
    model = tiny_model("qwen2_moe").requires_grad_(False)
    seam.install_implementation(model)
    ids = torch.full((1, 2), 7)
    one = Batch(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, num_examples=1, num_labels=1)
    layers = seam.find_moe_layers(model)
    for layer, tokens in zip(layers, count_tokens(model, [one]), strict=True):
        experts = {used: tuple(e for e in range(6) if bool(tokens[e]) == used) for used in (False, True)}
        split_layer(layer, SlotPlan(num_experts=6, tuned=experts[False], kept=experts[True]))
    names = tuple(name for name, _ in model.named_parameters() if ".tuned." in name)
    before = {name: model.get_parameter(name).detach().clone() for name in names}
    settings = TrainingSettings(batch_size=1)
    result = local_steps(model, [one], [ParameterGroup(names=names, lr=1e-3)], settings, seed=0)
    assert result.gradient_norms == [0.0]
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())
