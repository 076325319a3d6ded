"""Single experts from disk: bit-equal to the live ones in every family, and clear words about damage."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import Damage
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from families import each_family
from fedexperts.errors import UserError
from fedexperts.models.checkpoint import Checkpoint
from fedexperts.models.tiny import tiny_model
from fedexperts.moe.surgery import seam


@pytest.mark.parametrize("family", each_family())
def test_expert_on_disk_is_the_live_expert(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    checkpoint, layers = Checkpoint(tmp_path), seam.find_moe_layers(model)
    assert [layer.name for layer in checkpoint.layers] == [layer.name for layer in layers]
    for layer in layers:
        for expert in (0, 4):
            live, read = layer.expert(expert), checkpoint.expert(layer.index, expert)
            assert read.keys() == live.keys()
            for name, weight in live.items():
                assert read[name].dtype == weight.dtype
                assert torch.equal(read[name], weight), name


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    tiny_model("qwen2_moe").save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def copied(folder: Path, to: Path) -> Path:
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def shard_with(folder: Path, part: str) -> tuple[str, Path]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    name = next(name for name in index if part in name)
    return name, folder / index[name]


def test_experts_are_read_from_shards(sharded: Path) -> None:
    layer, checkpoint = seam.find_moe_layers(tiny_model("qwen2_moe"))[1], Checkpoint(sharded)
    for expert in range(6):
        for name, weight in layer.expert(expert).items():
            assert torch.equal(checkpoint.expert(1, expert)[name], weight)


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "granitemoe"])
def test_all_experts_of_a_layer_are_the_fused_parameters(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    layer = seam.find_moe_layers(model)[1]
    fused = Checkpoint(tmp_path).fused(1)
    assert tuple(fused) == layer.parameter_names()
    assert all(torch.equal(fused[name], getattr(layer.experts, name)) for name in fused)


def test_dtype_is_the_folders_own_or_what_is_asked_for(tmp_path: Path) -> None:
    tiny_model("mixtral", dtype=torch.bfloat16).save_pretrained(tmp_path)
    for dtype in (None, torch.float32):
        read = Checkpoint(tmp_path, dtype).expert(0, 3)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype or "auto")
        live = seam.find_moe_layers(loaded)[0].expert(3)
        assert all(read[name].dtype == live[name].dtype for name in live)
        assert all(torch.equal(read[name], live[name]) for name in live)


def test_a_layer_of_one_expert_is_read(tmp_path: Path) -> None:
    model = tiny_model("qwen2_moe", num_experts=1, num_experts_per_tok=1)
    model.save_pretrained(tmp_path)
    live = seam.find_moe_layers(model)[0].expert(0)
    assert all(torch.equal(found, live[name]) for name, found in Checkpoint(tmp_path).expert(0, 0).items())


@pytest.mark.parametrize("family", ["qwen2_moe", "granitemoe"])
def test_rest_and_experts_are_the_whole_file(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    rest = Checkpoint(tmp_path).rest()
    on_disk = load_file(tmp_path / "model.safetensors")
    numbers = sum(on_disk[name].numel() for name in rest)
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert numbers + experts == sum(tensor.numel() for tensor in on_disk.values())


def test_layers_and_experts_out_of_range_are_refused(sharded: Path) -> None:
    checkpoint = Checkpoint(sharded)
    with pytest.raises(
        UserError, match=r"expert 6 of layer model\.layers\.0\.mlp\.experts: must be from 0 to 5"
    ):
        checkpoint.expert(0, 6)
    with pytest.raises(UserError, match=r"MoE layer 2 of .*: must be from 0 to 1"):
        checkpoint.expert(2, 0)


def test_a_missing_shard_is_named(sharded: Path, tmp_path: Path) -> None:
    folder = copied(sharded, tmp_path)
    _, shard = shard_with(folder, "experts.3.down_proj")
    shard.unlink()
    with pytest.raises(UserError, match=f"shard {shard.name} of checkpoint .* is missing"):
        Checkpoint(folder)


def test_a_shard_cut_short_is_named(sharded: Path, tmp_path: Path) -> None:
    folder = copied(sharded, tmp_path)
    _, shard = shard_with(folder, "experts.3.down_proj")
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(UserError, match=f"{shard.name} is damaged or cut short"):
        Checkpoint(folder)


def test_a_tensor_that_the_index_promises_in_vain_is_named(sharded: Path, tmp_path: Path) -> None:
    folder = copied(sharded, tmp_path)
    name, shard = shard_with(folder, "experts.3.down_proj")
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors or {"x": torch.zeros(1)}, shard, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{shard.name} has no tensor {name}"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("lost", "told"),
    [
        ("layers.1.mlp.experts.5.down_proj", r"down_proj is made of 6 experts, but .* holds 5 tensors"),
        ("layers.1.mlp.experts.5.gate_proj", r"gate_up_proj is made of 6 experts, but .* holds 5 tensors"),
        ("layers.1.mlp.experts.", r"has no tensor that model.layers.1.mlp.experts.gate_up_proj is made of"),
    ],
)
def test_experts_that_are_missing_are_told(damaged: Damage, lost: str, told: str) -> None:
    def edit(tensors):
        for name in [name for name in tensors if lost in name]:
            del tensors[name]

    with pytest.raises(UserError, match=told):
        Checkpoint(damaged("lost", edit)).expert(1, 5)


def test_half_of_a_conversion_is_refused(damaged: Damage) -> None:
    def edit(tensors):
        for name in [
            name for name in tensors if "layers.1" in name and ".experts." in name and "up_proj" in name
        ]:
            del tensors[name]

    with pytest.raises(UserError, match=r"has not all the tensors that .*gate_up_proj is made of"):
        Checkpoint(damaged("half", edit)).expert(1, 5)


def test_an_expert_of_another_size_is_refused(damaged: Damage) -> None:
    def edit(tensors):
        name = "model.layers.0.mlp.experts.2.down_proj.weight"
        tensors[name] = tensors[name][:, :-1].contiguous()

    with pytest.raises(
        UserError, match=r"expert 2 of model\.layers\.0\.mlp\.experts\.down_proj .* \(32, 15\)"
    ):
        Checkpoint(damaged("size", edit)).expert(0, 2)


def test_folders_that_are_no_checkpoint_are_refused(sharded: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_bytes((sharded / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"has neither model\.safetensors nor"):
        Checkpoint(tmp_path)


def test_quantised_weights_are_refused(sharded: Path, tmp_path: Path) -> None:
    folder = copied(sharded, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="are quantised"):
        Checkpoint(folder)


def test_a_model_without_experts_is_refused_by_name(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "llama", vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="LlamaForCausalLM has no MoE layers"):
        Checkpoint(tmp_path)


def test_a_config_of_an_unknown_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(UserError, match="of no model that transformers knows"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_a_damaged_index_is_refused(text: str, tmp_path: Path) -> None:
    tiny_model("qwen2_moe").save_pretrained(tmp_path, max_shard_size="40KB")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json is damaged: it has no readable weight_map"):
        Checkpoint(tmp_path)
