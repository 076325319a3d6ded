"""Fused K-means over all layers against scikit-learn's KMeans layer by layer, on the same unit vectors.

The vectors are random, as many for each layer as the model has experts: ``planted`` ones lie around as many
directions as there are groups, ``even`` ones anywhere. Groups are judged by scikit-learn's own measure, the
sum of squared distances to the groups' means.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.tables import Figures, Table, milliseconds
from benchmarks.timing import in_turns, paired_ratio, spread
from fedexperts.moe.compressing.cluster import fused_kmeans

COMPONENTS = 32
STARTS = (1, 4)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Layers, experts of each, and groups of each."""

    title: str
    layers: int
    experts: int
    groups: int


SHAPES = (
    Shape(title="LLaMA-MoE-3.5B", layers=32, experts=16, groups=4),
    Shape(title="Qwen1.5-MoE-A2.7B", layers=24, experts=60, groups=8),
    Shape(title="DeepSeek-MoE-16B", layers=28, experts=64, groups=8),
    Shape(title="Qwen3-30B-A3B", layers=48, experts=128, groups=16),
)


def measure(_: str, *, repeats: int = 5, shapes: Sequence[Shape] = SHAPES) -> dict[str, Any]:
    """Seconds and inertia for each shape and kind of vectors; the model plays no part."""
    torch.set_num_threads(1)
    return {
        "components": COMPONENTS,
        "repeats": repeats,
        "settings": [_compare(shape, kind, repeats) for shape in shapes for kind in ("planted", "even")],
    }


def _compare(shape: Shape, kind: str, repeats: int) -> dict[str, Any]:
    vectors = _vectors(shape, kind)
    groups = [shape.groups] * shape.layers
    found: dict[str, list[Tensor]] = {}

    def rival(name: str, run: Callable[[], list[Tensor]]) -> Callable[[], float]:
        def timed() -> float:
            started = time.perf_counter()
            found[name] = run()
            return time.perf_counter() - started

        return timed

    rivals: dict[str, Callable[[], float]] = {}
    for starts in STARTS:
        rivals[f"fused_{starts}"] = rival(
            f"fused_{starts}", lambda n=starts: fused_kmeans(vectors, groups, seed=0, num_starts=n)
        )
        rivals[f"by_layer_{starts}"] = rival(
            f"by_layer_{starts}",
            lambda n=starts: [
                fused_kmeans([each], [shape.groups], seed=0, num_starts=n)[0] for each in vectors
            ],
        )
        rivals[f"sklearn_{starts}"] = rival(
            f"sklearn_{starts}", lambda n=starts: _scikit_learn(vectors, shape.groups, n)
        )
    seconds = in_turns(rivals, repeats)
    inertia = {name: _inertia(vectors, group, shape.groups) for name, group in found.items()}
    return {
        "title": shape.title,
        "layers": shape.layers,
        "experts": shape.experts,
        "groups": shape.groups,
        "kind": kind,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "inertia": inertia,
        "sklearn_over_fused": {
            str(starts): paired_ratio(seconds[f"sklearn_{starts}"], seconds[f"fused_{starts}"])
            for starts in STARTS
        },
        "by_layer_over_fused": {
            str(starts): paired_ratio(seconds[f"by_layer_{starts}"], seconds[f"fused_{starts}"])
            for starts in STARTS
        },
    }


def _vectors(shape: Shape, kind: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    def layer() -> Tensor:
        if kind == "even":
            return normal(shape.experts, COMPONENTS)
        centres = normal(shape.groups, COMPONENTS)
        own = torch.randint(shape.groups, (shape.experts,), generator=generator)
        return centres[own] + 0.7 * normal(shape.experts, COMPONENTS)

    return [functional.normalize(layer(), dim=1) for _ in range(shape.layers)]


def _scikit_learn(vectors: Sequence[Tensor], num_groups: int, num_starts: int) -> list[Tensor]:
    # Here, because the other benchmarks and the tests run without it.
    from sklearn.cluster import KMeans

    return [
        torch.from_numpy(
            KMeans(num_groups, n_init=num_starts, random_state=0).fit_predict(each.numpy())
        ).long()
        for each in vectors
    ]


def _inertia(vectors: Sequence[Tensor], groups: Sequence[Tensor], num_groups: int) -> float:
    total = 0.0
    for each, group in zip(vectors, groups, strict=True):
        sums = torch.zeros(num_groups, each.shape[1]).index_add_(0, group, each)
        sizes = torch.bincount(group, minlength=num_groups).clamp(min=1)
        total += float((each - (sums / sizes[:, None])[group]).square().sum())
    return total


def tables(figures: Figures) -> list[Table]:
    """Speed and inertia of each shape, for one start and for four."""
    return [_table(figures, str(starts)) for starts in STARTS]


def _table(figures: Figures, starts: str) -> Table:
    rows = []
    for one in figures["settings"]:
        medians = {name: values["median"] for name, values in one["seconds"].items()}
        ours, theirs = (one["inertia"][f"{name}_{starts}"] for name in ("fused", "sklearn"))
        rows.append(
            (
                f"{one['title']}, {one['layers']} x {one['experts']} to {one['groups']}, {one['kind']}",
                *(milliseconds(medians[f"{name}_{starts}"]) for name in ("fused", "by_layer", "sklearn")),
                f"{one['sklearn_over_fused'][starts]['median']:.1f}",
                f"{one['by_layer_over_fused'][starts]['median']:.1f}",
                f"{ours / theirs - 1:+.2%}",
            )
        )
    return Table(
        title=f"Milliseconds for all layers, first centroids tried: {starts}",
        columns=(
            "vectors",
            "fused",
            "the same, layer by layer",
            "scikit-learn",
            "scikit-learn over fused",
            "layer by layer over fused",
            "inertia over scikit-learn's",
        ),
        rows=tuple(rows),
    )
