"""Small sources and tokenizers for the tests of the data."""

import gzip
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

# The same cases in every run, and no limit in milliseconds, which a busy machine would miss.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<user>", "<bot>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[..., Path]:
    """Writes records as JSON lines, gzip'd if the file's name says so, and returns the path."""

    def write(records: Iterable[Mapping[str, Any]], name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        text = "".join(json.dumps(record) + "\n" for record in records).encode()
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
        return path

    return write


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Makes tokenizers with one token for each byte, and five special ones of ids 0 to 4."""

    def make(*, adds_bos_and_eos: bool = False, **options: Any) -> PreTrainedTokenizerFast:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(SPECIAL_TOKENS)
        if adds_bos_and_eos:
            backend.post_processor = processors.TemplateProcessing(
                single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
            )
        return PreTrainedTokenizerFast(tokenizer_object=backend, **options)

    return make


@pytest.fixture
def chat_tokenizer(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """A tokenizer with every special token and a chat template."""
    return make_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=CHAT_TEMPLATE)


@pytest.fixture
def real_data() -> Path:
    """The folder of real data sets that the environment variable FEDEXPERTS_DATA names."""
    folder = os.environ.get("FEDEXPERTS_DATA")
    if not folder:
        pytest.skip("FEDEXPERTS_DATA names no folder of real data sets")
    return Path(folder)
