"""Scores of a model on examples: what is counted, what is left out, and that they mean what they say."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from fedexperts.data.examples import Example
from fedexperts.data.prompts import PromptFormat
from fedexperts.errors import UserError
from fedexperts.evaluation.examples import Prediction, evaluate_examples
from fedexperts.evaluation.settings import EvaluationSettings

SETTINGS = EvaluationSettings(max_new_tokens=12, batch_size=3)


def test_a_model_that_knows_the_examples_by_heart_scores_full(
    taught_model: PreTrainedModel, format: PromptFormat, examples: list[Example]
) -> None:
    scores = evaluate_examples(taught_model, format, examples, SETTINGS)

    assert scores.rougeL == scores.exact_match == 1.0
    assert scores.loss is not None
    assert scores.loss < 0.1
    assert scores.num_test == len(examples)
    assert scores.num_unfinished == scores.num_empty == scores.num_truncated == scores.num_without_label == 0
    assert scores.predictions[0] == Prediction(
        prompt="<user> where lies Lima <bot>", response="in Peru", prediction="in Peru"
    )


def test_scores_do_not_depend_on_the_batch_size(
    taught_model: PreTrainedModel, format: PromptFormat, examples: list[Example]
) -> None:
    unseen = [replace(example, instruction=f"{example.instruction} city a") for example in examples]
    one, all_at_once = (
        evaluate_examples(taught_model, format, unseen, replace(SETTINGS, batch_size=size)) for size in (1, 8)
    )
    assert one.predictions == all_at_once.predictions
    assert one.rougeL == all_at_once.rougeL


def test_predictions_come_in_the_order_of_the_examples(
    taught_model: PreTrainedModel, format: PromptFormat, examples: list[Example]
) -> None:
    scores = evaluate_examples(taught_model, format, examples[::-1], SETTINGS)
    assert [item.prediction for item in scores.predictions] == [each.response for each in examples[::-1]]


def test_common_knowledge_is_scored_from_the_answers(
    taught_model: PreTrainedModel, format: PromptFormat, examples: list[Example]
) -> None:
    facts = [replace(examples[0], facet="own", key="Peru"), replace(examples[2], facet="own", key="Lima")]
    scores = evaluate_examples(taught_model, format, facts, SETTINGS)
    assert scores.facets.own_facts == 0.5


def test_perplexity_is_e_to_the_loss(
    model: PreTrainedModel, format: PromptFormat, examples: list[Example]
) -> None:
    scores = evaluate_examples(model, format, examples, SETTINGS)
    assert scores.loss is not None
    assert scores.perplexity == math.exp(scores.loss)


def test_nothing_is_generated_for_the_loss_alone(
    model: PreTrainedModel, format: PromptFormat, examples: list[Example]
) -> None:
    scores = evaluate_examples(model, format, examples, replace(SETTINGS, metrics=("loss",)))
    assert scores.rougeL is scores.exact_match is None
    assert scores.predictions == ()


def test_the_loss_is_not_taken_where_only_answers_count(
    taught_model: PreTrainedModel, format: PromptFormat, examples: list[Example]
) -> None:
    scores = evaluate_examples(taught_model, format, examples, replace(SETTINGS, metrics=("exact_match",)))
    assert scores.loss is scores.perplexity is scores.rougeL is None
    assert scores.exact_match == 1.0


def test_what_does_not_fit_is_counted(
    taught_model: PreTrainedModel, tokenizer: object, examples: list[Example]
) -> None:
    # A prompt has two tokens beside its words, a response one. Of 8 tokens the first and the third example
    # take all; of the others something is cut, and of the last, whose prompt has six words, all labels.
    short = PromptFormat(tokenizer, "chat", 8)  # type: ignore[arg-type]
    longest = Example(instruction="is Lima a city in Peru", response="is")

    scores = evaluate_examples(taught_model, short, [*examples, longest], SETTINGS)

    assert scores.num_test == 6
    assert scores.num_truncated == 4
    assert scores.num_without_label == 1
    assert scores.exact_match is not None
    assert (
        scores.exact_match >= 5 / 6
    )  # answers are to the whole prompt, and compared with the whole response


def test_answers_cut_at_the_limit_and_empty_ones_are_counted(
    taught_model: PreTrainedModel, format: PromptFormat, examples: list[Example]
) -> None:
    cut = evaluate_examples(taught_model, format, examples, replace(SETTINGS, max_new_tokens=1))
    assert cut.num_unfinished == 5

    silent = new_silent_model(taught_model, format)
    empty = evaluate_examples(silent, format, examples, SETTINGS)
    assert empty.num_empty == 5
    assert empty.rougeL == 0.0


def new_silent_model(model: PreTrainedModel, format: PromptFormat) -> PreTrainedModel:
    """A copy that ends every answer at once: EOS's logit is far above all others."""
    silent = type(model)(model.config).eval()
    with torch.no_grad():
        silent.model.norm.weight.zero_()
        silent.lm_head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size)
        silent.lm_head.bias[format.eos_token_id] = 100.0
    return silent


def test_a_prompt_too_long_for_the_model_loses_its_beginning(
    taught_model: PreTrainedModel,
    format: PromptFormat,
    examples: list[Example],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(taught_model.config, "max_position_embeddings", 6 + SETTINGS.max_new_tokens)
    padded = replace(examples[0], instruction="city city " + examples[0].instruction)

    scores = evaluate_examples(taught_model, format, [padded, examples[0]], SETTINGS)

    assert scores.num_prompts_cut == 1

    assert (
        evaluate_examples(
            taught_model, format, examples[:1], replace(SETTINGS, max_new_tokens=17)
        ).num_prompts_cut
        == 1
    )
    with pytest.raises(UserError, match=r"evaluation\.max_new_tokens is 18; it must be below the model's 18"):
        evaluate_examples(taught_model, format, examples, replace(SETTINGS, max_new_tokens=18))


def test_no_example_is_an_error(model: PreTrainedModel, format: PromptFormat) -> None:
    with pytest.raises(UserError, match="no example to evaluate on"):
        evaluate_examples(model, format, [], SETTINGS)


def test_examples_without_any_label_are_an_error(
    model: PreTrainedModel, tokenizer: object, examples: list[Example]
) -> None:
    tight = PromptFormat(tokenizer, "chat", 3)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no example with a label"):
        evaluate_examples(model, tight, examples, SETTINGS)
