"""The expert toolbox on the embedded model: ``python -m examples.experts`` fills docs/experts.md.

Every step calls the library as anybody would; nothing here knows about federation.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.tables import Table, markdown, put_into
from torch import Tensor

from fedexperts.config.load import build_config
from fedexperts.costs.stopwatch import Stopwatch
from fedexperts.data.batches import Batch, encode_all, sequential_batches
from fedexperts.moe.choosing.subsets import choose_subset
from fedexperts.moe.compressing.merge import MergePlan, MergeSettings, merged_layers, plan_merge
from fedexperts.moe.compressing.merge_error import layer_error, model_error
from fedexperts.moe.compressing.quantize import quantization_report, quantized
from fedexperts.moe.observing.activations import collect_activations
from fedexperts.moe.observing.profile import LayerProfile, Profiler, count_tokens
from fedexperts.moe.observing.utility import gradient_utility
from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.low_bit import LowBitForm
from fedexperts.report.drawing import heat_map
from fedexperts.report.figures import cells
from fedexperts.report.tables import number_table
from fedexperts.running.workbench import Workbench, open_workbench

ROOT = Path(__file__).resolve().parent.parent
NUM_TUNED, NUM_MERGED, NUM_EXAMPLES, SHOWN_LAYER = 4, 16, 48, 1


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The model, and one client's tokens for each category."""

    bench: Workbench
    train: Mapping[str, Sequence[Batch]]
    test: Mapping[str, Sequence[Batch]]

    @property
    def model(self) -> Any:
        """The model in the seat."""
        return self.bench.parts.model

    @property
    def layers(self) -> tuple[seam.MoeLayer, ...]:
        """Its MoE layers."""
        return self.bench.parts.layers


def main() -> None:
    """Make the page."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument(
        "--docs", type=Path, default=ROOT / "docs", help="folder with experts.md and images/"
    )
    docs = options.parse_args().docs
    config = build_config(
        {"threads": 1, "data": {"source": "tinyworld", "partition": {"num_clients": 8}}}
        | {"algorithm": {"name": "local_only"}, "evaluation": {"exam": {"source": "none"}}},
        "examples/experts.py",
        ["rounds=1"],
    )
    with open_workbench(config, Stopwatch()) as bench:
        scene = _scene(bench)
        _make_page(scene, docs)


def _scene(bench: Workbench) -> Scene:
    splits: dict[str, dict[str, list[Batch]]] = {"train": {}, "test": {}}
    for client in bench.data.client_ids:
        for split, found in splits.items():
            examples = bench.data.examples(client, split)[:NUM_EXAMPLES]
            encoded, _ = encode_all(bench.format, examples)
            pad = bench.format.pad_token_id
            found[examples[0].label] = list(sequential_batches(encoded, batch_size=8, pad_token_id=pad))
    return Scene(bench=bench, **splits)


def _make_page(scene: Scene, docs: Path) -> None:
    category = next(iter(scene.train))
    before = _shares(scene)
    profiler = Profiler(scene.model, scene.layers)
    seen = collect_activations(
        scene.model, scene.layers, scene.train[category], byte_limit=2**30, observers=[profiler]
    )
    unseen = collect_activations(scene.model, scene.layers, scene.test[category], byte_limit=2**30)
    profiles = profiler.profiles()
    utility_LE = gradient_utility(scene.model, scene.layers, scene.train[category]).values()
    tuned = [utility_E.topk(NUM_TUNED).indices.tolist() for utility_E in utility_LE]
    plans = _plans(scene, profiles, tuned, MergeSettings())
    pictures = {
        "before": _picture("tokens by expert, full model", before, range(len(before[category])), tuned),
    }
    with merged_layers(scene.layers, plans):
        after = _shares(scene)
    slots = plans[SHOWN_LAYER].slots
    by_slot = {name: _by_slot(shares_E, slots.lookup(), slots.num_slots) for name, shares_E in after.items()}
    names = [f"{expert}" for expert in slots.tuned] + [f"{len(group)} in one" for group in slots.merged]
    pictures["after"] = _picture("tokens by slot, merged model", by_slot, names, [], column="slot")
    (docs / "images").mkdir(exist_ok=True)
    for name, picture in pictures.items():
        (docs / "images" / f"experts_{name}.svg").write_text(picture + "\n")
    page = docs / "experts.md"
    tables = {
        "profile": _profile_table(profiles, utility_LE),
        "plan": _plan_table(plans),
        "ways": _ways_table(scene, category, profiles, tuned, unseen),
        "selection": _selection_table(scene, seen),
    }
    text = page.read_text()
    for name, table in tables.items():
        text = put_into(text, name, markdown([table]), "python -m examples.experts")
    page.write_text(text)


def _shares(scene: Scene) -> dict[str, Tensor]:
    """By category the shares of its tokens' choices that each expert of the shown layer gets, (E,)."""
    found = {}
    for category, batches in scene.train.items():
        tokens_E = count_tokens(scene.model, batches)[SHOWN_LAYER].double()
        found[category] = tokens_E / tokens_E.sum()
    return found


def _by_slot(shares_E: Tensor, lookup_E: Tensor, num_slots: int) -> Tensor:
    return torch.zeros(num_slots, dtype=shares_E.dtype).index_add(0, lookup_E, shares_E)


