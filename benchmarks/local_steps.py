"""One client's local steps against transformers' Trainer and against the matmul roof of the machine."""

import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainingArguments

from benchmarks.matmul_roof import ProductCounter, seconds_at_own_shapes, square_flops_per_second
from benchmarks.phases import shares_by_part
from benchmarks.setting import bench_config, model_source
from benchmarks.timing import in_turns, paired_ratio, spread
from fedexperts.algorithms.api import ModelParts
from fedexperts.config.schema import RunConfig
from fedexperts.costs.stopwatch import Stopwatch
from fedexperts.data.batches import Batch, draw_batches, encode_all
from fedexperts.models.adapters import find_targets, lora_config, lora_state, peft_state
from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.graft import GateMeter, GraftForm, grafted
from fedexperts.moe.surgery.seam import current, load_tensors
from fedexperts.running.workbench import Workbench, open_workbench
from fedexperts.tensors import Tensors
from fedexperts.training.local_steps import LocalResult, local_steps
from fedexperts.training.optimizers import ParameterGroup
from fedexperts.training.settings import TrainingSettings

CLIENT = "client-000"
SAME_LORA = 1e-3
"""Largest difference of the LoRA tensors after all steps, as a share of how far they moved."""


@dataclass(frozen=True, kw_only=True)
class Ours:
    """Our model and one client's batches, ready for local steps."""

    bench: Workbench
    batches: list[Batch]
    start: Tensors

    @property
    def parts(self) -> ModelParts:
        """The model."""
        return self.bench.parts

    @property
    def training(self) -> TrainingSettings:
        """The settings."""
        return self.bench.config.training

    def groups(self) -> list[ParameterGroup]:
        """LoRA alone, as FedAvg trains it."""
        return [ParameterGroup(names=self.parts.lora_names, lr=self.training.lr)]

    def train(self, batches: Sequence[Batch]) -> LocalResult:
        """Local steps from LoRA's start."""
        load_tensors(self.parts.model, self.start)
        return local_steps(self.parts.model, batches, self.groups(), self.training, seed=0)


def measure(model: str, *, repeats: int = 5, num_steps: int = 20) -> dict[str, Any]:
    """All figures, ready for JSON."""
    config = bench_config(model, "fedavg", f"training.num_local_steps={num_steps}")
    with _prepared(config) as ours:
        rival = TrainerRival(model_source(model), config, ours)
        assert_same_training(ours, rival)
        seconds = in_turns(
            {
                "ours": lambda: _seconds(lambda: ours.train(ours.batches)),
                "trainer": lambda: rival.train()[0],
                "ours_with_data": lambda: _seconds(lambda: ours.train(_drawn(ours.bench))),
                "flex": lambda: _flex_seconds(ours),
            },
            repeats,
        )
        num_tokens = sum(int(batch.attention_mask.sum()) for batch in ours.batches)
        roof = _roof(ours)
        shares = shares_by_part(ours.parts.model, lambda: ours.train(ours.batches[:5]))
    roof_seconds = {key: value * num_steps for key, value in roof["seconds_per_step"].items()}
    medians = {name: spread(values)["median"] for name, values in seconds.items()}
    return {
        "model": model,
        "num_steps": num_steps,
        "batch_size": config.training.batch_size,
        "num_tokens": num_tokens,
        "num_padding": sum(batch.attention_mask.numel() for batch in ours.batches) - num_tokens,
        "experts_implementation": {"ours": "fedexperts over grouped_mm", "trainer": rival.experts},
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "tokens_per_second": {
            name: spread([num_tokens / value for value in values]) for name, values in seconds.items()
        },
        "trainer_over_ours": paired_ratio(seconds["trainer"], seconds["ours"]),
        "roof": roof,
        "share_of_square_roof": roof_seconds["square"] / medians["ours"],
        "share_of_own_shapes_roof": roof_seconds["own_shapes"] / medians["ours"],
        "shares": shares,
    }


@contextmanager
def _prepared(config: RunConfig) -> Iterator[Ours]:
    with open_workbench(config, Stopwatch()) as bench:
        start = current(bench.parts.model, bench.parts.lora_names)
        yield Ours(bench=bench, batches=_drawn(bench), start=start)


