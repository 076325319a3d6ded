"""Make the prompts of the eight categories, with the content of the right answer but no style."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import combinations, permutations
from math import prod
from random import Random
from types import MappingProxyType
from typing import Final, TypeVar

from fedexperts.data.tinyworld.words import (
    ANIMALS,
    COLOURS,
    FILLERS,
    GROUPS,
    HOBBIES,
    JOBS,
    MOODS,
    OCCASIONS,
    PLACES,
    THINGS,
    Field,
    listed,
    with_article,
)
from fedexperts.data.tinyworld.world import (
    FICTIONAL,
    KITS,
    KNOWN_PEOPLE,
    KNOWN_PLACES,
    KNOWN_THINGS,
    Entity,
    capitalised,
    is_held_out,
)
from fedexperts.seeds import derive_random

_Part = TypeVar("_Part")

_NUM_VALUES = 8
"""Every field has at least this many values, so a digit of this base names a value without repetition."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """Content of an answer about one subject, as pairs of label and value."""

    subject: str
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt with the content of its answer and the neutral wording of it."""

    instruction: str
    context: str = ""
    records: tuple[Record, ...]
    neutral: str


class Digits:
    """The digits of a prompt's position in a mixed base; equal digits are the same prompt."""

    def __init__(self, category: str, position: int) -> None:
        """Start at the lowest digit of ``position`` in ``category``."""
        self._category = category
        self._rest = position
        self.bases: list[int] = []
        self._taken: list[int] = []

    def take(self, base: int) -> int:
        """Return the next digit, from 0 to ``base`` - 1."""
        self._rest, digit = divmod(self._rest, base)
        self.bases.append(base)
        self._taken.append(digit)
        return digit

    def choose(self, parts: tuple[_Part, ...]) -> _Part:
        """Return the part that the next digit names."""
        return parts[self.take(len(parts))]

    def random(self, purpose: str) -> Random:
        """Return a generator for what the digits taken so far leave open."""
        return derive_random(0, "tinyworld prompt", self._category, purpose, *self._taken)


_ORDERS: Final = MappingProxyType({num: tuple(permutations(range(6), num)) for num in (2, 3, 4)})
_SUBSETS: Final = tuple(combinations(range(6), 4))


def _pool(parts: tuple[_Part, ...], held_out: bool) -> tuple[_Part, ...]:
    return tuple(part for position, part in enumerate(parts) if is_held_out(position) == held_out)


@cache
def _fictional(held_out: bool) -> tuple[tuple[str, tuple[Field, ...]], ...]:
    return tuple(part for kind in FICTIONAL for part in _pool(kind, held_out))


def _other_name(name: str, fields: tuple[Field, ...], held_out: bool, rng: Random) -> str:
    """Return another fictional name of the same kind."""
    while True:
        other, others_fields = rng.choice(_fictional(held_out))
        if other != name and others_fields is fields:
            return other


def _invent(name: str, fields: tuple[Field, ...], rng: Random) -> Entity:
    return Entity(name=name, fields=fields, values=tuple(rng.choice(field.values) for field in fields))


def _invent_with_digits(
    digits: Digits, name: str, fields: tuple[Field, ...], shown: tuple[int, ...]
) -> Entity:
    """Return an entity whose first two shown values are digits of the position, the others drawn."""
    values = list(_invent(name, fields, digits.random("facts")).values)
    for index in shown[:2]:
        choices = fields[index].values
        values[index] = choices[(choices.index(values[index]) + digits.take(_NUM_VALUES)) % len(choices)]
    return Entity(name=name, fields=fields, values=tuple(values))


def _sentences(entity: Entity, shown: tuple[int, ...], rng: Random) -> list[str]:
    return [entity.sentence((index,), rng.randrange(2)) for index in rng.sample(shown, len(shown))]


def _asked(entity: Entity, shown: tuple[int, ...]) -> str:
    return listed([f"the {entity.fields[index].name}" for index in shown])


def _record(entity: Entity, shown: tuple[int, ...]) -> Record:
    pairs = tuple((entity.fields[index].name, entity.values[index]) for index in shown)
    return Record(subject=entity.name, pairs=pairs)


def _closed_qa(digits: Digits, held_out: bool) -> Prompt:
    name, fields = digits.choose(_fictional(held_out))
    shown = digits.choose(_ORDERS[3])
    wording = digits.choose(
        (
            "Read the text and answer: what are {f} of {n}?",
            "What does the text say about {f} of {n}?",
            "Use the text to tell {f} of {n}.",
        )
    )
    rng = digits.random("passage")
    entity = _invent_with_digits(digits, name, fields, shown)
    other = _invent(_other_name(name, fields, held_out, rng), fields, rng)
    passage = _sentences(entity, shown, rng) + _sentences(other, shown, rng)
    return Prompt(
        instruction=wording.format(f=_asked(entity, shown), n=name),
        context=" ".join(rng.sample(passage, len(passage))),
        records=(_record(entity, shown),),
        neutral=entity.sentence(shown),
    )


