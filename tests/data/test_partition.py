import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedexperts.data.partition import (
    deal_labels,
    dirichlet_shares,
    partition_dirichlet,
    partition_examples,
    partition_iid,
    partition_natural,
    partition_pathological,
)
from fedexperts.data.settings import PartitionSettings
from fedexperts.errors import UserError

seeds = st.integers(0, 2**32)


def codes(values):
    return np.array(values, dtype=np.int64)


def names(num_labels):
    return [f"label {label}" for label in range(num_labels)]


def flat(partition):
    return [index for own in partition.indices for index in own]


@given(seeds, st.integers(1, 200), st.integers(1, 20))
def test_iid_gives_every_example_once_in_equal_parts(seed, num_examples, num_clients):
    partition = partition_iid(num_examples, num_clients=num_clients, rng=random.Random(seed))
    assert sorted(flat(partition)) == list(range(num_examples))
    sizes = [len(own) for own in partition.indices]
    assert len(sizes) == num_clients
    assert max(sizes) - min(sizes) <= 1


@given(
    seeds, st.lists(st.integers(0, 5), min_size=40, max_size=200), st.floats(1e-3, 1e3), st.integers(1, 10)
)
def test_dirichlet_gives_every_example_once_and_enough_to_each(seed, labels, alpha, num_clients):
    partition = partition_dirichlet(
        codes(labels), num_clients=num_clients, alpha=alpha, min_examples=4, rng=random.Random(seed)
    )
    assert sorted(flat(partition)) == list(range(len(labels)))
    assert len(partition.indices) == num_clients
    assert min(len(own) for own in partition.indices) >= 4


@given(seeds, st.integers(1, 12), st.data())
def test_pathological_gives_each_client_its_labels_and_divides_each_label(seed, num_clients, data):
    num_labels = data.draw(st.integers(1, 8))
    labels_per_client = data.draw(st.integers(1, num_labels))
    labels = codes(list(range(num_labels)) * 24)
    partition = partition_pathological(
        labels,
        num_clients=num_clients,
        labels_per_client=labels_per_client,
        label_names=names(num_labels),
        rng=random.Random(seed),
    )
    assert len(flat(partition)) == len(set(flat(partition)))
    held = [Counter(labels[list(own)].tolist()) for own in partition.indices]
    assert [len(own) for own in held] == [labels_per_client] * num_clients
    for label in range(num_labels):
        parts = [own[label] for own in held if label in own]
        assert sum(parts) in (0, 24)
        assert not parts or max(parts) - min(parts) <= 1


@given(seeds, st.integers(1, 8), st.integers(1, 30), st.data())
def test_labels_are_dealt_evenly(seed, num_labels, num_clients, data):
    each = data.draw(st.integers(1, num_labels))
    hands = deal_labels(num_labels, num_clients, each, random.Random(seed))
    assert all(len(set(hand)) == each for hand in hands)
    times = Counter(label for hand in hands for label in hand)
    assert max(times.values()) - min(times[label] for label in range(num_labels)) <= 2


def test_one_label_each_goes_in_order():
    assert deal_labels(4, 4, 1, random.Random(7)) == [[0], [1], [2], [3]]


@given(seeds, st.floats(1e-3, 1e4), st.integers(1, 50))
def test_dirichlet_shares_sum_to_one(seed, alpha, size):
    shares = dirichlet_shares(alpha, size, random.Random(seed))
    assert len(shares) == size
    assert min(shares) >= 0
    assert sum(shares) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_dirichlet_shares_have_the_variance_of_the_distribution(alpha):
    """Var = (k - 1) / (k² (kα + 1)); 4,000 draws with a fixed seed agree to a tenth."""
    rng, size = random.Random(0), 5
    first = [dirichlet_shares(alpha, size, rng)[0] for _ in range(4000)]
    assert np.mean(first) == pytest.approx(1 / size, rel=0.1)
    assert np.var(first) == pytest.approx((size - 1) / (size**2 * (size * alpha + 1)), rel=0.1)


def test_small_alpha_gives_each_label_to_one_client():
    labels = codes([0] * 50 + [1] * 50)
    partition = partition_dirichlet(labels, num_clients=2, alpha=1e-3, min_examples=0, rng=random.Random(0))
    held = [Counter(labels[list(own)].tolist()) for own in partition.indices]
    assert all(count == 50 for own in held for count in own.values())


def test_large_alpha_gives_each_client_an_equal_share_of_each_label():
    """The standard deviation of a share is 1/4 · sqrt(3 / 40,001): below 3 of 1,000 examples."""
    labels = codes([0, 1] * 1000)
    partition = partition_dirichlet(labels, num_clients=4, alpha=1e4, min_examples=0, rng=random.Random(0))
    held = [np.bincount(labels[list(own)]) for own in partition.indices]
    assert np.abs(np.array(held) - 250).max() <= 12


