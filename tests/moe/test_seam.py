"""Finding MoE layers, naming experts, watching and writing through the seam."""

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from installed import Installed, installed_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from fedexperts.errors import UserError
from fedexperts.models.tiny import tiny_model
from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.graft import GraftForm, graft, grafted
from fedexperts.moe.surgery.seam import MoeLayer
from fedexperts.moe.surgery.slots import SlotPlan, restore_layer, split_layer

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def model_of(family: str, **more: Any) -> nn.Module:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL, **more))


class Doubled(nn.Module):
    def forward(self, experts: nn.Module, hidden_TD: Tensor, routed_TD: Tensor) -> Tensor:
        return 2 * routed_TD


def test_dense_model_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="LlamaForCausalLM has no MoE layers"):
        seam.find_moe_layers(model_of("llama"))


def test_llama4_is_refused_by_name() -> None:
    model = model_of("llama4_text", intermediate_size_mlp=48, head_dim=8, num_local_experts=4)
    with pytest.raises(UserError, match="Llama4ForCausalLM is not supported: its experts"):
        seam.find_moe_layers(model)


def test_experts_called_in_another_way_are_refused_by_name() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("doge", is_moe=True))
    with pytest.raises(UserError, match=r"DogeForCausalLM is not supported: its experts \(DogeCDMoE\)"):
        seam.find_moe_layers(model)


def test_a_block_without_a_router_is_refused_by_name(qwen: Installed) -> None:
    model = copy.deepcopy(qwen.model)
    del model.model.layers[1].mlp.gate
    with pytest.raises(
        UserError, match=r"the MoE block of model\.layers\.1\.mlp\.experts has no router under"
    ):
        seam.find_moe_layers(model)


def test_layers_are_counted_without_the_dense_ones() -> None:
    layers = installed_model("deepseek_v3").layers
    assert [layer.name for layer in layers] == ["model.layers.1.mlp.experts", "model.layers.2.mlp.experts"]
    assert [layer.index for layer in layers] == [0, 1]


def test_sizes_do_not_depend_on_the_layout() -> None:
    upright, transposed = installed_model("granitemoe").layers[0], installed_model("gpt_oss").layers[0]
    assert not upright.experts.is_transposed
    assert transposed.experts.is_transposed
    assert (upright.hidden_size, upright.expert_size) == (transposed.hidden_size, transposed.expert_size)
    assert (upright.hidden_size, upright.expert_size) == (32, 48)


def test_expert_has_its_biases() -> None:
    names = {"gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"}
    assert set(installed_model("gpt_oss").layers[0].expert(3)) == names


@pytest.mark.parametrize("expert", [-1, 6])
def test_expert_out_of_range_is_refused(qwen: Installed, expert: int) -> None:
    with pytest.raises(
        UserError, match=r"expert -?\d of layer model.layers.0.mlp.experts: must be from 0 to 5"
    ):
        qwen.layers[0].expert(expert)


def test_router_row_is_the_logit_of_its_expert(qwen: Installed) -> None:
    layer, hidden = qwen.layers[1], torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rows = torch.stack([layer.router_row(expert) for expert in range(6)])
        logits = nn.functional.linear(hidden, rows)
        chosen = layer.router(hidden)[-1]
    assert torch.equal(logits.topk(2).indices.sort().values, chosen.sort().values)


def test_names_go_layer_by_layer_and_expert_by_expert(qwen: Installed) -> None:
    names = seam.expert_names(qwen.layers)
    assert names[:3] == (
        "model.layers.0.mlp.experts.0.gate_up_proj",
        "model.layers.0.mlp.experts.0.down_proj",
        "model.layers.0.mlp.experts.1.gate_up_proj",
    )
    assert names[-1] == "model.layers.1.mlp.experts.5.down_proj"
    assert seam.fused_names(names) == {
        f"model.layers.{layer}.mlp.experts.{parameter}"
        for layer in (0, 1)
        for parameter in ("gate_up_proj", "down_proj")
    }


def test_a_numbered_parameter_that_is_no_expert_keeps_its_name() -> None:
    assert seam.fused_names(["model.layers.3.scale"]) == {"model.layers.3.scale"}


