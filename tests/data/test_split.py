import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedexperts.data.settings import SplitSettings
from fedexperts.data.split import SPLITS, split_examples
from fedexperts.errors import UserError


def split(prompts, seed=0, **shares):
    return split_examples(prompts, SplitSettings(**shares), client="client-003", rng=random.Random(seed))


def test_different_prompts_are_split_by_the_exact_shares():
    sizes = {name: len(own) for name, own in split(range(160)).items()}
    assert sizes == {"train": 100, "validation": 20, "test": 40}


@given(st.lists(st.integers(0, 9), min_size=2, max_size=80), st.integers(0, 99))
def test_no_prompt_is_in_two_splits_and_no_example_is_lost(prompts, seed):
    try:
        splits = split(prompts, seed)
    except UserError:  # too few different prompts
        assert len(set(prompts)) < len(prompts)
        return
    assert sorted(position for own in splits.values() for position in own) == list(range(len(prompts)))
    held = [{prompts[position] for position in splits[name]} for name in SPLITS]
    assert sum(map(len, held)) == len(set().union(*held))
    assert splits["train"]
    assert splits["test"]


def test_two_examples_are_one_to_train_and_one_to_test():
    splits = split(["a", "b"])
    assert [len(splits[name]) for name in SPLITS] == [1, 0, 1]


@pytest.mark.parametrize("prompts", [["a"], ["a"] * 20])
def test_a_client_with_one_prompt_is_refused_by_name(prompts):
    with pytest.raises(UserError, match=r"client-003 has .* 1 different prompts"):
        split(prompts)


def test_a_validation_share_of_zero_keeps_none():
    assert split(range(10), validation=0.0)["validation"] == []


def test_the_order_depends_on_the_generator_alone():
    assert split(range(20), seed=1) == split(range(20), seed=1)
    assert split(range(20), seed=1) != split(range(20), seed=2)
