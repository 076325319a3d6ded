"""Predicted peak memory of local steps against what a process takes, on models of several families.

What a process takes is measured twice. With an allocator that gives freed memory back at once and with small
oneDNN caches, it is tensors and little else: that is what the prediction is of. With the C library's defaults
it is what a user sees on a CPU. The process before the model is loaded is not counted in either.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.tables import Figures, Table
from fedexperts.costs.dry_run import BatchShape
from fedexperts.costs.memory import predict_memory
from fedexperts.data.batches import IGNORED_LABEL, Batch
from fedexperts.models.adapters import AdapterSettings, add_lora
from fedexperts.models.tiny import tiny_model
from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.graft import GraftForm, graft
from fedexperts.moe.surgery.slots import SlotPlan, split_layer
from fedexperts.training.local_steps import local_steps
from fedexperts.training.optimizers import ParameterGroup
from fedexperts.training.settings import TrainingSettings

RETURNING = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",
    "LRU_CACHE_CAPACITY": "16",
}
"""Environment under which freed memory goes back at once and oneDNN keeps few compiled products."""
_SHAPE = BatchShape(examples=8, length=256, labels=512)
_SIZES = {
    "vocab_size": 8000,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 32,
    "initializer_range": 0.02,
}
_EXPERTS = {
    "num_experts": 32,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model and what is trained of it."""

    family: str
    trained: str
    """``lora``, ``flex`` (LoRA and grafts), ``experts`` (all in full) or ``slots`` (a quarter tuned, the rest
    merged into two)."""
    dtype: str = "float32"
    recomputes: bool = False
    sizes: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """As the table shows it."""
        how = ", checkpointing" if self.recomputes else ""
        return f"{self.family}, {self.trained}, {self.dtype}{how}"


_QWEN = _EXPERTS | {"shared_expert_intermediate_size": 512}
_DEEPSEEK = {"n_routed_experts": 32, "num_experts_per_tok": 6, "moe_intermediate_size": 128}
CASES = (
    Case(family="qwen2_moe", trained="lora", sizes=_QWEN),
    Case(family="qwen2_moe", trained="lora", recomputes=True, sizes=_QWEN),
    Case(family="qwen2_moe", trained="flex", dtype="bfloat16", sizes=_QWEN),
    Case(family="qwen2_moe", trained="flex", dtype="bfloat16", recomputes=True, sizes=_QWEN),
    Case(family="qwen3_moe", trained="experts", sizes=_EXPERTS),
    Case(family="qwen3_moe", trained="slots", sizes=_EXPERTS),
    Case(family="deepseek", trained="flex", sizes=_DEEPSEEK),
    Case(family="llama_moe", trained="flex", sizes={"intermediate_size": 2048, "num_experts": 16}),
    Case(family="mixtral", trained="lora", dtype="bfloat16", sizes={"intermediate_size": 512}),
    Case(family="gpt_oss", trained="lora", sizes={"intermediate_size": 256, "num_local_experts": 32}),
)


def measure(model: str, *, cases: int = len(CASES)) -> dict[str, Any]:
    """Bytes by case, ready for JSON; the cases bring their own models, so ``model`` is only named."""
    rows = []
    for case in CASES[:cases]:
        tight, usual = in_new_process(case, RETURNING), in_new_process(case, {})
        rows.append({"title": case.title, "usual": usual["peak"], **tight})
    return {"model": model, "shape": asdict(_SHAPE), "cases": rows}


