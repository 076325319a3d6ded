"""Neurons may change places, and the places that fit best are found."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from seated import Seated

from fedexperts.moe import seam
from fedexperts.moe.align import align_neurons, best_assignment, neurons, permute_neurons


def shuffled(number, seed=0):
    return torch.randperm(number, generator=torch.Generator().manual_seed(seed))


def test_permuted_expert_gives_the_same_output(seated: Seated):
    layer = seated.layers[0]
    hidden = torch.randn(9, 32, generator=torch.Generator().manual_seed(3))
    weights = layer.expert(2)
    permuted = permute_neurons(layer.experts, weights, shuffled(layer.expert_size))
    assert {name: w.shape for name, w in permuted.items()} == {name: w.shape for name, w in weights.items()}
    assert any(not torch.equal(permuted[name], weight) for name, weight in weights.items())
    # the same sums over neurons in another order
    torch.testing.assert_close(
        seam.run_expert(layer.experts, hidden, permuted), seam.run_expert(layer.experts, hidden, weights)
    )


def test_neurons_cover_all_weights_but_the_output_bias(seated: Seated):
    layer = seated.layers[0]
    weights = layer.expert(1)
    found = neurons(layer.experts, weights)
    assert len(found) == layer.expert_size
    assert found.numel() == sum(w.numel() for name, w in weights.items() if name != "down_proj_bias")


def test_alignment_undoes_a_permutation(seated: Seated):
    layer = seated.layers[0]
    weights = layer.expert(4)
    permuted = permute_neurons(layer.experts, weights, shuffled(layer.expert_size, seed=1))
    aligned = align_neurons(layer, permuted, weights)
    for name, weight in weights.items():
        assert torch.equal(aligned[name], weight), name


square = st.integers(1, 6).flatmap(
    lambda size: st.lists(
        st.lists(st.integers(-4, 4), min_size=size, max_size=size), min_size=size, max_size=size
    )
)


@given(square)
def test_assignment_is_the_best_of_all_permutations(gain):
    gain = np.array(gain, dtype=float)
    rows = np.arange(len(gain))
    found = best_assignment(gain)
    assert sorted(found) == rows.tolist()
    best = max(gain[rows, list(order)].sum() for order in permutations(rows.tolist()))
    assert gain[rows, found].sum() == best


@pytest.mark.parametrize("size", [1, 30, 120])
def test_assignment_of_a_planted_permutation(size):
    rng = np.random.default_rng(0)
    order = rng.permutation(size)
    gain = rng.normal(size=(size, size))
    gain[np.arange(size), order] += 20
    assert best_assignment(gain).tolist() == order.tolist()
