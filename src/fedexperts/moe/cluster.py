"""Which experts of a layer are alike: Flux's fused K-means on weights, and clusters by mean output.

By weights, after Flux (arXiv 2508.19078): every expert becomes a short vector by a principal component
analysis of its layer's experts, and one K-means with cosine distance runs over the experts of all layers at
once. All distances are one matrix product; those between an expert and another layer's centroid are infinite,
so that no group leaves its layer. (Notes on the paper set them to zero, which suits a similarity only.)

By outputs, after HC-SMoE (arXiv 2410.08589): experts are alike whose mean outputs are, and average linkage
joins the nearest. There is nothing to seed or repeat, and it needs distances only, of which a layer has few.

Shape suffixes: ``N`` experts to be grouped (of one layer, or of all in a row), ``M`` groups, ``P``
components, ``T`` tokens, ``D`` hidden, ``L`` layers, ``E`` all experts of a layer, ``X`` weights of one.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from fedexperts.errors import UserError
from fedexperts.moe import seam
from fedexperts.moe.seam import MoeLayer
from fedexperts.seeds import derive_seed

Groups = tuple[tuple[int, ...], ...]
"""A layer's experts in groups: indices in ascending order, groups in that of their first."""

NUM_COMPONENTS = 32
"""Principal components that are kept where a layer has as many."""

_CHUNK_BYTES = 2**25
_MAX_STEPS = 100


@torch.no_grad()
def weight_vectors(layer: MoeLayer, chosen: Sequence[int], num_components: int = NUM_COMPONENTS) -> Tensor:
    """Principal components of the chosen experts' weights, float32 (N, P) in main memory.

    The weights of an expert are taken as one long vector (gate, up, down, biases, in whatever layout: the
    order of its entries does not matter), less the mean of the chosen ones. The components come from the
    N x N matrix of inner products, which is summed up over pieces of the weights of at most 32 MB.

    Raises:
        UserError: an expert is not one of the layer's, or a weight is not finite.
    """
    _check_chosen(layer, chosen)
    gram_NN = torch.zeros(len(chosen), len(chosen), dtype=torch.float64)
    for piece_NX in _pieces(layer, chosen):
        centred_NX = piece_NX - piece_NX.mean(dim=0)
        gram_NN += (centred_NX @ centred_NX.T).double().cpu()
    if not torch.isfinite(gram_NN).all():
        raise UserError(f"the experts of layer {layer.name} have a weight that is not finite")
    value_N, vector_NN = torch.linalg.eigh(gram_NN)
    kept = min(num_components, max(len(chosen) - 1, 1))
    components_NP: Tensor = (vector_NN * value_N.clamp(min=0).sqrt()).flip(1)[:, :kept].float()
    return components_NP


def _check_chosen(layer: MoeLayer, chosen: Sequence[int]) -> None:
    assert chosen, "there must be an expert to look at"
    for expert in chosen:
        layer.expert(expert)
    if len(set(chosen)) != len(chosen):
        raise UserError(f"an expert of layer {layer.name} is given twice: {list(chosen)}")


