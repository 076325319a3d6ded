"""Experts in few bits: bytes, routing and predictions beside the full model's, and training through them.

The first part runs the trained model on a client's examples. The second trains nothing but passes gradients
through frozen experts, in new processes on one thread: eight MoE blocks of ``benchmarks/slots.py``'s sizes in
bfloat16, dense in transformers' own grouped product, and dense, in 8 and in 4 bits by ours.
"""

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.anonymous_memory import PeakMemory, anonymous_megabytes
from benchmarks.setting import bench_config
from benchmarks.slots import BATCH, LENGTH, SIZES, Stack
from benchmarks.tables import Figures, Table
from benchmarks.timing import spread
from fedexperts.costs.stopwatch import Stopwatch
from fedexperts.data.batches import Batch, draw_batches, encode_all
from fedexperts.moe.compressing.quantize import quantization_report, quantize_experts, quantized
from fedexperts.moe.observing.agreement import record_routing, routing_agreement
from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.low_bit import LowBitForm
from fedexperts.moe.surgery.slots import SlotPlan, split_layer
from fedexperts.running.workbench import Workbench, open_workbench

CLIENT = "client-000"


def measure(
    model: str, *, repeats: int = 2, num_steps: int = 3, num_batches: int = 8, length: int = LENGTH
) -> dict[str, Any]:
    """All figures, ready for JSON; memory in megabytes (10^6 bytes)."""
    config = bench_config(model, "fedavg")
    with open_workbench(config, Stopwatch()) as bench:
        agreement = _agreement(bench, num_batches)
    training: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _turn in range(repeats):
        for way, made in training.items():
            made.append(_in_new_process(way, num_steps, length))
    return {
        "model": model,
        "agreement": agreement,
        "sizes": SIZES,
        "num_tokens": BATCH * length,
        "training": {
            way: {kind: spread([one[kind] for one in made]) for kind in made[0]}
            for way, made in training.items()
        },
    }


def _agreement(bench: Workbench, num_batches: int) -> dict[str, dict[str, float]]:
    """By number of bits: what became of the bytes, the routing and the predictions."""
    model, layers, batches = bench.parts.model, bench.parts.layers, _drawn(bench, num_batches)
    full, found = record_routing(model, layers, batches), {}
    for bits in (8, 4, 3, 2):
        with quantized(layers, LowBitForm(bits=bits)):
            report = quantization_report(model)
            agreement = routing_agreement(full, record_routing(model, layers, batches))
        found[str(bits)] = {
            "num_experts": report.num_experts,
            "num_quantized": report.num_quantized,
            "dense_megabytes": report.dense_bytes / 1e6,
            "packed_megabytes": report.packed_bytes / 1e6,
            "rest_megabytes": report.rest_bytes / 1e6,
            "kl": agreement.kl,
            "top_k_overlap": agreement.top_k_overlap,
            "exact_set_share": agreement.exact_set_share,
            "frequency_distance": agreement.frequency_distance,
            "num_tokens": agreement.num_tokens,
            "num_kl_tokens": agreement.num_kl_tokens,
        }
    return found


def _drawn(bench: Workbench, num_batches: int) -> list[Batch]:
    encoded, _ = encode_all(bench.format, bench.data.examples(CLIENT, "train"))
    return draw_batches(
        encoded,
        num_batches=num_batches,
        batch_size=bench.config.training.batch_size,
        rng=random.Random(0),
        pad_token_id=bench.format.pad_token_id,
    )


def _in_new_process(*words: object) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.quantization", *(str(word) for word in words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _in_slots(model: Stack) -> None:
    seam.install_implementation(model)
    for layer in seam.find_moe_layers(model):
        split_layer(layer, SlotPlan(num_experts=layer.num_experts, kept=tuple(range(layer.num_experts))))


def _in_bits(form: LowBitForm) -> Callable[[Stack], None]:
    def prepare(model: Stack) -> None:
        seam.install_implementation(model)
        quantize_experts(seam.find_moe_layers(model), form)

    return prepare


WAYS: dict[str, Callable[[Stack], None]] = {
    "stock": lambda model: None,
    "dense": _in_slots,
    "8": _in_bits(LowBitForm(bits=8)),
    "4": _in_bits(LowBitForm(bits=4)),
}


def run_alone(way: str, num_steps: int, length: int) -> dict[str, float]:
    """Forward and backward through frozen experts in this process, which must be new."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    before = anonymous_megabytes()
    model = Stack(torch.bfloat16).train()
    WAYS[way](model)
    weights = anonymous_megabytes() - before
    hidden_BTD = torch.randn(BATCH, length, SIZES["hidden_size"], dtype=torch.bfloat16)
    with PeakMemory() as peak:
        seconds = [_step(model, hidden_BTD) for _ in range(num_steps + 1)]
    return {
        "weights": weights,
        "peak": peak.megabytes - before,
        "tokens_per_second": BATCH * length / min(seconds[1:]),
    }


def _step(model: Stack, hidden_BTD: torch.Tensor) -> float:
    began = time.thread_time()
    model(hidden_BTD.detach().requires_grad_()).float().square().mean().backward()
    return time.thread_time() - began


def tables(figures: Figures) -> list[Table]:
    """What was measured."""
    agreement = figures["agreement"]
    rows = tuple(
        (
            f"{bits} bits",
            f"{found['packed_megabytes']:.2f}",
            f"{found['kl']:.4f}",
            f"{found['top_k_overlap']:.3f}",
            f"{found['exact_set_share']:.3f}",
            f"{found['frequency_distance']:.4f}",
        )
        for bits, found in agreement.items()
    )
    any_bits = agreement["4"]
    names = {
        "stock": "dense, transformers' grouped product",
        "dense": "dense, ours",
        "8": "8 bits, ours",
        "4": "4 bits, ours",
    }
    training = tuple(
        (
            title,
            *(f"{figures['training'][way][kind]['median']:,.0f}" for kind in ("weights", "peak")),
            f"{figures['training'][way]['tokens_per_second']['median']:,.0f}",
        )
        for way, title in names.items()
    )
    counts = f"{any_bits['num_quantized']} of {any_bits['num_experts']} experts"
    return [
        Table(
            title=f"{counts}, {any_bits['dense_megabytes']:.2f} MB dense, in groups of 64 ("
            f"{any_bits['num_tokens']:,} tokens, predictions at {any_bits['num_kl_tokens']:,} of them)",
            columns=("", "MB", "KL, nats", "top-k overlap", "same set", "frequencies, total variation"),
            rows=rows,
        ),
        Table(
            title=f"Forward and backward through frozen experts, bfloat16, {figures['num_tokens']:,} tokens: "
            "anonymous memory, and tokens per second of one thread",
            columns=("", "weights, MB", "peak, MB", "tokens/s"),
            rows=training,
        ),
    ]


if __name__ == "__main__":
    print(json.dumps(run_alone(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
