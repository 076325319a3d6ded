"""Seconds of a whole FedAvg job on LoRA, ours against a new TRL trainer for every client and round.

Ours runs twice: in one process with two threads, and in as many one-thread workers as there are cores.
"""

import os
import statistics
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.setting import bench_config, model_source
from benchmarks.timing import in_turns, paired_ratio, spread
from benchmarks.usual_recipe import JobRun, UsualRecipe
from fedexperts.config.schema import RunConfig
from fedexperts.costs.stopwatch import Stopwatch
from fedexperts.data.batches import IGNORED_LABEL, encode_all
from fedexperts.evaluation.examples import evaluate_examples
from fedexperts.federation.checkpoint import load_checkpoint
from fedexperts.moe.surgery.seam import current, load_tensors
from fedexperts.run_directory import RunDirectory, read_lines
from fedexperts.running.experiment import run_experiment
from fedexperts.running.progress import QuietProgress
from fedexperts.running.workbench import Workbench, open_workbench
from fedexperts.tensors import Tensors

SAME_LOSS = 0.05
"""Largest difference between both sides' losses, as a share: they draw the same examples, but batch them
differently, so the losses cannot be equal."""
HELD_OUT_PER_CLIENT = 16


def measure(model: str, *, repeats: int = 3, num_local_steps: int = 5) -> dict[str, Any]:
    """All figures, ready for JSON."""
    steps = f"training.num_local_steps={num_local_steps}"
    config = bench_config(model, "fedavg", steps)
    with_workers = bench_config(model, "fedavg", steps, "threads=1", f"transport.workers={_num_cores()}")
    with open_workbench(config, Stopwatch()) as bench:
        start = current(bench.parts.model, bench.parts.lora_names)
        rivals = {
            name: UsualRecipe(model_source(model), config, start, tokenized_before=name == "kinder")
            for name in ("recipe", "kinder")
        }
        assert_same_examples(bench, rivals["recipe"])
        runs: dict[str, list[JobRun]] = {"ours": [], "workers": [], "recipe": [], "kinder": []}

        def ours(name: str, config_of_ours: RunConfig) -> float:
            runs[name].append(run_ours(config_of_ours))
            # A run sets the threads of this process, and the recipes run in it too.
            torch.set_num_threads(config.threads)
            return runs[name][-1].rounds_seconds

        def theirs(name: str) -> float:
            runs[name].append(rivals[name].run(bench.format.tokenizer))
            return runs[name][-1].rounds_seconds

        seconds = in_turns(
            {
                "ours": lambda: ours("ours", config),
                "workers": lambda: ours("workers", with_workers),
                "recipe": lambda: theirs("recipe"),
                "kinder": lambda: theirs("kinder"),
            },
            repeats,
        )
        losses = {name: _losses(bench, made[-1]) for name, made in runs.items()}
        losses["start"] = {"held_out": _held_out_loss(bench, start)}
    whole = {
        name: [run.loading_seconds + run.rounds_seconds for run in made[1:]] for name, made in runs.items()
    }
    return {
        "model": model,
        "clients": 4,
        "workers": min(with_workers.transport.workers, 4),
        "rounds": config.rounds,
        "num_local_steps": num_local_steps,
        "batch_size": config.training.batch_size,
        "seconds_of_rounds": {name: spread(values) for name, values in seconds.items()},
        "seconds_with_loading": {name: spread(values) for name, values in whole.items()},
        "recipe_over_ours": paired_ratio(seconds["recipe"], seconds["ours"]),
        "kinder_over_ours": paired_ratio(seconds["kinder"], seconds["ours"]),
        "recipe_over_workers": paired_ratio(seconds["recipe"], seconds["workers"]),
        "ours_over_workers": paired_ratio(seconds["ours"], seconds["workers"]),
        "recipe_over_ours_with_loading": paired_ratio(whole["recipe"], whole["ours"]),
        "phases": {name: _median_phases(made[1:]) for name, made in runs.items()},
        "losses": losses,
        "loss_apart": _apart(losses),
    }


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_ours(config: RunConfig) -> JobRun:
    """The same job by ``fedexperts run``; its evaluation, before and after the rounds, is off the clock."""
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(Path(folder) / "run")
        result = run_experiment(config, run.path, progress=QuietProgress())
        reached, lines = load_checkpoint(run), read_lines(run.rounds)
    assert reached is not None
    seconds, phases = result["seconds"], Counter[str]()
    for line in lines:
        phases.update(
            {_PHASE_NAMES[phase]: value for phase, value in line["seconds"].items() if phase != "total"}
        )
    # Of turns side by side, the phases add up to more than the rounds took.
    phases["run directory"] = max(seconds["rounds"] - phases.total(), 0.0)
    return JobRun(
        loading_seconds=sum(seconds.get(phase, 0.0) for phase in ("data", "model", "workers")),
        rounds_seconds=seconds["rounds"],
        phases=dict(phases),
        losses=[line["train_loss"] for line in lines],
        state=reached.state.tensors,
    )


_PHASE_NAMES = {
    "load": "personal tensors in and out",
    "save": "personal tensors in and out",
    "train": "encoding, drawing and training",
    "transport": "messages",
    "aggregate": "checking and averaging",
}


def assert_same_examples(bench: Workbench, recipe: UsualRecipe) -> None:
    """TRL must see the tokens and labels that we see, or it does other work."""
    client_id = bench.data.client_ids[0]
    ours, _ = encode_all(bench.format, bench.data.examples(client_id, "train"))
    records = recipe.records(bench.data, client_id, bench.format)
    theirs = recipe.trainer(recipe.model(), records, bench.format.tokenizer, 1).train_dataset
    for mine, ids, labels in zip(ours, theirs["input_ids"], theirs["labels"], strict=True):
        assert list(mine.input_ids) == list(ids), "TRL tokenizes differently"
        assert sum(label != IGNORED_LABEL for label in labels) == mine.num_labels, "TRL masks differently"


def _losses(bench: Workbench, run: JobRun) -> dict[str, float]:
    return {"last_round": run.losses[-1], "held_out": _held_out_loss(bench, run.state)}


def _held_out_loss(bench: Workbench, state: Tensors) -> float:
    """Loss of the global model on the same test examples of every client, by our own evaluation."""
    load_tensors(bench.parts.model, state)
    examples = [
        example
        for client_id in bench.data.client_ids
        for example in bench.data.examples(client_id, "test")[:HELD_OUT_PER_CLIENT]
    ]
    loss = evaluate_examples(bench.parts.model, bench.format, examples, bench.config.evaluation).loss
    assert loss is not None
    return loss


def _apart(losses: dict[str, dict[str, float]]) -> dict[str, float]:
    """Difference of the recipe's losses from ours as a share of ours.

    Raises:
        AssertionError: it is beyond :data:`SAME_LOSS`, so the two do not train alike.
    """
    apart = {kind: losses["recipe"][kind] / loss - 1 for kind, loss in losses["ours"].items()}
    assert all(abs(share) <= SAME_LOSS for share in apart.values()), f"losses differ: {losses}"
    return apart


def _median_phases(runs: list[JobRun]) -> dict[str, float]:
    return {phase: statistics.median(run.phases[phase] for run in runs) for phase in runs[0].phases}