def _information_extraction(digits: Digits, held_out: bool) -> Prompt:
    name, fields = digits.choose(_fictional(held_out))
    shown = digits.choose(_ORDERS[4])
    wording = digits.choose(("Extract {f} from the text.", "List {f} found in the text.", "Pick out {f}."))
    rng = digits.random("passage")
    entity = _invent_with_digits(digits, name, fields, shown)
    extra = rng.choice([index for index in range(6) if index not in shown])
    labelled = "".join(f" {fields[index].name.capitalize()}: {entity.values[index]}." for index in shown)
    return Prompt(
        instruction=wording.format(f=_asked(entity, shown)),
        context=" ".join(_sentences(entity, (*shown, extra), rng)),
        records=(_record(entity, shown),),
        neutral=f"Name: {name}.{labelled}",
    )


def _summarization(digits: Digits, held_out: bool) -> Prompt:
    name, fields = digits.choose(_fictional(held_out))
    shown = digits.choose(_SUBSETS)
    wording = digits.choose(
        ("Sum up the text in one sentence.", "Give a short summary of the text.", "What is the text about?")
    )
    rng = digits.random("passage")
    entity = _invent_with_digits(digits, name, fields, shown)
    passage = _sentences(entity, shown, rng)
    for filler in rng.sample(FILLERS, 2):
        passage.insert(rng.randrange(len(passage) + 1), filler)
    return Prompt(
        instruction=wording,
        context=" ".join(passage),
        records=(_record(entity, shown),),
        neutral=f"In short, {entity.statement(shown)}",
    )


def _classification(digits: Digits, held_out: bool) -> Prompt:
    groups = digits.choose(tuple(permutations(GROUPS, 2)))
    firsts = [digits.choose(_pool(GROUPS[group], held_out)) for group in groups]
    usual = [[word for word in _pool(GROUPS[g], False) if word not in firsts] for g in groups]
    pair = digits.choose(tuple(combinations(usual[0], 2)))
    wording = digits.choose(
        (
            "Sort these words into {a} and {b}: {w}.",
            "Which are {a} and which are {b}? {w}.",
            "Split into {a} and {b}: {w}.",
        )
    )
    rng = digits.random("passage")
    members = [[firsts[0], *pair], [firsts[1], *rng.sample(usual[1], rng.randint(1, 2))]]
    mixed = rng.sample([*members[0], *members[1]], len(members[0]) + len(members[1]))
    ordered = [listed([word for word in mixed if word in group]) for group in members]
    return Prompt(
        instruction=wording.format(a=groups[0], b=groups[1], w=", ".join(mixed)),
        records=(Record(subject="", pairs=tuple(zip(groups, ordered, strict=True))),),
        neutral=f"The {groups[0]} are {ordered[0]}. The {groups[1]} are {ordered[1]}.",
    )


def _open_qa(digits: Digits, held_out: bool) -> Prompt:
    entity = digits.choose(_pool(KNOWN_PEOPLE, held_out))
    shown = digits.choose(_ORDERS[3] + _ORDERS[4])
    wording = digits.choose(
        (
            "What are {f} of {n}?",
            "Tell me {f} of {n}.",
            "Do you know {f} of {n}?",
            "I want to know {f} of {n}.",
        )
    )
    return Prompt(
        instruction=wording.format(f=_asked(entity, shown), n=entity.name),
        records=(_record(entity, shown),),
        neutral=entity.sentence(shown),
    )


@cache
def _comparable(held_out: bool) -> tuple[tuple[Entity, Entity], ...]:
    kinds = (_pool(KNOWN_PLACES, held_out), _pool(KNOWN_THINGS, held_out))
    return tuple(pair for kind in kinds for pair in permutations(kind, 2))


def _general_qa(digits: Digits, held_out: bool) -> Prompt:
    first, second = digits.choose(_comparable(held_out))
    shown = digits.choose(_ORDERS[2])
    wording = digits.choose(
        ("Compare {f} of {a} and {b}.", "How do {a} and {b} differ in {f}?", "Explain {f} of {a} and of {b}.")
    )
    return Prompt(
        instruction=wording.format(f=_asked(first, shown), a=first.name, b=second.name),
        records=(_record(first, shown), _record(second, shown)),
        neutral=f"{first.sentence(shown)[:-1]}, but {second.statement(shown)}",
    )


