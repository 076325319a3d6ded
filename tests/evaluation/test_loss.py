"""The loss is over tokens, in float32, and the same however it is cut into batches and chunks."""

import math

import pytest
import torch
from transformers import PreTrainedModel

from fedexperts.data.batches import encode_all, make_batch
from fedexperts.data.examples import Example
from fedexperts.data.prompts import Encoded, PromptFormat
from fedexperts.errors import UserError
from fedexperts.evaluation import loss
from fedexperts.evaluation.loss import label_losses, mean_loss


def encode(format: PromptFormat, examples: list[Example]) -> list[Encoded]:
    return encode_all(format, examples)[0]


def by_hand(model: PreTrainedModel, encoded: Encoded) -> float:
    """Minus the summed log-probability of the labels, from one forward pass without padding."""
    ids = torch.tensor([encoded.input_ids])
    with torch.no_grad():
        log_probabilities = model(input_ids=ids).logits[0].double().log_softmax(dim=-1)
    return -sum(
        float(log_probabilities[place - 1, encoded.input_ids[place]])
        for place in range(encoded.prompt_length, len(encoded.input_ids))
    )


def test_loss_is_the_mean_over_tokens_and_not_over_examples(
    model: PreTrainedModel, format: PromptFormat, examples: list[Example]
) -> None:
    encoded = encode(format, examples)
    sums = [by_hand(model, each) for each in encoded]
    over_tokens = sum(sums) / sum(each.num_labels for each in encoded)
    over_examples = sum(total / each.num_labels for total, each in zip(sums, encoded, strict=True)) / len(
        sums
    )

    got = mean_loss(model, encoded, batch_size=2, pad_token_id=format.pad_token_id)

    assert got == pytest.approx(over_tokens, rel=1e-6)  # float32 logits against float64 softmax
    assert abs(got - over_examples) > 1e-3


def test_loss_does_not_depend_on_the_batch_size(
    model: PreTrainedModel, format: PromptFormat, examples: list[Example]
) -> None:
    encoded = encode(format, examples)
    one, all_at_once = (
        mean_loss(model, encoded, batch_size=size, pad_token_id=format.pad_token_id) for size in (1, 8)
    )
    assert one == pytest.approx(all_at_once, rel=1e-6)  # matrix products of another size round otherwise


def test_loss_of_each_example_is_its_own(
    model: PreTrainedModel, format: PromptFormat, examples: list[Example]
) -> None:
    encoded = encode(format, examples)
    batch = make_batch(encoded, format.pad_token_id)

    got = label_losses(model, batch)

    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx([by_hand(model, each) for each in encoded], rel=1e-6)


def test_small_chunks_give_the_same_bits(
    model: PreTrainedModel,
    format: PromptFormat,
    examples: list[Example],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = make_batch(encode(format, examples), format.pad_token_id)
    whole = label_losses(model, batch)
    monkeypatch.setattr(loss, "_CHUNK_BYTES", 4 * model.config.vocab_size * 3)

    assert torch.equal(label_losses(model, batch), whole)


def test_no_logits_are_computed_before_the_first_label(
    model: PreTrainedModel, format: PromptFormat, examples: list[Example]
) -> None:
    encoded = encode(format, examples)
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda _, args, output: rows.append(output.shape[1]))
    batch = make_batch(encoded, format.pad_token_id)

    label_losses(model, batch)

    assert rows == [batch.input_ids.shape[1] - min(each.prompt_length for each in encoded) + 1]


def test_bfloat16_logits_meet_a_float32_softmax(
    model: PreTrainedModel, format: PromptFormat, examples: list[Example]
) -> None:
    model = model.bfloat16()
    encoded = encode(format, examples)[:1]

    got = label_losses(model, make_batch(encoded, format.pad_token_id))

    assert float(got[0]) == pytest.approx(by_hand(model, encoded[0]), rel=1e-6)


def test_a_loss_that_is_not_finite_is_an_error(
    model: PreTrainedModel, format: PromptFormat, examples: list[Example]
) -> None:
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan

    with pytest.raises(UserError, match="loss of 5 of 5 examples is not finite"):
        mean_loss(model, encode(format, examples), batch_size=2, pad_token_id=format.pad_token_id)
