"""ROUGE-L and exact match, against values worked out by hand."""

import pytest

from fedexperts.evaluation.rouge import exact_match_share, mean_rouge_l


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence() -> None:
    # Common: the, sat, mat. Precision 3/4, recall 3/6, F = 2 * 3/4 * 1/2 / (5/4) = 3/5.
    assert mean_rouge_l(["the dog sat mat"], ["the cat sat on a mat"]) == pytest.approx(0.6)


def test_rouge_l_is_the_mean_over_examples() -> None:
    assert mean_rouge_l(["a b", "x"], ["a b", "y"]) == 0.5


def test_words_are_stemmed_and_lower_cased() -> None:
    assert mean_rouge_l(["Running cities!"], ["runs city"]) == 1.0


def test_an_empty_answer_scores_nothing() -> None:
    assert mean_rouge_l(["", "  "], ["some words", "some words"]) == 0.0


def test_exact_match_ignores_white_space_and_nothing_else() -> None:
    predictions = [" in  Peru\n", "in peru", "in Peru.", "in Peru"]
    assert exact_match_share(predictions, ["in Peru"] * 4) == 0.5
