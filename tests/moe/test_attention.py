"""Attention received by an expert's tokens, against the model's own attention maps."""

from contextlib import ExitStack

import pytest
import torch
from cached import PLENTY, Tokens, padded_batches
from installed import Installed, installed_model, random_tokens
from torch import Tensor

from families import each_family
from fedexperts.errors import UserError
from fedexperts.models.tiny import FAMILIES, tiny_model
from fedexperts.moe.observing.activations import collect_activations
from fedexperts.moe.observing.forward_pass import run_pass
from fedexperts.moe.observing.profile import LayerProfile, Profiler, count_tokens, profile_experts
from fedexperts.moe.surgery import seam

WITHOUT_ATTENTION = {"jamba", "nemotron_h"}
"""In the tiny ones every MoE layer stands in a block without attention."""
HYBRID = {
    "bailing_hybrid",
    "granitemoehybrid",
    "kimi_linear",
    "lfm2_moe",
    "minimax",
    "qwen3_5_moe_text",
    "qwen3_next",
    "qwen4_exp_text",
}
"""One of their two MoE layers stands beside linear attention, Mamba or a convolution."""
FULL = tuple(sorted(set(FAMILIES) - WITHOUT_ATTENTION - HYBRID))


def from_maps(found: Installed, batch: Tokens) -> list[Tensor]:
    """Mean attention per expert by the model's eager attention maps, position by position."""
    stock, chosen = found.model.config._attn_implementation, {}
    found.model.set_attn_implementation("eager")
    try:
        with (
            torch.no_grad(),
            seam.watch_experts(found.layers, lambda layer, *a: chosen.update({layer.index: a[1]})),
        ):
            maps = found.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_attentions=True
            ).attentions
    finally:
        found.model.set_attn_implementation(stock)
    is_token = batch.attention_mask.bool()
    means = []
    for layer in found.layers:
        block = [int(part) for part in layer.name.split(".") if part.isdigit()][-1]
        length = is_token.shape[1]
        map_BSS = maps[block][..., :length].float().mean(1) * is_token[:, :, None]
        # zeros are what the mask hides: no softmax weight of a tiny model is that small
        received = (map_BSS.sum(1) / (map_BSS > 0).sum(1).clamp(min=1))[is_token]
        index = chosen[layer.index][is_token.reshape(-1)]
        means.append(
            torch.stack(
                [
                    received[(index == expert).any(dim=1)].sum() / max(int((index == expert).sum()), 1)
                    for expert in range(layer.num_experts)
                ]
            )
        )
    return means


@pytest.mark.parametrize("family", each_family(FULL))
def test_it_is_that_of_the_models_own_attention_maps(family: str) -> None:
    found, (batch, *_) = installed_model(family), padded_batches([(24, 15, 9)])
    profiles = profile_experts(found.model, found.layers, [batch])
    for profile, expected_E in zip(profiles, from_maps(found, batch), strict=True):
        assert profile.mean_attention_E is not None
        # float32 softmax of scores summed in another order
        torch.testing.assert_close(profile.mean_attention_E.float(), expected_E, rtol=1e-5, atol=1e-6)
        assert profile.attention_error == 0.0


