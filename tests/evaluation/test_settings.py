"""Evaluation settings refuse what cannot be measured, by the key's full name."""

from dataclasses import replace
from typing import Any

import pytest

from fedexperts.errors import UserError
from fedexperts.evaluation.settings import WHENS, EvaluationSettings, ExamFields, ExamSettings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics": ()}, "evaluation.metrics is empty"),
        ({"metrics": ("loss", "bleu")}, 'evaluation.metrics names "bleu"'),
        ({"max_new_tokens": 0}, "evaluation.max_new_tokens is 0; it must be at least 1"),
        ({"batch_size": 0}, "evaluation.batch_size is 0; it must be at least 1"),
        ({"max_test_examples": -1}, "evaluation.max_test_examples is -1; it must be at least 0"),
        ({"matrix_examples": 0}, "evaluation.matrix_examples is 0; it must be at least 1"),
        ({"matrix_clients": 1}, "evaluation.matrix_clients is 1; it must be at least 2"),
    ],
)
def test_values_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EvaluationSettings(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": ""}, "evaluation.exam.source is empty"),
        ({"num_questions": -1}, "evaluation.exam.num_questions is -1"),
        ({"answer_form": "number"}, 'evaluation.exam.answer_form is "number"; it must be text or letter'),
    ],
)
def test_exams_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ExamSettings(**settings)


def test_a_question_needs_its_fields() -> None:
    with pytest.raises(UserError, match=r"evaluation\.exam\.fields\.answer is empty"):
        ExamFields(answer="")


def test_every_evaluation_has_its_means_before_and_after_and_the_exam_where_there_is_one() -> None:
    settings = EvaluationSettings(metrics=("loss", "exact_match"), own_metrics=("words",))
    means = [f"{score}_{when}" for score in ("loss", "perplexity", "exact_match", "words") for when in WHENS]
    assert settings.mean_scores == (*means, "exam_global")
    assert replace(settings, exam=ExamSettings(source="none")).mean_scores == tuple(means)


def test_answers_are_generated_only_for_metrics_that_need_them() -> None:
    assert EvaluationSettings(metrics=("loss", "rougeL")).generates
    assert EvaluationSettings(metrics=("exact_match",)).generates
    assert not EvaluationSettings(metrics=("loss",)).generates
