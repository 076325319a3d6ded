"""Parametrise a test over the families: one of each layout in the fast tests, all in the slow."""

import pytest

from fedexperts.models.tiny import FAMILIES

LAYOUTS = {
    "deepseek_v3": "a dense layer first, latent attention, correction biases beside the router",
    "gemma4_text": "experts beside a dense block, a router of a projection and two scales",
    "gpt_oss": "transposed and interleaved weights, biases of experts and router, attention sinks",
    "granitemoe": "fused weights on disk, experts in block_sparse_moe",
    "hunyuan_v1_moe": "float32 parameters in a bfloat16 model, a router within the router",
    "jamba": "experts in feed_forward, Mamba beside attention",
    "llama_moe": "a router of two layers, a class of ours",
    "nemotron_h": "no gate projection, experts in mixer, a layer without attention",
    "qwen2_moe": "the shipped model's: a gated shared expert and nothing unusual",
}
"""The families that the fast tests run, and the layout that each one stands for."""


def each_family(families: tuple[str, ...] = FAMILIES) -> list:
    """``families`` as parameters of a test; those that stand for no layout are slow."""
    return [pytest.param(family, marks=() if family in LAYOUTS else pytest.mark.slow) for family in families]
