"""Draw the entities of the world and their facts, the same for every seed; a pretrained model can know
them."""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from fedexperts.data.tinyworld.words import (
    FICTIONAL_PEOPLE,
    FICTIONAL_PLACES,
    FICTIONAL_THINGS,
    HOBBIES,
    OCCASIONS,
    PEOPLE,
    PERSON_FIELDS,
    PLACE_FIELDS,
    PLACES,
    THING_FIELDS,
    THINGS,
    Field,
    listed,
)
from fedexperts.seeds import derive_random

_WORLD_SEED = 1729


@dataclass(frozen=True, kw_only=True)
class Entity:
    """A person, a place or a thing, with the value of each of its fields."""

    name: str
    """Name as it appears in the middle of a sentence (a thing with its article)."""
    fields: tuple[Field, ...]
    values: tuple[str, ...]
    """Values, one for each field, in the order of the fields."""

    def clause(self, index: int, wording: int = 0) -> str:
        """Return the predicate that tells field ``index``, e.g. ``lives in Oslem``."""
        return self.fields[index].clauses[wording].format(v=self.values[index])

    def statement(self, indices: tuple[int, ...], wording: int = 0) -> str:
        """Return a sentence that tells fields ``indices`` in that order, ready to stand after a comma."""
        return f"{self.name} {listed([self.clause(index, wording) for index in indices])}."

    def sentence(self, indices: tuple[int, ...], wording: int = 0) -> str:
        """Return the statement as a sentence of its own."""
        return capitalised(self.statement(indices, wording))


def capitalised(text: str) -> str:
    """Return ``text`` with its first letter in upper case and the rest unchanged."""
    return text[0].upper() + text[1:]


def _known(names: tuple[str, ...], fields: tuple[Field, ...], article: str = "") -> tuple[Entity, ...]:
    entities = []
    for name in names:
        rng = derive_random(_WORLD_SEED, "facts", name)
        values = tuple(rng.choice(field.values) for field in fields)
        entities.append(Entity(name=article + name, fields=fields, values=values))
    return tuple(entities)


KNOWN_PEOPLE: Final = _known(PEOPLE, PERSON_FIELDS)
KNOWN_PLACES: Final = _known(PLACES, PLACE_FIELDS)
KNOWN_THINGS: Final = _known(THINGS, THING_FIELDS, "the ")
KNOWN: Final = KNOWN_PEOPLE + KNOWN_PLACES + KNOWN_THINGS
"""All entities whose facts never change."""

FICTIONAL: Final = (
    tuple((name, PERSON_FIELDS) for name in FICTIONAL_PEOPLE),
    tuple((name, PLACE_FIELDS) for name in FICTIONAL_PLACES),
    tuple((f"the {name}", THING_FIELDS) for name in FICTIONAL_THINGS),
)
"""Names (people, places, things) that have other facts in every passage, so that the passage must be read."""


def is_held_out(position: int) -> bool:
    """Return whether the entry at ``position`` of its list is kept out of the pretraining instructions."""
    return position % 3 == 2


def _kits(owners: tuple[str, ...]) -> MappingProxyType[str, tuple[str, str]]:
    kits = {}
    for owner in owners:
        first, second = derive_random(_WORLD_SEED, "kit", owner).sample(THINGS, 2)
        kits[owner] = (first, second)
    return MappingProxyType(kits)


KITS: Final = _kits(HOBBIES + OCCASIONS)
"""Two things for each hobby and each occasion, from which brainstorming draws its ideas."""
