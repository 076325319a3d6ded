"""The best r of 60 experts, at the price of one; and what a profile adds to a forward pass.

The layer has Qwen1.5-MoE's true shape and random weights in bfloat16. The rival is how the papers' selector
does it (NAEE, arXiv 2402.14800): run the layer for each subset. It runs for a sample of subsets, whose losses
must be ours, and the rest is told as extrapolated. It is given its best: each expert in one product over all
tokens, the routed sum and the router's logits cached. On a processor all runs on one thread, and seconds are
that thread's: they do not grow when other processes take turns with it.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from benchmarks.tables import Figures, Table
from benchmarks.timing import in_turns, paired_ratio, spread
from fedexperts.models.load import ModelSettings, load_model
from fedexperts.models.tiny import tiny_model
from fedexperts.moe.choosing.quadratic import all_subsets
from fedexperts.moe.choosing.subsets import SubsetRule, Weighting, choose_subset, subset_losses
from fedexperts.moe.observing.activations import LayerActivations
from fedexperts.moe.observing.forward_pass import run_pass
from fedexperts.moe.observing.profile import DEFAULT_QUERIES, LayerProfile, profile_experts
from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.one_expert import run_expert
from fedexperts.moe.surgery.seam import MoeLayer
from fedexperts.seeds import derive_random

SHAPE = {"hidden_size": 2048, "moe_intermediate_size": 1408, "num_experts": 60, "num_experts_per_tok": 4}
"""Qwen1.5-MoE-A2.7B's."""
SMALL_SHAPE = {"hidden_size": 32, "moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 4}
QUICK: dict[str, Any] = {"num_tokens": 64, "shape": SMALL_SHAPE, "num_rerun": 2, "length": 32}
PAPER_SECONDS = {1: 58, 2: 3246, 3: 87091}
"""FLEx, table 7, on the authors' machine: the whole model, another number of tokens."""
SIZES = (1, 2, 3)
GREEDY = 8
PROFILED = {
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_hidden_layers": 4,
    "num_experts": 64,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 256,
    "max_position_embeddings": 1024,
}


def measure(
    model: str,
    *,
    repeats: int = 3,
    num_tokens: int = 2048,
    shape: dict[str, int] = SHAPE,
    num_rerun: int = 6,
    length: int = 512,
    device: str = "cpu",
) -> dict[str, Any]:
    """All figures, ready for JSON; ``model`` is one of the two that are profiled."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            selection = _selection(repeats, num_tokens, shape, num_rerun, device)
            profiles = {
                "embedded" if model == "tinyworld" else model: _embedded(model),
                "random": tiny_model("qwen2_moe", **PROFILED),
            }
            profile = {name: _profile(one, length, max(repeats, 5)) for name, one in profiles.items()}
    finally:
        torch.set_num_threads(before)
    return {"device": device, "selection": selection, "profile": profile}


def _selection(
    repeats: int, num_tokens: int, shape: dict[str, int], num_rerun: int, device: str
) -> dict[str, Any]:
    layer = _layer(shape, device)
    kept = _activations(layer, num_tokens, device)
    weightings: tuple[Weighting, ...] = ("softmax", "router")
    rivals = {
        f"{weighting} {size}": _choosing(layer, kept, size, SubsetRule(weighting=weighting), device)
        for weighting in weightings
        for size in (*SIZES, GREEDY)
    }
    seconds = in_turns(rivals | {"experts once": _timed(lambda: _every_output(layer, kept), device)}, repeats)
    return {
        "shape": shape,
        "num_tokens": num_tokens,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "over_one": {
            f"{weighting} {size}": paired_ratio(seconds[f"{weighting} {size}"], seconds[f"{weighting} 1"])
            for weighting in weightings
            for size in (*SIZES, GREEDY)
        },
        "rerun": {
            str(size): _rerun(layer, kept, size, num_rerun, device)
            | {"num_subsets": len(all_subsets(layer.num_experts, size))}
            for size in SIZES
        },
    }


def _layer(shape: dict[str, int], device: str) -> MoeLayer:
    """One MoE block of the shape with random weights in bfloat16."""
    config = Qwen2MoeConfig(**shape, shared_expert_intermediate_size=8, norm_topk_prob=False)
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        block = Qwen2MoeSparseMoeBlock(config).to(torch.bfloat16)
    block = block.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in block.parameters():
        parameter.normal_(0, 0.02, generator=generator)
    (layer,) = seam.find_moe_layers(nn.ModuleDict({"mlp": block}))
    return layer


def _activations(layer: MoeLayer, num_tokens: int, device: str) -> LayerActivations:
    generator = torch.Generator(device).manual_seed(1)
    hidden = torch.randn(num_tokens, layer.hidden_size, generator=generator, device=device).bfloat16()
    logits, weights, index = layer.router(hidden)
    return LayerActivations(
        layer_index=0,
        hidden_TD=hidden.cpu(),
        top_k_index_TK=index.cpu(),
        top_k_weights_TK=weights.float().cpu(),
        routed_TD=layer.experts(hidden, index, weights).cpu(),
        logits_TE=logits.float().cpu(),
    )


def _timed(run: Callable[[], object], device: str) -> Callable[[], float]:
    def timed() -> float:
        clock = time.thread_time if device == "cpu" else time.perf_counter
        started = clock()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        return clock() - started

    return timed


def _choosing(
    layer: MoeLayer, kept: LayerActivations, size: int, rule: SubsetRule, device: str
) -> Callable[[], float]:
    return _timed(lambda: choose_subset(layer, kept, size, rule), device)


def _every_output(layer: MoeLayer, kept: LayerActivations) -> None:
    hidden = kept.hidden_TD.to(layer.router_row(0).device)
    for expert in range(layer.num_experts):
        run_expert(layer.experts, hidden, layer.expert(expert))


def _rerun(layer: MoeLayer, kept: LayerActivations, size: int, number: int, device: str) -> dict[str, Any]:
    """Seconds for a subset, over a sample of subsets that begins with one that is not counted."""
    losses, subsets = subset_losses(layer, kept, size), all_subsets(layer.num_experts, size)
    draw = derive_random(0, "subsets to run again", size)
    here = LayerActivations(
        **{
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in vars(kept).items()
        }
    )
    seconds = []
    for position in [draw.randrange(len(subsets)) for _ in range(number + 1)]:
        subset: list[int] = subsets[position].tolist()
        found: list[float] = []

        def run_again(subset: list[int] = subset, found: list[float] = found) -> None:
            found.append(_loss(layer, here, subset))

        seconds.append(_timed(run_again, device)())
        # the rival adds up in bfloat16, as the layer does
        assert abs(found[0] / float(losses[position]) - 1) < 0.01, (subset, found[0], losses[position])
    return spread(seconds[1:])


def _loss(layer: MoeLayer, kept: LayerActivations, subset: Sequence[int]) -> float:
    assert kept.logits_TE is not None
    weights = kept.logits_TE[:, subset].softmax(dim=-1).to(kept.hidden_TD.dtype)
    total = torch.zeros_like(kept.routed_TD)
    for slot, expert in enumerate(subset):
        total += weights[:, slot, None] * run_expert(layer.experts, kept.hidden_TD, layer.expert(expert))
    return float((kept.routed_TD - total).float().norm())


@dataclass(frozen=True)
class _Batch:
    input_ids: Tensor
    attention_mask: Tensor


def _embedded(model: str) -> nn.Module:
    return load_model(ModelSettings(name=model, device="cpu"), 0).model


def _profile(model: Any, length: int, repeats: int) -> dict[str, Any]:
    """Overhead of counting, and of the attention received, over a forward pass alone."""
    seam.install_implementation(model)
    layers, vocabulary = seam.find_moe_layers(model), model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (4, 4, length), generator=generator)
    batches = [_Batch(batch, torch.ones_like(batch)) for batch in ids]

    def profile(num_queries: int) -> list[LayerProfile]:
        return profile_experts(model, layers, batches, num_queries=num_queries)

    seconds = in_turns(
        {
            "forward": _timed(lambda: run_pass(model, batches, (), "run"), "cpu"),
            "counts": _timed(lambda: profile(0), "cpu"),
            "attention": _timed(lambda: profile(DEFAULT_QUERIES), "cpu"),
        },
        repeats,
    )
    sampled, exact = profile(DEFAULT_QUERIES), profile(length)
    return {
        "num_tokens": ids.numel(),
        "length": length,
        "num_queries": DEFAULT_QUERIES,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "over_forward": {
            name: paired_ratio(seconds[name], seconds["forward"]) for name in ("counts", "attention")
        },
        "error_told": max(float(one.attention_error or 0.0) for one in sampled),
        "error_made": max(_error(one, other) for one, other in zip(sampled, exact, strict=True)),
        "spread_of_experts": max(_spread_of(one) for one in exact),
    }


def _error(sampled: LayerProfile, exact: LayerProfile) -> float:
    assert sampled.mean_attention_E is not None
    assert exact.mean_attention_E is not None
    used = exact.tokens_E > 0
    apart = (sampled.mean_attention_E - exact.mean_attention_E)[used]
    return float(apart.square().mean().sqrt() / exact.mean_attention_E[used].mean())


def _spread_of(profile: LayerProfile) -> float:
    assert profile.mean_attention_E is not None
    used = profile.mean_attention_E[profile.tokens_E > 0]
    return float(used.std() / used.mean())


def tables(figures: Figures) -> list[Table]:
    """What the document shows."""
    return [
        _selection_table(figures),
        _rerun_table(figures["selection"]),
        _profile_table(figures["profile"]),
    ]


def _selection_table(figures: Figures) -> Table:
    found, rows = figures["selection"], []
    for size in (*SIZES, GREEDY):
        cells = []
        for weighting in ("softmax", "router"):
            name = f"{weighting} {size}"
            cells += [
                f"{found['seconds'][name]['median']:.2f}",
                f"{found['over_one'][name]['median']:.2f}",
            ]
        what = "greedy with swaps" if size == GREEDY else f"of {found['rerun'][str(size)]['num_subsets']:,}"
        rows.append((f"r = {size}, {what}", *cells))
    once = f"{found['seconds']['experts once']['median']:.2f}"
    rows.append(("every expert once on every token, nothing else", once, "", once, ""))
    shape = found["shape"]
    return Table(
        title=(
            f"Seconds to choose r of {shape['num_experts']} experts (hidden {shape['hidden_size']}, "
            f"inner {shape['moe_intermediate_size']}, {found['num_tokens']:,} tokens, bfloat16, "
            f"{figures['device']})"
        ),
        columns=("", "softmax over the subset", "over r = 1", "router's weights", "over r = 1"),
        rows=tuple(rows),
    )


def _rerun_table(found: Figures) -> Table:
    rows = []
    for size in SIZES:
        rerun, ours = found["rerun"][str(size)], found["seconds"][f"softmax {size}"]["median"]
        whole = rerun["median"] * rerun["num_subsets"]
        rows.append(
            (
                f"r = {size}",
                f"{rerun['num_subsets']:,}",
                f"{rerun['median']:.3f}",
                f"{whole:,.0f}",
                f"{whole / ours:,.0f}",
                f"{PAPER_SECONDS[size]:,}",
            )
        )
    sampled = len(found["rerun"]["1"]["values"])
    return Table(
        title=f"Running the layer again for each subset: {sampled} subsets measured, the rest extrapolated",
        columns=(
            "",
            "subsets",
            "seconds each",
            "seconds for all, extrapolated",
            "over ours",
            "paper, its machine and its calibration data",
        ),
        rows=tuple(rows),
    )


def _profile_table(found: Figures) -> Table:
    rows = [
        (
            f"{name}, {one['num_tokens']:,} tokens in sequences of {one['length']}",
            f"{one['seconds']['forward']['median'] * 1e3:.0f}",
            f"{one['over_forward']['counts']['median'] - 1:+.1%}",
            f"{one['over_forward']['attention']['median'] - 1:+.1%}",
            f"{one['error_told']:.1%}",
            f"{one['error_made']:.1%}",
            f"{one['spread_of_experts']:.1%}",
        )
        for name, one in found.items()
    ]
    queries = next(iter(found.values()))["num_queries"]
    return Table(
        title=f"What a profile adds to a forward pass, and how far {queries} sampled queries lead astray",
        columns=(
            "model",
            "forward alone, ms",
            "counting tokens",
            "and attention received",
            "error told (worst layer)",
            "error made",
            "spread between experts",
        ),
        rows=tuple(rows),
    )