def _drawn(bench: Workbench) -> list[Batch]:
    """Read, encode and draw, the same at every call."""
    encoded, _ = encode_all(bench.format, bench.data.examples(CLIENT, "train"))
    return draw_batches(
        encoded,
        num_batches=bench.config.training.num_local_steps,
        batch_size=bench.config.training.batch_size,
        rng=random.Random(0),
        pad_token_id=bench.format.pad_token_id,
    )


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _flex_seconds(ours: Ours) -> float:
    """FLEx's local steps on the same batches: LoRA, grafts and gates, and the meter of the gates."""
    parts, lr = ours.parts, ours.training.lr
    load_tensors(parts.model, ours.start)
    with grafted(parts.layers, [0] * len(parts.layers), GraftForm(), 0) as names:
        meter = GateMeter()
        started = time.perf_counter()
        with seam.watch_experts(parts.layers, meter.observe):
            groups = [*ours.groups(), ParameterGroup(names=names, lr=lr)]
            local_steps(parts.model, ours.batches, groups, ours.training, seed=0)
        return time.perf_counter() - started


def _roof(ours: Ours) -> dict[str, Any]:
    """Floating-point operations of one step and the least seconds they take, from a middling batch."""
    batch = sorted(ours.batches, key=lambda each: each.input_ids.numel())[len(ours.batches) // 2]
    with ProductCounter() as counter:
        ours.train([batch])
    square = square_flops_per_second()
    by_work = sorted(counter.counts.items(), key=lambda item: item[0].flops * item[1], reverse=True)
    scale = sum(each.input_ids.numel() for each in ours.batches) / len(ours.batches) / batch.input_ids.numel()
    return {
        "flops_per_step": counter.flops * scale,
        "square_flops_per_second": square,
        "seconds_per_step": {
            "square": counter.flops * scale / square,
            "own_shapes": seconds_at_own_shapes(counter.counts) * scale,
        },
        "largest_shapes": [
            {"shape": list(product), "count": count, "share": product.flops * count / counter.flops}
            for product, count in by_work[:6]
        ],
    }


class TrainerRival:
    """The same checkpoint, LoRA through PEFT, and transformers' Trainer on the very same batches."""

    def __init__(self, source: str, config: RunConfig, ours: Ours) -> None:
        base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        self.experts = str(base.config._experts_implementation)
        targets = find_targets(base, config.adapter.target_modules)
        self.model = get_peft_model(base, lora_config(config.adapter, targets))
        self._start, self._training = peft_state(ours.start), config.training
        self._batches = [
            {
                "input_ids": batch.input_ids,
                "attention_mask": batch.attention_mask,
                "labels": batch.labels,
            }
            for batch in ours.batches
        ]

    def train(self) -> tuple[float, float]:
        """Seconds of ``Trainer.train`` alone, from LoRA's start, and the mean loss it tells."""
        set_peft_model_state_dict(self.model, self._start)
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                model=self.model,
                args=self._arguments(folder),
                train_dataset=self._batches,  # type: ignore[arg-type]
                data_collator=lambda batches: dict(batches[0]),
            )
            trainer.remove_callback(PrinterCallback)
            started = time.perf_counter()
            output = trainer.train()
            return time.perf_counter() - started, output.training_loss

    def lora(self) -> Tensors:
        """LoRA now, by our names."""
        return lora_state(get_peft_model_state_dict(self.model))

    def _arguments(self, folder: str) -> TrainingArguments:
        """One ready batch is one item of the data set; nothing is saved, logged or reported."""
        settings = self._training
        return TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            max_steps=len(self._batches),
            per_device_train_batch_size=1,
            train_sampling_strategy="sequential",
            learning_rate=settings.lr,
            lr_scheduler_type="constant",
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.gradient_clip,
            optim="adamw_torch_fused",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_num_workers=0,
        )


def assert_same_training(ours: Ours, rival: TrainerRival) -> None:
    """Both must compute the same thing, or a comparison of their speed means nothing."""
    result = ours.train(ours.batches)
    mine = current(ours.parts.model, ours.parts.lora_names)
    _, loss = rival.train()
    theirs = rival.lora()
    moved = max(_largest_difference(mine[name], ours.start[name]) for name in mine)
    apart = max(_largest_difference(mine[name], theirs[name]) for name in mine)
    assert apart <= SAME_LORA * moved, f"LoRA differs by {apart} after moving by {moved}"
    mean = sum(result.losses) / len(result.losses)
    assert abs(mean - loss) <= SAME_LORA * mean, f"mean training loss {mean}, with Trainer {loss}"


def _largest_difference(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max())