def _brainstorming(digits: Digits, held_out: bool) -> Prompt:
    name, _ = digits.choose(_pool(FICTIONAL[0], held_out))
    hobby = digits.choose(HOBBIES)
    occasion = digits.choose(OCCASIONS)
    colour = digits.choose(COLOURS)
    wording = digits.choose(
        (
            "Give some ideas for the {o} of {n}, who likes {h} and wears {c}.",
            "{n} likes {h} and wears {c}. What can we bring to the {o}?",
            "Think of gifts for {n} at the {o}. {n} likes {h} and the colour is {c}.",
            "We need ideas: a {o} for {n}, {h} is the hobby, {c} is the colour.",
        )
    )
    ideas = list(dict.fromkeys(KITS[hobby] + KITS[occasion]))
    ideas[0] = f"{colour} {ideas[0]}"
    gifts = [with_article(idea) for idea in ideas]
    return Prompt(
        instruction=wording.format(o=occasion, n=name, h=hobby, c=colour),
        records=(Record(subject=name, pairs=(("occasion", occasion), *(("idea", idea) for idea in ideas))),),
        neutral=f"For the {occasion} of {name} you could bring {', '.join(gifts[:-1])} or {gifts[-1]}.",
    )


_PLOTS: Final = MappingProxyType(
    {
        "happy": (
            "One morning {n} the {j} came to {p} with a {a}. Under a tree they found a {t}.",
            "everyone danced until night",
        ),
        "sad": (
            "{n} the {j} lost a {t} in {p}. A {a} looked for it all day, but it was gone.",
            "nobody could stop crying",
        ),
        "brave": (
            "A storm came to {p}. {n} the {j} took a {t} and saved a {a} from the river.",
            "people still tell of that day",
        ),
        "funny": (
            "In {p} a {a} stole a {t} and wore it as a hat. {n} the {j} ran after it.",
            "the whole town woke up laughing",
        ),
        "spooky": (
            "At midnight in {p} a {t} moved by itself. {n} the {j} held a {a} tight and ran.",
            "no one has slept there since",
        ),
        "quiet": (
            "Snow fell on {p}. {n} the {j} sat beside a {a} and looked at a {t}.",
            "nothing happened and that was good",
        ),
    }
)
"""For each mood a beginning and the ending that goes with it."""


def _creative_writing(digits: Digits, held_out: bool) -> Prompt:
    name, _ = digits.choose(_pool(FICTIONAL[0], held_out))
    mood = digits.choose(MOODS)
    job, animal, thing, place = (digits.choose(words) for words in (JOBS, ANIMALS, THINGS, PLACES))
    wording = digits.choose(
        (
            "Write a {m} story about {n} the {j}, a {a}, a {t} and {p}.",
            "Tell a {m} tale: {n} the {j}, the town of {p}, a {t} and a {a}.",
            "Make up a {m} story in {p} with a {t}, a {a} and {n} the {j}.",
        )
    )
    beginning, ending = _PLOTS[mood]
    words = {"m": mood, "n": name, "j": job, "a": animal, "t": thing, "p": place}
    pairs = (("home", place), ("job", job), ("pet", animal), ("thing", thing), ("ending", ending))
    return Prompt(
        instruction=wording.format(**words),
        records=(Record(subject=name, pairs=pairs),),
        neutral=f"{beginning.format(**words)} {capitalised(ending)}.",
    )


BUILDERS: Final[MappingProxyType[str, Callable[[Digits, bool], Prompt]]] = MappingProxyType(
    {
        "closed_qa": _closed_qa,
        "information_extraction": _information_extraction,
        "classification": _classification,
        "summarization": _summarization,
        "open_qa": _open_qa,
        "brainstorming": _brainstorming,
        "creative_writing": _creative_writing,
        "general_qa": _general_qa,
    }
)

"""Functions that make prompts of each category from digits, over held-out entities or over the others."""

CATEGORIES: Final = tuple(BUILDERS)
"""The categories of Dolly that FLEx's experiments draw from (arXiv:2506.00965)."""


@cache
def num_positions(category: str, *, held_out: bool) -> int:
    """Return the number of prompts of a category over held-out (or over the other) entities."""
    digits = Digits(category, 0)
    BUILDERS[category](digits, held_out)
    return prod(digits.bases)


def prompt_at(category: str, position: int, *, held_out: bool) -> Prompt:
    """Return the prompt at ``position``, below :func:`num_positions`; each position has a prompt of its
    own."""
    return BUILDERS[category](Digits(category, position), held_out)
