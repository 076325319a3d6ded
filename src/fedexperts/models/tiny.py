"""Build small random models of every supported family, for tests and for a first look.

The same lines build all of them from the family's own configuration class; a dictionary lists what a family
needs beyond the common small sizes.
"""

from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fedexperts.errors import UserError
from fedexperts.models.ports import register_ports

_SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 6,
    "num_local_experts": 6,
    "n_routed_experts": 6,
    "moe_num_experts": 6,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "mlp_only_layers": [],
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "max_position_embeddings": 256,
    "sliding_window": 16,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Sizes by configuration field; a family takes those that it has. Initial weights are larger than usual, so
that outputs of a model of these sizes differ visibly."""

_LATENT_ATTENTION = {"num_key_value_heads": 4}
"""Multi-head latent attention has as many key heads as query heads."""
_ALL_SPARSE = {"mlp_layer_types": ["sparse", "sparse"]}
_FIRST_DENSE = {"num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "sparse"]}
_INDEXED = {"index_topk": 64, "index_n_heads": 2, "index_head_dim": 16}
_LINEAR_THEN_FULL = {"layer_types": ["linear_attention", "full_attention"]}
_GATED_DELTA = _LINEAR_THEN_FULL | {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_MAMBA_2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}

_FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "aria_text": {},
    "axk1": _LATENT_ATTENTION | _ALL_SPARSE,
    "axk2": _LATENT_ATTENTION | _ALL_SPARSE | _INDEXED,
    "bailing_hybrid": _LATENT_ATTENTION
    | _ALL_SPARSE
    | _LINEAR_THEN_FULL
    | {"linear_head_dim": 8, "linear_num_heads": 4},
    "beam": _ALL_SPARSE,
    "cohere2_moe": _FIRST_DENSE,
    "deepseek": {"num_hidden_layers": 3, "first_k_dense_replace": 1},
    "deepseek_v2": _LATENT_ATTENTION | {"num_hidden_layers": 3, "first_k_dense_replace": 1},
    "deepseek_v3": _LATENT_ATTENTION | {"num_hidden_layers": 3, "first_k_dense_replace": 1},
    "deepseek_v32": _LATENT_ATTENTION | _ALL_SPARSE | _INDEXED,
    "deepseek_v4": _INDEXED
    | {"mlp_layer_types": ["moe", "moe"], "num_key_value_heads": 1, "o_groups": 2, "o_lora_rank": 8},
    "dots1": {"n_shared_experts": 1},
    "ernie4_5_moe": {"num_hidden_layers": 3, "moe_layer_start_index": 1, "moe_layer_end_index": 2},
    "exaone_moe": _ALL_SPARSE,
    "flex_olmo": {},
    "flint": {},
    "gemma4_text": {
        "enable_moe_block": True,
        "top_k_experts": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "global_head_dim": 8,
        "num_global_key_value_heads": 2,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 128,
    },
    "glm4_moe": {"num_hidden_layers": 3, "first_k_dense_replace": 1},
    "glm4_moe_lite": _LATENT_ATTENTION | _ALL_SPARSE,
    "glm_moe_dsa": _LATENT_ATTENTION | _ALL_SPARSE | _INDEXED,
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoehybrid": _LINEAR_THEN_FULL | _MAMBA_2,
    "granitemoeshared": {},
    "hunyuan_v1_moe": {},
    "hy_v3": _ALL_SPARSE,
    "hy_v4": _LATENT_ATTENTION | _ALL_SPARSE | _INDEXED,
    "jamba": {
        "num_hidden_layers": 3,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 0,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "kimi_linear": _LATENT_ATTENTION
    | _ALL_SPARSE
    | _LINEAR_THEN_FULL
    | {"linear_attn_config": {"head_dim": 8, "num_heads": 4}},
    "kolibri1": {},
    "laguna": _ALL_SPARSE,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama_moe": {"intermediate_size": 96, "num_selects": 2, "score_scale_factor": [2.0, 3.0]},
    "mellum": _ALL_SPARSE,
    "mimo_v2_flash": _ALL_SPARSE,
    "minimax": {"block_size": 16},
    "minimax_m2": {},
    "minimax_m3_vl_text": _ALL_SPARSE,
    "mixtral": {},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "ssm_state_size": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "chunk_size": 16,
        "moe_shared_expert_intermediate_size": 24,
    },
    "olmoe": {},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_5_moe_text": _GATED_DELTA,
    "qwen3_moe": {},
    "qwen3_next": _GATED_DELTA,
    "qwen4_exp_text": _GATED_DELTA
    | {
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "solar_open": {},
}

FAMILIES: tuple[str, ...] = tuple(_FAMILIES)
"""Names of the supported families, as ``model_type`` in their config.json."""


def tiny_model(
    family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """Build a random model of ``family`` with two MoE layers of six experts, top-2, in evaluation mode.

    Equal arguments give equal weights, and torch's global generator is left as it was. ``overrides`` are
    fields of the family's configuration.

    Raises:
        UserError: ``family`` is not one of :data:`FAMILIES`.
    """
    if family not in _FAMILIES:
        raise UserError(f'no tiny model of family "{family}"; it must be one of {", ".join(FAMILIES)}')
    register_ports()
    defaults = AutoConfig.for_model(family)
    known = {*defaults.to_dict(), *defaults.attribute_map}
    small = {name: value for name, value in _SMALL.items() if name in known}
    config = AutoConfig.for_model(family, **(small | _FAMILIES[family] | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        _fill_zeros(model)
    return cast(PreTrainedModel, model.eval())


@torch.no_grad()
def _fill_zeros(model: nn.Module) -> None:
    """Fill weights that a family starts at zero (router, experts' biases); zeros would make all experts
    alike."""
    for parameter in model.parameters():
        if parameter.dim() >= 2 and not parameter.any():
            parameter.normal_(std=_SMALL["initializer_range"])
