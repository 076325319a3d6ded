"""Flux and FLEx in one client: a private graft beside experts tuned by roles, all others merged.

A client's compact model has the experts that its role names, averaged over the clients that tuned them (Flux,
arXiv 2508.19078), few merged others, and in each MoE layer a graft behind a sigmoid gate that never leaves it
(FLEx, arXiv 2506.00965, eq. 2 and 4). ``reading N`` points to docs/algorithms/graft_and_merge.md.

Shape suffixes: ``L`` MoE layers, ``E`` experts of the largest layer.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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
)
from fedexperts.algorithms.flex import CHOSEN, GATE_MEAN
from fedexperts.algorithms.flux import Flux, StepsTaken
from fedexperts.costs.room import Room, room_of
from fedexperts.errors import UserError
from fedexperts.messages import Expected, Sent
from fedexperts.moe.choosing.subsets import choose_subset
from fedexperts.moe.compressing.merge import MergePlan
from fedexperts.moe.compressing.merge_error import layer_error
from fedexperts.moe.observing.activations import Activations
from fedexperts.moe.surgery import graft as grafting
from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.graft import GateMeter, GraftForm
from fedexperts.moe.surgery.seam import MoeLayer
from fedexperts.tensors import Tensors


@dataclass(frozen=True, kw_only=True)
class GraftAndMerge(Flux):
    """Tune experts by roles as Flux does, and own a grafted expert per MoE layer as FLEx does."""

    lora: bool = True
    """Also train, send and average LoRA, as FLEx does."""
    graft: GraftForm = field(default_factory=GraftForm)
    """Form of the grafted expert, and of its gate."""
    graft_lr_scale: float = 1.0
    """Learning rate of the grafted expert as a multiple of ``training.lr``."""
    gate_lr_scale: float = 1.0
    """Learning rate of the gate as a multiple of ``training.lr``."""
    own_model: Literal["trained", "received"] = "received"
    """The shared part of a client's own model: as the client trained it, or as it came, with the graft alone
    as trained (reading 3)."""

    def __post_init__(self) -> None:
        """Refuse what Flux refuses, and a graft whose base would move."""
        super().__post_init__()
        refuse_below(self, {"graft_lr_scale": 0, "gate_lr_scale": 0})
        if self.graft.lora_rank:
            raise UserError(
                f"graft.lora_rank is {self.graft.lora_rank}, but the experts under a graft move from round "
                "to round: it must be 0"
            )

    # Names and memory

    def personal_names(self, parts: ModelParts) -> tuple[str, ...]:
        """Return the parameters of grafts and gates."""
        return grafting.graft_names(parts.layers)

    def trained(self, parts: ModelParts, sent: Sent) -> tuple[TrainedGroup, ...]:
        """Return what Flux trains, then grafts and gates."""
        own = self.personal_names(parts)
        kinds = ((False, self.graft_lr_scale), (True, self.gate_lr_scale))
        return (
            *super().trained(parts, sent),
            *(
                TrainedGroup(
                    names=grafting.names_of_kind(own, is_gate=is_gate), lr_scale=scale, keeps_optimizer=True
                )
                for is_gate, scale in kinds
            ),
        )

    def room(self, parts: ModelParts) -> Room:
        """Return the account of a client's turn, a graft in each layer included."""

        def add(layers: Sequence[MoeLayer]) -> None:
            grafting.graft(layers, [0] * len(layers), self.graft, seed=0)

        room = room_of(parts.model, parts.layers, parts.largest_batch, parts.training, add)
        return replace(room, tuned_bytes=self.tuned_bytes)

    def expected(self, parts: ModelParts, state: ServerState, client_id: str) -> Expected:
        """Return what Flux expects, and the gates' openness by layer."""
        expected = super().expected(parts, state, client_id)
        gates = torch.empty(len(parts.layers), device="meta")
        return replace(expected, tables={**expected.tables, GATE_MEAN: gates})

    # The client's half

    def blank(self, parts: ModelParts) -> Kept:
        """Return Flux's, with the first expert of each layer chosen: grafts are of one size."""
        kept = super().blank(parts)
        chosen = torch.zeros(len(parts.layers), dtype=torch.int64)
        return replace(kept, beside={**kept.beside, CHOSEN: chosen})

    def install(self, client: Client, kept: Kept, sent: Sent) -> Kept:
        """Make the model the server's, and add the client's grafts if it has been trained before."""
        received = super().install(client, kept, sent)
        if CHOSEN not in kept.beside:
            return received
        self._add_grafts(client, kept.beside[CHOSEN])
        seam.load_tensors(client.parts.model, kept.parameters)
        return replace(received, parameters=kept.parameters, optimizer=kept.optimizer)

    def _add_grafts(self, client: Client, chosen_L: Tensor) -> None:
        grafting.graft(client.parts.layers, chosen_L.tolist(), self.graft, client.seed)

    def holds(self, kept: Kept, sent: Sent) -> Mapping[str, Tensor]:
        """Return what came, and the client's own graft."""
        return {**super().holds(kept, sent), **kept.parameters}

    @contextmanager
    def activations(self, client: Client) -> Iterator[Activations]:
        """Give activations of the model as it came, without the client's grafts."""
        with _without_grafts(client.parts.layers), super().activations(client) as activations:
            yield activations

    def start_steps(self, client: Client, kept: Kept, sent: Sent) -> tuple[Tensors, dict[str, float]]:
        """Choose the graft if the client is new, merge, and judge the merge, all by one pass (reading 1)."""
        if CHOSEN in kept.beside and not self.merge.needs_activations:
            return super().start_steps(client, kept, sent)
        layers, chosen = client.parts.layers, {}
        with self.activations(client) as activations:
            if CHOSEN not in kept.beside:
                chosen[CHOSEN] = _best_experts(layers, activations)
            plans = self.planned(client, kept, sent, activations)
            error = statistics.fmean(_errors(layers, plans, activations))
        if chosen:
            self._add_grafts(client, chosen[CHOSEN])
        self.fill_slots(client, kept, sent, plans)
        return chosen, {"merge_error": error}

    def take_steps(self, client: Client, sent: Sent) -> StepsTaken:
        """Take Flux's local steps, and measure how far gates are open."""
        meter = GateMeter()
        with seam.watch_experts(client.parts.layers, meter.observe):
            steps = super().take_steps(client, sent)
        means = torch.tensor([mean for _, mean in sorted(meter.means().items())])
        return replace(steps, tables={**steps.tables, GATE_MEAN: means})

    @property
    def keeps_start(self) -> bool:
        """Whether a turn needs what it trains as it was before: to send changes, or to go back to it."""
        return super().keeps_start or self.own_model == "received"

    def finish(self, client: Client, before: Tensors) -> None:
        """Leave the shared part as it was trained, or put back what was received."""
        if self.own_model == "received":
            seam.load_tensors(client.parts.model, before)

    def describe(self, kept: Kept) -> Tensors:
        """Return the profile that the client keeps, and the copied expert of each layer."""
        chosen = {CHOSEN: kept.beside[CHOSEN]} if CHOSEN in kept.beside else {}
        return {**super().describe(kept), **chosen}


def _best_experts(layers: Sequence[MoeLayer], activations: Activations) -> Tensor:
    """Return the expert of each layer that reconstructs it best (FLEx, eq. 4), int64 (L,)."""
    choices = (choose_subset(layer, activations.layer(layer.index), 1) for layer in layers)
    return torch.tensor([choice.experts[0] for choice in choices])


def _errors(
    layers: Sequence[MoeLayer], plans: Sequence[MergePlan], activations: Activations
) -> Iterator[float]:
    for layer, plan in zip(layers, plans, strict=True):
        yield layer_error(layer, plan.slots, plan.weights, activations.layer(layer.index))


@contextmanager
def _without_grafts(layers: Sequence[MoeLayer]) -> Iterator[None]:
    """Take the layers' grafts away for the length of a block."""
    additions = [(layer, seam.addition_of(layer)) for layer in layers if seam.addition_of(layer) is not None]
    for layer, _ in additions:
        seam.take_from_layer(layer)
    try:
        yield
    finally:
        for layer, addition in additions:
            seam.add_to_layer(layer, addition)
