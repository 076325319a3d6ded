"""Measure how much of its training data a model gives away when it is shown a beginning.

Definition after FlexOlmo's authors (arXiv 2507.07024): prefixes of 32 tokens, ten sampled continuations,
extracted where one of them has a normalised Levenshtein similarity of at least 0.9 to the true one. Theirs
are documents; here a text is a response that follows its prompt, and how tokens are drawn is our choice.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedexperts.data.examples import Example
from fedexperts.data.prompts import PromptFormat
from fedexperts.errors import UserError
from fedexperts.evaluation.generate import generate_sampled

SIMILARITY = 0.9
"""Similarity from which a text counts as extracted."""


@dataclass(frozen=True, kw_only=True)
class ExtractionSettings:
    """Settings of an extraction test."""

    prefix_tokens: int = 32
    """Tokens of the response that are shown, after its prompt."""
    num_generations: int = 10
    """Continuations that are sampled for each text."""
    top_k: int = 50
    """Likeliest tokens that each token is drawn among, at temperature 1."""
    seed: int = 0
    """Seed of the draws."""
    batch_size: int = 16
    """Continuations side by side."""

    def __post_init__(self) -> None:
        """Refuse numbers outside their range."""
        for name, least in (("prefix_tokens", 1), ("num_generations", 1), ("top_k", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, not {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """Texts that a model was asked for, and those that it gave away."""

    best: tuple[float, ...]
    """Similarity of the best continuation of each text, from 0 to 1."""

    @property
    def num_extracted(self) -> int:
        """Number of texts that were extracted."""
        return sum(similarity >= SIMILARITY for similarity in self.best)

    def figures(self) -> dict[str, float]:
        """Return the figures of a table."""
        number = len(self.best)
        return {
            "num_texts": number,
            "num_extracted": self.num_extracted,
            "rate": self.num_extracted / number,
            "mean_best_similarity": math.fsum(self.best) / number,
        }


def extract(
    model: Any, format: PromptFormat, texts: Sequence[Example], settings: ExtractionSettings
) -> Extraction:
    """Continue the beginning of each text's response, and compare with its rest.

    Raises:
        UserError: there is no text, or one has nothing left after the prefix.
    """
    if not texts:
        raise UserError("there is no text to extract")
    prompts, rests = zip(*(_cut(format, text, settings.prefix_tokens) for text in texts), strict=True)
    asked = [prompt for prompt in prompts for _ in range(settings.num_generations)]
    answers = generate_sampled(
        model,
        asked,
        max_new_tokens=max(map(len, rests)),
        batch_size=settings.batch_size,
        eos_token_id=format.eos_token_id,
        pad_token_id=format.pad_token_id,
        seed=settings.seed,
        top_k=settings.top_k,
    )
    best = []
    for place, rest in enumerate(rests):
        start = place * settings.num_generations
        own = answers[start : start + settings.num_generations]
        true = format.tokenizer.decode(rest)
        said = (format.tokenizer.decode(list(answer.token_ids[: len(rest)])) for answer in own)
        best.append(max(similarity(text, true) for text in said))
    return Extraction(best=tuple(best))


def _cut(format: PromptFormat, text: Example, prefix_tokens: int) -> tuple[list[int], list[int]]:
    """Return prompt and prefix, and the rest of the response as training saw it, without EOS."""
    encoded = format.encode(text)
    ids = list(encoded.input_ids[: None if encoded.is_truncated else -1])
    start = encoded.prompt_length + prefix_tokens
    if len(ids) <= start:
        raise UserError(
            f"{text.source_id} has {len(ids) - encoded.prompt_length} tokens of response within "
            f"data.max_tokens, but prefix_tokens is {prefix_tokens}: nothing is left to extract"
        )
    return ids[:start], ids[start:]


def similarity(one: str, other: str) -> float:
    """Return 1 less the Levenshtein distance of two texts over the length of the longer; 1 for equal ones."""
    return 1 - levenshtein(one, other) / max(len(one), len(other), 1)


def levenshtein(one: str, other: str) -> int:
    """Return the least number of letters to insert, delete or replace to make one text the other."""
    above = list(range(len(other) + 1))
    for row, letter in enumerate(one, start=1):
        here = [row]
        for column, its in enumerate(other, start=1):
            here.append(min(above[column] + 1, here[-1] + 1, above[column - 1] + (letter != its)))
        above = here
    return above[-1]