def test_writing_into_a_view_writes_into_the_model(qwen: Installed) -> None:
    name = "model.layers.1.mlp.experts.2.down_proj"
    view = seam.tensor_views(qwen.model, [name])[name]
    kept = view.clone()
    view.fill_(7.0)
    written = qwen.layers[1].experts.down_proj.detach().clone()
    view.copy_(kept)
    assert (written == 7.0).all(dim=(1, 2)).tolist() == [expert == 2 for expert in range(6)]


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.mlp.experts.6.down_proj", "model.layers.1.mlp.experts.0.up_proj", "model.nothing"],
)
def test_a_view_of_what_is_not_there_is_an_error(qwen: Installed, name: str) -> None:
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        seam.tensor_views(qwen.model, [name])


def test_watching_sees_each_layer_once_with_what_it_got_and_gave(qwen: Installed) -> None:
    seen: list[tuple[int, tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = []

    def see(layer: MoeLayer, hidden: Tensor, index: Tensor, weights: Tensor, routed: Tensor) -> None:
        assert index.shape == weights.shape
        seen.append((layer.index, tuple(hidden.shape), tuple(index.shape), tuple(routed.shape)))

    with seam.watch_experts(qwen.layers, see):
        qwen.logits()
    qwen.logits()
    assert seen == [(index, (40, 32), (40, 2), (40, 32)) for index in (0, 1)]


def test_watching_ends_with_an_exception(qwen: Installed) -> None:
    def see(*_: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), seam.watch_experts(qwen.layers, see):
        qwen.logits()
    assert torch.equal(qwen.logits(), qwen.stock_logits)


def test_watching_sees_the_addition(qwen: Installed) -> None:
    sums: list[Tensor] = []

    def see(layer: MoeLayer, hidden: Tensor, index: Tensor, weights: Tensor, routed: Tensor) -> None:
        sums.append(routed)

    layer = qwen.layers[0]
    with seam.watch_experts([layer], see):
        qwen.logits()
        seam.add_to_layer(layer, Doubled())
        qwen.logits()
        seam.take_from_layer(layer)
    assert torch.equal(sums[1], 2 * sums[0])


def test_a_layer_takes_one_addition(qwen: Installed) -> None:
    layer = qwen.layers[0]
    seam.add_to_layer(layer, Doubled())
    with pytest.raises(UserError, match="has grafts already"):
        seam.add_to_layer(layer, Doubled())
    with pytest.raises(UserError, match="has a graft: remove it before"):
        seam.remove_implementation(qwen.model)
    seam.take_from_layer(layer)
    assert seam.addition_of(layer) is None


PLAN = SlotPlan(num_experts=6, tuned=(1,), kept=(0, 2, 3, 4, 5))


def test_saving_is_refused_while_slots_or_a_graft_would_be_lost(qwen: Installed, tmp_path: Path) -> None:
    with (
        grafted(qwen.layers[1:], [2], GraftForm(), 0),
        pytest.raises(UserError, match=r"1.*has a graft, for"),
    ):
        qwen.model.save_pretrained(tmp_path)
    fused = split_layer(qwen.layers[0], PLAN)
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.experts has slots instead of its experts"):
        qwen.model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
    restore_layer(qwen.layers[0], fused)
    qwen.model.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").exists()


def test_a_copy_of_an_installed_model_guards_its_own_slots(qwen: Installed, tmp_path: Path) -> None:
    twin = copy.deepcopy(qwen.model)
    split_layer(seam.find_moe_layers(twin)[0], PLAN)
    with pytest.raises(UserError, match="has slots"):
        twin.save_pretrained(tmp_path)
    qwen.model.save_pretrained(tmp_path)


def test_an_installed_model_goes_with_its_last_user() -> None:
    model = tiny_model("qwen2_moe")
    seam.install_implementation(model)
    gone = weakref.ref(model)
    del model
    assert gone() is None


def test_slots_and_grafts_without_the_implementation_are_refused() -> None:
    model = tiny_model("qwen2_moe")
    layers = seam.find_moe_layers(model)
    with pytest.raises(UserError, match="without our experts implementation"):
        split_layer(layers[0], PLAN)
    with pytest.raises(UserError, match="without our experts implementation"):
        graft(layers, [0, 0], GraftForm(), 0)
    assert len(layers[0].experts.down_proj) == 6


def test_the_implementation_is_not_removed_with_slots(qwen: Installed) -> None:
    fused = split_layer(qwen.layers[0], PLAN)
    with pytest.raises(UserError, match="remove it before the experts implementation"):
        seam.remove_implementation(qwen.model)
    restore_layer(qwen.layers[0], fused)
