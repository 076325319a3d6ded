import json

import pytest
from transformers import PreTrainedTokenizerFast

from fedexperts.data.examples import Example
from fedexperts.data.federated import load_federated_data
from fedexperts.data.prompts import PromptFormat
from fedexperts.data.settings import DataSettings, PartitionSettings
from fedexperts.errors import UserError

EXAMPLE = Example(instruction="Where is Lima?", response="In Peru.")
WITH_CONTEXT = Example(instruction="Where is Lima?", context="Lima is in Peru.", response="In Peru.")
EOS = 2


def test_chat_prompt_and_response_meet_at_the_prompt_length(chat_tokenizer):
    format = PromptFormat(chat_tokenizer, "auto", 256)
    encoded = format.encode(EXAMPLE)
    prompt, labels = encoded.input_ids[: encoded.prompt_length], encoded.input_ids[encoded.prompt_length :]
    assert chat_tokenizer.decode(prompt) == "<s><user>Where is Lima?<bot>"
    assert chat_tokenizer.decode(labels) == "In Peru.</s>"
    assert encoded.num_labels == len(labels) == len("In Peru.") + 1
    assert not encoded.is_truncated


def test_generation_begins_where_the_labels_begin(chat_tokenizer):
    format = PromptFormat(chat_tokenizer, "auto", 256)
    encoded = format.encode(WITH_CONTEXT)
    assert tuple(format.encode_prompt(WITH_CONTEXT)) == encoded.input_ids[: encoded.prompt_length]


def test_context_follows_the_instruction_in_the_chat_template(chat_tokenizer):
    text = PromptFormat(chat_tokenizer, "chat", 256).prompt_text(WITH_CONTEXT)
    assert text == "<s><user>Where is Lima?\n\nLima is in Peru.<bot>"


def test_alpaca_is_used_without_a_chat_template(make_tokenizer):
    format = PromptFormat(make_tokenizer(eos_token="</s>", pad_token="<pad>"), "auto", 256)
    assert format.prompt_text(EXAMPLE).endswith("### Instruction:\nWhere is Lima?\n\n### Response:\n")
    assert "### Input:" not in format.prompt_text(EXAMPLE)
    assert "\n\n### Input:\nLima is in Peru.\n\n### Response:\n" in format.prompt_text(WITH_CONTEXT)


def test_alpaca_can_be_chosen_over_a_chat_template(chat_tokenizer):
    assert "### Response:" in PromptFormat(chat_tokenizer, "alpaca", 256).prompt_text(EXAMPLE)


