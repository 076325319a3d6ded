"""FedDPA: Yang, Long, Shen, Jiang, Blumenstein, "Dual-Personalizing Adapter for Federated Foundation Models",
NeurIPS 2024, arXiv 2403.19211.

Each client has two LoRA adapters on the same modules: a global one, averaged as in FedAvg, and a local one
that stays. FedDPA-F trains the local one after the federation, from the global one; FedDPA-T trains it in
every round beside the frozen global one. Their outputs are mixed with a fixed weight in training; at
inference each instance weighs them by its likeness to a few of the client's training instances. ``reading N``
points to docs/algorithms/feddpa.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedexperts.algorithms.api import (
    Client,
    Kept,
    ModelParts,
    ServerState,
    TrainedGroup,
    refuse_below,
    refuse_idle,
    upload_of,
)
from fedexperts.algorithms.fedavg_finetune import ALONE, FedAvgFinetune
from fedexperts.errors import UserError, refuse_unknown
from fedexperts.messages import Sent, Upload
from fedexperts.models.adapters import add_adapter, scale_adapters
from fedexperts.models.instance_weights import (
    REFERENCES,
    InstanceForm,
    add_instance_weights,
    instance_weights_of,
)
from fedexperts.models.prompts import hidden_size
from fedexperts.moe.surgery import seam
from fedexperts.tensors import Tensors, num_bytes
from fedexperts.training.local_steps import LocalResult

GLOBAL, LOCAL = "default", "own"
"""Names of the two adapters in the model; those of their parameters differ in nothing else."""


@dataclass(frozen=True, kw_only=True)
class FedDPA(FedAvgFinetune):
    """An averaged adapter and a personal one, mixed."""

    variant: Literal["F", "T"]
    """``F``: FedAvg first, then the local adapter is fine-tuned from the averaged one. ``T``: both in every
    round."""
    federated_rounds: int = 0
    """Rounds before the local adapter starts; for ``F`` only."""
    mix: float = 0.5
    """Weight of the local adapter's output; the global one has the rest of 1 (reading 1)."""
    weighting: Literal["instance", "fixed"] = "instance"
    """At inference ``instance`` multiplies ``mix`` by the prompt's mean cosine similarity to stored ones."""
    num_instances: int = 5
    """Training instances, at most, whose prompts a client stores to compare with (reading 5)."""

    def __post_init__(self) -> None:
        """Refuse a weight outside 0 to 1, and rounds that do not fit the variant."""
        refuse_unknown(self)
        super().__post_init__()
        if not 0 < self.mix <= 1:
            raise UserError(f"mix must be above 0 and at most 1, not {self.mix}")
        refuse_below(self, {"num_instances": 1}, exclusive=False)
        if self.weighting == "fixed":
            refuse_idle(self, ("num_instances",), 'with weighting = "fixed"')
        if (self.variant == "F") is not bool(self.federated_rounds):
            problem = "at least 1 with" if self.variant == "F" else "0, as it has no effect, with"
            raise UserError(
                f'federated_rounds must be {problem} variant "{self.variant}", not {self.federated_rounds}'
            )

    def is_alone(self, state: ServerState) -> bool:
        """Return whether the federation is over, which it never is for ``T``."""
        return self.variant == "F" and super().is_alone(state)

    def personal_names(self, parts: ModelParts) -> tuple[str, ...]:
        """Return the local adapter's parameters, and the stored instances."""
        there = {name for name, _ in parts.model.named_parameters()}
        return tuple(name for name in (*map(_local, parts.lora_names), REFERENCES) if name in there)

    def trained(self, parts: ModelParts, sent: Sent) -> tuple[TrainedGroup, ...]:
        """Return the global adapter while it is averaged, and the local one where it is there."""
        shared = () if ALONE in sent.orders else parts.lora_names
        local = tuple(name for name in self.personal_names(parts) if name != REFERENCES)
        return (TrainedGroup(names=shared), TrainedGroup(names=local, keeps_optimizer=True))

    def blank(self, parts: ModelParts) -> Kept:
        """Return a local adapter and stored instances without values of their own: sizes need no data."""
        if self.weighting == "fixed":
            return Kept()
        stored = torch.zeros(self.num_instances, hidden_size(parts.model))
        local = _renamed(seam.current(parts.model, parts.lora_names))
        return Kept(parameters=local | {REFERENCES: stored})

    def server_view(self, kept: Kept, sent: Sent) -> Sent:
        """Return the averaged adapter, which a client that trains alone keeps beside its local one."""
        return Sent(tensors={**kept.beside, **sent.tensors})

    def install(self, client: Client, kept: Kept, sent: Sent) -> Kept:
        """Load the averaged adapter, and mix the local one in where it has begun."""
        parts = client.parts
        if self.variant == "F" and ALONE not in sent.orders:
            self.install_shared(parts, sent)
            return kept
        kept = kept or self.begin(parts, sent)
        add_adapter(parts.model, parts.adapter, client.seed, LOCAL)
        self.weigh(parts, local=self.mix, averaged=1 - self.mix)
        if self.weighting == "instance":
            return self._install_instances(client, kept, sent)
        seam.load_tensors(parts.model, self.holds(kept, sent))
        return kept

    def _install_instances(self, client: Client, kept: Kept, sent: Sent) -> Kept:
        """Load both adapters and weigh them by instance; store the instances now if the client is new."""
        parts, stored = client.parts, kept.parameters.get(REFERENCES)
        prompts = self._instances(client) if stored is None else ()
        num_instances = len(prompts) if stored is None else len(stored)
        add_instance_weights(parts.model, self.instance_form(parts), num_instances)
        seam.load_tensors(parts.model, self.holds(kept, sent))
        if stored is not None:
            return kept
        self._store(parts, prompts)
        return replace(kept, parameters=seam.current(parts.model, self.personal_names(parts)))

    def _instances(self, client: Client) -> list[tuple[int, ...]]:
        batches = client.calibration_batches(self.num_instances)
        return [prompt for batch in batches for prompt in batch.prompts()]

    def _store(self, parts: ModelParts, prompts: Sequence[tuple[int, ...]]) -> None:
        """Represent the stored prompts under the local adapter as it stands."""
        seam.load_tensors(
            parts.model, {REFERENCES: instance_weights_of(parts.model).embed(parts.model, prompts)}
        )

    def instance_form(self, parts: ModelParts) -> InstanceForm:
        """Return how instances weigh the two adapters."""
        scale = parts.adapter.alpha / parts.adapter.rank
        return InstanceForm(averaged=GLOBAL, local=LOCAL, largest=self.mix, scale=scale)

    def holds(self, kept: Kept, sent: Sent) -> Mapping[str, Tensor]:
        """Return both adapters, and the stored instances."""
        return {**self.server_view(kept, sent).tensors, **kept.parameters}

    def begin(self, parts: ModelParts, sent: Sent) -> Kept:
        """Return the local adapter's start: LoRA's own for ``T`` (reading 2), the average for ``F``."""
        if self.variant == "T":
            return Kept(parameters=_renamed(seam.current(parts.model, parts.lora_names)))
        return Kept(parameters=_renamed(sent.tensors), beside=sent.tensors)

    def keep(self, client: Client, kept: Kept, result: LocalResult) -> Kept:
        """Return the local adapter as trained, with the stored instances as it now represents them."""
        if self.weighting == "instance" and REFERENCES in self.personal_names(client.parts):
            self._store(client.parts, self._instances(client))
        return super().keep(client, kept, result)

    def bytes_beside(self, parts: ModelParts, kept: Kept, sent: Sent) -> int:
        """Add, for ``T``, the trained global adapter, which waits to be sent while the local one trains."""
        waiting = num_bytes(sent.tensors) if self.variant == "T" else 0
        return super().bytes_beside(parts, kept, sent) + waiting

    def client_update(self, client: Client, kept: Kept, sent: Sent) -> tuple[Upload, Kept]:
        """Train the adapters that this round is for."""
        if self.variant == "T":
            return self.train_both(client, kept, sent)
        return (self.train_local if ALONE in sent.orders else super().client_update)(client, kept, sent)

    def train_both(self, client: Client, kept: Kept, sent: Sent) -> tuple[Upload, Kept]:
        """Train the global adapter alone, then the local one beside the frozen average (reading 3)."""
        kept, parts = kept or self.begin(client.parts, sent), client.parts
        self.install_shared(parts, sent)
        result = client.train((TrainedGroup(names=parts.lora_names),))
        upload = upload_of(client, parts.lora_names, sent, result)
        kept = self.install(client, kept, sent)
        personal = client.train(self.trained(parts, sent)[1:], optimizer_state=kept.optimizer)
        upload.measured["personal_loss"] = personal.metrics()["train_loss"]
        return upload, self.keep(client, kept, personal)

    def train_local(self, client: Client, kept: Kept, sent: Sent) -> tuple[Upload, Kept]:
        """Fine-tune the local adapter by itself; the global one is mixed in afterwards."""
        kept = self.install(client, kept, sent)
        self.weigh(client.parts, local=1, averaged=0)
        result = client.train(self.trained(client.parts, sent), optimizer_state=kept.optimizer)
        self.weigh(client.parts, local=self.mix, averaged=1 - self.mix)
        return upload_of(client, (), sent, result), self.keep(client, kept, result)

    def weigh(self, parts: ModelParts, *, local: float, averaged: float) -> None:
        """Set the weights of the two adapters' outputs."""
        scale = parts.adapter.alpha / parts.adapter.rank
        scale_adapters(parts.model, {GLOBAL: averaged * scale, LOCAL: local * scale})


def _local(name: str) -> str:
    return name.replace(f".{GLOBAL}.", f".{LOCAL}.")


def _renamed(tensors: Tensors) -> Tensors:
    return {_local(name): tensor for name, tensor in tensors.items()}