def _plans(
    scene: Scene, profiles: Sequence[LayerProfile], tuned: Sequence[Sequence[int]], settings: MergeSettings
) -> list[MergePlan]:
    return plan_merge(
        scene.layers,
        tokens_LE=[each.tokens_E for each in profiles],
        attention_LE=[each.mean_attention_E for each in profiles if each.mean_attention_E is not None],
        num_merged=NUM_MERGED,
        tuned=tuned,
        settings=settings,
        seed=0,
    )


def _picture(
    title: str,
    shares: Mapping[str, Tensor],
    columns: Sequence[object],
    tuned: Sequence[Sequence[int]],
    *,
    column: str = "expert",
) -> str:
    rows = {category: cells(shares_E.tolist()) for category, shares_E in shares.items()}
    titles = [f"category / {column} of layer {SHOWN_LAYER}", *map(str, columns)]
    high = max(float(shares_E.max()) for shares_E in shares.values())
    outlined = frozenset((0, expert) for expert in (tuned[SHOWN_LAYER] if tuned else ()))
    table = number_table(title, titles, "routing.share", rows)
    drawn = heat_map(table, title, limits=(0.0, high), outlined=outlined)
    return drawn[drawn.index("<svg") :].replace("<svg", '<svg style="background: #ffffff"', 1).rstrip()


def _profile_table(profiles: Sequence[LayerProfile], utility_LE: Sequence[Tensor]) -> Table:
    rows = []
    for profile, utility_E in zip(profiles, utility_LE, strict=True):
        assert profile.mean_attention_E is not None
        used, useful = profile.tokens_E.argsort(descending=True), utility_E.argsort(descending=True)
        rows.append(
            (
                str(profile.layer_index),
                ", ".join(str(int(expert)) for expert in used[:4]),
                f"{float(profile.tokens_E[used[:4]].sum() / profile.tokens_E.sum()):.0%}",
                ", ".join(str(int(e)) for e in profile.mean_attention_E.argsort(descending=True)[:4]),
                ", ".join(str(int(expert)) for expert in useful[:4]),
                f"{profile.attention_error or 0.0:.1%}",
            )
        )
    columns = ("layer", "most used", "their share", "most attended", "highest utility", "error of attention")
    return Table(title="One client's experts", columns=columns, rows=tuple(rows))


def _plan_table(plans: Sequence[MergePlan]) -> Table:
    rows = tuple(
        (
            str(number),
            ", ".join(str(expert) for expert in sorted(plan.slots.tuned)),
            str(len(plan.slots.merged)),
            " · ".join(" ".join(str(expert) for expert in sorted(group)) for group in plan.slots.merged),
        )
        for number, plan in enumerate(plans)
    )
    return Table(title="The plan", columns=("layer", "tuned", "merged slots", "groups"), rows=rows)


def _ways_table(
    scene: Scene,
    category: str,
    profiles: Sequence[LayerProfile],
    tuned: Sequence[Sequence[int]],
    unseen: Any,
) -> Table:
    ways = {
        "merged, attention x frequency, adaptive budget": MergeSettings(),
        "the same, equal numbers for all layers": MergeSettings(budget="uniform"),
        "the same, plain mean": MergeSettings(weighting="mean"),
        "dropped instead of merged": MergeSettings(is_dropping=True),
    }
    rows = []
    for name, settings in ways.items():
        plans = _plans(scene, profiles, tuned, settings)
        errors = [
            layer_error(layer, plan.slots, plan.weights, unseen.layer(layer.index))
            for layer, plan in zip(scene.layers, plans, strict=True)
        ]
        changed = model_error(scene.model, merged_layers(scene.layers, plans), scene.test[category])
        with merged_layers(scene.layers, plans):
            size = _expert_megabytes(scene)
        rows.append((name, f"{size:.2f}", f"{sum(errors) / len(errors):.3f}", *_losses(changed)))
    for bits in (8, 4, 2):
        form = LowBitForm(bits=bits, group_size=64)
        with quantized(scene.layers, form):
            size = quantization_report(scene.model).packed_bytes / 1e6
        changed = model_error(scene.model, quantized(scene.layers, form), scene.test[category])
        rows.append((f"all experts in {bits} bits", f"{size:.2f}", "", *_losses(changed)))
    full = ("full model, float32", f"{_expert_megabytes(scene):.2f}", "0", f"{changed.loss_before:.3f}", "0")
    columns = (
        "experts",
        "MB",
        "error of a layer's output",
        "loss on its test answers",
        "KL to the full model",
    )
    return Table(title="What is lost", columns=columns, rows=(full, *rows))


def _losses(changed: Any) -> tuple[str, str]:
    return f"{changed.loss_after:.3f}", f"{changed.kl:.3f}"


def _expert_megabytes(scene: Scene) -> float:
    return (
        sum(p.numel() * p.element_size() for layer in scene.layers for p in layer.experts.parameters()) / 1e6
    )


def _selection_table(scene: Scene, seen: Any) -> Table:
    rows = []
    for layer in scene.layers:
        activations = seen.layer(layer.index)
        norm = float(torch.linalg.vector_norm(activations.routed_TD.float()))
        cells = []
        for size in (1, 2, 3, 6):
            choice = choose_subset(layer, activations, size)
            chosen = " ".join(str(expert) for expert in choice.experts)
            cells.append(f"{chosen} ({choice.loss / norm:.2f})")
        rows.append((str(layer.index), *cells))
    columns = ("layer", "1 expert", "2", "3", "6, greedy")
    return Table(title="Experts that stand in for the whole layer", columns=columns, rows=tuple(rows))


if __name__ == "__main__":
    main()
