"""Group similar experts of a layer: Flux's fused K-means on weights, and clusters by mean output.

By weights, after Flux (arXiv 2508.19078): a principal component analysis of a layer's experts turns each into
a short vector, and one K-means with cosine distance runs over the experts of all layers at once. The paper
takes all distances as one matrix product and bars those between an expert and another layer's centroid, so
that no group crosses layers. Here the product is a batched one over layers, in which barred pairs do not
occur: the groups are the same, and work grows with the number of layers, not with its square.

By outputs, after HC-SMoE (arXiv 2410.08589): experts are similar if their mean outputs are, and average
linkage joins the nearest. It needs no seed and no repetition, and only distances, of which a layer has few.

Shape suffixes: ``N`` experts to be grouped (of one layer, or of all in a row), ``M`` groups, ``P``
components, ``T`` tokens, ``D`` hidden, ``L`` layers, ``E`` all experts of a layer, ``X`` weights of one.
"""

import math
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from fedexperts.errors import UserError
from fedexperts.moe.surgery import one_expert
from fedexperts.moe.surgery.seam import MoeLayer
from fedexperts.seeds import derive_seed

Groups = tuple[tuple[int, ...], ...]
"""A layer's experts in groups: ascending indices, groups ordered by their first index."""

NUM_COMPONENTS = 32
"""Maximum number of principal components kept."""

_CHUNK_BYTES = 2**25
_MAX_STEPS = 100


