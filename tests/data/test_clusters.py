"""Partitions as FedNLP has them: shares of all examples, and shares of clusters of inputs."""

import itertools
import random
import sys

import numpy as np
import pytest

from fedexperts.data.clusters import cluster_inputs
from fedexperts.data.examples import Example
from fedexperts.data.federated import load_federated_data
from fedexperts.data.partition import dirichlet_shares, partition_examples
from fedexperts.data.settings import DataSettings, PartitionSettings, TinyworldSettings
from fedexperts.data.table import label_table
from fedexperts.errors import UserError

TOPICS = (
    ("river", "mountain", "forest", "valley", "lake"),
    ("bread", "cheese", "butter", "honey", "soup"),
    ("engine", "wheel", "brake", "gear", "clutch"),
)


def inputs(num_each):
    """Examples of each topic in turn: sentences of three of its words, all different by their number."""
    rng = random.Random(0)
    return [
        Example(instruction=f"{' '.join(rng.sample(words, 3))} {'x' * (2 + number)}", response="yes")
        for number in range(num_each)
        for words in TOPICS
    ]


def partition_by(labels, *, clusters=None, seed=0, min_examples=2, **options):
    return partition_examples(
        np.array(labels),
        np.zeros(len(labels), dtype=np.int64),
        PartitionSettings(min_examples=min_examples, **options),
        label_names=["a", "b"],
        rng=random.Random(seed),
        clusters_N=None if clusters is None else np.array(clusters),
    )


def test_quantity_cuts_one_shuffled_row_at_the_drawn_shares_whatever_the_labels():
    rng = random.Random(5)
    order = list(range(100))
    rng.shuffle(order)
    cuts = [0, *np.rint(np.cumsum(dirichlet_shares(1.0, 4, rng)) * 100).astype(int)]
    by_hand = tuple(tuple(sorted(order[a:b])) for a, b in itertools.pairwise(cuts))
    assert min(map(len, by_hand)) >= 2, "a seed at which nothing is moved"
    for labels in ([0] * 100, [0, 1] * 50):
        options = {"kind": "quantity", "num_clients": 4, "alpha": 1.0}
        assert partition_by(labels, seed=5, **options).indices == by_hand


def test_quantity_differs_in_size_and_mixes_labels():
    partition = partition_by([0, 1] * 500, kind="quantity", num_clients=5, alpha=1.0)
    sizes = [len(own) for own in partition.indices]
    assert sum(sizes) == 1000
    assert max(sizes) > 3 * min(sizes)
    largest = max(partition.indices, key=len)
    # A sample of n from halves has its share within four standard deviations of a half.
    assert abs(np.mean([index % 2 for index in largest]) - 0.5) < 4 * 0.5 / len(largest) ** 0.5


def test_the_largest_client_gives_to_those_that_a_draw_of_sizes_left_with_too_few():
    partition = partition_by([0] * 40, kind="quantity", num_clients=8, alpha=0.01, min_examples=4)
    assert sorted(map(len, partition.indices)) == [4, 4, 4, 4, 4, 4, 8, 8]
    assert 16 < partition.num_moved <= 28


def test_clusters_are_divided_as_labels_are_and_labels_play_no_part():
    clusters = [0, 1, 2, 1] * 10
    options = {"num_clients": 4, "alpha": 0.3, "seed": 3}
    drawn = partition_by([0, 1] * 20, clusters=clusters, kind="clusters", **options)
    assert drawn == partition_by(clusters, kind="dirichlet", **options)


def test_inputs_on_a_topic_are_one_cluster():
    found = cluster_inputs(inputs(8), 3, seed=0)
    assert [len(set(found[topic::3].tolist())) for topic in range(3)] == [1, 1, 1]
    assert set(found.tolist()) == {0, 1, 2}


def test_the_response_plays_no_part_and_the_context_does():
    examples = inputs(8)
    answered = [Example(instruction=e.instruction, response=f"no {i}") for i, e in enumerate(examples)]
    moved = [Example(instruction="", context=e.instruction, response="yes") for e in examples]
    found = cluster_inputs(examples, 3, seed=0).tolist()
    assert found == cluster_inputs(answered, 3, seed=0).tolist() == cluster_inputs(moved, 3, seed=0).tolist()


@pytest.mark.parametrize(
    ("examples", "sentence"),
    [
        (inputs(1), r"num_clusters is 4, but there are fewer different inputs among 3 examples"),
        (inputs(1) * 4, r"num_clusters is 4, but there are fewer different inputs among 12 examples"),
        ([Example(instruction="?", response="a")] * 9, r"no input has a word of two letters"),
    ],
)
def test_inputs_that_give_no_such_clusters_are_refused(examples, sentence):
    with pytest.raises(UserError, match=sentence):
        cluster_inputs(examples, 4, seed=0)


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(UserError, match=r"scikit-learn: run pip install -e '\.\[clusters\]'"):
        cluster_inputs(inputs(2), 2, seed=0)


def world(**options):
    partition = PartitionSettings(kind="clusters", num_clients=4, min_examples=6, **options)
    return DataSettings(partition=partition, tinyworld=TinyworldSettings(examples_per_client=40))


def rows_of(settings, seed):
    with load_federated_data(settings, seed) as data:
        return label_table(data)


def test_tinyworld_is_divided_by_clusters_that_the_table_counts():
    settings = world(num_clusters=6, alpha=0.3)
    rows = rows_of(settings, 0)
    totals = [row.num_train + row.num_validation + row.num_test for row in rows]
    assert (
        totals == [sum(row.clusters.values()) for row in rows] == [sum(row.labels.values()) for row in rows]
    )
    assert sum(totals) == 160
    assert min(totals) >= 6
    assert {number for row in rows for number in row.clusters} == set(range(6))
    assert rows == rows_of(settings, 0) != rows_of(settings, 1)


def test_own_files_are_divided_by_clusters(write_lines):
    records = [{"instruction": e.instruction, "response": str(i)} for i, e in enumerate(inputs(12))]
    settings = DataSettings(
        source=str(write_lines(records)),
        partition=PartitionSettings(kind="clusters", num_clients=3, num_clusters=3, alpha=1e-3),
    )
    assert all(len(row.clusters) >= 1 for row in rows_of(settings, 0))


def test_a_partition_that_is_none_by_clusters_counts_none():
    settings = DataSettings(tinyworld=TinyworldSettings(examples_per_client=16))
    assert [row.clusters for row in rows_of(settings, 0)] == [{}] * 8
