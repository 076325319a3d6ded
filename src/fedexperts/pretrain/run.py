"""Run one pretraining: from a corpus to a folder that `from_pretrained` loads."""

import importlib.metadata
import json
import platform
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fedexperts.errors import UserError
from fedexperts.pretrain.rows import batches
from fedexperts.pretrain.scores import PretrainScores, expert_table, score_pretrained
from fedexperts.pretrain.settings import PretrainSettings
from fedexperts.pretrain.tokenizer import train_tokenizer
from fedexperts.pretrain.training import Report, build_model, train


@dataclass(frozen=True, kw_only=True)
class PretrainReport:
    """Result of a pretraining run; written as ``pretrain.json`` beside the weights."""

    settings: PretrainSettings
    num_parameters: int
    num_texts: int
    """Texts trained on."""
    num_tokens: int
    """Tokens of these texts, padding left out."""
    loss: float
    """Mean cross-entropy (nats per learnt token) over the last 100 steps."""
    scores: PretrainScores
    """Measured on the weights as saved, in bfloat16's precision."""
    environment: dict[str, str]
    seconds: dict[str, float]
    """Wall-clock seconds by phase."""


def pretrain(settings: PretrainSettings, to: Path, report: Report) -> PretrainReport:
    """Train a model and its tokenizer from scratch and write them to the folder ``to``.

    The same settings on the same machine and library versions give the same bytes. The folder appears only
    when all is done; an interrupted run leaves nothing in it. ``report`` is called with lines of progress.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"{to} is not an empty folder; give `fedexperts pretrain --to` a new one")
    torch.set_num_threads(settings.threads)
    partial = to.with_name(f"{to.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        result = _pretrain_into(settings, partial, report)
        if to.exists():
            to.rmdir()
        partial.rename(to)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return result


def _pretrain_into(settings: PretrainSettings, folder: Path, report: Report) -> PretrainReport:
    started = time.monotonic()
    tokenizer = train_tokenizer(settings)
    model = build_model(settings, tokenizer)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    report(f"{num_parameters:,} parameters, {len(tokenizer)} tokens; training {settings.num_steps} steps")
    trained = time.monotonic()
    loss, num_texts, num_tokens = train(model, batches(tokenizer, settings), settings, report)
    scored = time.monotonic()
    model.to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    report("scoring the exam, held-out prompts and expert use")
    scores = score_pretrained(
        folder,
        seed=settings.seed,
        num_questions=settings.num_exam_questions,
        num_prompts=settings.num_test_prompts,
    )
    for layer in range(settings.num_layers):
        report(expert_table(scores, layer))
    result = PretrainReport(
        settings=settings,
        num_parameters=num_parameters,
        num_texts=num_texts,
        num_tokens=num_tokens,
        loss=loss,
        scores=scores,
        environment=_environment(),
        seconds={
            "tokenizer": round(trained - started, 1),
            "training": round(scored - trained, 1),
            "scoring": round(time.monotonic() - scored, 1),
        },
    )
    (folder / "pretrain.json").write_text(json.dumps(asdict(result), indent=1) + "\n")
    return result


def _environment() -> dict[str, str]:
    packages = ("torch", "transformers", "tokenizers")
    versions = {package: importlib.metadata.version(package) for package in packages}
    return {"python": platform.python_version(), **versions, "machine": platform.machine()}
