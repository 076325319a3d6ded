"""The exam's score, against log-likelihoods taken one choice at a time."""

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from fedexperts.data.examples import Example, Question
from fedexperts.data.prompts import PromptFormat
from fedexperts.errors import UserError
from fedexperts.evaluation.multiple_choice import list_choices, score_exam

CHOICES = ("in Peru", "Quito", "the capital of Ecuador", "a city")


ASKED = ("where lies Lima", "where lies Oslo", "is Quito far away", "the city", "where is Quito", "is Oslo")


def log_likelihood(model: PreTrainedModel, format: PromptFormat, question: str, choice: str) -> torch.Tensor:
    """Log-probabilities of the choice's own tokens after the question."""
    prompt = format.encode_prompt(Example(instruction=question, response=""))
    ids = prompt + format.tokenizer(choice, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)
    return torch.stack([scores[place - 1, ids[place]] for place in range(len(prompt), len(ids))])


def likeliest(model: PreTrainedModel, format: PromptFormat, *, normalise: bool) -> list[Question]:
    """Questions of which the right choice is the one the model finds likeliest, one choice at a time."""
    found = []
    for text in ASKED:
        each = [log_likelihood(model, format, text, choice) for choice in CHOICES]
        scores = [float(one.mean() if normalise else one.sum()) for one in each]
        found.append(Question(question=text, choices=CHOICES, answer=scores.index(max(scores))))
    return found


@pytest.mark.parametrize("batch_size", [1, 5, 64])
@pytest.mark.parametrize("normalise", [False, True])
def test_the_likeliest_choice_is_taken(
    model: PreTrainedModel, format: PromptFormat, batch_size: int, normalise: bool
) -> None:
    questions = likeliest(model, format, normalise=normalise)

    assert score_exam(model, format, questions, batch_size, normalise=normalise).accuracy == 1.0
    # By sums the short choices win, so that the two ways can be told apart.
    assert score_exam(model, format, questions, batch_size, normalise=not normalise).accuracy < 1.0


def test_the_right_choice_may_be_listed_twice(model: PreTrainedModel, format: PromptFormat) -> None:
    questions = [
        replace(question, choices=(*CHOICES, CHOICES[question.answer]), answer=4)
        for question in likeliest(model, format, normalise=False)
    ]
    assert score_exam(model, format, questions, 8).accuracy == 1.0


def test_accuracy_is_also_told_by_subject(model: PreTrainedModel, format: PromptFormat) -> None:
    questions = likeliest(model, format, normalise=False)
    wrong = [replace(each, answer=(each.answer + 1) % 4, subject="wrong") for each in questions[:2]]
    right = [replace(each, subject="right") for each in questions[2:]]

    score = score_exam(model, format, [*wrong, *right], 8)

    assert score.by_subject == {"right": 1.0, "wrong": 0.0}
    assert (score.accuracy, score.num_questions, score.num_left_out) == (4 / 6, 6, 0)


def test_a_model_that_knows_the_answers_passes(taught_model: PreTrainedModel, format: PromptFormat) -> None:
    known = [
        Question(question="where lies Lima", choices=("Norway", "in Peru"), answer=1),
        Question(question="the capital of Ecuador", choices=("Quito", "Lima", "Oslo"), answer=0),
    ]
    assert score_exam(taught_model, format, known, 4).accuracy == 1.0


def test_a_question_that_does_not_fit_is_left_out_and_counted(
    taught_model: PreTrainedModel, format: PromptFormat
) -> None:
    fitting = Question(question="where lies Lima", choices=("Norway", "in Peru"), answer=1)
    too_long = Question(question="where lies Lima", choices=("Norway", "in Peru " * 20), answer=0)

    score = score_exam(taught_model, format, [too_long, fitting], 4)

    assert (score.num_questions, score.num_left_out, score.accuracy) == (1, 1, 1.0)
    with pytest.raises(UserError, match=r"none of the 1 exam questions fits data\.max_tokens = 24"):
        score_exam(taught_model, format, [too_long], 4)


def test_letters_stand_for_listed_choices() -> None:
    listed = list_choices(Question(question="Where?", choices=("Peru", "Norway"), answer=1, subject="s"))
    assert listed == Question(
        question="Where?\nA. Peru\nB. Norway", choices=("A", "B"), answer=1, subject="s"
    )


def test_likelihoods_that_are_not_finite_are_an_error(model: PreTrainedModel, format: PromptFormat) -> None:
    question = Question(question="where lies Lima", choices=CHOICES, answer=0)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        score_exam(model, format, [question], 8)
