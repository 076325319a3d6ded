"""Gradient utility against true gradients: how well experts are ranked, and what each way costs.

The truth is laid out by autograd: the gradient of every expert's weights, one backward pass for each sequence
("per sample"), and one for each label token ("per token's own loss"). Ranks are compared by Spearman's
correlation within each layer, as a client chooses among a layer's experts, and over all layers together.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.setting import bench_config
from benchmarks.tables import Figures, Table, milliseconds
from benchmarks.timing import in_turns, paired_ratio, spread
from fedexperts.costs.stopwatch import Stopwatch
from fedexperts.data.batches import Batch, draw_batches, encode_all
from fedexperts.moe.observing.label_logits import label_logits
from fedexperts.moe.observing.probe import probed_utility
from fedexperts.moe.observing.profile import count_tokens
from fedexperts.moe.observing.utility import gradient_utility, run_by_rows, sample_losses
from fedexperts.moe.surgery.seam import MoeLayer
from fedexperts.running.workbench import Workbench, open_workbench
from fedexperts.seeds import derive_random

CLIENT = "client-000"
PAIRS = (1, 2, 4)
PROBED = 2
"""Experts of each layer whose probes are timed."""


def measure(
    model: str, *, seeds: int = 3, num_examples: int = 8, repeats: int = 3, pairs: Sequence[int] = PAIRS
) -> dict[str, Any]:
    """Rank correlations for each seed, seconds of each way for the first."""
    ranks: dict[str, dict[str, list[float]]] = {}
    seconds: dict[str, Any] = {}
    for seed in range(seeds):
        config = bench_config(model, "fedavg", f"seed={seed}", "threads=1")
        with open_workbench(config, Stopwatch()) as bench:
            batch = _draw(bench, seed, num_examples)
            for name, found in _ranks(bench, batch, seed, pairs).items():
                for key, value in found.items():
                    ranks.setdefault(name, {}).setdefault(key, []).append(value)
            if seed == 0:
                seconds = _seconds(bench, batch, repeats)
                tokens, labels = int(batch.attention_mask.sum()), batch.num_labels
    return {
        "model": model,
        "seeds": seeds,
        "examples": num_examples,
        "tokens": tokens,
        "labels": labels,
        "ranks": {
            name: {
                key: {"mean": statistics.mean(values), "min": min(values), "values": values}
                for key, values in found.items()
            }
            for name, found in ranks.items()
        },
        **seconds,
    }


def _draw(bench: Workbench, seed: int, num_examples: int) -> Batch:
    encoded, _ = encode_all(bench.format, bench.data.examples(CLIENT, "train"))
    rng, pad = derive_random(seed, "utility benchmark"), bench.format.pad_token_id
    return draw_batches(encoded, num_batches=1, batch_size=num_examples, rng=rng, pad_token_id=pad)[0]


def _ranks(bench: Workbench, batch: Batch, seed: int, pairs: Sequence[int]) -> dict[str, dict[str, float]]:
    model, layers = bench.parts.model, bench.parts.layers
    everyone = [range(layer.num_experts) for layer in layers]
    ways = {
        f"exact, per {per}": gradient_utility(model, layers, [batch], per=per) for per in ("sample", "token")
    }
    for number in pairs:
        ways[f"probes, {number} pair{'s' * (number > 1)}"] = probed_utility(
            model, layers, [batch], everyone, num_pairs=number, seed=seed
        )
    utilities = {name: found.values() for name, found in ways.items()}
    utilities["frequency (the paper's first round)"] = count_tokens(model, [batch])
    truths = {
        "sample": _true_per_sample(model, layers, batch),
        "token": _true_per_token(model, layers, batch),
    }
    return {
        name: {
            f"{kind}_{scope}": _rank_correlation(found, truth, by_layer=scope == "layer")
            for kind, truth in truths.items()
            for scope in ("layer", "all")
        }
        for name, found in utilities.items()
    }


def _rank_correlation(found: Sequence[Tensor], truth: Sequence[Tensor], *, by_layer: bool) -> float:
    if not by_layer:
        return _spearman(torch.cat(list(found)), torch.cat(list(truth)))
    return statistics.mean(_spearman(*each) for each in zip(found, truth, strict=True))


def _spearman(left: Tensor, right: Tensor) -> float:
    ranks = torch.stack([_middle_ranks(left.double()), _middle_ranks(right.double())])
    return float(torch.corrcoef(ranks)[0, 1])


def _middle_ranks(values: Tensor) -> Tensor:
    """Ranks, with the mean of their places for equal values."""
    below = (values[:, None] > values).sum(dim=1)
    return below + (values[:, None] == values).sum(dim=1) / 2


def _expert_weights(layers: Sequence[MoeLayer]) -> list[list[Tensor]]:
    return [[getattr(layer.experts, name) for name in layer.parameter_names()] for layer in layers]


def _true(
    layers: Sequence[MoeLayer], losses: Callable[[], Sequence[Tensor]], reached: Tensor
) -> list[Tensor]:
    """Eq. 3 by autograd: one backward pass for each loss; ``reached`` counts |D|, (L, E)."""
    weights = _expert_weights(layers)
    flat = [weight.requires_grad_() for own in weights for weight in own]
    squares = [torch.zeros(layer.num_experts, dtype=torch.float64) for layer in layers]
    for loss in losses():
        gradients = iter(torch.autograd.grad(loss, flat, retain_graph=True))
        for square, own in zip(squares, weights, strict=True):
            for _ in own:
                square += next(gradients).double().flatten(1).square().sum(dim=1)
    for weight in flat:
        weight.requires_grad_(False)
    return [(square * count).sqrt() for square, count in zip(squares, reached, strict=True)]


def _true_per_sample(model: Any, layers: Sequence[MoeLayer], batch: Batch) -> list[Tensor]:
    counts = torch.stack(gradient_utility(model, layers, [batch]).counts_LE)
    return _true(layers, lambda: sample_losses(model, batch).unbind(), counts)


def _true_per_token(model: Any, layers: Sequence[MoeLayer], batch: Batch) -> list[Tensor]:
    """The gradient of each label's own cross-entropy; |D| counts the tokens that the expert ran for."""
    counts = torch.stack(gradient_utility(model, layers, [batch], per="token").counts_LE)

    def losses() -> Sequence[Tensor]:
        logits_MV, label_M, _ = label_logits(model, batch)
        return torch.nn.functional.cross_entropy(logits_MV, label_M, reduction="none").unbind()

    return _true(layers, losses, counts)


