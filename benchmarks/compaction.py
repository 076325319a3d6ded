"""A compact model straight from disk, against loading the whole model: anonymous memory, seconds.

The checkpoint has random weights in shards: 8 layers of 60 experts in bfloat16, 2.28 GB. Each way runs in a
process of its own, with the file in the page cache for all of them. Anonymous memory (``RssAnon``, sampled)
is what a process must really have: the mapped file does not count, and may be dropped at any time.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.anonymous_memory import PeakMemory, anonymous_megabytes
from benchmarks.tables import Figures, Table
from benchmarks.timing import spread
from fedexperts.models.checkpoint import Checkpoint
from fedexperts.models.compact import compact_model, load_compact, merge_by_shares, restore_model
from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.low_bit import LowBitForm
from fedexperts.moe.surgery.slots import SlotPlan

SIZES: dict[str, Any] = {
    "vocab_size": 16384,
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 736,
    "shared_expert_intermediate_size": 64,
}
"""Of a Qwen2-MoE: 480 experts of 4.5 MB, and 112 MB of everything else."""
QUICK_SIZES = {"vocab_size": 512, "hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2}
NUM_KEPT, NUM_MERGED = 8, 2
IN_PLACE = "in_place"


def measure(_: str, *, repeats: int = 3, sizes: dict[str, Any] | None = None) -> dict[str, Any]:
    """All figures, ready for JSON; memory in megabytes (10^6 bytes), times in seconds."""
    figures: dict[str, list[dict[str, float]]] = {way: [] for way in (*WAYS, IN_PLACE)}
    with tempfile.TemporaryDirectory() as folder:
        _alone("make", folder, json.dumps(SIZES | (sizes or {})))
        total = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        num_shards = len(list(Path(folder).glob("*.safetensors")))
        for _repeat in range(repeats):
            for way, made in figures.items():
                made.append(_alone("run", folder, way))
    ways = {
        way: {kind: spread([one[kind] for one in made]) for kind in made[0]} for way, made in figures.items()
    }
    return {"checkpoint_megabytes": total / 1e6, "num_shards": num_shards, "ways": ways}


def _alone(*words: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.compaction", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def make(folder: Path, sizes: str) -> dict[str, float]:
    """Write the checkpoint, in shards of at most 500 MB."""
    config = AutoConfig.for_model("qwen2_moe", **json.loads(sizes), tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
        folder, max_shard_size="500MB"
    )
    return {}


def _plans(checkpoint: Checkpoint) -> list[SlotPlan]:
    plans = []
    for layer in checkpoint.layers:
        rest = tuple(range(NUM_KEPT, layer.num_experts))
        groups = tuple(rest[start::NUM_MERGED] for start in range(NUM_MERGED))
        plans.append(SlotPlan(num_experts=layer.num_experts, kept=tuple(range(NUM_KEPT)), merged=groups))
    return plans


def _merge(checkpoint: Checkpoint) -> Any:
    return merge_by_shares([torch.ones(layer.num_experts) for layer in checkpoint.layers])


def _full(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def _compact(folder: Path) -> Any:
    checkpoint = Checkpoint(folder)
    return load_compact(checkpoint, _plans(checkpoint), _merge(checkpoint))


def _four_bits(folder: Path) -> Any:
    checkpoint = Checkpoint(folder)
    everyone = [
        SlotPlan(num_experts=layer.num_experts, kept=tuple(range(layer.num_experts)))
        for layer in checkpoint.layers
    ]
    return load_compact(checkpoint, everyone, _merge(checkpoint), form=LowBitForm(bits=4))


def _one_expert(folder: Path) -> Any:
    return Checkpoint(folder).expert(1, 7)


WAYS: dict[str, Callable[[Path], Any]] = {
    "full": _full,
    "compact": _compact,
    "four_bits": _four_bits,
    "one_expert": _one_expert,
}


def run(folder: Path, way: str) -> dict[str, float]:
    """One way in this process, which must be new: anonymous memory before, and over that at peak and end."""
    before = anonymous_megabytes()
    if way == IN_PLACE:
        return _in_place(folder, before)
    with PeakMemory() as peak:
        start, work = time.perf_counter(), time.process_time()
        kept = WAYS[way](folder)
        seconds, processor_seconds = time.perf_counter() - start, time.process_time() - work
    end = anonymous_megabytes()
    del kept
    memory = {"before": before, "peak": peak.megabytes - before, "end": end - before}
    return memory | {"seconds": seconds, "processor_seconds": processor_seconds}


def _in_place(folder: Path, before: float) -> dict[str, float]:
    """The whole model loaded, made compact, and restored from disk."""
    model, checkpoint = _full(folder), Checkpoint(folder)
    wanted = [_last_down(layer) for layer in seam.find_moe_layers(model)]
    seam.install_implementation(model)
    memory, seconds = {"full": anonymous_megabytes() - before}, {}
    start = time.perf_counter()
    compact_model(model, _plans(checkpoint), _merge(checkpoint))
    seconds["seconds_to_compact"] = time.perf_counter() - start
    memory["compact"] = anonymous_megabytes() - before
    start = time.perf_counter()
    restore_model(model, checkpoint)
    seconds["seconds_to_restore"] = time.perf_counter() - start
    memory["restored"] = anonymous_megabytes() - before
    for layer, weight in zip(seam.find_moe_layers(model), wanted, strict=True):
        assert torch.equal(_last_down(layer), weight), "restored to other bits"
    return memory | seconds


def _last_down(layer: seam.MoeLayer) -> torch.Tensor:
    return layer.expert(layer.num_experts - 1)["down_proj"].detach().clone()


def tables(figures: Figures) -> list[Table]:
    """What was measured."""
    ways = figures["ways"]
    names = {
        "full": "the whole model by from_pretrained",
        "compact": "8 experts kept and 52 merged into 2, straight from disk",
        "four_bits": "all experts in 4 bits, straight from disk",
        "one_expert": "one expert read",
    }
    rows = tuple(
        (title, *(f"{ways[way][kind]['median']:,.0f}" for kind in ("peak", "end")), *_both_seconds(ways[way]))
        for way, title in names.items()
    )
    megabytes, shards = figures["checkpoint_megabytes"], figures["num_shards"]
    live = {kind: values["median"] for kind, values in ways["in_place"].items()}
    steps = (
        ("loaded whole", f"{live['full']:,.0f}", ""),
        ("made compact in place", f"{live['compact']:,.0f}", f"{live['seconds_to_compact']:.1f}"),
        ("restored from disk", f"{live['restored']:,.0f}", f"{live['seconds_to_restore']:.1f}"),
    )
    imports = ways["compact"]["before"]["median"]
    return [
        Table(
            title=f"A checkpoint of {megabytes:,.0f} MB in {shards} shards: anonymous memory above the "
            f"{imports:.0f} MB that Python and imports take",
            columns=("", "peak, MB", "at the end, MB", "seconds", "processor seconds"),
            rows=rows,
        ),
        Table(title="The same model, live", columns=("", "MB afterwards", "seconds"), rows=steps),
    ]


def _both_seconds(way: Mapping[str, Any]) -> tuple[str, str]:
    return f"{way['seconds']['median']:.2f}", f"{way['processor_seconds']['median']:.2f}"


if __name__ == "__main__":
    transformers.logging.disable_progress_bar()
    # One thread: two that work on small tensors wait for each other beside a neighbour.
    torch.set_num_threads(1)
    print(json.dumps({"make": make, "run": run}[sys.argv[1]](Path(sys.argv[2]), sys.argv[3])))