@given(seeds, st.lists(st.integers(0, 5), min_size=40, max_size=200), st.integers(2, 10))
def test_the_largest_clients_give_to_those_that_have_too_few(seed, labels, num_clients):
    partitions = [
        partition_dirichlet(
            codes(labels), num_clients=num_clients, alpha=0.3, min_examples=least, rng=random.Random(seed)
        )
        for least in (0, 4)
    ]
    before, after = ([len(own) for own in partition.indices] for partition in partitions)
    assert [now for was, now in zip(before, after, strict=True) if was < 4] == [4] * sum(
        was < 4 for was in before
    )
    givers = [now for was, now in zip(before, after, strict=True) if now < was]
    assert all(now >= max(after) - 1 for now in givers)
    assert partitions[1].num_moved == sum(max(4 - was, 0) for was in before)


def test_moves_to_small_clients_are_counted():
    partition = partition_dirichlet(
        codes([0] * 40), num_clients=4, alpha=1e-3, min_examples=5, rng=random.Random(1)
    )
    assert partition.num_moved == 15
    assert sorted(len(own) for own in partition.indices) == [5, 5, 5, 25]


def test_natural_keeps_the_examples_of_each_client():
    partition = partition_natural(codes([0, 1, 0, 2, 1, 0]), num_clients=0, min_examples=1)
    assert partition.indices == ((0, 2, 5), (1, 4), (3,))
    assert partition.clients == (0, 1, 2)


def test_natural_takes_the_largest_in_the_order_of_the_source():
    partition = partition_natural(codes([0, 1, 1, 2, 2, 3, 3, 3]), num_clients=2, min_examples=1)
    assert partition.clients == (1, 3)


def test_natural_leaves_small_clients_out_and_says_how_many(caplog):
    partition = partition_natural(codes([0, 1, 1, 2, 2, 2]), num_clients=2, min_examples=2)
    assert partition.clients == (1, 2)
    assert [record.getMessage() for record in caplog.records] == [
        "1 clients have fewer than 2 examples and are left out."
    ]


def test_natural_with_one_client_says_nothing(caplog):
    assert partition_natural(codes([7, 7]), num_clients=0, min_examples=2).clients == (7,)
    assert caplog.records == []


def test_natural_keeps_the_order_of_many_examples():
    clients = codes([random.Random(index).randrange(3) for index in range(1000)])
    partition = partition_natural(clients, num_clients=0, min_examples=1)
    assert [list(own) for own in partition.indices] == [
        np.flatnonzero(clients == client).tolist() for client in range(3)
    ]


def test_natural_with_more_clients_than_there_are_is_refused():
    with pytest.raises(UserError, match=r"2 clients have 2 examples or more .*num_clients is 3"):
        partition_natural(codes([0, 1, 1, 2, 2, 2]), num_clients=3, min_examples=2)


def partition_by(labels, clients=None, **options):
    settings = PartitionSettings(min_examples=2, **options)
    return partition_examples(
        codes(labels),
        codes(clients or [0] * len(labels)),
        settings,
        label_names=names(max(labels) + 1),
        rng=random.Random(0),
    )


def test_each_kind_is_the_partition_of_its_name():
    labels, rng = [0, 0, 1, 1], random.Random
    equal = partition_by(labels, kind="iid", num_clients=2)
    assert equal == partition_iid(4, num_clients=2, rng=rng(0))
    owned = partition_by(labels, [3, 5, 5, 3], kind="natural", num_clients=2)
    assert owned.indices == ((0, 3), (1, 2))
    largest = partition_by(labels * 2, [3, 5, 5, 3, 4, 4, 4, 6], kind="natural", num_clients=1)
    assert largest.clients == (4,)
    drawn = partition_by(labels, kind="dirichlet", num_clients=2, alpha=0.5)
    assert drawn == partition_dirichlet(codes(labels), num_clients=2, alpha=0.5, min_examples=2, rng=rng(0))
    assert partition_by(labels, kind="pathological", num_clients=2).indices == ((0, 1), (2, 3))


def test_a_label_that_no_client_holds_is_told(caplog):
    partition_by([0, 0, 1, 1, 1], kind="pathological", num_clients=1)
    assert [record.getMessage() for record in caplog.records] == [
        "No client holds the label 'label 1'; its 3 examples are not used."
    ]


def test_more_clients_than_examples_is_refused():
    with pytest.raises(UserError, match=r"num_clients is 8 .* needs 16; there are 10"):
        partition_by([0] * 10, kind="iid", num_clients=8)


def test_more_labels_for_each_client_than_there_are_is_refused():
    with pytest.raises(UserError, match=r"labels_per_client is 3 .* 2 labels: label 0, label 1"):
        partition_by([0, 1] * 10, kind="pathological", num_clients=2, labels_per_client=3)


def test_a_label_with_fewer_examples_than_holders_is_refused():
    with pytest.raises(UserError, match='Label "label 1" has 1 examples for 2 clients'):
        partition_by([0] * 10 + [1], kind="pathological", num_clients=2, labels_per_client=2)


def test_a_client_below_the_least_size_is_refused():
    with pytest.raises(UserError, match=r"Client 1 would have 1 examples"):
        partition_by([0] * 10 + [1], kind="pathological", num_clients=2)


@pytest.mark.parametrize("kind", ["iid", "pathological", "dirichlet"])
def test_equal_seeds_give_equal_partitions(kind):
    labels = [0, 1, 2, 3] * 10
    assert partition_by(labels, kind=kind, num_clients=4) == partition_by(labels, kind=kind, num_clients=4)