def test_there_is_one_bos_with_either_template(make_tokenizer):
    options = {"adds_bos_and_eos": True, "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    chat_template = "{{ bos_token }}<user>{{ messages[0].content }}<bot>"
    chat = PromptFormat(make_tokenizer(chat_template=chat_template, **options), "auto", 256)
    alpaca = PromptFormat(make_tokenizer(**options), "auto", 256)
    for format in (chat, alpaca):
        ids = format.encode(EXAMPLE).input_ids
        assert ids[0] == 1
        assert ids.count(1) == 1
        assert ids.count(EOS) == 1


def test_braces_in_an_instruction_stay(make_tokenizer):
    format = PromptFormat(make_tokenizer(eos_token="</s>"), "alpaca", 256)
    assert "{context} {0}" in format.prompt_text(Example(instruction="{context} {0}", response="x"))


def test_eos_is_the_last_label(chat_tokenizer):
    encoded = PromptFormat(chat_tokenizer, "auto", 256).encode(EXAMPLE)
    assert encoded.input_ids[-1] == EOS


def test_control_tokens_in_a_response_are_plain_text(chat_tokenizer):
    encoded = PromptFormat(chat_tokenizer, "auto", 256).encode(Example(instruction="?", response="a</s>b"))
    assert encoded.num_labels == len("a</s>b") + 1
    assert encoded.input_ids.count(EOS) == 1


@pytest.mark.parametrize(("max_tokens", "num_labels"), [(30, 9), (29, 8), (23, 2), (21, 0), (5, 0)])
def test_what_is_over_the_limit_is_cut_from_the_end(chat_tokenizer, max_tokens, num_labels):
    format = PromptFormat(chat_tokenizer, "auto", max_tokens)
    encoded = format.encode(Example(instruction="123456789012345678", response="In Peru."))
    assert encoded.num_labels == num_labels
    assert encoded.is_truncated == (max_tokens < 30)
    assert len(encoded.input_ids) == min(max_tokens, 30)


def test_a_prompt_for_generation_is_never_cut(chat_tokenizer):
    format = PromptFormat(chat_tokenizer, "auto", 4)
    assert len(format.encode_prompt(EXAMPLE)) == 3 + len(EXAMPLE.instruction)


def test_a_tokenizer_without_eos_is_refused(make_tokenizer):
    with pytest.raises(UserError, match="has no EOS token"):
        PromptFormat(make_tokenizer(pad_token="<pad>"), "auto", 256)


def test_a_chat_template_that_is_not_there_is_refused(make_tokenizer):
    with pytest.raises(UserError, match=r'data.template is "chat"'):
        PromptFormat(make_tokenizer(eos_token="</s>"), "chat", 256)


def test_a_chat_template_that_fails_is_refused(make_tokenizer):
    tokenizer = make_tokenizer(eos_token="</s>", chat_template="{{ raise_exception('system first') }}")
    with pytest.raises(UserError, match="system first"):
        PromptFormat(tokenizer, "auto", 256)


@pytest.mark.parametrize(
    ("options", "pad"),
    [
        ({"pad_token": "<pad>"}, 0),
        ({"pad_token": "</s>", "unk_token": "<user>", "bos_token": "<s>"}, 3),
        ({"bos_token": "<s>"}, 1),
        ({}, EOS),
    ],
)
def test_padding_is_eos_only_where_nothing_else_is(make_tokenizer, options, pad):
    assert PromptFormat(make_tokenizer(eos_token="</s>", **options), "auto", 256).pad_token_id == pad


def test_a_prompt_does_not_change_with_the_date(make_tokenizer):
    template = "{{ strftime_now('%d %B %Y') }} {{ messages[0].content }}"
    format = PromptFormat(make_tokenizer(eos_token="</s>", chat_template=template), "auto", 256)
    assert format.prompt_text(EXAMPLE) == "01 January 2025 Where is Lima?"


def test_many_examples_encode_as_one_by_one(chat_tokenizer):
    format = PromptFormat(chat_tokenizer, "auto", 256)
    assert format.encode_examples([EXAMPLE, WITH_CONTEXT]) == [
        format.encode(EXAMPLE),
        format.encode(WITH_CONTEXT),
    ]
    assert format.encode_examples([]) == []


def test_a_real_tokenizer_learns_each_response_to_its_end(real_data):
    """Its chat template opens and closes thoughts in the prompt, and its EOS ends the assistant's turn."""
    folder = real_data / "tokenizers"
    config = json.loads((folder / "minimind_6400_tokenizer_config.json").read_text())
    special = {name: config[name] for name in ("bos_token", "eos_token", "pad_token", "chat_template")}
    path = str(folder / "minimind_6400_tokenizer.json")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=path, **special)
    format = PromptFormat(tokenizer, "auto", 100_000)
    source = DataSettings(
        source=str(real_data / "dolly"),
        max_examples=200,
        partition=PartitionSettings(kind="iid", num_clients=1),
    )
    with load_federated_data(source, 0) as data:
        examples = data.examples("client-000", "train")
    for example, encoded in zip(examples, format.encode_examples(examples), strict=True):
        labels = encoded.input_ids[encoded.prompt_length :]
        assert tokenizer.decode(labels) == example.response + "<|im_end|>"
        prompt = tokenizer.decode(encoded.input_ids[: encoded.prompt_length])
        assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