def test_a_bias_on_the_scores_is_in_the_attention() -> None:
    found, (batch,) = installed_model("qwen2_moe"), padded_batches([(24, 15)])
    bias = torch.randn(2, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    hidden = torch.ones(24, 24, dtype=torch.bool).triu(1) | ~batch.attention_mask[:, None, None].bool()
    mask = bias.masked_fill(hidden, torch.finfo(bias.dtype).min)
    with ExitStack() as hooks:
        for layer in found.model.model.layers:
            hook = layer.self_attn.register_forward_pre_hook(
                lambda _, args, kwargs: (args, kwargs | {"attention_mask": mask}), with_kwargs=True
            )
            hooks.callback(hook.remove)
        profiles, expected = profile_experts(found.model, found.layers, [batch]), from_maps(found, batch)
    for profile, expected_E in zip(profiles, expected, strict=True):
        torch.testing.assert_close(profile.mean_attention_E.float(), expected_E, rtol=1e-5, atol=1e-6)


def test_watching_changes_no_bit(installed: Installed) -> None:
    stock = installed.model.config._attn_implementation
    profiler = Profiler(installed.model, installed.layers, num_queries=4, on_missing="leave_out")
    with profiler.watching():
        profiler.begin(installed.attention_mask.bool())
        assert torch.equal(installed.logits(), installed.stock_logits)
    assert installed.model.config._attn_implementation == stock
    assert torch.equal(installed.logits(), installed.stock_logits)


@pytest.mark.parametrize("family", each_family(tuple(sorted(HYBRID | WITHOUT_ATTENTION))))
def test_layers_without_softmax_attention_are_told(family: str) -> None:
    found, batches = installed_model(family), padded_batches()
    number = 2 if family in WITHOUT_ATTENTION else 1
    with pytest.raises(UserError, match=rf"no softmax attention runs in the block of .* \({number} of 2 MoE"):
        profile_experts(found.model, found.layers, batches)
    profiles = profile_experts(found.model, found.layers, batches, on_missing="leave_out")
    assert [profile.mean_attention_E is None for profile in profiles].count(True) == number
    assert [profile.tokens_E.tolist() for profile in profiles] == [
        tokens_E.tolist() for tokens_E in count_tokens(found.model, batches)
    ]


def long_batch(length: int = 200) -> Tokens:
    ids = random_tokens(3, length, seed=7)
    return Tokens(ids, torch.ones_like(ids))


def relative_error(profile: LayerProfile, exact: LayerProfile) -> float:
    assert profile.mean_attention_E is not None
    assert exact.mean_attention_E is not None
    apart_E = profile.mean_attention_E - exact.mean_attention_E
    return float(apart_E.square().mean().sqrt() / exact.mean_attention_E.mean())


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_error_told_is_no_less_than_the_error_made(family: str) -> None:
    """Root mean squares over experts and 20 draws; half samples differ more than the whole errs."""
    model = tiny_model(family, sliding_window=512, max_position_embeddings=256)
    layers, batch = seam.find_moe_layers(model), long_batch()
    (exact, _) = profile_experts(model, layers, [batch], num_queries=PLENTY)
    drawn = [profile_experts(model, layers, [batch], num_queries=32, seed=seed)[0] for seed in range(20)]
    made = torch.tensor([relative_error(profile, exact) for profile in drawn]).square().mean().sqrt()
    told = torch.tensor([profile.attention_error for profile in drawn]).square().mean().sqrt()
    assert 0.8 < told / made < 4
    assert made < 0.1


def test_more_queries_err_less(qwen: Installed) -> None:
    batch = long_batch()
    (exact, _) = profile_experts(qwen.model, qwen.layers, [batch], num_queries=PLENTY)
    errors = []
    for num_queries in (8, 100):
        drawn = [
            profile_experts(qwen.model, qwen.layers, [batch], num_queries=num_queries, seed=seed)[0]
            for seed in range(5)
        ]
        errors.append(sum(relative_error(profile, exact) for profile in drawn))
    assert errors[1] < errors[0] / 2


def test_few_queries_of_a_sliding_window_leave_tokens_out_and_no_mean_is_drawn_to_zero() -> None:
    model = tiny_model("mixtral", sliding_window=8)
    layers, batch = seam.find_moe_layers(model), long_batch(128)
    (exact, _) = profile_experts(model, layers, [batch], num_queries=PLENTY)
    (few, _) = profile_experts(model, layers, [batch], num_queries=6)
    assert few.mean_attention_E is not None
    assert exact.mean_attention_E is not None
    # 6 queries see 48 of 128 tokens
    assert 0.5 < float(few.mean_attention_E.mean() / exact.mean_attention_E.mean()) < 2


def test_equal_seeds_give_equal_profiles(qwen: Installed) -> None:
    def attention(seed: int) -> Tensor | None:
        return profile_experts(qwen.model, qwen.layers, [long_batch()], num_queries=8, seed=seed)[
            0
        ].mean_attention_E

    assert torch.equal(attention(1), attention(1))
    assert not torch.equal(attention(1), attention(2))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out(qwen: Installed, side: str) -> None:
    ids = random_tokens(1, 12, seed=3)
    pad, padding = torch.full((1, 5), 77), torch.zeros(1, 5, dtype=torch.int64)
    ones = torch.ones_like(ids)
    parts = [(ids, ones), (pad, padding)] if side == "right" else [(pad, padding), (ids, ones)]
    padded = Tokens(*(torch.cat(both, dim=1) for both in zip(*parts, strict=True)))
    plain, found = (
        profile_experts(qwen.model, qwen.layers, [batch]) for batch in (Tokens(ids, ones), padded)
    )
    for one, other in zip(plain, found, strict=True):
        assert torch.equal(one.tokens_E, other.tokens_E)
        # rotary angles differ by a shift, and blocks of the softmax by the padding
        torch.testing.assert_close(one.mean_attention_E, other.mean_attention_E, rtol=1e-4, atol=1e-6)


def test_frequencies_are_shares_that_sum_to_top_k(qwen: Installed) -> None:
    for profile in profile_experts(qwen.model, qwen.layers, padded_batches()):
        assert profile.num_tokens == 36
        assert float(profile.frequency_E.sum()) == pytest.approx(2)
        assert torch.equal((profile.frequency_E * 36).round().long(), profile.tokens_E)


def test_one_pass_serves_the_profile_and_the_activations(qwen: Installed) -> None:
    calls = []
    hook = qwen.model.register_forward_pre_hook(lambda *_: calls.append(1))
    profiler = Profiler(qwen.model, qwen.layers)
    try:
        activations = collect_activations(
            qwen.model, qwen.layers, padded_batches(), byte_limit=PLENTY, observers=(profiler,)
        )
    finally:
        hook.remove()
    assert len(calls) == 3 + 1  # and one sequence, to see how many bytes a token takes
    for profile, plain in zip(
        profiler.profiles(), profile_experts(qwen.model, qwen.layers, padded_batches()), strict=True
    ):
        assert torch.equal(profile.tokens_E, plain.tokens_E)
        assert torch.equal(profile.mean_attention_E, plain.mean_attention_E)
        chosen = activations.layer(profile.layer_index).top_k_index_TK
        assert torch.equal(torch.bincount(chosen.reshape(-1), minlength=6), profile.tokens_E)


def test_a_layer_alone_can_be_profiled(qwen: Installed) -> None:
    both = profile_experts(qwen.model, qwen.layers, padded_batches())
    (last,) = profile_experts(qwen.model, qwen.layers[1:], padded_batches())
    assert torch.equal(last.mean_attention_E, both[1].mean_attention_E)


def test_attention_that_shows_no_weights_is_refused(qwen: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qwen.model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(
        UserError, match="implementation 'flash_attention_2': load the model with one of sdpa, eager"
    ):
        Profiler(qwen.model, qwen.layers)
    monkeypatch.undo()
    run_pass(qwen.model, padded_batches(), (Profiler(qwen.model, qwen.layers, num_queries=0),), "see")
