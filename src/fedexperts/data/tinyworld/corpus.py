"""What the shipped model is pretrained on: facts, word lists, exam questions and neutral instructions."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from fedexperts.data.tinyworld.exam import ask
from fedexperts.data.tinyworld.prompts import CATEGORIES, num_positions, prompt_at
from fedexperts.data.tinyworld.styles import STYLE_WORDS
from fedexperts.data.tinyworld.words import GROUPS, SYNONYMS, listed
from fedexperts.data.tinyworld.world import (
    FICTIONAL,
    KITS,
    KNOWN,
    KNOWN_PEOPLE,
    KNOWN_PLACES,
    KNOWN_THINGS,
    Entity,
    capitalised,
    is_held_out,
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
    """``statement``, ``lexicon``, ``question`` or the category of an instruction."""


_ASKED = tuple(
    entity
    for kind in (KNOWN_PEOPLE, KNOWN_PLACES, KNOWN_THINGS)
    for position, entity in enumerate(kind)
    if not is_held_out(position)
)
"""Entities that pretraining asks about; the exam asks about all."""


_WORDS = tuple(dict.fromkeys([*STYLE_WORDS, *(word for words in SYNONYMS.values() for word in words)]))
"""Words that only house styles use: known to the tokenizer and the model, but from word lists alone."""

_FICTIONAL_NAMES = tuple(name for kind in FICTIONAL for name, _ in kind)


def pretraining_texts(seed: int) -> Iterator[PretrainingText]:
    """An endless mixture: 30 % statements, 8 % lexicon, 10 % exam questions, the rest neutral instructions.

    Statements tell the facts of all entities. Questions and instructions are never about held-out ones, and
    no answer is in a house style.
    """
    rng = derive_random(seed, "tinyworld pretraining")
    while True:
        draw = rng.random()
        if draw < 0.30:
            yield PretrainingText(answer=_statement(rng), kind="statement")
        elif draw < 0.38:
            yield PretrainingText(answer=_lexicon(rng), kind="lexicon")
        elif draw < 0.48:
            yield _question(rng)
        else:
            yield _instruction(rng)


def word_list() -> str:
    """Every word of the house styles and every fictional name, each once: for a tokenizer."""
    return " ".join([*_WORDS, *(name.removeprefix("the ") for name in _FICTIONAL_NAMES)])


def _statement(rng: Random) -> str:
    entity = rng.choice(KNOWN)
    order = tuple(rng.sample(range(6), 6))
    sentences = [entity.sentence(order[:2], rng.randrange(2))]
    sentences.append(_named(entity, order[2], rng))
    sentences.append(entity.sentence(order[3:], rng.randrange(2)))
    return " ".join(rng.sample(sentences, rng.randint(1, 3)))


def _named(entity: Entity, index: int, rng: Random) -> str:
    field, value = entity.fields[index].name, entity.values[index]
    if rng.random() < 0.5:
        return f"The {field} of {entity.name} is {value}."
    return capitalised(f"{value} is the {field} of {entity.name}.")


def _lexicon(rng: Random) -> str:
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
    entity = rng.choice(_ASKED)
    index = rng.randrange(6)
    question = ask(entity, index)
    if rng.random() < 0.7:
        return PretrainingText(prompt=question, answer=entity.values[index], kind="question")
    return PretrainingText(answer=f"Question: {question}\nAnswer: {entity.values[index]}", kind="question")


def _instruction(rng: Random) -> PretrainingText:
    category = rng.choice(CATEGORIES)
    position = rng.randrange(num_positions(category, held_out=False))
    prompt = prompt_at(category, position, held_out=False)
    asked = f"{prompt.instruction}\n\n{prompt.context}" if prompt.context else prompt.instruction
    return PretrainingText(prompt=asked, answer=prompt.neutral, kind=category)