def tables(figures: Figures) -> list[Table]:
    """What was measured, in MB of 10^6 bytes."""
    shape, cases = figures["shape"], figures["cases"]
    size = f"{shape['examples']} examples of {shape['length']} tokens with {shape['labels']} labels"
    rows = tuple(
        (
            case["title"],
            *(f"{case[kind] / 1e6:,.0f}" for kind in ("predicted", "peak")),
            f"{case['predicted'] / case['peak']:.3f}",
            f"{case['usual'] / 1e6:,.0f}",
        )
        for case in cases
    )
    process = sorted(case["process"] for case in cases)[len(cases) // 2]
    return [
        Table(
            title=f"Peak memory, {size}, above the {process / 1e6:.0f} MB of the process itself",
            columns=("", "predicted, MB", "measured, MB", "predicted / measured", "usual allocator, MB"),
            rows=rows,
        )
    ]


def in_new_process(case: Case, environment: dict[str, str]) -> dict[str, int]:
    """What :func:`run_alone` finds in a process of its own under ``environment``."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory_plan", json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run_alone(case: Case) -> dict[str, int]:
    """One case in this process, which must be new: bytes predicted, and found above the process itself."""
    torch.set_num_threads(1)
    settings = TrainingSettings(gradient_checkpointing=case.recomputes, batch_size=_SHAPE.examples)
    # Once on a tiny model, so that libraries loaded late belong to the process.
    _steps(*_build(case, small=True), BatchShape(examples=2, length=16, labels=8), settings)
    process = _settled()
    model, names = _build(case)
    loaded = _settled() - process
    Path("/proc/self/clear_refs").write_text("5")
    _steps(model, names, _SHAPE, settings)
    peak = _status("VmHWM") - process
    # Afterwards, as what is imported for it is no part of a run.
    predicted = predict_memory(model, names, _SHAPE, settings).total
    return {"process": process, "loaded": loaded, "predicted": predicted, "peak": peak}


def _build(case: Case, *, small: bool = False) -> tuple[Any, list[str]]:
    sizes = {} if small else _known(case.family, _SIZES) | case.sizes
    model = tiny_model(case.family, dtype=getattr(torch, case.dtype), **sizes).requires_grad_(False)
    seam.install_implementation(model)
    layers = seam.find_moe_layers(model)
    if case.trained == "experts":
        return model, sorted(seam.fused_names(seam.expert_names(layers)))
    if case.trained == "slots":
        for layer in layers:
            _split(layer)
        return model, [name for name, _ in model.named_parameters() if ".tuned." in name]
    names = list(add_lora(model, AdapterSettings(), 0))
    if case.trained == "flex":
        names += graft(layers, [0] * len(layers), GraftForm(), 0)
    return model, names


def _known(family: str, sizes: dict[str, Any]) -> dict[str, Any]:
    config = tiny_model(family).config
    if family == "llama_moe":
        sizes = sizes | {"score_scale_factor": 4.0}
    return {name: value for name, value in sizes.items() if hasattr(config, name)}


def _split(layer: seam.MoeLayer) -> None:
    num_tuned = layer.num_experts // 4
    middle = (num_tuned + layer.num_experts) // 2
    plan = SlotPlan(
        num_experts=layer.num_experts,
        tuned=tuple(range(num_tuned)),
        merged=(tuple(range(num_tuned, middle)), tuple(range(middle, layer.num_experts))),
    )
    split_layer(layer, plan, [layer.expert(num_tuned), layer.expert(middle)])


def _steps(model: Any, names: list[str], shape: BatchShape, settings: TrainingSettings) -> None:
    batches = [_batch(shape, model.config.vocab_size, seed) for seed in range(3)]
    local_steps(model, batches, [ParameterGroup(names=tuple(names), lr=1e-3)], settings, seed=0)


def _batch(shape: BatchShape, vocab_size: int, seed: int) -> Batch:
    size = (shape.examples, shape.length)
    ids = torch.randint(3, vocab_size, size, generator=torch.Generator().manual_seed(seed))
    labels = torch.full(size, IGNORED_LABEL)
    asked = slice(1, 1 + shape.labels // shape.examples)
    labels[:, asked] = ids[:, asked]
    mask = torch.ones_like(ids)
    # Without any padding transformers leaves the attention mask out; a real batch has some.
    mask[0, -1] = 0
    return Batch(
        input_ids=ids,
        attention_mask=mask,
        labels=labels,
        num_examples=shape.examples,
        num_labels=shape.labels,
    )


def _settled() -> int:
    """Resident bytes after all that is free has been given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"this benchmark needs Linux: there is no {name} in /proc/self/status")


if __name__ == "__main__":
    print(json.dumps(run_alone(Case(**json.loads(sys.argv[1])))))
