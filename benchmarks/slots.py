"""Training some experts: slots against all experts, a gradient mask, and PEFT's ``target_parameters``.

Each variant runs in a process of its own, on one thread, so that peaks are its own and processor time is
not a neighbour's. What runs is eight MoE blocks of Qwen3-MoE's code with random weights, without attention
and logits, which cost every variant the same and would hide the differences.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.anonymous_memory import PeakMemory
from benchmarks.tables import Figures, Table
from benchmarks.timing import spread
from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.slots import SlotPlan, split_layer

SIZES: dict[str, int] = {
    "hidden_size": 512,
    "moe_intermediate_size": 256,
    "num_experts": 64,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 8,
}
BATCH, LENGTH, NUM_TUNED, NUM_MERGED = 8, 512, 8, 4
VARIANTS = ("stock", "mask", "peft", "kept", "merged", "frozen")
DTYPES = ("float32", "bfloat16")


def measure(_: str, *, repeats: int = 2, num_steps: int = 3, length: int = LENGTH) -> dict[str, Any]:
    """Speed and memory of every variant, in turns; the embedded model plays no part."""
    found: dict[str, dict[str, list[dict[str, float]]]] = {d: {v: [] for v in VARIANTS} for d in DTYPES}
    for _turn in range(repeats):
        for dtype in DTYPES:
            for variant in VARIANTS:
                found[dtype][variant].append(_in_new_process(variant, dtype, num_steps, length))
    kinds = ("tokens_per_second", "peak_megabytes", "trained")
    return {
        "sizes": SIZES,
        "tokens": BATCH * length,
        "tuned": NUM_TUNED,
        "merged": NUM_MERGED,
        "dtypes": {
            dtype: {
                variant: {kind: spread([one[kind] for one in runs])["median"] for kind in kinds}
                for variant, runs in variants.items()
            }
            for dtype, variants in found.items()
        },
    }


def _in_new_process(*arguments: object) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.slots", *(str(argument) for argument in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run_alone(variant: str, dtype: str, num_steps: int, length: int) -> dict[str, float]:
    """One variant in this process: steps of AdamW on the same random tokens."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Stack(getattr(torch, dtype)).train()
    prepared = _PREPARE[variant](model)
    trained = [p for p in prepared.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None
    hidden_BTD = torch.randn(BATCH, length, SIZES["hidden_size"], dtype=getattr(torch, dtype))
    with PeakMemory() as peak:
        _step(prepared, hidden_BTD, optimizer)
        seconds = [_step(prepared, hidden_BTD, optimizer) for _ in range(num_steps)]
    return {
        "tokens_per_second": BATCH * length / min(seconds),
        "peak_megabytes": peak.megabytes,
        "trained": float(sum(p.numel() for p in trained)),
    }


class Stack(nn.Module):
    """The MoE blocks of a Qwen3-MoE, each behind a norm and beside a residual; nothing between them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        config = Qwen3MoeConfig(
            **SIZES, vocab_size=8, num_attention_heads=1, num_key_value_heads=1, head_dim=8
        )
        model = Qwen3MoeForCausalLM._from_config(config, dtype=dtype).requires_grad_(False)
        model.set_experts_implementation("grouped_mm")
        self.config = model.config
        self.blocks = nn.ModuleList([layer.mlp for layer in model.model.layers])

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        for block in self.blocks:
            hidden_BTD = hidden_BTD + block(nn.functional.rms_norm(hidden_BTD, hidden_BTD.shape[-1:]))
        return hidden_BTD

    def set_experts_implementation(self, name: str) -> None:
        """As a transformers model does it."""
        self.config._experts_implementation = name


def _step(model: Any, hidden_BTD: Tensor, optimizer: torch.optim.Optimizer | None) -> float:
    began = time.thread_time()
    # What lies before the first experts needs a gradient, as it does under LoRA on attention.
    model(hidden_BTD.detach().requires_grad_()).float().square().mean().backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return time.thread_time() - began


def _all_experts(model: Any) -> Any:
    for layer in seam.find_moe_layers(model):
        layer.experts.requires_grad_(True)
    return model


def _mask(model: Any) -> Any:
    for layer in seam.find_moe_layers(model):
        for parameter in layer.experts.parameters():
            parameter.requires_grad_(True)
            parameter.register_hook(_keep_first)
    return model


def _keep_first(gradient: Tensor) -> Tensor:
    masked = gradient.clone()
    masked[NUM_TUNED:] = 0
    return masked


def _peft(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    names = ["experts.gate_up_proj", "experts.down_proj"]
    return get_peft_model(
        model, LoraConfig(r=8, target_modules=[], target_parameters=names), autocast_adapter_dtype=False
    )


def _slots(*, is_merged: bool) -> Callable[[Any], Any]:
    def prepare(model: Any) -> Any:
        tuned, others = tuple(range(NUM_TUNED)), tuple(range(NUM_TUNED, SIZES["num_experts"]))
        groups = tuple(others[i::NUM_MERGED] for i in range(NUM_MERGED)) if is_merged else ()
        plan = SlotPlan(
            num_experts=SIZES["num_experts"], tuned=tuned, kept=() if is_merged else others, merged=groups
        )
        seam.install_implementation(model)
        for layer in seam.find_moe_layers(model):
            split_layer(layer, plan, [_mean(seam.fused_weights(layer), group) for group in groups])
        return model

    return prepare


def _mean(fused: dict[str, Tensor], group: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: weight[list(group)].mean(dim=0) for name, weight in fused.items()}


_PREPARE: dict[str, Callable[[Any], Any]] = {
    "stock": _all_experts,
    "mask": _mask,
    "peft": _peft,
    "kept": _slots(is_merged=False),
    "merged": _slots(is_merged=True),
    "frozen": lambda model: model,
}


_TITLES = {
    "stock": "all experts train (transformers' grouped_mm)",
    "mask": "the same, gradients of the others masked",
    "peft": "PEFT target_parameters, LoRA of rank 8 on all experts",
    "kept": "slots: 8 tuned, 56 kept",
    "merged": "slots: 8 tuned, 56 merged into 4",
    "frozen": "no expert trains (grouped_mm), the floor without slots",
}


def tables(figures: Figures) -> list[Table]:
    """One for each dtype."""
    return [_table(figures, dtype) for dtype in figures["dtypes"]]


def _table(figures: Figures, dtype: str) -> Table:
    variants = figures["dtypes"][dtype]
    stock = variants["stock"]
    rows = [
        (
            _TITLES[variant],
            f"{found['trained'] / 1e6:.1f}",
            f"{found['peak_megabytes']:,.0f}",
            f"{found['peak_megabytes'] / stock['peak_megabytes']:.2f}",
            f"{found['tokens_per_second']:,.0f}",
            f"{found['tokens_per_second'] / stock['tokens_per_second']:.2f}",
        )
        for variant, found in variants.items()
    ]
    sizes = figures["sizes"]
    title = (
        f"{dtype}: {sizes['num_hidden_layers']} layers of {sizes['num_experts']} experts, hidden "
        f"{sizes['hidden_size']}, inner {sizes['moe_intermediate_size']}, "
        f"top-{sizes['num_experts_per_tok']}, {figures['tokens']:,} tokens, AdamW, one thread"
    )
    columns = ("", "trained, M", "peak, MB", "of stock", "tokens/s", "times stock")
    return Table(title=title, columns=columns, rows=tuple(rows))


if __name__ == "__main__":
    print(json.dumps(run_alone(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
