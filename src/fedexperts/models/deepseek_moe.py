"""Implement DeepSeek-MoE 16B, v1 (``model_type`` "deepseek"; Dai et al., 2401.06066) on the experts
interface.

Transformers has no class for it, and its authors' code is remote code. It is Llama with fine-grained routed
experts beside shared ones without a gate, in all layers but the first. Checkpoints are read and written with
the published names (``mlp.experts.3.gate_proj.weight``). The load-balancing loss of its pretraining is not
implemented.

Shape suffixes: ``T`` tokens, ``D`` hidden, ``K`` top-k.
"""

from typing import Any, cast

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts, Qwen2MoeTopKRouter

from fedexperts.errors import UserError
from fedexperts.models.llama_with_experts import ExpertsLlamaForCausalLM, ExpertsLlamaPreTrainedModel


class DeepseekConfig(LlamaConfig):  # type: ignore[misc]
    """DeepSeek-MoE 16B's own sizes by default; the fields are those of its ``config.json``."""

    model_type = "deepseek"
    attribute_map = {"num_experts": "n_routed_experts"}  # noqa: RUF012 - as transformers declares it

    vocab_size: int = 102400
    hidden_size: int = 2048
    intermediate_size: int = 10944
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 16
    max_position_embeddings: int = 4096
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001
    moe_intermediate_size: int = 1408
    n_routed_experts: int = 64
    n_shared_experts: int | None = 2
    num_experts_per_tok: int = 6
    first_k_dense_replace: int = 1
    moe_layer_freq: int = 1
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"

    def __post_init__(self, **kwargs: Any) -> None:
        """Refuse what the published code refuses."""
        super().__post_init__(**kwargs)
        if self.scoring_func != "softmax":
            raise UserError(f'scoring_func is "{self.scoring_func}"; DeepSeek-MoE v1 has "softmax" alone')

    def is_sparse(self, layer_index: int) -> bool:
        """Return whether a layer has experts."""
        return layer_index >= self.first_k_dense_replace and layer_index % self.moe_layer_freq == 0


class DeepseekMoE(nn.Module):
    """Sum of routed and shared experts."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.gate = Qwen2MoeTopKRouter(config)
        self.experts = Qwen2MoeExperts(config)
        self.shared_experts = _shared_experts(config) if config.n_shared_experts else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map ``hidden_states`` (batch, length, D) to the same shape."""
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights_TK, index_TK = self.gate(hidden_TD)
        output_TD = self.experts(hidden_TD, index_TK, weights_TK)
        if self.shared_experts is not None:
            output_TD = output_TD + self.shared_experts(hidden_TD)
        return cast(Tensor, output_TD.view_as(hidden_states))


def _shared_experts(config: DeepseekConfig) -> LlamaMLP:
    """Make the shared experts side by side: one dense block of their common width."""
    widened = LlamaConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.moe_intermediate_size * (config.n_shared_experts or 0),
        hidden_act=config.hidden_act,
    )
    return LlamaMLP(widened)


class DeepseekModel(ExpertsLlamaPreTrainedModel, LlamaModel):  # type: ignore[misc]
    """A Llama whose sparse layers have :class:`DeepseekMoE` in the place of the dense block."""

    config: DeepseekConfig

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            if config.is_sparse(index):
                layer.mlp = DeepseekMoE(config)
        self.post_init()


class DeepseekForCausalLM(ExpertsLlamaForCausalLM):
    """The language model, under the class name that published checkpoints give."""

    config: DeepseekConfig
    model_class = DeepseekModel


def register() -> None:
    """Register the model with transformers' Auto classes; a checkpoint's ``auto_map`` is then not needed."""
    AutoConfig.register(DeepseekConfig.model_type, DeepseekConfig, exist_ok=True)
    AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM, exist_ok=True)
    # Published names are Qwen2-MoE's: one tensor for each expert and matrix.
    mapping = get_checkpoint_conversion_mapping("qwen2_moe")
    register_checkpoint_conversion_mapping(DeepseekConfig.model_type, mapping, overwrite=True)
