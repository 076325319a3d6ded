"""Make examples of the world by seed, category and index."""

import re
from functools import cache
from typing import Final

from fedexperts.data.examples import Example
from fedexperts.data.tinyworld.prompts import CATEGORIES, num_positions, prompt_at
from fedexperts.data.tinyworld.styles import STYLES, styled
from fedexperts.errors import UserError
from fedexperts.seeds import derive_seed

_SOURCE_ID: Final = re.compile(r"tinyworld/(-?\d+)/([a-z_]+)/(\d+)")
_NUM_FEISTEL_ROUNDS = 4


def num_prompts(category: str) -> int:
    """Return the number of distinct prompts of ``category``, equal for every seed; indices are below it.

    All of them are about held-out people, places, things or words, which no pretraining instruction names.
    """
    _check("category", category, CATEGORIES)
    return num_positions(category, held_out=True)


def make_example(*, seed: int, category: str, index: int, style: str = "neutral") -> Example:
    """Make example ``index`` of ``category`` in the order that ``seed`` gives, answered in ``style``.

    Equal arguments give equal examples on every machine. Distinct indices of one seed and category give
    distinct prompts, because the seed only permutes the prompts; other seeds give the same prompts in another
    order. An index past :func:`num_prompts`, an unknown category or style raise a :class:`UserError`.
    """
    if not 0 <= index < num_prompts(category):
        raise UserError(
            f"tinyworld index {index} of {category} is out of range: it has {num_prompts(category)} prompts"
        )
    _check("style", style, ("neutral", *STYLES))
    position = _permuted(derive_seed(seed, "tinyworld order", category), index, num_prompts(category))
    prompt = prompt_at(category, position, held_out=True)
    return Example(
        instruction=prompt.instruction,
        context=prompt.context,
        response=styled(prompt, style),
        label=category,
        source_id=f"tinyworld/{seed}/{category}/{index}",
    )


def restyle(example: Example, style: str) -> Example:
    """Return the same prompt with the same content told in ``style``; keeps no ``client``."""
    match = _SOURCE_ID.fullmatch(example.source_id)
    if match is None:
        raise UserError(f"source_id {example.source_id!r} is not tinyworld's: tinyworld/SEED/CATEGORY/INDEX")
    return make_example(seed=int(match[1]), category=match[2], index=int(match[3]), style=style)


def _check(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"tinyworld {name} {value!r} is not one of {', '.join(allowed)}")


def _permuted(key: int, index: int, size: int) -> int:
    """Return the place of ``index`` in a random permutation of ``range(size)`` (a cycle-walking Feistel
    network).

    (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002.)
    """
    half = (size.bit_length() + 1) // 2
    while True:
        index = _feistel(key, index, half)
        if index < size:
            return index


def _feistel(key: int, index: int, half: int) -> int:
    left, right = divmod(index, 1 << half)
    for step in range(_NUM_FEISTEL_ROUNDS):
        left, right = right, left ^ (_round(key, step, right) % (1 << half))
    return (left << half) | right


@cache
def _round(key: int, step: int, half: int) -> int:
    return derive_seed(key, "feistel", step, half)
