"""Tiny models: the same for the same seed, and of the family that was asked for."""

import re
from pathlib import Path

import pytest
import torch

from families import LAYOUTS, each_family
from fedexperts.errors import UserError
from fedexperts.models.tiny import FAMILIES, tiny_model
from fedexperts.moe.surgery import seam
from fedexperts.tensors import first_non_finite, sha256_of

NAMED_BY_THE_ISSUE = {
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "mixtral",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "phimoe",
    "jamba",
}


def test_families_that_users_were_promised_are_there() -> None:
    assert set(FAMILIES) >= NAMED_BY_THE_ISSUE
    assert list(FAMILIES) == sorted(FAMILIES)


@pytest.mark.parametrize("family", each_family())
def test_equal_seeds_give_equal_models(family: str) -> None:
    first, again, other = (tiny_model(family, seed=seed).state_dict() for seed in (1, 1, 2))
    assert sha256_of(first) == sha256_of(again) != sha256_of(other)
    assert first_non_finite(first) is None
    assert sum(tensor.numel() for tensor in first.values()) < 200_000


def layout_of(family: str) -> set[object]:
    """All that surgery has to tell apart: how an MoE layer is laid out, and the block that it stands in."""
    model = tiny_model(family, dtype=torch.bfloat16)
    layer, *_ = seam.find_moe_layers(model)
    block_name = layer.name.rpartition(".")[0]
    block = dict(model.get_submodule(block_name).named_parameters())
    router = [name for name in block if name.split(".")[0] in ("gate", "router")]
    return {
        *((mark, getattr(layer.experts, mark)) for mark in ("is_transposed", "has_bias", "is_concatenated")),
        ("parameters", layer.parameter_names()),
        ("place", tuple(part for part in layer.name.split(".") if not part.isdigit())),
        ("router", len(router), any(name.endswith("bias") for name in router)),
        ("correction", any("correction" in name for name in model.state_dict())),
        ("shared expert", any("shared" in name for name in block)),
        ("shared gate", any("shared_expert_gate" in name for name in block)),
        ("float32", any(parameter.dtype == torch.float32 for parameter in model.parameters())),
        ("dense layer first", "0" not in block_name.split(".")),
    }


def test_families_of_the_fast_tests_have_every_layout_that_a_family_has() -> None:
    found = {family: layout_of(family) for family in FAMILIES}
    covered = set().union(*(found[family] for family in LAYOUTS))
    assert {family: layout - covered for family, layout in found.items() if layout - covered} == {}


def test_global_generator_is_left_as_it_was() -> None:
    before = torch.get_rng_state()
    tiny_model("mixtral", seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_overrides_reach_the_configuration() -> None:
    model = tiny_model("qwen2_moe", num_experts=4, vocab_size=77, dtype=torch.bfloat16)
    assert model.config.num_experts == 4
    assert model.get_input_embeddings().weight.shape == (77, 32)
    assert model.dtype == torch.bfloat16


def test_unknown_family_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(UserError, match='no tiny model of family "llama"; it must be one of afmoe, '):
        tiny_model("llama")


def test_documentation_lists_the_families() -> None:
    text = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    table = re.findall(r"^\| `(\w+)` \| `\w+ForCausalLM` \|", text, flags=re.MULTILINE)
    assert tuple(table) == FAMILIES
