import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedexperts.data.batches import BatchCounts, draw_batches, encode_all, make_batch, sequential_batches
from fedexperts.data.examples import Example
from fedexperts.data.prompts import Encoded, PromptFormat
from fedexperts.errors import UserError


def encoded(*ids: int, prompt_length: int = 1) -> Encoded:
    return Encoded(input_ids=ids, prompt_length=prompt_length, is_truncated=False)


def of_length(length: int) -> Encoded:
    return encoded(*range(10, 10 + length))


def test_a_batch_is_padded_on_the_right_and_masked_by_length():
    batch = make_batch([encoded(5, 6, 7, 2, prompt_length=2), encoded(8, 2)], pad_token_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 2], [8, 2, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.labels.tolist() == [[-100, -100, 7, 2], [-100, 2, -100, -100]]
    assert (batch.num_examples, batch.num_labels) == (2, 3)
    assert {t.dtype for t in (batch.input_ids, batch.attention_mask, batch.labels)} == {torch.int64}


def test_a_prompt_is_what_precedes_the_first_label_and_all_tokens_where_nothing_is_learnt():
    batch = make_batch(
        [encoded(5, 6, 7, 2, prompt_length=2), encoded(8, 2), encoded(4, 3, prompt_length=2)], 0
    )
    assert batch.prompts() == [(5, 6), (8,), (4, 3)]


def test_eos_is_learnt_where_padding_is_eos_too():
    batch = make_batch([encoded(5, 6, 7, 2), encoded(8, 2)], pad_token_id=2)
    assert batch.labels[1].tolist() == [-100, 2, -100, -100]
    assert batch.attention_mask[1].tolist() == [1, 1, 0, 0]


def test_a_batch_with_no_label_is_refused():
    with pytest.raises(UserError, match="A batch with no label"):
        make_batch([encoded(5, 6, prompt_length=2)], pad_token_id=0)


def test_length_is_rounded_up_to_a_multiple():
    assert make_batch([of_length(9)], 0, multiple_of=8).input_ids.shape == (1, 16)
    assert make_batch([of_length(8)], 0, multiple_of=8).input_ids.shape == (1, 8)
    for multiple, length in ((1, 9), (8, 16)):
        several = {"batch_size": 1, "pad_token_id": 0, "multiple_of": multiple}
        (drawn,) = draw_batches([of_length(9)], num_batches=1, rng=random.Random(0), **several)
        (read,) = sequential_batches([of_length(9)], **several)
        assert drawn.input_ids.shape == read.input_ids.shape == (1, length)


def test_length_is_not_rounded_unless_asked_for():
    nine = {"batch_size": 1, "pad_token_id": 0}
    (drawn,) = draw_batches([of_length(9)], num_batches=1, rng=random.Random(0), **nine)
    (read,) = sequential_batches([of_length(9)], **nine)
    assert {batch.input_ids.shape for batch in (drawn, read, make_batch([of_length(9)], 0))} == {(1, 9)}


def test_examples_without_label_are_left_out_and_counted(chat_tokenizer):
    format = PromptFormat(chat_tokenizer, "auto", 10)
    examples = [
        Example(instruction="a", response="bc"),  # 4 of the prompt with <s><user><bot>, 3 labels
        Example(instruction="a", response="0123456789"),  # cut
        Example(instruction="0123456789", response="b"),  # nothing left but prompt
        Example(instruction="a", response=""),  # EOS is a label
    ]
    kept, counts = encode_all(format, examples)
    assert [each.num_labels for each in kept] == [3, 6, 1]
    assert counts == BatchCounts(
        num_examples=4, num_truncated=2, num_without_label=1, num_tokens=22, num_labels=10
    )


def test_counts_add_up():
    one = BatchCounts(num_examples=1, num_truncated=2, num_without_label=3, num_tokens=4, num_labels=5)
    assert sum([one, one], BatchCounts()) == BatchCounts(
        num_examples=2, num_truncated=4, num_without_label=6, num_tokens=8, num_labels=10
    )


def test_sequential_batches_hold_every_example_once_by_length():
    batches = list(sequential_batches([of_length(n) for n in (5, 2, 9, 3, 7)], batch_size=2, pad_token_id=0))
    assert [batch.attention_mask.sum(dim=1).tolist() for batch in batches] == [[2, 3], [5, 7], [9]]


def drawn_lengths(seed: int, num_examples: int, num_batches: int, batch_size: int) -> list[list[int]]:
    batches = draw_batches(
        [of_length(2 + position) for position in range(num_examples)],
        num_batches=num_batches,
        batch_size=batch_size,
        rng=random.Random(seed),
        pad_token_id=0,
    )
    return [batch.attention_mask.sum(dim=1).tolist() for batch in batches]


@given(st.integers(0, 99), st.integers(1, 30), st.integers(1, 6), st.integers(1, 6))
def test_no_example_is_drawn_again_before_all_were(seed, num_examples, num_batches, batch_size):
    batches = drawn_lengths(seed, num_examples, num_batches, batch_size)
    assert [len(batch) for batch in batches] == [batch_size] * num_batches
    times = Counter(length for batch in batches for length in batch)
    laps = num_batches * batch_size // num_examples
    assert set(times.values()) <= {laps, laps + 1}
    assert len(times) == min(num_examples, num_batches * batch_size)


def test_drawn_batches_hold_examples_of_like_length_in_random_order():
    batches = drawn_lengths(seed=1, num_examples=40, num_batches=5, batch_size=8)
    spans = [(min(batch), max(batch)) for batch in batches]
    assert spans != sorted(spans)
    assert all(one[1] < other[0] for one, other in zip(sorted(spans), sorted(spans)[1:], strict=False))


def test_equal_generators_draw_equal_batches_and_others_do_not():
    assert drawn_lengths(3, 40, 5, 4) == drawn_lengths(3, 40, 5, 4)
    assert drawn_lengths(3, 40, 5, 4) != drawn_lengths(4, 40, 5, 4)


def test_further_examples_come_on_top_as_they_come():
    own, public = [of_length(n) for n in (5, 3, 4, 6)], [encoded(*range(50, 50 + n)) for n in (9, 2)]
    plain = draw_batches(own, num_batches=2, batch_size=2, rng=random.Random(0), pad_token_id=0)
    mixed = draw_batches(
        own, num_batches=2, batch_size=2, rng=random.Random(0), pad_token_id=0, beside=public, num_beside=1
    )
    for before, after, further in zip(plain, mixed, public, strict=True):
        own_rows = before.attention_mask.bool()
        assert torch.equal(after.input_ids[:2, : own_rows.shape[1]][own_rows], before.input_ids[own_rows])
        assert tuple(after.input_ids[2][after.attention_mask[2].bool()].tolist()) == further.input_ids


def test_drawing_from_nothing_is_refused():
    with pytest.raises(UserError, match="no example with a label"):
        draw_batches([], num_batches=1, batch_size=1, rng=random.Random(0), pad_token_id=0)


def test_a_batch_moves_to_a_device_whole():
    batch = make_batch([of_length(3)], 0)
    moved = batch.to("meta")
    for name in ("input_ids", "attention_mask", "labels"):
        assert getattr(moved, name).device.type == "meta"
        assert torch.equal(getattr(batch.to("cpu"), name), getattr(batch, name))
    assert (moved.num_examples, moved.num_labels) == (1, 2)
