"""FLEx: Liu et al., arXiv 2506.00965, "Personalized Federated LLMs via Expert Grafting".

Pretrained experts and routers stay frozen. LoRA on the non-expert parameters travels and is averaged; each
client grafts one private expert per MoE layer, a copy of the pretrained expert that best reconstructs the
layer on the client's data (eq. 4), behind a sigmoid gate (eq. 2), and keeps it. ``reading N`` points to
docs/algorithms/flex.md.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedexperts.algorithms.api import (
    Algorithm,
    Client,
    Kept,
    ModelParts,
    ServerState,
    TrainedGroup,
    refuse_below,
    upload_of,
)
from fedexperts.errors import UserError
from fedexperts.messages import Expected, Sent, Upload
from fedexperts.moe.choosing.subsets import LARGEST, choose_subsets
from fedexperts.moe.surgery import graft as grafting
from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.graft import GateMeter, GraftForm
from fedexperts.moe.surgery.seam import MoeLayer
from fedexperts.tensors import Tensors

CHOSEN = "chosen_experts"
"""Kept beside the graft: the copied expert of each MoE layer, int64 (L,), or (L, num_grafts) with several."""
GATE_MEAN = "gate_mean"
"""Table of an upload: mean openness of each grafted layer's gates in training, float32 (L,)."""


@dataclass(frozen=True, kw_only=True)
class Flex(Algorithm):
    """Shared LoRA on non-experts, one private grafted expert per MoE layer, or several."""

    graft: GraftForm = field(default_factory=GraftForm)
    """How the grafted expert is built and joined."""
    num_grafts: int = 1
    """Grafted experts per MoE layer, 1 (as the paper has it) to 8, each behind its own gate (reading 5)."""
    graft_lr_scale: float = 1.0
    """Learning rate of the grafted expert as a multiple of ``training.lr``."""
    gate_lr_scale: float = 1.0
    """Learning rate of the gate as a multiple of ``training.lr``."""
    calibration_examples: int = 128
    """Training examples, at most, that the copied expert is chosen by (reading 4)."""
    layers: tuple[int, ...] = ()
    """MoE layers that get a graft, counted from 0; empty takes all, as the paper does."""

    def __post_init__(self) -> None:
        """Refuse numbers outside their range."""
        refuse_below(self, {"graft_lr_scale": 0, "gate_lr_scale": 0})
        refuse_below(self, {"calibration_examples": 1}, exclusive=False)
        if not 1 <= self.num_grafts <= LARGEST:
            raise UserError(f"num_grafts must be from 1 to {LARGEST}, not {self.num_grafts}")
        if len(set(self.layers)) < len(self.layers):
            raise UserError(f"layers must not name a layer twice, but is {list(self.layers)}")

    def grafted_layers(self, parts: ModelParts) -> tuple[MoeLayer, ...]:
        """Return the MoE layers that get a graft.

        Raises:
            UserError: the model lacks one of them, or has fewer experts than grafts are asked for.
        """
        for index in self.layers:
            if not 0 <= index < len(parts.layers):
                raise UserError(
                    f"algorithm.layers has {index}: the MoE layers are 0 to {len(parts.layers) - 1}"
                )
        layers = tuple(layer for layer in parts.layers if not self.layers or layer.index in self.layers)
        fewest = min(layer.num_experts for layer in layers)
        if self.num_grafts > fewest:
            raise UserError(
                f"algorithm.num_grafts is {self.num_grafts}: a layer has only {fewest} experts to copy"
            )
        return layers

    def personal_names(self, parts: ModelParts) -> tuple[str, ...]:
        """Return the parameters of grafts and gates."""
        return grafting.graft_names(parts.layers)

    def trained(self, parts: ModelParts, sent: Sent) -> tuple[TrainedGroup, ...]:
        """Return LoRA, grafts and gates, each at its own rate."""
        own = self.personal_names(parts)
        weights = grafting.names_of_kind(own, is_gate=False)
        gates = grafting.names_of_kind(own, is_gate=True)
        return (
            TrainedGroup(names=parts.lora_names),
            TrainedGroup(names=weights, lr_scale=self.graft_lr_scale, keeps_optimizer=True),
            TrainedGroup(names=gates, lr_scale=self.gate_lr_scale, keeps_optimizer=True),
        )

    def expected(self, parts: ModelParts, state: ServerState, client_id: str) -> Expected:
        """Return averaged LoRA, and the gates' openness by layer."""
        gates = torch.empty(len(self.grafted_layers(parts)), device="meta")
        expected = super().expected(parts, state, client_id)
        return Expected(tensors=expected.tensors, tables={GATE_MEAN: gates})

    def blank(self, parts: ModelParts) -> Kept:
        """Return expert 0 chosen everywhere: grafts are of one size whichever expert is copied."""
        several = () if self.num_grafts == 1 else (self.num_grafts,)
        chosen = torch.zeros(len(self.grafted_layers(parts)), *several, dtype=torch.int64)
        return Kept(beside={CHOSEN: chosen})

    def install(self, client: Client, kept: Kept, sent: Sent) -> Kept:
        """Load the averaged LoRA and graft the client's own experts, chosen now if the client is new."""
        parts = client.parts
        chosen = kept.beside[CHOSEN] if kept else self.choose(client)
        names = grafting.graft(self.grafted_layers(parts), chosen.tolist(), self.graft, client.seed)
        seam.load_tensors(parts.model, {**sent.tensors, **kept.parameters})
        own = seam.current(parts.model, names)
        return Kept(parameters=own, beside={CHOSEN: chosen}, optimizer=kept.optimizer)

    def choose(self, client: Client) -> Tensor:
        """Choose by eq. 4 on the pretrained model: LoRA is at its start here, whatever has been averaged."""
        choices = choose_subsets(
            client.parts.model,
            self.grafted_layers(client.parts),
            client.calibration_batches(self.calibration_examples),
            self.num_grafts,
            seed=client.derive_seed("calibration"),
        )
        chosen = torch.tensor([choice.experts for choice in choices])
        return chosen.squeeze(1) if self.num_grafts == 1 else chosen

    def client_update(self, client: Client, kept: Kept, sent: Sent) -> tuple[Upload, Kept]:
        """Train LoRA, graft and gate together; send LoRA, keep the rest."""
        kept = self.install(client, kept, sent)
        meter = GateMeter()
        with seam.watch_experts(self.grafted_layers(client.parts), meter.see):
            result = client.train(self.trained(client.parts, sent), optimizer_state=kept.optimizer)
        tables = {GATE_MEAN: torch.tensor([mean for _, mean in sorted(meter.means().items())])}
        upload = upload_of(client, self.shared_names(client.parts), sent, result, tables=tables)
        return upload, self.keep(client, kept, result)

    def describe(self, kept: Kept) -> Tensors:
        """Return the copied expert of each layer."""
        return {CHOSEN: kept.beside[CHOSEN]} if kept else {}
