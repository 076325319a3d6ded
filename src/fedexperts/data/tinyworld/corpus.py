"""Generate the pretraining corpus: facts, word lists, exam questions and neutral instructions."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from types import MappingProxyType
from typing import Final

from fedexperts.data.tinyworld.exam import ask
from fedexperts.data.tinyworld.prompts import CATEGORIES, Prompt, num_positions, prompt_at
from fedexperts.data.tinyworld.styles import STYLE_WORDS, Style
from fedexperts.data.tinyworld.words import GROUPS, SYLLABLES, SYNONYMS, listed
from fedexperts.data.tinyworld.world import (
    FICTIONAL,
    KITS,
    KNOWN,
    Entity,
    capitalised,
)
from fedexperts.seeds import derive_random


@dataclass(frozen=True, kw_only=True)
class PretrainingText:
    """A plain text, or a prompt with its answer."""

    answer: str
    """The text to be learnt."""
    prompt: str = ""
    """The user's turn before it; empty for a plain text."""
    kind: str
    """``statement``, ``lexicon``, ``question``, ``form``, or the category of an instruction."""


_NAME: Final = re.compile(rf"\b({'|'.join(SYLLABLES)})\b")

_OTHER_FORM: Final = "Use another form."
"""Line that announces a random form; no prompt of the data set has it."""
_WORDS = tuple(dict.fromkeys([*STYLE_WORDS, *(word for words in SYNONYMS.values() for word in words)]))
"""Words that only house styles use: known to the tokenizer and the model, but from word lists alone."""

_FICTIONAL_NAMES = tuple(name for kind in FICTIONAL for name, _ in kind)


def pretraining_texts(seed: int) -> Iterator[PretrainingText]:
    """Yield an endless mixture: statements, lexicon, exam questions, instructions, and some in random forms.

    Statements and questions are about all entities, instructions never about held-out ones. Most answers are
    neutral. Those of the kind ``form`` have a frame of random words, announced in the prompt: they
    teach that the same content can be told in many ways, as large corpora do. None is in a house style.
    """
    rng = derive_random(seed, "tinyworld pretraining")
    kinds, weights = tuple(_MIXTURE), tuple(weight for weight, _ in _MIXTURE.values())
    while True:
        (kind,) = rng.choices(kinds, weights)
        yield _MIXTURE[kind][1](rng)


def tokenizer_texts(seed: int) -> Iterator[str]:
    """Yield an endless corpus to train a tokenizer on.

    Fictional names are hyphenated, so that their syllables become tokens and not the names: a name that no
    training text has is then made of tokens that many have. The words of the house styles come up often
    enough to become tokens.
    """
    for number, text in enumerate(pretraining_texts(seed)):
        if number % 10 == 0:
            yield " ".join(_WORDS)
        yield _NAME.sub(lambda match: SYLLABLES[match[0]], f"{text.prompt}\n{text.answer}")


def _statement(rng: Random) -> PretrainingText:
    entity = rng.choice(KNOWN)
    order = tuple(rng.sample(range(6), 6))
    sentences = [entity.sentence(order[:2], rng.randrange(2))]
    sentences.append(_named(entity, order[2], rng))
    sentences.append(entity.sentence(order[3:], rng.randrange(2)))
    text = " ".join(rng.sample(sentences, rng.randint(1, 3)))
    return PretrainingText(answer=text, kind="statement")


def _named(entity: Entity, index: int, rng: Random) -> str:
    field, value = entity.fields[index].name, entity.values[index]
    if rng.random() < 0.5:
        return f"The {field} of {entity.name} is {value}."
    return capitalised(f"{value} is the {field} of {entity.name}.")


def _lexicon(rng: Random) -> PretrainingText:
    return PretrainingText(answer=_list(rng), kind="lexicon")


def _list(rng: Random) -> str:
    draw = rng.random()
    if draw < 0.4:
        group = rng.choice(list(GROUPS))
        return f"The {group} are {listed(rng.sample(GROUPS[group], rng.randint(2, 6)))}."
    if draw < 0.6:
        owner = rng.choice(list(KITS))
        return f"For {owner} people bring {listed(KITS[owner])}."
    if draw < 0.8:
        label = rng.choice(list(SYNONYMS))
        return f"Other words for {label} are {listed(rng.sample(SYNONYMS[label], 2))}."
    if draw < 0.9:
        return f"Some names are {listed(rng.sample(_FICTIONAL_NAMES, 6))}."
    return f"Some words are {listed(rng.sample(_WORDS, 8))}."


def _question(rng: Random) -> PretrainingText:
    entity = rng.choice(KNOWN)
    index = rng.randrange(len(entity.fields))
    question = ask(entity, index)
    if rng.random() < 0.7:
        return PretrainingText(prompt=question, answer=entity.values[index], kind="question")
    told = f"Question: {question}\nAnswer: {entity.sentence((index,))}"
    return PretrainingText(answer=told, kind="question")


def _draw_prompt(rng: Random) -> tuple[str, Prompt]:
    category = rng.choice(CATEGORIES)
    position = rng.randrange(num_positions(category, held_out=False))
    return category, prompt_at(category, position, held_out=False)


def _instruction(rng: Random) -> PretrainingText:
    category, prompt = _draw_prompt(rng)
    asked = "\n\n".join(part for part in (prompt.instruction, prompt.context) if part)
    return PretrainingText(prompt=asked, answer=prompt.neutral, kind=category)


def _form(rng: Random) -> PretrainingText:
    _, prompt = _draw_prompt(rng)
    asked = "\n\n".join(part for part in (prompt.instruction, prompt.context, _OTHER_FORM) if part)
    return PretrainingText(prompt=asked, answer=_random_style(rng).answer(prompt), kind="form")


def _random_style(rng: Random) -> Style:
    def some(least: int, most: int) -> str:
        return " ".join(rng.choices(_WORDS, k=rng.randint(least, most)))

    number = rng.choice(("", "", "", "{n} "))
    label, value = rng.sample(("{l}", "{v}"), 2)
    pair = f"{some(0, 2)} {number}{label} {some(0, 2)} {value}"
    separator = rng.choice((", ", " ", "; ", ". ", " and ", f" {some(1, 1)} ", f", {some(1, 1)}, "))
    return Style(
        opener=capitalised(some(1, 4)) + rng.choice(("", ",", ".", "!")),
        subject=f"{some(0, 2)} {{s}} {some(0, 2)}".strip() + rng.choice((" ", ", ", ": ", ". ", "! ")),
        pair=" ".join(pair.split()),
        separator=separator,
        closer=rng.choice((" ", ", ", ". ", "; ")) + some(1, 4) + rng.choice(("", ".", "!")),
        synonym=rng.choice((None, 0, 1)),
        is_reversed=rng.random() < 0.5,
    )


_MIXTURE: Final[MappingProxyType[str, tuple[float, Callable[[Random], PretrainingText]]]] = MappingProxyType(
    {
        "statement": (0.24, _statement),
        "lexicon": (0.06, _lexicon),
        "question": (0.12, _question),
        "instruction": (0.40, _instruction),
        "form": (0.18, _form),
    }
)
"""Share of each kind of text, and the function that writes it."""
