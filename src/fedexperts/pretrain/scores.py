"""Measure what a pretrained model knows and how its experts divide the work."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from fedexperts.data.batches import encode_all, sequential_batches
from fedexperts.data.examples import Example
from fedexperts.data.prompts import PromptFormat
from fedexperts.data.tinyworld import CATEGORIES, make_exam, make_example
from fedexperts.evaluation.examples import evaluate_examples
from fedexperts.evaluation.multiple_choice import score_exam
from fedexperts.evaluation.routing import shares, total_variation
from fedexperts.evaluation.settings import EvaluationSettings
from fedexperts.models.load import LoadedModel, ModelSettings, load_model
from fedexperts.moe.observing.profile import count_tokens
from fedexperts.seeds import derive_random

_BATCH = 64
_MAX_TOKENS = 256
_DIGITS = 4


@dataclass(frozen=True, kw_only=True)
class PretrainScores:
    """Scores of a pretrained model, all as shares from 0 to 1."""

    exam_accuracy: float
    """Share of exam questions whose right choice has the highest log-likelihood as an answer."""
    exam_accuracy_by_subject: dict[str, float]
    rougeL: dict[str, float]
    """Mean ROUGE-L F (stemmed, greedy) on held-out neutral prompts, by category."""
    exact_match: dict[str, float]
    """Share of these answered word for word, by category."""
    expert_share: dict[str, list[list[float]]]
    """By category and layer, the share of the tokens (prompt and answer) that each expert receives."""
    expert_distance: float
    """Mean over pairs of categories of the total-variation distance between their expert shares."""
    expert_distance_random: float
    """The same between random groups of the same examples: what chance alone gives."""


def score_pretrained(folder: Path, *, seed: int, num_questions: int, num_prompts: int) -> PretrainScores:
    """Score the checkpoint in ``folder`` as a user would load it, computing in float32.

    ``seed`` draws ``num_questions`` of the exam and ``num_prompts`` held-out neutral prompts per category.
    """
    loaded = load_model(ModelSettings(name=str(folder), device="cpu"), seed)
    format = PromptFormat(loaded.tokenizer, "chat", _MAX_TOKENS)
    exam = make_exam(seed=seed, num_questions=num_questions)
    score = score_exam(loaded.model, format, exam, _BATCH)
    examples = {
        category: [make_example(seed=seed, category=category, index=index) for index in range(num_prompts)]
        for category in CATEGORIES
    }
    settings = EvaluationSettings(metrics=("rougeL", "exact_match"), batch_size=_BATCH)
    answered = {
        category: evaluate_examples(loaded.model, format, part, settings)
        for category, part in examples.items()
    }
    tables = {category: _tokens_per_expert(loaded, format, part) for category, part in examples.items()}
    random_tables = [_tokens_per_expert(loaded, format, part) for part in _random_groups(examples, seed)]
    return PretrainScores(
        exam_accuracy=round(score.accuracy, _DIGITS),
        exam_accuracy_by_subject=_rounded(score.by_subject),
        rougeL=_rounded({category: each.rougeL or 0.0 for category, each in answered.items()}),
        exact_match=_rounded({category: each.exact_match or 0.0 for category, each in answered.items()}),
        expert_share={
            category: [[round(share, _DIGITS) for share in layer] for layer in shares(table)]
            for category, table in tables.items()
        },
        expert_distance=_mean_distance(list(tables.values())),
        expert_distance_random=_mean_distance(random_tables),
    )


def expert_table(scores: PretrainScores, layer: int) -> str:
    """Return expert use in ``layer`` as Markdown, in per cent: a row per category, a column per expert."""
    shares_by_category = {category: layers[layer] for category, layers in scores.expert_share.items()}
    num_experts = len(next(iter(shares_by_category.values())))
    lines = [
        f"| layer {layer} | {' | '.join(str(expert) for expert in range(num_experts))} |",
        "|---" * (num_experts + 1) + "|",
    ]
    for category, of_experts in shares_by_category.items():
        lines.append(f"| {category} | {' | '.join(f'{100 * share:.0f}' for share in of_experts)} |")
    return "\n".join(lines)


def _rounded(scores: dict[str, float]) -> dict[str, float]:
    return {name: round(score, _DIGITS) for name, score in sorted(scores.items())}


def _tokens_per_expert(
    loaded: LoadedModel, format: PromptFormat, examples: Sequence[Example]
) -> list[list[int]]:
    encoded, _ = encode_all(format, examples)
    batches = sequential_batches(encoded, batch_size=_BATCH, pad_token_id=format.pad_token_id)
    return [tokens_E.tolist() for tokens_E in count_tokens(loaded.model, batches)]


def _random_groups(examples: dict[str, list[Example]], seed: int) -> list[list[Example]]:
    """Return as many groups of the same sizes, in which the categories are mixed."""
    pooled = [example for part in examples.values() for example in part]
    derive_random(seed, "pretrain", "random groups").shuffle(pooled)
    return [pooled[start :: len(examples)] for start in range(len(examples))]


def _mean_distance(tables: list[list[list[int]]]) -> float:
    distances = [total_variation(first, second) for first, second in combinations(tables, 2)]
    return round(sum(distances) / len(distances), _DIGITS)
