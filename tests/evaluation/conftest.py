"""A tiny Qwen2-MoE with a tokenizer of whole words, and the same model after it has learnt a few examples."""

import random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fedexperts.data.batches import draw_batches, encode_all
from fedexperts.data.examples import Example
from fedexperts.data.prompts import PromptFormat
from fedexperts.models.tiny import tiny_model

SPECIAL = ["<pad>", "<eos>", "<user>", "<bot>", "<unk>"]
WORDS = ["where", "lies", "Lima", "Oslo", "Quito", "in", "Peru", "Norway", "Ecuador", "the", "capital", "of"]
WORDS += ["is", "a", "city", "far", "away"]
TEMPLATE = (
    "{% for message in messages %}<user> {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)
MAX_TOKENS = 24


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def format(tokenizer: PreTrainedTokenizerFast) -> PromptFormat:
    return PromptFormat(tokenizer, "chat", MAX_TOKENS)


@pytest.fixture(scope="session")
def examples() -> list[Example]:
    """Responses of different lengths, so that a mean over examples is not one over tokens."""
    pairs = [
        ("where lies Lima", "in Peru"),
        ("where lies Oslo", "Oslo is the capital of Norway"),
        ("the capital of Ecuador", "Quito"),
        ("is Quito far away", "Quito is a city in Ecuador far away"),
        ("is Lima the capital", "Lima is the capital of Peru"),
    ]
    return [Example(instruction=instruction, response=response) for instruction, response in pairs]


def new_model(num_words: int, **overrides: int) -> PreTrainedModel:
    return tiny_model("qwen2_moe", vocab_size=num_words, num_experts=4, **overrides)


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Random weights, anew for each test."""
    return new_model(len(tokenizer))


@pytest.fixture(scope="session")
def taught_model(format: PromptFormat, examples: list[Example]) -> PreTrainedModel:
    """The same model after 120 steps on the examples, which it then knows by heart."""
    model = new_model(len(format.tokenizer)).train()
    encoded, _ = encode_all(format, examples)
    batches = draw_batches(
        encoded, num_batches=120, batch_size=5, rng=random.Random(0), pad_token_id=format.pad_token_id
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in batches:
        optimizer.zero_grad()
        model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
        ).loss.backward()
        optimizer.step()
    return model.eval()