def _seconds(bench: Workbench, batch: Batch, repeats: int) -> dict[str, Any]:
    model, layers = bench.parts.model, bench.parts.layers
    some = [range(PROBED)] * len(layers)

    def timed(run: Callable[[], object]) -> Callable[[], float]:
        def seconds() -> float:
            started = time.perf_counter()
            run()
            return time.perf_counter() - started

        return seconds

    def step() -> None:
        """Forward and backward as local steps do it: LoRA trains, experts do not."""
        with run_by_rows(layers):
            sample_losses(model, batch).sum().backward()
        model.zero_grad()

    rivals = {
        "step": timed(step),
        "sample": timed(lambda: gradient_utility(model, layers, [batch])),
        "token": timed(lambda: gradient_utility(model, layers, [batch], per="token")),
        "autograd": timed(lambda: _true_per_sample(model, layers, batch)),
        "pair": timed(lambda: probed_utility(model, layers, [batch], some, num_pairs=1, seed=0)),
    }
    seconds = in_turns(rivals, repeats)
    return {
        "probed": PROBED * len(layers),
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "over_step": {name: paired_ratio(values, seconds["step"]) for name, values in seconds.items()},
    }


def tables(figures: Figures) -> list[Table]:
    """Ranks and costs."""
    return [_rank_table(figures), _cost_table(figures)]


def _rank_table(figures: Figures) -> Table:
    keys = ("sample_layer", "sample_all", "token_layer", "token_all")
    rows = [
        (name, *(f"{one[key]['mean']:.3f} ({one[key]['min']:.3f})" for key in keys))
        for name, one in figures["ranks"].items()
    ]
    return Table(
        title=(
            f"Spearman's correlation with the true utility, mean and least of {figures['seeds']} seeds, "
            f"{figures['examples']} sequences each"
        ),
        columns=(
            "utility",
            "true per sample, within a layer",
            "true per sample, all layers",
            "true per token's own loss, within a layer",
            "true per token's own loss, all layers",
        ),
        rows=tuple(rows),
    )


def _cost_table(figures: Figures) -> Table:
    names = {
        "step": "forward and backward alone",
        "sample": "exact, per sample",
        "token": "exact, per token",
        "autograd": "true per sample: all gradients laid out, sequence by sequence",
        "pair": f"one pair of probes for each of {figures['probed']} experts",
    }
    rows = [
        (
            title,
            milliseconds(figures["seconds"][name]["median"]),
            f"{figures['over_step'][name]['median']:.2f}",
        )
        for name, title in names.items()
    ]
    title = f"Cost on a batch of {figures['tokens']} tokens, {figures['labels']} of them labels"
    return Table(title=title, columns=("", "ms", "over forward and backward"), rows=tuple(rows))