def _pieces(layer: MoeLayer, chosen: Sequence[int]) -> Iterator[Tensor]:
    """The same part of each chosen expert's weights, float32 (N, at most some), one part after the other."""
    size = max(_CHUNK_BYTES // (4 * len(chosen)), 1)
    for name in layer.parameter_names():
        weights_EX = getattr(layer.experts, name).flatten(1)
        index_N = torch.tensor(chosen, device=weights_EX.device)
        for start in range(0, weights_EX.shape[1], size):
            yield weights_EX[:, start : start + size][index_N].float()


@torch.no_grad()
def output_vectors(layer: MoeLayer, chosen: Sequence[int], hidden_TD: Tensor) -> Tensor:
    """Mean output of each chosen expert over ``hidden_TD``, float32 (N, D) in main memory.

    Every expert sees every token, wherever the router sent it, so that all are asked the same.
    """
    _check_chosen(layer, chosen)
    inputs_TD = hidden_TD.to(next(layer.experts.parameters()).device)
    means = [
        seam.run_expert(layer.experts, inputs_TD, layer.expert(expert)).float().mean(dim=0).cpu()
        for expert in chosen
    ]
    return torch.stack(means)


def fused_kmeans(
    vectors: Sequence[Tensor], num_groups: Sequence[int], *, seed: int, num_starts: int = 4
) -> list[Tensor]:
    """K-means with cosine distance in all layers at once.

    Args:
        vectors: by layer a tensor (N, P); N and P may differ between layers.
        num_groups: by layer, from 1 to N (0 where there is no expert).
        seed: of the run; equal arguments give equal groups.
        num_starts: times that all is done, from other first centroids; each layer keeps its best.

    Returns:
        By layer the group of each expert, int64 (N,); no group is empty.
    """
    assert all(min(len(v), 1) <= m <= len(v) for v, m in zip(vectors, num_groups, strict=True)), num_groups
    if sum(num_groups) == 0:
        return [torch.zeros(0, dtype=torch.int64) for _ in vectors]
    points = _Points(vectors, num_groups)
    best_N = torch.zeros(len(points.unit_NP), dtype=torch.int64)
    least_L = torch.full((len(vectors),), torch.inf)
    for start in range(num_starts):
        generator = torch.Generator().manual_seed(derive_seed(seed, "kmeans", start))
        group_N, distance_N = points.converge(points.first_centroids(generator))
        inertia_L = torch.zeros(len(vectors)).index_add_(0, points.layer_N, distance_N)
        # Sums in another order must not pass for progress.
        is_better_L = inertia_L < least_L - 1e-6 * least_L.abs().nan_to_num(posinf=0)
        least_L = torch.where(is_better_L, inertia_L, least_L)
        best_N = torch.where(is_better_L[points.layer_N], group_N, best_N)
    best_N -= points.first_group_L[points.layer_N]
    return list(torch.split(best_N, points.sizes))


class _Points:
    """The experts of all layers in a row, on the unit sphere, and which centroids each may go to."""

    def __init__(self, vectors: Sequence[Tensor], num_groups: Sequence[int]) -> None:
        width = max(each.shape[1] for each in vectors)
        rows = [functional.pad(each.float(), (0, width - each.shape[1])) for each in vectors]
        self.unit_NP = functional.normalize(torch.cat(rows), dim=1)
        self.num_groups = list(num_groups)
        self.sizes = [len(each) for each in vectors]
        self.layer_N = torch.arange(len(vectors)).repeat_interleave(torch.tensor(self.sizes))
        layer_M = torch.arange(len(vectors)).repeat_interleave(torch.tensor(self.num_groups))
        self.is_apart_NM = self.layer_N[:, None] != layer_M
        self.first_group_L = torch.tensor([0, *accumulate(num_groups)])[:-1]

    def first_centroids(self, generator: torch.Generator) -> Tensor:
        """k-means++ in every layer side by side: the next is drawn by its distance to those there, (M, P)."""
        shape = (len(self.sizes), max(self.sizes))
        is_expert_LN = torch.arange(shape[1]) < torch.tensor(self.sizes)[:, None]
        unit_LNP = self.unit_NP.new_zeros(*shape, self.unit_NP.shape[1])
        unit_LNP[is_expert_LN] = self.unit_NP
        chance_LN, picks = is_expert_LN.float(), []
        rows = torch.arange(shape[0])
        for _ in range(max(self.num_groups)):
            # The largest of chance over exponential noise falls on each with its share of the chances.
            noise_LN = torch.empty(shape).exponential_(generator=generator)
            pick_L = (chance_LN / noise_LN.clamp(min=1e-30)).argmax(dim=1)
            picks.append(pick_L)
            distance_LN = 1 - torch.einsum("lnp,lp->ln", unit_LNP, unit_LNP[rows, pick_L])
            # One that is a copy of a centroid may still be taken, when there is nothing else.
            chance_LN = torch.minimum(chance_LN, distance_LN.clamp(min=1e-12)) * is_expert_LN
            chance_LN[rows, pick_L] = 0
        return torch.cat([unit_LNP[i, torch.stack(picks)[:m, i]] for i, m in enumerate(self.num_groups)])

    def converge(self, centroid_MP: Tensor) -> tuple[Tensor, Tensor]:
        """Lloyd's steps until no expert moves: each expert's group and its distance to the centroid."""
        before_N: Tensor | None = None
        for _ in range(_MAX_STEPS):
            distance_NM = (1 - self.unit_NP @ centroid_MP.T).masked_fill_(self.is_apart_NM, torch.inf)
            nearest_N, group_N = distance_NM.min(dim=1)
            self._fill_empty(group_N, nearest_N, len(centroid_MP))
            if before_N is not None and torch.equal(group_N, before_N):
                break
            before_N = group_N
            sums_MP = torch.zeros_like(centroid_MP).index_add_(0, group_N, self.unit_NP)
            centroid_MP = functional.normalize(sums_MP, dim=1)
        return group_N, nearest_N

    def _fill_empty(self, group_N: Tensor, distance_N: Tensor, num_groups: int) -> None:
        """Give an empty group the expert of its layer that is farthest from its own centroid, in place."""
        size_M = torch.bincount(group_N, minlength=num_groups)
        for empty in torch.nonzero(size_M == 0).flatten().tolist():
            may_leave_N = ~self.is_apart_NM[:, empty] & (size_M[group_N] > 1)
            farthest = int(distance_N.masked_fill(~may_leave_N, -torch.inf).argmax())
            size_M[group_N[farthest]] -= 1
            group_N[farthest], distance_N[farthest], size_M[empty] = empty, 0.0, 1


def average_linkage(vectors_NP: Tensor, num_groups: int) -> Tensor:
    """Join the two groups of least mean Euclidean distance until ``num_groups`` are left.

    Returns the group of each expert, int64 (N,).
    """
    number = len(vectors_NP)
    assert min(number, 1) <= num_groups <= number, num_groups
    # The direct differences: distances by inner products would tell equal vectors apart.
    distance_NN = torch.cdist(
        vectors_NP.double(), vectors_NP.double(), compute_mode="donot_use_mm_for_euclid_dist"
    ).fill_diagonal_(torch.inf)
    size_N, group_N = torch.ones(number, dtype=torch.float64), torch.arange(number)
    for _ in range(number - num_groups):
        kept, joined = divmod(int(distance_NN.argmin()), number)
        share = size_N[kept] / (size_N[kept] + size_N[joined])
        mean_N = share * distance_NN[kept] + (1 - share) * distance_NN[joined]
        distance_NN[kept], distance_NN[:, kept] = mean_N, mean_N
        distance_NN[joined], distance_NN[:, joined] = torch.inf, torch.inf
        distance_NN[kept, kept] = torch.inf
        size_N[kept] += size_N[joined]
        group_N[group_N == joined] = kept
    _, numbered_N = torch.unique(group_N, return_inverse=True)
    return cast(Tensor, numbered_N)


def groups_of(chosen: Sequence[int], group_N: Tensor) -> Groups:
    """The chosen experts by group, where ``group_N`` gives each one's."""
    members: dict[int, list[int]] = {}
    for expert, group in zip(chosen, group_N.tolist(), strict=True):
        members.setdefault(group, []).append(expert)
    return tuple(sorted(tuple(sorted(each)) for each in members.values()))
