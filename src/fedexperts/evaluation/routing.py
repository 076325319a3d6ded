"""Measure how evenly, and how differently, experts are used, from tokens per expert.

A *table* is a list by MoE layer of lists by expert of numbers of tokens, as
``count_tokens`` gives them. Nothing here needs torch. Layers count alike: each
figure is taken within a layer, and the mean over layers is returned.
"""

from collections.abc import Sequence
from math import fsum, log
from statistics import fmean, pstdev

Table = Sequence[Sequence[int]]


def balance_std(table: Table) -> float:
    """Return the standard deviation of tokens per expert, in tokens: 0 is perfect balance.

    It is the population's, over all of a layer's experts, including those without tokens; FLEx reports it
    (App. C.6) without saying whether population or sample and how layers are joined. It grows with the number
    of tokens: compare only counts on the same text.
    """
    return fmean(pstdev(tokens_E) for tokens_E in table)


def normalised_entropy(table: Table) -> float:
    """Return the entropy of the shares of tokens over its largest value, ln E: 1 for even use, 0 for one
    expert.

    It is the entropy of how experts are used over a text, not of the router's softmax for a token. A layer of
    one expert has 1.
    """
    return fmean(
        _entropy(shares_E) / log(len(shares_E)) if len(shares_E) > 1 else 1.0 for shares_E in shares(table)
    )


def shares(table: Table) -> list[list[float]]:
    """Return each layer's tokens per expert as shares that sum to 1."""
    return [_shares(tokens_E) for tokens_E in table]


def total_variation(first: Table, second: Table) -> float:
    """Return half the sum of differences of shares in two tables: 0 for equal use, 1 for no common expert."""
    pairs = zip(shares(first), shares(second), strict=True)
    return fmean(fsum(abs(a - b) for a, b in zip(one, other, strict=True)) / 2 for one, other in pairs)


def _shares(tokens_E: Sequence[int]) -> list[float]:
    total = sum(tokens_E)
    assert total > 0, "no token was counted"
    return [tokens / total for tokens in tokens_E]


def _entropy(shares_E: Sequence[float]) -> float:
    return -fsum(share * log(share) for share in shares_E if share > 0)
