"""What slots promise, for every family: the numbers of the experts they stand for, and nothing left
behind."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from installed import Installed, assert_same_state, state
from torch import Tensor

from fedexperts.errors import UserError
from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.graft import GraftForm, grafted
from fedexperts.moe.surgery.rows import group_rows
from fedexperts.moe.surgery.slots import (
    SlotPlan,
    full_weights,
    has_slots,
    idle_experts,
    restore_layer,
    split_layer,
)

SINGLETONS = SlotPlan(num_experts=6, tuned=(3, 1), kept=(5, 0), merged=((2,), (4,)))
"""Every expert in a slot of its own, in an order that is not theirs."""
MIXED = SlotPlan(num_experts=6, tuned=(1, 4), kept=(0,), merged=((2, 3, 5),))


def merged_weights(layer, plan):
    """Plain means of the groups."""
    return [
        {name: torch.stack([layer.expert(e)[name] for e in group]).mean(dim=0) for name in layer.expert(0)}
        for group in plan.merged
    ]


class Split:
    """All MoE layers of a model in slots for the length of a ``with`` block."""

    def __init__(self, layers, plan, order="rows"):
        self.layers, self.plan, self.order = layers, plan, order

    def __enter__(self):
        self.fused = [
            split_layer(layer, self.plan, merged_weights(layer, self.plan), order=self.order)
            for layer in self.layers
        ]
        return self.layers

    def __exit__(self, *_):
        for layer, fused in zip(self.layers, self.fused, strict=True):
            if seam.slots_of(layer) is not None:
                restore_layer(layer, fused)


def overwritten(installed: Installed, plan: SlotPlan) -> Installed:
    """A copy of the model whose merged experts are all overwritten by their mean, without slots."""
    model = copy.deepcopy(installed.model)
    for layer in seam.find_moe_layers(model):
        for group, weights in zip(plan.merged, merged_weights(layer, plan), strict=True):
            for name, weight in weights.items():
                getattr(layer.experts, name).data[list(group)] = weight
    return Installed(
        installed.family,
        model,
        seam.find_moe_layers(model),
        installed.input_ids,
        installed.attention_mask,
        installed.stock_logits,
    )


def test_singletons_in_stock_order_are_the_base_model_bit_for_bit(installed: Installed) -> None:
    with Split(installed.layers, SINGLETONS, "stock"):
        assert torch.equal(installed.logits(), installed.stock_logits)


def test_singletons_run_row_by_row_are_the_base_model(installed: Installed) -> None:
    with Split(installed.layers, SINGLETONS):
        # float32: another order of the same sums
        torch.testing.assert_close(installed.logits(), installed.stock_logits, rtol=1e-4, atol=1e-5)


def test_undoing_slots_leaves_what_was_there(installed: Installed) -> None:
    before = state(installed.model)
    with Split(installed.layers, MIXED):
        assert has_slots(installed.layers)
        assert list(installed.model.state_dict()) != before["names"]
    assert not has_slots(installed.layers)
    assert_same_state(installed.model, before)
    assert torch.equal(installed.logits(), installed.stock_logits)


def test_merged_slots_are_the_model_whose_experts_were_overwritten(installed: Installed) -> None:
    reference = overwritten(installed, MIXED)
    with Split(installed.layers, MIXED):
        found = installed.logits()
        again = [full_weights(layer) for layer in installed.layers]
    torch.testing.assert_close(found, reference.logits(), rtol=1e-4, atol=1e-5)
    for layer, weights in zip(reference.layers, again, strict=True):
        for name, weight in weights.items():
            assert torch.equal(weight, getattr(layer.experts, name)), name


def gradients(installed: Installed, names: list[str]) -> dict[str, Tensor]:
    """Gradients of the named parameters and of the embedding after one backward pass."""
    parameters = dict(installed.model.named_parameters())
    embedding = installed.model.get_input_embeddings().weight
    wanted = [embedding, *(parameters[name] for name in names)]
    was = [parameter.requires_grad for parameter in wanted]
    for parameter in wanted:
        parameter.requires_grad_(True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = torch.autograd.grad(installed.loss(), wanted, materialize_grads=True)
    for parameter, trained in zip(wanted, was, strict=True):
        parameter.requires_grad_(trained)
    return dict(zip(["embedding", *names], found, strict=True))


def assert_gradients_of_overwritten_experts(installed: Installed) -> None:
    reference = overwritten(installed, MIXED)
    fused = [f"{layer.name}.{name}" for layer in reference.layers for name in layer.parameter_names()]
    routers = [name for name, _ in reference.model.named_parameters() if name.endswith(("gate.weight",))]
    wanted = gradients(reference, fused + routers)
    with Split(installed.layers, MIXED):
        tuned = [
            f"{seam.slots_name(layer)}.tuned.weights.{name}"
            for layer in installed.layers
            for name in layer.expert(0)
        ]
        found = gradients(installed, tuned + routers)
    for name in ["embedding", *routers]:
        torch.testing.assert_close(found[name], wanted[name], rtol=2e-3, atol=1e-5)
    for ours, theirs in zip(tuned, fused, strict=True):
        torch.testing.assert_close(found[ours], wanted[theirs][list(MIXED.tuned)], rtol=2e-3, atol=1e-5)


def test_gradients_are_those_of_the_model_whose_experts_were_overwritten(installed: Installed) -> None:
    assert_gradients_of_overwritten_experts(installed)


def test_a_norm_after_each_expert_is_in_the_gradients(qwen: Installed) -> None:
    """transformers knows such experts (muse_spark); none of the supported families has them."""
    model = copy.deepcopy(qwen.model)
    for layer in seam.find_moe_layers(model):
        norm = torch.nn.RMSNorm(32).requires_grad_(False)
        norm.weight.data = torch.linspace(0.5, 1.5, 32)
        layer.experts.post_expert_norm, layer.experts.has_post_expert_norm = norm, True
    with_norms = dataclasses.replace(qwen, model=model, layers=seam.find_moe_layers(model))
    assert not torch.equal(with_norms.logits(), qwen.stock_logits)
    assert_gradients_of_overwritten_experts(with_norms)
    with_norms.layers[0].experts.post_expert_norm.requires_grad_(True)
    with (
        Split(with_norms.layers, MIXED),
        pytest.raises(AssertionError, match="the norm after experts is frozen"),
    ):
        with_norms.loss()


def test_kept_experts_that_train_get_their_gradients_row_by_row(qwen: Installed) -> None:
    name = f"{qwen.layers[0].name}.down_proj"
    wanted = gradients(qwen, [name])[name]
    with Split(qwen.layers, SINGLETONS):
        found = gradients(qwen, [name])[name]
    torch.testing.assert_close(found, wanted[[5, 0, 2, 4]], rtol=2e-3, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients(installed: Installed) -> None:
    with Split(installed.layers, MIXED):
        tuned = [n for n, _ in installed.model.named_parameters() if ".slots.tuned." in n]
        installed.model.train()
        try:
            plain = gradients(installed, tuned)
            installed.model.activation_checkpointing_enable()
            recomputed = gradients(installed, tuned)
        finally:
            installed.model.activation_checkpointing_disable()
            installed.model.eval()
    for name, gradient in plain.items():
        assert torch.equal(recomputed[name], gradient), name


def test_generation_with_cache_is_generation_without(installed: Installed) -> None:
    with Split(installed.layers, MIXED):
        made = [
            installed.model.generate(
                input_ids=installed.input_ids,
                attention_mask=installed.attention_mask,
                max_new_tokens=4,
                min_new_tokens=4,
                do_sample=False,
                use_cache=use_cache,
            )
            for use_cache in (True, False)
        ]
    assert torch.equal(*made)


def test_closed_graft_over_slots_is_the_slots_alone(installed: Installed) -> None:
    with Split(installed.layers, MIXED):
        alone = installed.logits()
        with grafted(installed.layers, [1, 3], GraftForm(gate_init="zero", gate_bias=-1e4), 0):
            assert torch.equal(installed.logits(), alone)
        with grafted(installed.layers, [1, 3], GraftForm(), 0):
            assert not torch.equal(installed.logits(), alone)


def test_tuned_experts_are_float32_in_a_bfloat16_model(installed: Installed) -> None:
    model = copy.deepcopy(installed.model).to(torch.bfloat16)
    layers = seam.find_moe_layers(model)
    with Split(layers, MIXED):
        output = model(input_ids=installed.input_ids, labels=installed.input_ids, use_cache=False)
        output.loss.backward()
        for name, parameter in model.named_parameters():
            if ".slots.tuned." in name:
                assert parameter.dtype == torch.float32
                assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
            else:
                assert parameter.grad is None, name
    assert torch.isfinite(output.logits).all()


def test_autocast_trains_the_tuned_experts_in_its_dtype(installed: Installed) -> None:
    with Split(installed.layers, MIXED):
        tuned = [n for n, _ in installed.model.named_parameters() if ".slots.tuned." in n]
        wanted = gradients(installed, tuned)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = gradients(installed, tuned)
    apart = sum(float((found[n] - wanted[n]).norm()) ** 2 for n in tuned) ** 0.5
    size = sum(float(wanted[n].norm()) ** 2 for n in tuned) ** 0.5
    # bfloat16 moves some tokens to another expert
    assert 0 < apart < 0.5 * size


def test_only_the_tuned_experts_train(qwen: Installed) -> None:
    with Split(qwen.layers, MIXED):
        trained = {name for name, p in qwen.model.named_parameters() if p.requires_grad}
        stored = {len(getattr(layer.experts, n)) for layer in qwen.layers for n in layer.parameter_names()}
    assert trained == {
        f"{seam.slots_name(layer)}.tuned.weights.{name}" for layer in qwen.layers for name in layer.expert(0)
    }
    assert stored == {MIXED.num_frozen}


def test_layers_found_in_slots_still_have_all_their_experts(qwen: Installed) -> None:
    with Split(qwen.layers, MIXED):
        assert [layer.num_experts for layer in seam.find_moe_layers(qwen.model)] == [6, 6]
        assert seam.expert_names(qwen.layers)


def test_an_experts_name_reaches_its_slot(qwen: Installed) -> None:
    layer = qwen.layers[0]
    name = seam.expert_name(layer, 4, "down_proj")
    with Split(qwen.layers, MIXED):
        view = seam.tensor_views(qwen.model, [name])[name]
        view.fill_(7.0)
        assert torch.equal(seam.slots_of(layer).tuned.weights["down_proj"][1], view)
        missing = seam.expert_name(layer, 6, "down_proj")
        with pytest.raises(UserError, match="no tensor named"):
            seam.tensor_views(qwen.model, [missing])


def test_a_tuned_expert_that_no_token_reaches_is_named(qwen: Installed) -> None:
    layer = qwen.layers[0]
    index, weights = torch.tensor([[0, 1], [2, 1]]), torch.full((2, 2), 0.5)
    with Split(qwen.layers, MIXED):
        assert idle_experts(qwen.layers) == {0: (1, 4), 1: (1, 4)}
        with torch.no_grad():
            layer.experts(torch.randn(2, 32), index, weights)
        assert idle_experts(qwen.layers)[0] == (1, 4), "nothing is trained without gradients"
        layer.experts(torch.randn(2, 32), index, weights)
        assert idle_experts(qwen.layers) == {0: (4,), 1: (1, 4)}


def test_a_dropped_expert_adds_nothing(qwen: Installed) -> None:
    layer = qwen.layers[0]
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([[0, 1], [1, 2], [2, 0], [3, 1], [4, 5]])
    weights = torch.full((5, 2), 0.3)
    alone = torch.where(index == 1, 0.0, weights)
    plan = SlotPlan(num_experts=6, kept=(0, 2, 3), merged=((4, 5),), dropped=(1,))
    for order in ("rows", "stock"):
        with torch.no_grad():
            with Split(qwen.layers, plan, order):
                found = layer.experts(hidden, index, weights)
                with pytest.raises(UserError, match="expert 1 has been dropped"):
                    layer.expert(1)
            reference = layer.experts(hidden[:4], index[:4], alone[:4])
        torch.testing.assert_close(found[:4], reference, rtol=1e-5, atol=1e-6)


def test_two_choices_that_meet_in_a_slot_run_once() -> None:
    slots = torch.tensor([[0, 1], [1, 1], [-1, 0]])
    rows = group_rows(slots, torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]), 3)
    assert rows.sizes == [2, 2, 0]
    assert rows.token_R.tolist() == [0, 2, 0, 1]
    torch.testing.assert_close(rows.weight_R, torch.tensor([0.1, 0.6, 0.2, 0.7]))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12).flatmap(
        lambda n: st.tuples(st.just(n), st.lists(st.integers(-1, 4), min_size=n, max_size=n))
    )
)
def test_every_expert_is_looked_up_where_the_plan_put_it(drawn: tuple[int, list[int]]) -> None:
    num_experts, kinds = drawn
    of = {kind: tuple(e for e in range(num_experts) if kinds[e] == kind) for kind in range(-1, 5)}
    groups = tuple(group for group in (of[2], of[3], of[4]) if group)
    plan = SlotPlan(num_experts=num_experts, tuned=of[0], kept=of[1], merged=groups, dropped=of[-1])
    lookup = plan.lookup().tolist()
    order = [(e,) for e in of[0] + of[1]] + list(groups)
    assert plan.num_slots == len(order) == len(set(lookup) - {-1})
    for slot, group in enumerate(order):
        assert [lookup[e] for e in group] == [slot] * len(group)
    assert [lookup[e] for e in of[-1]] == [-1] * len(of[-1])


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        ({"tuned": (0, 6), "kept": (1, 2, 3, 4, 5)}, "plan names expert 6: must be from 0 to 5"),
        ({"tuned": (0,), "kept": (0, 1, 2, 3, 4, 5)}, "plan names expert 0 twice"),
        ({"tuned": (0,), "kept": (1, 2, 5)}, r"plan leaves expert 3 without a slot \(2 of 6 in all\)"),
        ({"kept": (0, 1, 2, 3, 4, 5), "merged": ((),)}, "empty group"),
    ],
)
def test_a_wrong_plan_is_refused_in_one_sentence(plan: dict[str, tuple], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        SlotPlan(num_experts=6, **plan)


def test_a_plan_for_another_layer_is_refused(qwen: Installed) -> None:
    with pytest.raises(UserError, match="plan for 3 experts, but layer"):
        split_layer(qwen.layers[0], SlotPlan(num_experts=3, kept=(0, 1, 2)))
    with pytest.raises(UserError, match="plan has 1 merged groups, but weights came for 0"):
        split_layer(qwen.layers[0], MIXED)
