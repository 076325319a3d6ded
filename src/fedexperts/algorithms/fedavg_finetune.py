"""Local fine-tuning after FedAvg: Yu, Bagdasaryan, Shmatikov, "Salvaging Federated Learning by Local
Adaptation", arXiv 2002.04758; a baseline of Collins et al., ICML 2021, arXiv 2102.07089.

FedAvg (arXiv 1602.05629) for the first rounds; then every client goes on alone, from the averaged LoRA, with
a copy of its own. ``reading N`` points to docs/algorithms/fedavg_finetune.md.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedexperts.algorithms.api import (
    Algorithm,
    Client,
    Kept,
    ModelParts,
    ServerState,
    TrainedGroup,
    next_state,
    refuse_below,
    upload_of,
)
from fedexperts.errors import UserError
from fedexperts.messages import Expected, Sent, Upload
from fedexperts.moe.surgery import seam
from fedexperts.training.local_steps import LocalResult

ALONE = "alone"
"""Order in a download: the client trains for itself in this round and sends no tensors."""
HAS_OWN = "has_own_model"
"""Beside the server's tensors, once the federation is over: clients with a copy of their own, bool (C,)."""
AVERAGE = "average/"
"""A client keeps its own LoRA by its names, and the average by its names after this; both lie beside, as LoRA
has travelled."""


@dataclass(frozen=True, kw_only=True)
class FedAvgFinetune(Algorithm):
    """FedAvg for some rounds, then each client alone."""

    federated_rounds: int
    """Rounds of FedAvg before the clients part; 0 is local-only training, all rounds are FedAvg."""

    def __post_init__(self) -> None:
        """Refuse a negative number of rounds."""
        refuse_below(self, {"federated_rounds": 0}, exclusive=False)

    def is_alone(self, state: ServerState) -> bool:
        """Return whether clients train for themselves in the round after ``state``."""
        return state.round_number >= self.federated_rounds

    def personal_names(self, parts: ModelParts) -> tuple[str, ...]:
        """Return all LoRA parameters if none of them ever travels."""
        return () if self.federated_rounds else parts.lora_names

    def trained(self, parts: ModelParts, sent: Sent) -> tuple[TrainedGroup, ...]:
        """Return LoRA, whose optimizer state may stay with a client that trains alone."""
        return (TrainedGroup(names=parts.lora_names, keeps_optimizer=ALONE in sent.orders),)

    def download(self, state: ServerState, client_id: str) -> Sent:
        """Return the averaged LoRA, but nothing to a client that goes on from its own."""
        if not self.is_alone(state):
            return Sent(tensors=state.tensors)
        has_own = HAS_OWN in state.beside and bool(state.beside[HAS_OWN][state.position(client_id)])
        return Sent(tensors={} if has_own else state.tensors, orders={ALONE: True})

    def expected(self, parts: ModelParts, state: ServerState, client_id: str) -> Expected:
        """Return LoRA as long as the federation lasts, then nothing."""
        return Expected() if self.is_alone(state) else super().expected(parts, state, client_id)

    def server_update(self, state: ServerState, uploads: Iterable[tuple[str, Upload]]) -> ServerState:
        """Average; after the federation note which clients have a model of their own."""
        if not self.is_alone(state):
            return super().server_update(state, uploads)
        nobody = torch.zeros(len(state.clients), dtype=torch.bool)
        has_own = state.beside.get(HAS_OWN, nobody).clone()
        for client_id, _ in uploads:
            has_own[state.position(client_id)] = True
        return next_state(state, beside={HAS_OWN: has_own})

    def server_view(self, kept: Kept, sent: Sent) -> Sent:
        """Return the averaged LoRA, which a client that trains alone keeps beside its own."""
        average = {name.removeprefix(AVERAGE): t for name, t in kept.beside.items() if AVERAGE in name}
        return Sent(tensors={**average, **sent.tensors})

    def install(self, client: Client, kept: Kept, sent: Sent) -> Kept:
        """Load the client's own LoRA if it has one, else the average."""
        seam.load_tensors(client.parts.model, self.holds(kept, sent))
        return kept

    def holds(self, kept: Kept, sent: Sent) -> Mapping[str, Tensor]:
        """Return the client's own LoRA if it has one, else the average."""
        return {name: t for name, t in kept.beside.items() if AVERAGE not in name} or sent.tensors

    def client_update(self, client: Client, kept: Kept, sent: Sent) -> tuple[Upload, Kept]:
        """Train LoRA; send it, or keep it."""
        self.refuse_idle(client)
        kept = self.install(client, kept, sent)
        result = client.train(self.trained(client.parts, sent), optimizer_state=kept.optimizer)
        if ALONE not in sent.orders:
            return upload_of(client, client.parts.lora_names, sent, result), Kept()
        return upload_of(client, (), sent, result), self.keep_alone(client, kept, sent, result)

    def keep_alone(self, client: Client, kept: Kept, sent: Sent, result: LocalResult) -> Kept:
        """Return the client's own LoRA, and the average unless that is LoRA's start."""
        average = self.server_view(kept, sent).tensors if self.federated_rounds else {}
        own = seam.current(client.parts.model, client.parts.lora_names)
        beside = own | {AVERAGE + name: tensor for name, tensor in average.items()}
        return Kept(beside=beside, optimizer=result.optimizer_state)

    def refuse_idle(self, client: Client) -> None:
        """Raise UserError if the federation would outlast the run."""
        if self.federated_rounds > client.num_rounds:
            raise UserError(
                f"algorithm.federated_rounds is {self.federated_rounds}, but must be at most the run's "
                f"rounds, which are {client.num_rounds}"
            )
