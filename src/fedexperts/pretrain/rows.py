"""Pack the corpus into rows of tokens; every text is packed whole."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from transformers import PreTrainedTokenizerFast

from fedexperts.data.tinyworld import PretrainingText, pretraining_texts
from fedexperts.errors import UserError
from fedexperts.pretrain.settings import PretrainSettings
from fedexperts.pretrain.tokenizer import ASSISTANT, END, USER
from fedexperts.seeds import derive_random

_WINDOW = 4096
"""Texts that are packed together; a larger window wastes less of a row."""

Encoded = tuple[list[int], list[int]]
"""Token ids of a text, and at each token the id to be predicted there (-100 for none)."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Texts packed into one row; every list has length T."""

    ids: list[int]
    labels: list[int]
    """At each token the id to be predicted there, -100 for none."""
    segments: list[int]
    """Index in the row of the text that a token belongs to, -1 for padding."""
    positions: list[int]


def batches(tokenizer: PreTrainedTokenizerFast, settings: PretrainSettings) -> Iterator[list[Row]]:
    """Yield batches of ``rows_per_step`` rows without end, in the order that the seed gives."""
    texts = pretraining_texts(settings.seed)
    rng = derive_random(settings.seed, "pretrain", "rows")
    waiting: list[Row] = []
    while True:
        encoded = encode(tokenizer, list(islice(texts, _WINDOW)))
        rows = pack(encoded, settings.row_tokens, tokenizer.pad_token_id)
        rng.shuffle(rows)
        waiting.extend(rows)
        while len(waiting) >= settings.rows_per_step:
            yield waiting[: settings.rows_per_step]
            del waiting[: settings.rows_per_step]


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[PretrainingText]) -> list[Encoded]:
    """Return token ids of each text with its end, and the id to be predicted at each token (-100 for
    none)."""
    prompts = [f"{USER}{text.prompt}{END}{ASSISTANT}" if text.prompt else "" for text in texts]
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer([text.answer + END for text in texts], add_special_tokens=False)["input_ids"]
    encoded = []
    for before, answer in zip(prompt_ids, answer_ids, strict=True):
        targets = [-100] * len(before) + list(answer)
        encoded.append(([*before, *answer], [*targets[1:], -100]))
    return encoded


def pack(encoded: list[Encoded], row_tokens: int, pad_token_id: int) -> list[Row]:
    """Pack texts, longest first, each into the fullest row that has room for it."""
    rooms: list[list[list[Encoded]]] = [[] for _ in range(row_tokens + 1)]
    for text in sorted(encoded, key=lambda text: len(text[0]), reverse=True):
        length = len(text[0])
        if length > row_tokens:
            raise UserError(f"pretrain row_tokens is {row_tokens}; a text of the corpus needs {length}")
        room = next((room for room in range(length, row_tokens + 1) if rooms[room]), None)
        row = [] if room is None else rooms[room].pop()
        row.append(text)
        rooms[(row_tokens if room is None else room) - length].append(row)
    return [_row(row, room, pad_token_id) for room, rows in enumerate(rooms) for row in rows]


def _row(texts: list[Encoded], room: int, pad_token_id: int) -> Row:
    lengths = [len(ids) for ids, _ in texts]
    return Row(
        ids=[token for ids, _ in texts for token in ids] + [pad_token_id] * room,
        labels=[label for _, labels in texts for label in labels] + [-100] * room,
        segments=[index for index, length in enumerate(lengths) for _ in range(length)] + [-1] * room,
        positions=[position for length in lengths for position in range(length)] + [0] * room,
    )
