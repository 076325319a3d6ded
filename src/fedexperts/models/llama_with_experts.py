"""Share classes between the two ports: Llama with experts where transformers' own has a dense block."""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers import initialization as init
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts, Qwen2MoeTopKRouter


class ExpertsLlamaPreTrainedModel(LlamaPreTrainedModel):  # type: ignore[misc]
    """Llama's class, with initial weights for the modules that Llama lacks."""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # Transformers derives it from a class's source file and caches the answer, which would be inherited
        # from Llama; what counts is the decorator on Qwen2MoeExperts.
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Qwen2MoeExperts | Qwen2MoeTopKRouter):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, mean=0.0, std=self.config.initializer_range)


class ExpertsLlamaForCausalLM(ExpertsLlamaPreTrainedModel, LlamaForCausalLM):  # type: ignore[misc]
    """The language model around ``model_class``."""

    model_class: ClassVar[Any]

    def __init__(self, config: Any) -> None:
        # Llama's own would make a dense model first.
        LlamaPreTrainedModel.__init__(self, config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
