"""Implement LLaMA-MoE 3.0B and 3.5B ("llama_moe"; Zhu et al., 2406.16554) on the experts interface.

Transformers has no class for it, and its authors' code is remote code. It is Llama-2 with every dense block
cut into experts, and a router of two layers that adds noise in training, as its authors intended. Checkpoints
are read and written with the published names (``mlp.calculator.experts.weight_gate.3``). The balance loss of
its pretraining is not implemented.

Shape suffixes: ``T`` tokens, ``D`` hidden, ``E`` experts, ``K`` top-k.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import WeightRenaming
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

from fedexperts.errors import UserError
from fedexperts.models.llama_with_experts import ExpertsLlamaForCausalLM, ExpertsLlamaPreTrainedModel

_FIXED = {
    "gate_type": "TopKBalancedNoisyGate",
    "calculator_type": "UniversalCalculator",
    "add_weight_norm": False,
}
"""Fields of the published configuration with one value in all checkpoints; code for others is not public."""


class LlamaMoEConfig(LlamaConfig):  # type: ignore[misc]
    """LLaMA-MoE-v1-3.5B (4/16) by default; the fields are those of its ``config.json``."""

    model_type = "llama_moe"
    attribute_map = {"num_experts_per_tok": "num_selects"}  # noqa: RUF012 - as transformers declares it

    pad_token_id: int | None = 0
    num_experts: int = 16
    num_selects: int = 4
    size_experts: list[list[int]] | None = None
    gate_network: str = "mlp"
    gate_use_softmax: bool = True
    gate_add_noise: bool = True
    gate_noise_epsilon: float = 1e-2
    multiply_gate_scores: bool = True
    score_scale_factor: float | int | list[float] | list[int] = 4.0
    gate_type: str = "TopKBalancedNoisyGate"
    calculator_type: str = "UniversalCalculator"
    add_weight_norm: bool = False

    @property
    def moe_intermediate_size(self) -> int:
        """Inner size of one expert."""
        return int(self.intermediate_size // self.num_experts)

    def __post_init__(self, **kwargs: Any) -> None:
        """Refuse experts that cannot be held in one tensor, and gates whose code is not public."""
        super().__post_init__(**kwargs)
        for field, value in _FIXED.items():
            if getattr(self, field) != value:
                raise UserError(f"{field} is {getattr(self, field)!r}; LLaMA-MoE is supported with {value!r}")
        if self.gate_network not in ("mlp", "linear"):
            raise UserError(f'gate_network is "{self.gate_network}"; it must be "mlp" or "linear"')
        if self.intermediate_size % self.num_experts:
            inner = self.intermediate_size
            raise UserError(f"intermediate_size {inner} is not a multiple of num_experts {self.num_experts}")
        sizes = {size for layer in self.size_experts or [] for size in layer}
        if not sizes <= {self.moe_intermediate_size}:
            raise UserError(
                f"size_experts has {', '.join(map(str, sorted(sizes)))}, but all experts must have the same "
                f"size here, {self.moe_intermediate_size}"
            )


class LlamaMoERouter(nn.Module):
    """``softmax`` over the K largest of ``W2 tanh(W1 x)``, times a scale; with noise in training."""

    def __init__(self, config: LlamaMoEConfig, scale: float) -> None:
        super().__init__()
        self.config, self.scale = config, scale
        hidden, num_experts = config.hidden_size, config.num_experts
        first = nn.Linear(hidden, num_experts, bias=False)
        second = nn.Linear(num_experts, num_experts, bias=False)
        is_linear = config.gate_network == "linear"
        self.gate_network = first if is_linear else nn.Sequential(first, nn.Tanh(), second)
        if config.gate_add_noise:
            self.weight_noise = nn.Linear(hidden, num_experts, bias=False)

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (T, E), and weights and indices (T, K) of the chosen experts."""
        logits_TE = self.gate_network(hidden_TD)
        if self.training and self.config.gate_add_noise:
            spread_TE = functional.softplus(self.weight_noise(hidden_TD)) + self.config.gate_noise_epsilon
            logits_TE = logits_TE + torch.randn_like(logits_TE) * spread_TE
        top_TK, index_TK = logits_TE.topk(self.config.num_selects, dim=-1)
        return logits_TE, self._weights(top_TK), index_TK

    def _weights(self, top_TK: Tensor) -> Tensor:
        if not self.config.multiply_gate_scores:
            return torch.ones_like(top_TK)
        if self.config.gate_use_softmax:
            top_TK = top_TK.float().softmax(dim=-1).to(top_TK.dtype)
        return top_TK * self.scale

    def rows(self) -> Tensor:
        """Return weight rows (E, D) of the logits' linear part, ``W2 W1``: tanh is the identity near zero."""
        if isinstance(self.gate_network, nn.Linear):
            return self.gate_network.weight
        first, second = cast(nn.Linear, self.gate_network[0]), cast(nn.Linear, self.gate_network[2])
        return second.weight @ first.weight


class LlamaMoELayer(nn.Module):
    """One layer's router and experts."""

    def __init__(self, config: LlamaMoEConfig, scale: float) -> None:
        super().__init__()
        self.gate = LlamaMoERouter(config, scale)
        self.experts = Qwen2MoeExperts(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map ``hidden_states`` (batch, length, D) to the same shape."""
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights_TK, index_TK = self.gate(hidden_TD)
        return cast(Tensor, self.experts(hidden_TD, index_TK, weights_TK).view_as(hidden_states))


class LlamaMoEModel(ExpertsLlamaPreTrainedModel, LlamaModel):  # type: ignore[misc]
    """A Llama whose dense blocks are :class:`LlamaMoELayer`."""

    config: LlamaMoEConfig

    def __init__(self, config: LlamaMoEConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            scale: Any = config.score_scale_factor
            layer.mlp = LlamaMoELayer(config, scale[index] if isinstance(scale, list) else scale)
        self.post_init()


class LlamaMoEForCausalLM(ExpertsLlamaForCausalLM):
    """The language model, under the class name that published checkpoints give."""

    config: LlamaMoEConfig
    model_class = LlamaMoEModel


def register() -> None:
    """Register the model with transformers' Auto classes; a checkpoint's ``auto_map`` is then not needed."""
    AutoConfig.register(LlamaMoEConfig.model_type, LlamaMoEConfig, exist_ok=True)
    AutoModelForCausalLM.register(LlamaMoEConfig, LlamaMoEForCausalLM, exist_ok=True)
    # A conversion pattern knows an index only where a dot follows it, so names are first made Qwen2-MoE's.
    names = [
        WeightRenaming(
            rf"mlp\.calculator\.experts\.weight_{kind}\.(\d+)", rf"mlp.experts.\1.{kind}_proj.weight"
        )
        for kind in ("gate", "up", "down")
    ]
    mapping = names + get_checkpoint_conversion_mapping("qwen2_moe")
    register_checkpoint_conversion_mapping(LlamaMoEConfig.model_type, mapping, overwrite=True)