@torch.no_grad()
def weight_vectors(layer: MoeLayer, chosen: Sequence[int], num_components: int = NUM_COMPONENTS) -> Tensor:
    """Return the principal components of the chosen experts' weights, float32 (N, P) in main memory.

    The weights of an expert are one long vector (gate, up, down, biases, in whatever layout: the order of its
    entries does not matter), less the mean of the chosen ones. The components come from the N x N matrix of
    inner products, summed over pieces of the weights of at most 32 MB.

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
    """Yield the same part of each chosen expert's weights, float32 (N, at most some), part after part."""
    size = max(_CHUNK_BYTES // (4 * len(chosen)), 1)
    for name in layer.parameter_names():
        weights_EX = getattr(layer.experts, name).flatten(1)
        index_N = torch.tensor(chosen, device=weights_EX.device)
        for start in range(0, weights_EX.shape[1], size):
            yield weights_EX[:, start : start + size][index_N].float()


@torch.no_grad()
def output_vectors(layer: MoeLayer, chosen: Sequence[int], hidden_TD: Tensor) -> Tensor:
    """Return the mean output of each chosen expert over ``hidden_TD``, float32 (N, D) in main memory.

    Every expert runs on every token, wherever the router sent it, so that all have the same inputs.
    """
    _check_chosen(layer, chosen)
    inputs_TD = hidden_TD.to(next(layer.experts.parameters()).device)
    means = [
        one_expert.run_expert(layer.experts, inputs_TD, layer.expert(expert)).float().mean(dim=0).cpu()
        for expert in chosen
    ]
    return torch.stack(means)


def fused_kmeans(
    vectors: Sequence[Tensor], num_groups: Sequence[int], *, seed: int, num_starts: int = 4
) -> list[Tensor]:
    """Run K-means with cosine distance in all layers at once.

    Args:
        vectors: by layer a tensor (N, P); N and P may differ between layers.
        num_groups: by layer, from 1 to N (0 where there is no expert).
        seed: of the run; equal arguments give equal groups.
        num_starts: how many first centroids are tried, side by side; each layer keeps its best groups.

    Returns:
        By layer the group of each expert, int64 (N,); no group is empty.
    """
    assert all(min(len(v), 1) <= m <= len(v) for v, m in zip(vectors, num_groups, strict=True)), num_groups
    if sum(num_groups) == 0:
        return [torch.zeros(0, dtype=torch.int64) for _ in vectors]
    points = _Points(vectors, num_groups)
    generator = torch.Generator().manual_seed(derive_seed(seed, "kmeans"))
    group_LNZ, distance_LNZ = points.converge(points.first_centroids(generator, num_starts))
    best_L = distance_LNZ.sum(dim=1).argmin(dim=1)
    return [group_LNZ[at, : len(each), best_L[at]] for at, each in enumerate(vectors)]


class _Points:
    """Experts of all layers on the unit sphere, each layer's padded with zeros to the longest.

    Shapes: ``N`` and ``M`` are the most experts and groups of a layer here, ``Z`` is the number of starts.
    """

    def __init__(self, vectors: Sequence[Tensor], num_groups: Sequence[int]) -> None:
        length, width = (max(each.shape[axis] for each in vectors) for axis in (0, 1))
        padded = [functional.pad(v.float(), (0, width - v.shape[1], 0, length - len(v))) for v in vectors]
        self.unit_LNP = functional.normalize(torch.stack(padded), dim=-1)
        sizes_L, groups_L = torch.tensor([len(each) for each in vectors]), torch.tensor(num_groups)
        self.is_expert_LN = torch.arange(length) < sizes_L[:, None]
        self.is_group_LM = torch.arange(int(groups_L.max())) < groups_L[:, None]

    def first_centroids(self, generator: torch.Generator, num_starts: int = 1) -> Tensor:
        """Draw first centroids by k-means++ for every start in every layer at once, (L, Z, M, P).

        The next centroid is drawn with probability by distance to the existing ones; of a few draws, the one
        that leaves the smallest total distance is taken (the greedy form, which scikit-learn has too).

        Shapes: ``Y`` is the layers times the starts, ``C`` the draws.
        """
        num_groups = self.is_group_LM.shape[1]
        num_draws = min(2 + int(math.log(num_groups)), self.unit_LNP.shape[1])
        unit_YNP = self.unit_LNP.repeat_interleave(num_starts, dim=0)
        nearest_YN = self.is_expert_LN.float().repeat_interleave(num_starts, dim=0)
        each, picks = torch.arange(len(unit_YNP)), []
        for _ in range(num_groups):
            # The argmax of probability over exponential noise is a draw by these probabilities.
            noise_YN = torch.empty(nearest_YN.shape).exponential_(generator=generator)
            draws_YC = (nearest_YN / noise_YN.clamp(min=1e-30)).topk(num_draws, dim=1).indices
            drawn_YCP = unit_YNP[each[:, None], draws_YC]
            # A copy of a centroid is taken only if nothing else is left.
            distance_YCN = (1 - drawn_YCP @ unit_YNP.mT).clamp(min=1e-9)
            left_YCN = torch.minimum(nearest_YN[:, None], distance_YCN)
            best_Y = left_YCN.sum(dim=-1).argmin(dim=1)
            picks.append(drawn_YCP[each, best_Y])
            nearest_YN = left_YCN[each, best_Y]
            nearest_YN[each, draws_YC[each, best_Y]] = 0
        return torch.stack(picks, dim=1).reshape(len(self.unit_LNP), num_starts, num_groups, -1)

    def converge(self, centroid_LZMP: Tensor) -> tuple[Tensor, Tensor]:
        """Run Lloyd's steps until no expert moves; return each expert's group and distance to it, (L, N,
        Z)."""
        before_LNZ: Tensor | None = None
        for _ in range(_MAX_STEPS):
            group_LNZ, distance_LNZ, size_LZM = self._assign(centroid_LZMP)
            self._fill_empty(group_LNZ, distance_LNZ, size_LZM)
            if before_LNZ is not None and torch.equal(group_LNZ, before_LNZ):
                break
            before_LNZ = group_LNZ
            member_LNZM = torch.zeros(*group_LNZ.shape, size_LZM.shape[-1]).scatter_(
                -1, group_LNZ[..., None], 1
            )
            sums_LXP = member_LNZM.flatten(2).mT @ self.unit_LNP
            centroid_LZMP = functional.normalize(sums_LXP.reshape(centroid_LZMP.shape), dim=-1)
        return group_LNZ, distance_LNZ

    def _assign(self, centroid_LZMP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return group and distance (L, N, Z) of each expert, and the experts of each group (L, Z, M)."""
        num_starts, num_groups = centroid_LZMP.shape[1:3]
        cosine_LNX = self.unit_LNP @ centroid_LZMP.flatten(1, 2).mT
        distance_LNZM = (1 - cosine_LNX).reshape(*cosine_LNX.shape[:2], num_starts, num_groups)
        distance_LNZM.masked_fill_(~self.is_group_LM[:, None, None], torch.inf)
        distance_LNZ, group_LNZ = distance_LNZM.min(dim=-1)
        distance_LNZ = distance_LNZ * self.is_expert_LN[..., None]
        is_expert_LZN = self.is_expert_LN[:, None].expand(-1, num_starts, -1).long()
        size_LZM = torch.zeros(len(group_LNZ), num_starts, num_groups, dtype=torch.int64)
        return group_LNZ, distance_LNZ, size_LZM.scatter_add_(-1, group_LNZ.mT, is_expert_LZN)

    def _fill_empty(self, group_LNZ: Tensor, distance_LNZ: Tensor, size_LZM: Tensor) -> None:
        """Give an empty group the expert of its layer that is farthest from its own centroid, in place."""
        empty = torch.nonzero((size_LZM == 0) & self.is_group_LM[:, None])
        for layer, start, group in empty.tolist():
            group_N, distance_N = group_LNZ[layer, :, start], distance_LNZ[layer, :, start]
            size_M = size_LZM[layer, start]
            may_leave_N = self.is_expert_LN[layer] & (size_M[group_N] > 1)
            farthest = int(distance_N.masked_fill(~may_leave_N, -torch.inf).argmax())
            size_M[group_N[farthest]] -= 1
            group_N[farthest], distance_N[farthest], size_M[group] = group, 0.0, 1


def average_linkage(vectors_NP: Tensor, num_groups: int) -> Tensor:
    """Join the two groups of least mean Euclidean distance until ``num_groups`` are left.

    Returns the group of each expert, int64 (N,).
    """
    number = len(vectors_NP)
    assert min(number, 1) <= num_groups <= number, num_groups
    # Direct differences: distances by inner products would not be 0 for equal vectors.
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
    """Return the chosen experts by group, where ``group_N`` gives each one's group."""
    members: dict[int, list[int]] = {}
    for expert, group in zip(chosen, group_N.tolist(), strict=True):
        members.setdefault(group, []).append(expert)
    return tuple(sorted(tuple(sorted(each)) for each in members.values()))
