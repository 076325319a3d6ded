"""Make the knowledge exam: multiple choice on the facts of the known entities."""

from typing import Final

from fedexperts.data.examples import Question
from fedexperts.data.tinyworld.world import KNOWN, Entity
from fedexperts.errors import UserError
from fedexperts.seeds import derive_random

_NUM_CHOICES = 4

ALL_FACTS: Final = tuple((entity, index) for entity in KNOWN for index in range(len(entity.fields)))
"""Every fact of the world: an entity and the index of one of its fields."""


def ask(entity: Entity, index: int) -> str:
    """Return the exam's question for field ``index`` of ``entity``."""
    return entity.fields[index].question.format(n=entity.name)


def make_exam(*, seed: int, num_questions: int) -> list[Question]:
    """Make distinct questions with four choices each; ``subject`` is the kind of fact.

    Subjects and answer positions are balanced to within one. Fewer than one question, or more questions than
    facts, raise a :class:`UserError`.
    """
    if not 1 <= num_questions <= len(ALL_FACTS):
        raise UserError(
            f"num_questions {num_questions} is not allowed: tinyworld's exam has 1 to {len(ALL_FACTS)}"
        )
    rng = derive_random(seed, "tinyworld exam")
    by_subject: dict[str, list[tuple[Entity, int]]] = {}
    for entity, index in rng.sample(ALL_FACTS, len(ALL_FACTS)):
        by_subject.setdefault(entity.fields[index].name, []).append((entity, index))
    queues = [by_subject[subject] for subject in sorted(by_subject)]
    facts: list[tuple[Entity, int]] = []
    while len(facts) < num_questions:
        facts.extend(queue.pop() for queue in queues if queue)
    answers = [position % _NUM_CHOICES for position in range(num_questions)]
    rng.shuffle(answers)
    return [
        _question(seed, entity, index, answer)
        for (entity, index), answer in zip(facts[:num_questions], answers, strict=True)
    ]


def _question(seed: int, entity: Entity, index: int, answer: int) -> Question:
    field = entity.fields[index]
    rng = derive_random(seed, "tinyworld choices", entity.name, field.name)
    choices = rng.sample([value for value in field.values if value != entity.values[index]], _NUM_CHOICES - 1)
    choices.insert(answer, entity.values[index])
    return Question(question=ask(entity, index), choices=tuple(choices), answer=answer, subject=field.name)
