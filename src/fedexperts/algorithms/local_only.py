"""Local-only training: no federation, the floor that every federation must beat."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from fedexperts.algorithms.aggregation import current, load_tensors
from fedexperts.algorithms.api import Client, ModelParts, ServerState
from fedexperts.algorithms.kept_state import flatten, unflatten
from fedexperts.messages import Upload
from fedexperts.tensors import Tensors
from fedexperts.training.local_steps import local_steps
from fedexperts.training.optimizers import ParameterGroup


@dataclass(frozen=True, kw_only=True)
class LocalOnly:
    """Each client trains its own LoRA and keeps it; nothing travels."""

    def upload_names(self, parts: ModelParts) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def personal_names(self, parts: ModelParts) -> tuple[str, ...]:
        """All LoRA parameters."""
        return parts.lora_names

    def blank_personal(self, parts: ModelParts) -> Tensors:
        """LoRA's start."""
        return current(parts.model, parts.lora_names)

    def init(self, parts: ModelParts) -> ServerState:
        """An empty state."""
        return ServerState(round=0, tensors={})

    def download(self, state: ServerState, client_id: str) -> Tensors:
        """Nothing."""
        return {}

    def install(self, client: Client, personal: Tensors, tensors: Mapping[str, Tensor]) -> Tensors:
        """Load the client's LoRA; in its first round that is LoRA's start, as in every other algorithm."""
        names = client.parts.lora_names
        own = personal or current(client.parts.model, names)
        load_tensors(client.parts.model, {name: own[name] for name in names})
        return own

    def client_update(
        self, client: Client, personal: Tensors, tensors: Mapping[str, Tensor]
    ) -> tuple[Upload, Tensors]:
        """Train and keep."""
        own = self.install(client, personal, tensors)
        names, keep = client.parts.lora_names, client.training.optimizer_state == "kept"
        result = local_steps(
            client.parts.model,
            client.draw_batches(),
            [ParameterGroup(names=names, lr=client.lr)],
            client.training,
            seed=client.derive_seed("dropout"),
            optimizer_state=unflatten(own) if keep else None,
            keep_state_of=names if keep else (),
            on_step=client.on_step,
        )
        return Upload(metrics=result.metrics()), current(client.parts.model, names) | flatten(
            result.optimizer_state
        )

    def server_update(self, state: ServerState, uploads: Iterable[Upload]) -> ServerState:
        """Count the round; there is nothing to average."""
        for _ in uploads:
            pass
        return ServerState(round=state.round + 1, tensors={})
