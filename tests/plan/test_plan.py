"""A plan against published sizes, against what runs, and against its own bounds."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedexperts.algorithms import ALGORITHMS
from fedexperts.cli import main
from fedexperts.config.load import load_config
from fedexperts.costs.memory import predict_memory
from fedexperts.errors import UserError
from fedexperts.models.adapters import AdapterSettings, add_lora
from fedexperts.models.shapes import SHAPES, find_shape
from fedexperts.models.tiny import tiny_model
from fedexperts.moe.compressing.quantize import quantize_experts, quantized_bank
from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.graft import GraftForm, graft
from fedexperts.moe.surgery.low_bit import LowBitForm
from fedexperts.moe.surgery.slots import SlotPlan, split_layer
from fedexperts.plan.counting import PRECISIONS, Counter, build, describe_experts
from fedexperts.plan.fitting import (
    SlotFit,
    best_slots,
    is_tight,
    least_bytes,
    precisions_that_fit,
    slots_that_fit,
    total_bytes,
)
from fedexperts.plan.report import make_plan
from fedexperts.plan.settings import PlanSettings, parse_memory
from fedexperts.plan.source import find_source, read_headers
from fedexperts.running.checking import check_experiment
from fedexperts.running.experiment import run_experiment
from fedexperts.tensors import num_bytes

QWEN = "Qwen1.5-MoE-A2.7B"
SMALL = PlanSettings(
    batch=2, seq=48, dtype="float32", adapter=AdapterSettings(rank=4), graft=GraftForm(lora_rank=0)
)
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "moe_intermediate_size": 48,
    "num_experts": 24,
    "num_local_experts": 24,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 3,
}
FEWER = SIZES | {"num_hidden_layers": 1}


def small_config() -> Any:
    return tiny_model("qwen3_moe", **SIZES).config


@pytest.mark.parametrize("name", SHAPES)
def test_built_in_shape_has_the_published_number_of_parameters(name: str) -> None:
    counter = Counter(find_source(name).config, PlanSettings())
    assert sum(counter.parameters.values()) == SHAPES[name].parameters
    assert counter.experts.number * counter.experts.parameters_each == counter.parameters["routed_experts"]


def test_sizes_of_qwen_are_those_of_papers_md() -> None:
    counter = Counter(find_source(QWEN).config, PlanSettings(graft=GraftForm(lora_rank=0)))
    experts = counter.experts
    assert experts.parameters_each == 8_650_752  # 8.65 M
    assert experts.number * experts.parameters_each == 12_457_082_880  # 12.46 B
    assert counter.trained["travelling"] == 9_437_184  # 9.44 M
    gates = 24 * (2048 + 1)
    assert counter.trained["personal"] - gates == 24 * 8_650_752  # 207.6 M
    assert round(2 * 12_457_082_880 / (2 * counter.trained["travelling"])) == 1320


def test_lora_goes_on_all_of_attention_where_a_target_is_missing() -> None:
    assert Counter(find_source("DeepSeek-V2-Lite").config, PlanSettings()).targets == ("attention",)


def test_hub_names_of_the_shapes_are_known_too() -> None:
    assert find_shape("qwen/QWEN1.5-moe-a2.7b") is SHAPES[QWEN]
    assert find_shape("nobody/nothing") is None


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_frozen_expert_has_the_bytes_of_a_real_bank(family: str) -> None:
    model = tiny_model(family)
    experts = describe_experts(build(model.config, SMALL))
    layer = seam.find_moe_layers(model)[0]
    assert experts.bytes_each["dense"] == num_bytes(layer.expert(0))
    for name, bits in (("int8", 8), ("int4", 4)):
        bank = quantized_bank(layer, LowBitForm(bits=bits))
        assert 6 * experts.bytes_each[name] == num_bytes(dict(bank.named_buffers()))


def test_a_tuned_expert_takes_sixteen_bytes_a_parameter() -> None:
    experts = describe_experts(build(small_config(), SMALL))
    assert experts.tuned_bytes_each == 16 * experts.parameters_each


def really_quantised(bits: Any) -> tuple[Any, list[str]]:
    model = tiny_model("qwen3_moe", **SIZES).requires_grad_(False)
    seam.install_implementation(model)
    names = list(add_lora(model, AdapterSettings(rank=4, target_modules=("q_proj", "k_proj", "v_proj")), 0))
    layers = seam.find_moe_layers(model)
    quantize_experts(layers, LowBitForm(bits=bits))
    return model, names


@pytest.mark.parametrize(
    ("precision", "bits"), [pytest.param("int8", 8, marks=pytest.mark.slow), ("int4", 4)]
)
@pytest.mark.slow
def test_low_bit_plan_is_within_a_tenth_of_the_model_in_low_bits(precision: Any, bits: Any) -> None:
    lora = AdapterSettings(rank=4, target_modules=("q_proj", "k_proj", "v_proj"))
    asked = replace(SMALL, method="fedavg", adapter=lora)
    model, names = really_quantised(bits)
    real = predict_memory(model, names, asked.shape, asked.training).total
    assert total_bytes(Counter(small_config(), asked), precision) == pytest.approx(real, rel=0.1)


@cache
def flux_counter() -> Counter:
    return Counter(small_config(), replace(SMALL, method="flux"))


@pytest.mark.parametrize(
    "memory",
    [
        1_800_000,
        *(pytest.param(memory, marks=pytest.mark.slow) for memory in (2_500_000, 4_000_000)),
        8_000_000,
    ],
)
@pytest.mark.slow
def test_flux_plan_is_within_a_tenth_of_the_model_in_slots(memory: int) -> None:
    asked = replace(SMALL, method="flux")
    (found,) = [
        slot
        for slot in slots_that_fit(flux_counter(), memory)
        if (slot.precision, slot.merged_per_layer) == ("dense", 4)
    ]
    assert found.num_tuned
    model = tiny_model("qwen3_moe", **SIZES).requires_grad_(False)
    seam.install_implementation(model)
    for index, layer in enumerate(seam.find_moe_layers(model)):
        num_tuned = found.num_tuned // 3 + (index < found.num_tuned % 3)
        groups = tuple(tuple(range(num_tuned + start, 24, 4)) for start in range(4))
        plan = SlotPlan(num_experts=24, tuned=tuple(range(num_tuned)), merged=groups)
        split_layer(layer, plan, [layer.expert(0)] * 4)
    names = [name for name, _ in model.named_parameters() if ".tuned." in name]
    real = predict_memory(model, names, asked.shape, asked.training).total
    assert found.total == pytest.approx(real, rel=0.1)


def test_dense_plan_is_the_real_model_counted() -> None:
    asked = replace(SMALL, adapter=AdapterSettings(rank=4, target_modules=("attention",)))
    model = tiny_model("qwen3_moe", **SIZES).requires_grad_(False)
    seam.install_implementation(model)
    lora = add_lora(model, asked.adapter, 0)
    layers = seam.find_moe_layers(model)
    grafted = graft(layers, [0] * len(layers), asked.graft, 0)
    real = predict_memory(model, [*lora, *grafted], asked.shape, asked.training)
    counter = Counter(small_config(), asked)
    assert replace(counter.memory, copies=0) == real
    received, kept = (num_bytes(seam.current(model, names)) for names in (lora, grafted))
    chosen = 8 * len(layers)
    to_undo_by = received
    assert counter.memory.copies == received + kept + chosen + to_undo_by
    assert least_bytes(counter, "dense") == counter.memory.total - real.activations


@settings(deadline=None, max_examples=30)
@given(memory=st.integers(min_value=10_000, max_value=60_000_000))
def test_as_many_experts_are_tuned_as_fit_and_no_more(memory: int) -> None:
    experts = flux_counter().experts
    for slot in slots_that_fit(flux_counter(), memory):
        if slot.num_tuned is None:
            assert slot.total > memory
            continue
        assert slot.total <= memory
        merged = slot.merged_per_layer and experts.num_layers * slot.merged_per_layer
        one_more = flux_counter().room(slot.precision).total(slot.num_tuned + 1, merged)
        assert slot.num_tuned == experts.number or one_more > memory
        assert slot.num_tuned + slot.num_frozen <= experts.number


@given(memory=st.integers(min_value=1, max_value=10**12))
def test_memory_is_read_in_every_unit(memory: int) -> None:
    assert parse_memory(f"{memory}B") == memory
    assert parse_memory(f"{memory} KB") == 1000 * memory
    assert parse_memory(f"{memory}MiB") == 2**20 * memory


@pytest.mark.parametrize("text", ["3xb", "-1GB", "0GB", "GB", "1e3", "24"])
def test_other_amounts_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="it must be an amount above 0 with a unit, such as 24GB"):
        parse_memory(text)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"method": "fedsgd"}, 'method is "fedsgd"; it must be one of '),
        ({"batch": 0}, "batch must be at least 1, not 0"),
        ({"label_share": 0.0}, "label_share must be above 0 and at most 1, not 0.0"),
        ({"dtype": "float16"}, 'dtype is "float16"; it must be one of float32, bfloat16'),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        PlanSettings(**change)
    assert str(caught.value).startswith(sentence)


def test_what_trains_all_experts_has_no_plan_in_low_bits() -> None:
    counter = Counter(small_config(), replace(SMALL, method="fedavg_experts"))
    fits = precisions_that_fit(counter, 10**9)
    assert [fit.what for fit in fits] == ["all weights in float32"]
    assert counter.trained["travelling"] > counter.parameters["routed_experts"]


@pytest.mark.parametrize("method", sorted(ALGORITHMS))
def test_every_method_is_counted_from_headers_alone(method: str) -> None:
    counter = Counter(small_config(), replace(SMALL, method=method))
    assert counter.trained["trained"] > 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tiny_model("qwen3_moe", dtype=torch.bfloat16, **FEWER)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    return tmp_path


def test_headers_count_what_is_stored(folder: Path) -> None:
    stored = read_headers(folder)
    assert stored is not None
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert stored.values_by_dtype == {
        "BF16": sum(p.numel() for p in tiny_model("qwen3_moe", **FEWER).parameters())
    }
    assert stored.num_bytes == 2 * stored.num_values


@pytest.mark.parametrize("size", [4, 100, -1])
def test_damaged_file_is_told(folder: Path, size: int) -> None:
    path = min(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"damaged: it has no safetensors header|cut short"):
        read_headers(folder)


def test_folder_without_weights_needs_none(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert find_source(str(folder)).stored is None


def test_dense_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 1}))
    with pytest.raises(UserError, match="LlamaForCausalLM has no MoE layers"):
        make_plan(str(tmp_path), SMALL)


def test_hub_out_of_reach_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"no such folder or built-in shape \(Qwen1.5-MoE-A2.7B, .*on the hub its"
    ):
        find_source("nobody/nothing")


def plan_of(folder: Path, *arguments: str, capsys: pytest.CaptureFixture[str], code: int = 0) -> Any:
    assert main(["plan", str(folder), "--batch", "2", "--seq", "48", *arguments]) == code
    return capsys.readouterr().out


def test_command_gives_plain_data(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = plan_of(folder, "--memory", "2MB", "--json", "adapter.rank=4", capsys=capsys)
    found = json.loads(out)
    assert found["settings"]["adapter"]["rank"] == 4
    assert found["experts"]["per_layer"] == 24
    assert set(found["total_by_precision"]) == set(PRECISIONS)
    assert [fit["fits"] for fit in found["fits"][:3]] == [
        total <= 2_000_000 for total in found["total_by_precision"].values()
    ]


@pytest.mark.slow
def test_command_says_what_to_change_when_nothing_fits(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    roomy = json.loads(plan_of(folder, "--memory", "1GB", "--json", capsys=capsys))
    assert roomy["largest_batch"] > 2
    tight = min(roomy["total_by_precision"].values()) - 1
    out = plan_of(folder, "--memory", f"{tight}B", capsys=capsys)
    assert "a batch of 1, frozen experts in int4" in out
    out = plan_of(folder, "--memory", "1KB", capsys=capsys, code=1)
    assert "nothing of this fits" in out


def test_command_plans_slots_for_flux(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = plan_of(folder, "--memory", "3MB", "--method", "flux", capsys=capsys)
    assert "merged into 8 a layer" in out
    assert "What fits in 3MB" in out
    assert "profile of every expert" in out


EXPERIMENT = """
rounds = 1
threads = 1
model.name = "{folder}"
adapter.rank = 2
data.max_tokens = 192
data.partition.num_clients = 2
training.num_local_steps = 1
training.batch_size = 2
evaluation.max_test_examples = 1
evaluation.exam.num_questions = 2
evaluation.matrix = false
algorithm.name = "flex"
"""


def told(*arguments: str, capsys: pytest.CaptureFixture[str]) -> Any:
    main(["plan", *arguments, "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_what_is_advised_runs_within_its_memory(
    tiny_checkpoint: Path, tmp_path: Path, quiet: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "experiment.toml"
    path.write_text(EXPERIMENT.format(folder=tiny_checkpoint))
    least = min(told(str(path), capsys=capsys)["total_by_precision"].values())
    small = told(str(path), "--memory", f"{least - 1}B", capsys=capsys)
    roomy = told(str(path), "--memory", f"{least}B", capsys=capsys)
    advised = {
        fit["settings"]: limit
        for plan, limit in ((roomy, least), (small, least - 1))
        for fit in plan["fits"]
        if fit["fits"]
    }
    assert {
        "model.experts_bits=4",
        "training.gradient_checkpointing=true model.experts_bits=4",
    } <= advised.keys()
    (flux,) = (keys for keys in advised if keys.startswith("algorithm.name=flux algorithm.num_tuned="))
    for number, keys in enumerate(("model.experts_bits=4", flux)):
        config = load_config(path, keys.split())
        assert check_experiment(config).memory.total <= advised[keys], keys
        result = run_experiment(config, tmp_path / str(number), progress=quiet)
        assert result["failures"] == []
        assert result["frozen_unchanged"], keys


@pytest.mark.slow
def test_an_experiment_is_planned_with_the_defaults_of_run(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "experiment.toml"
    path.write_text(EXPERIMENT.format(folder=tiny_checkpoint))
    config, found = load_config(path), told(str(path), "--seq", "48", capsys=capsys)
    assert found["settings"]["dtype"] == config.model.dtype == "float32"
    assert found["settings"]["adapter"]["rank"] == 2
    assert (found["settings"]["batch"], found["settings"]["seq"]) == (2, 48)
    assert found["settings"]["gradient_checkpointing"] is config.training.gradient_checkpointing
    assert found["trained"] == {
        role: check_experiment(config).parameters[role] for role in ("travelling", "personal", "trained")
    }


def slot(**changes: Any) -> SlotFit:
    whole: dict[str, Any] = {
        "precision": "dense",
        "merged_per_layer": None,
        "num_tuned": 1,
        "num_frozen": 10,
        "total": 1,
        "profile": 1,
        "fits": True,
        "not_in_run": "",
    }
    return SlotFit(**whole | changes)


def test_the_advice_is_most_tuned_then_least_merged_of_what_run_can_do() -> None:
    few, more = slot(num_tuned=9), slot(num_tuned=10, merged_per_layer=2, num_frozen=4)
    less_merged = replace(more, merged_per_layer=4, num_frozen=8)
    elsewhere, too_big = slot(num_tuned=12, not_in_run="no"), slot(num_tuned=13, fits=False)
    assert best_slots([few, more, less_merged, elsewhere, too_big]) == less_merged
    assert best_slots([elsewhere, too_big]) is None


def test_a_profile_that_does_not_fit_is_told() -> None:
    profile = flux_counter().profile
    held = describe_experts(build(small_config(), SMALL))
    assert profile > flux_counter().other_bytes + held.number * held.bytes_each["int4"]
    assert not any(one.fits for one in slots_that_fit(flux_counter(), profile - 1))
    assert any(one.fits for one in slots_that_fit(flux_counter(), 10 * profile))


@pytest.mark.parametrize(("total", "expected"), [(899, False), (900, False), (901, True), (1000, True)])
def test_above_nine_tenths_of_the_memory_a_plan_is_tight(total: int, expected: bool) -> None:
    assert is_tight(total, 1000) is expected
    assert not is_tight(1001, 1000)
