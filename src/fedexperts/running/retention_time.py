"""Predict how long a run asks its models outside the clients' tasks, from one timed batch."""

import math
import time
from dataclasses import dataclass
from functools import partial

from fedexperts.config.schema import RunConfig
from fedexperts.evaluation.generate import generate_greedily
from fedexperts.running.workbench import Workbench

_FEW, _MORE = 1, 5
"""New tokens of the two timed passes; their difference is the time of a token without that of the prompt."""
_NEVER = -1
"""In place of the end-of-sequence token, so that no timed answer ends."""


@dataclass(frozen=True, kw_only=True)
class PredictedRetention:
    """Free questions and neutral instructions of a run, and their time."""

    num_free_questions: int
    num_neutral: int
    num_models: int
    """Number of times that a model is asked all of them."""
    seconds_at_most: float
    """Wall clock of one process if every answer has `evaluation.max_new_tokens` tokens."""


def predict_retention(bench: Workbench) -> PredictedRetention | None:
    """Time a batch of the longest prompts on the model in place; None where nothing is asked."""
    if not len(bench.probe):
        return None
    num_models = _count_models(bench.config, len(bench.data.client_ids))
    return PredictedRetention(
        num_free_questions=len(bench.probe.questions),
        num_neutral=len(bench.probe.neutral),
        num_models=num_models,
        seconds_at_most=num_models * _seconds(bench),
    )


def _count_models(config: RunConfig, num_clients: int) -> int:
    """Count the untouched model, the server's at each evaluation, and the clients' before and after."""
    every, evaluation = config.evaluation.every, config.evaluation
    num_interim = max(config.rounds - 1, 0) // every if every else 0
    return 2 + num_interim + (2 * num_clients if evaluation.exam.personalised else 0)


def _seconds(bench: Workbench) -> float:
    """Return the time to ask one model, at most."""
    settings, asked = bench.config.evaluation, [*bench.probe.questions, *bench.probe.neutral]
    positions = getattr(bench.parts.model.config, "max_position_embeddings", None) or 2**31
    room = max(positions - max(settings.max_new_tokens, _MORE), 1)
    prompts = sorted((prompt[-room:] for prompt in bench.format.encode_prompts(asked)), key=len)
    run = partial(
        generate_greedily,
        bench.parts.model,
        prompts[-settings.batch_size :],
        batch_size=settings.batch_size,
        eos_token_id=_NEVER,
        pad_token_id=bench.format.pad_token_id,
    )
    run(max_new_tokens=_FEW)
    times = []
    for num_tokens in (_FEW, _MORE):
        started = time.perf_counter()
        run(max_new_tokens=num_tokens)
        times.append(time.perf_counter() - started)
    of_token = max(times[1] - times[0], 0.0) / (_MORE - _FEW)
    return math.ceil(len(asked) / settings.batch_size) * (times[0] + settings.max_new_tokens * of_token)
