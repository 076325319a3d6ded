"""Compare generated texts with their references."""

import re
from collections.abc import Sequence
from functools import cache
from math import fsum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer


def mean_rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the mean over examples of ROUGE-L's F-measure with Porter stemming, from 0 to 1 (Lin, 2004).

    Computed by the package ``rouge-score``: lower-cased words of a-z and 0-9, the longest common subsequence
    of the whole text; an empty text scores 0, and so does any text in another script.
    """
    scorer = _scorer()
    pairs = zip(predictions, references, strict=True)
    scores = [scorer.score(reference, prediction)["rougeL"].fmeasure for prediction, reference in pairs]
    return fsum(scores) / len(scores)


def exact_match_share(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the share of predictions equal to their reference (letter case counts, white space not), 0 to
    1."""
    pairs = list(zip(predictions, references, strict=True))
    return sum(prediction.split() == reference.split() for prediction, reference in pairs) / len(pairs)


def contained_share(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the share of predictions that contain their reference's words in a row, 0 to 1.

    Letter case and punctuation do not count.
    """
    pairs = zip(map(_words, predictions), map(_words, references), strict=True)
    return sum(reference in prediction for prediction, reference in pairs) / len(predictions)


def _words(text: str) -> str:
    words = re.findall(r"[^\W_]+", text.casefold())
    return " ".join(["", *words, ""])


@cache
def _scorer() -> "RougeScorer":
    # Its stemmer brings all of nltk and what that finds; commands that score nothing do not wait for it.
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)
