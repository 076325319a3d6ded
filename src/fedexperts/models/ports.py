"""Register the model families of the papers that transformers lacks."""

from functools import cache

from fedexperts.models import deepseek_moe, llama_moe


@cache
def register_ports() -> None:
    """Register DeepSeek-MoE v1 and LLaMA-MoE with transformers' Auto classes."""
    deepseek_moe.register()
    llama_moe.register()
