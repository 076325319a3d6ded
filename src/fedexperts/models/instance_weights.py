"""Weigh two LoRA adapters anew for each instance, by its likeness to a few stored ones (FedDPA).

An instance is represented by the last layer's output at the last token of its prompt, with the local adapter
alone. The local adapter's weight is ``largest`` times the mean cosine similarity to the stored
representations; the averaged adapter has the rest of 1. The weight holds for prompt and answer. In training
mode both keep the fixed weights that they have.

Shape suffixes: ``B`` instances, ``S`` stored instances, ``D`` hidden.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedexperts.models.prompts import PerPrompt, Prompt, hidden_size
from fedexperts.moe.surgery.undo import push_undo

NAME = "instance_weights"
"""Attribute of the model; the stored representations are its parameter ``references``."""
REFERENCES = f"{NAME}.references"


@dataclass(frozen=True, kw_only=True)
class InstanceForm:
    """Construction of the weights."""

    averaged: str
    """Name of the adapter that has the rest of the weight."""
    local: str
    """Name of the adapter that likeness speaks for."""
    largest: float
    """Weight of the local adapter's output for an instance that is like the stored ones in every way."""
    scale: float
    """Factor of an adapter's output at weight 1."""


class InstanceWeights(PerPrompt):
    """The stored representations, and the local adapter's weight in each row of the pass that runs."""

    def __init__(self, num_instances: int, size: int, form: InstanceForm, device: torch.device) -> None:
        """Store zeros, to which no instance is like."""
        super().__init__()
        self.form = form
        self.references = nn.Parameter(torch.zeros(num_instances, size, device=device), requires_grad=False)

    def numbers_of(self, model: Any, prompts: Sequence[Prompt]) -> Tensor:
        """Return the local adapter's weights."""
        embedded_BD = self.embed(model, prompts)
        alike_BS = functional.cosine_similarity(embedded_BD.unsqueeze(1), self.references, dim=-1)
        return self.form.largest * alike_BS.mean(-1)

    def embed(self, model: Any, prompts: Sequence[Prompt]) -> Tensor:
        """Return the representations of prompts under the local adapter alone, float32 (B, D)."""
        with self.all_rows(1.0, len(prompts)):
            hidden, lengths_B = self.last_hidden(model, prompts)
        return hidden[torch.arange(len(prompts), device=hidden.device), lengths_B - 1].float()

    def factors(self, rows: Tensor, scaling: Mapping[str, float]) -> dict[str, Tensor]:
        """Return both adapters' factors: the averaged one has what the local one leaves of 1."""
        form = self.form
        return {form.averaged: (1 - rows) * form.scale, form.local: rows * form.scale}


def add_instance_weights(model: Any, form: InstanceForm, num_instances: int) -> InstanceWeights:
    """Weigh two adapters that are there for each instance; the stored representations are zero yet.

    Inside a client's turn it is undone at the end.
    """
    embedding = model.get_input_embeddings().weight
    weights = InstanceWeights(num_instances, hidden_size(model), form, embedding.device)
    push_undo(weights.attach(model, NAME, weighs_lora=True))
    return weights


def instance_weights_of(model: Any) -> Any:
    """Return the :class:`InstanceWeights` of the model, or None."""
    return getattr(model, NAME, None)


def notes_of(model: Any) -> dict[str, Any]:
    """Return the form of the weights as plain data, and the number of stored instances; empty for none."""
    weights = instance_weights_of(model)
    return {} if weights is None else asdict(weights.form) | {"num_instances": len(weights.references)}
