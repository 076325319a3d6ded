"""Families that transformers has not, made known to it: what the papers' own models need."""

from functools import cache

from fedexperts.models import deepseek_moe, llama_moe


@cache
def register_ports() -> None:
    """Let transformers' Auto classes build and read DeepSeek-MoE v1 and LLaMA-MoE."""
    deepseek_moe.register()
    llama_moe.register()
