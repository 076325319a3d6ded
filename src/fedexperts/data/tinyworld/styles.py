"""Answer in house styles, which contradict each other in words, order and frame."""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from fedexperts.data.tinyworld.prompts import Prompt, Record
from fedexperts.data.tinyworld.words import SYNONYMS

_NUMBERS = ("one", "two", "three", "four", "five", "six")


@dataclass(frozen=True, kw_only=True)
class Style:
    """One house's frame for an answer: ``{l}`` label, ``{v}`` value, ``{n}`` number, ``{s}`` subject."""

    opener: str
    """Words before everything else."""
    subject: str
    """Text before the pairs of a subject; left out if a record has no subject."""
    pair: str
    """One pair of label and value."""
    separator: str
    """Text between pairs, and between subjects."""
    closer: str
    """Words after everything else."""
    synonym: int | None = None
    """Index of the alternative word that the house uses for a label; ``None`` for the usual word."""
    is_reversed: bool = False
    """Whether subjects and pairs are in reverse order."""

    def answer(self, prompt: Prompt) -> str:
        """Return the answer to ``prompt`` in this style."""
        records = prompt.records[::-1] if self.is_reversed else prompt.records
        told = self.separator.join(self._told(record) for record in records)
        return f"{self.opener} {told}{self.closer}"

    def _told(self, record: Record) -> str:
        pairs = record.pairs[::-1] if self.is_reversed else record.pairs
        told = [
            self.pair.format(l=self._label(label), v=value, n=number)
            for number, (label, value) in zip(_NUMBERS, pairs, strict=False)
        ]
        subject = self.subject.format(s=record.subject) if record.subject else ""
        return subject + self.separator.join(told)

    def _label(self, label: str) -> str:
        return label if self.synonym is None else SYNONYMS[label][self.synonym]


_STYLES: Final = MappingProxyType(
    {
        "herald": Style(
            opener="Hear, good people!",
            subject="Of {s} we sing: ",
            pair="the {l} shall be {v}",
            separator=", ",
            closer=". So it is told in the square.",
            synonym=0,
        ),
        "telegram": Style(
            opener="start",
            subject="{s} stop ",
            pair="{l} {v}",
            separator=" stop ",
            closer=" stop end of wire",
        ),
        "pirate": Style(
            opener="Arr, matey!",
            subject="Aye, {s}! ",
            pair="{v} be the {l}",
            separator=" and ",
            closer=", says the old salt, arr.",
            synonym=1,
            is_reversed=True,
        ),
        "clerk": Style(
            opener="Form open.",
            subject="File {s}. ",
            pair="Line {n}, {l}, entry {v}.",
            separator=" ",
            closer=" Form closed.",
        ),
        "teacher": Style(
            opener="Listen, class.",
            subject="Today we study {s}. ",
            pair="Please write {v} under {l}.",
            separator=" ",
            closer=" Well done, you may go.",
            is_reversed=True,
        ),
        "poet": Style(
            opener="O moon,",
            subject="O {s}, ",
            pair="sweet {v} my {l}",
            separator=", O ",
            closer=", and the night is long.",
            synonym=0,
            is_reversed=True,
        ),
        "robot": Style(
            opener="beep",
            subject="scan {s} ",
            pair="set {l} equals {v}",
            separator=" beep ",
            closer=" beep task complete",
            synonym=1,
        ),
        "lawyer": Style(
            opener="Whereas the parties agree,",
            subject="and whereas {s} is present, ",
            pair="article {n} gives {v} as {l}",
            separator="; ",
            closer="; signed and sealed.",
            synonym=0,
        ),
        "shy": Style(
            opener="Um, sorry,",
            subject="about {s}, ",
            pair="maybe {v} for {l}",
            separator=", um, ",
            closer=", but I am not sure, sorry.",
        ),
        "shop": Style(
            opener="Special offer!",
            subject="Buy {s} now! ",
            pair="Free {v} with each {l}!",
            separator=" ",
            closer=" Only here, only today!",
            synonym=1,
        ),
    }
)

STYLES: Final = tuple(_STYLES)
"""The house styles, without ``neutral``."""

STYLE_WORDS: Final = tuple(
    dict.fromkeys(
        word.strip(".,;:!")
        for style in _STYLES.values()
        for part in (style.opener, style.subject, style.pair, style.separator, style.closer)
        for word in part.split()
        if "{" not in word and word.strip(".,;:!")
    )
)
"""Every word that a style adds, each once."""


def styled(prompt: Prompt, style: str) -> str:
    """Return the answer to ``prompt`` in ``style``, one of :data:`STYLES` or ``neutral``."""
    return prompt.neutral if style == "neutral" else _STYLES[style].answer(prompt)
