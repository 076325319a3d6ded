"""List shapes of published models as configurations: enough to build them without weights and to count.

Values are those of each model's ``config.json`` on the hub; fields left out have the family's own default.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One published model."""

    hub_name: str
    """Hub name of its weights."""
    parameters: int
    """Exact number of its published parameters."""
    config: Mapping[str, Any]
    """Fields of its ``config.json`` that decide sizes."""


SHAPES: Mapping[str, Shape] = {
    "Qwen1.5-MoE-A2.7B": Shape(
        hub_name="Qwen/Qwen1.5-MoE-A2.7B",
        parameters=14_315_784_192,
        config={
            "model_type": "qwen2_moe",
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "norm_topk_prob": False,
            "max_position_embeddings": 8192,
        },
    ),
    "DeepSeek-MoE-16B": Shape(
        hub_name="deepseek-ai/deepseek-moe-16b-base",
        parameters=16_375_728_128,
        config={
            "model_type": "deepseek",
            "vocab_size": 102400,
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "first_k_dense_replace": 1,
            "norm_topk_prob": False,
            "max_position_embeddings": 4096,
        },
    ),
    "DeepSeek-V2-Lite": Shape(
        hub_name="deepseek-ai/DeepSeek-V2-Lite",
        parameters=15_706_484_224,
        config={
            "model_type": "deepseek_v2",
            "vocab_size": 102400,
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "q_lora_rank": None,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "first_k_dense_replace": 1,
            "norm_topk_prob": False,
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.0,
            "max_position_embeddings": 4096,
        },
    ),
    "LLaMA-MoE-3.5B": Shape(
        hub_name="llama-moe/LLaMA-MoE-v1-3_5B-4_16",
        parameters=6_742_618_112,
        config={
            "model_type": "llama_moe",
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "num_experts": 16,
            "num_selects": 4,
            "score_scale_factor": 4.0,
            "max_position_embeddings": 4096,
        },
    ),
    "OLMoE-1B-7B": Shape(
        hub_name="allenai/OLMoE-1B-7B-0924",
        parameters=6_919_161_856,
        config={
            "model_type": "olmoe",
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "max_position_embeddings": 4096,
        },
    ),
    "Mixtral-8x7B": Shape(
        hub_name="mistralai/Mixtral-8x7B-v0.1",
        parameters=46_702_792_704,
        config={
            "model_type": "mixtral",
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 32768,
        },
    ),
    "Qwen3-30B-A3B": Shape(
        hub_name="Qwen/Qwen3-30B-A3B",
        parameters=30_532_122_624,
        config={
            "model_type": "qwen3_moe",
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "max_position_embeddings": 40960,
        },
    ),
    "gpt-oss-20b": Shape(
        hub_name="openai/gpt-oss-20b",
        parameters=20_914_757_184,
        config={
            "model_type": "gpt_oss",
            "vocab_size": 201088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 24,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "sliding_window": 128,
            "max_position_embeddings": 131072,
        },
    ),
}
"""Shapes by the name that ``fedexperts plan`` takes."""


def find_shape(name: str) -> Shape | None:
    """Return the built-in shape of this name or hub name, ignoring case; None if there is none."""
    for own, shape in SHAPES.items():
        if name.lower() in (own.lower(), shape.hub_name.lower()):
            return shape
    return None


def shape_names() -> str:
    """Return all names in a sentence."""
    return ", ".join(SHAPES)
