"""Greedy answers: those of transformers' generate, whatever the batch, with nothing left in the model."""

import random
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from fedexperts.errors import UserError
from fedexperts.evaluation.generate import Answer, generate_greedily
from fedexperts.models.tiny import tiny_model

NO_EOS = -1
LIMIT = 16


def random_prompts(num_words: int, num_prompts: int = 8) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(5, num_words) for _ in range(rng.randrange(3, 20))] for _ in range(num_prompts)]


def answers(model: Any, prompts: list[list[int]], *, eos: int, batch_size: int = 8) -> list[Answer]:
    return generate_greedily(
        model, prompts, max_new_tokens=LIMIT, batch_size=batch_size, eos_token_id=eos, pad_token_id=0
    )


def common_token(model: Any, prompts: list[list[int]]) -> int:
    """The token that most answers come to; as EOS it ends rows at different steps."""
    said = [set(answer.token_ids) for answer in answers(model, prompts, eos=NO_EOS)]
    return Counter(token for each in said for token in each).most_common(1)[0][0]


def by_transformers(model: Any, prompts: list[list[int]], eos: int) -> list[tuple[int, ...]]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    config = GenerationConfig(do_sample=False, max_new_tokens=LIMIT, eos_token_id=eos, pad_token_id=0)
    with torch.no_grad():
        rows = model.generate(ids, attention_mask=mask, generation_config=config)[:, longest:].tolist()
    return [tuple(row[: row.index(eos)]) if eos in row else tuple(row) for row in rows]


def test_answers_are_those_of_transformers_generate(model: PreTrainedModel) -> None:
    prompts = random_prompts(model.config.vocab_size)
    eos = common_token(model, prompts)

    got = answers(model, prompts, eos=eos)

    assert [answer.token_ids for answer in got] == by_transformers(model, prompts, eos)
    assert 0 < sum(answer.is_finished for answer in got) < len(got)


# deepseek_v3 has latent attention, jamba states beside keys and values, minimax a kind of cache of its own.
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss", "jamba", "minimax"])
def test_answers_do_not_depend_on_the_batch_size(family: str) -> None:
    model = tiny_model(family)
    prompts = random_prompts(128)
    eos = common_token(model, prompts)

    alone = answers(model, prompts, eos=eos, batch_size=1)

    assert answers(model, prompts, eos=eos, batch_size=8) == alone
    assert answers(model, prompts, eos=eos, batch_size=3) == alone


def test_an_answer_has_no_eos_and_says_whether_it_ended(model: PreTrainedModel) -> None:
    prompts = random_prompts(model.config.vocab_size)
    eos = common_token(model, prompts)

    for answer in answers(model, prompts, eos=eos):
        assert eos not in answer.token_ids
        assert answer.is_finished == (len(answer.token_ids) < LIMIT)


def test_rows_that_ended_leave_the_batch(model: PreTrainedModel) -> None:
    prompts = random_prompts(model.config.vocab_size)
    eos = common_token(model, prompts)
    sizes: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )

    got = answers(model, prompts, eos=eos)

    hook.remove()
    num_unfinished = sum(not answer.is_finished for answer in got)
    assert sizes[0] == len(prompts)
    assert sizes == sorted(sizes, reverse=True)
    assert num_unfinished <= sizes[-1] < len(prompts)


def test_generation_stops_when_all_have_ended(model: PreTrainedModel) -> None:
    prompt = [5, 6, 7]
    said = answers(model, [prompt], eos=NO_EOS)[0].token_ids
    num_calls = 0

    def count(*_: Any) -> None:
        nonlocal num_calls
        num_calls += 1

    model.register_forward_pre_hook(count)

    assert answers(model, [prompt], eos=said[0]) == [Answer(token_ids=(), is_finished=True)]
    assert num_calls == 1


def test_the_model_can_be_trained_afterwards_and_keeps_its_modes(model: PreTrainedModel) -> None:
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]

    answers(model, random_prompts(model.config.vocab_size), eos=NO_EOS)

    assert [module.training for module in model.modules()] == modes
    ids = torch.tensor([[5, 6, 7, 8]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.model.layers[0].self_attn.parameters())


def test_logits_that_are_not_finite_are_an_error(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan

    with pytest.raises(UserError, match="logits are not finite"):
        answers(model, [[5, 6]], eos=NO_EOS)
