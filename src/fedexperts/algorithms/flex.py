"""FLEx: Liu et al., arXiv 2506.00965, "Personalized Federated LLMs via Expert Grafting".

Pretrained experts and routers stay frozen. LoRA on the non-expert parameters travels and is averaged; each
client grafts one private expert per MoE layer, a copy of the pretrained expert that best reconstructs the
layer on the client's data (eq. 4), behind a sigmoid gate (eq. 2), and keeps it. ``reading N`` points to
docs/algorithms/flex.md.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedexperts.algorithms.aggregation import average, current, load_tensors, upload_of
from fedexperts.algorithms.api import Client, ModelParts, ServerState
from fedexperts.algorithms.kept_state import flatten, unflatten
from fedexperts.errors import UserError
from fedexperts.messages import Upload
from fedexperts.moe.choosing.subsets import LARGEST, choose_subsets
from fedexperts.moe.surgery import graft as grafting
from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.graft import GateMeter, GraftForm
from fedexperts.moe.surgery.seam import MoeLayer
from fedexperts.tensors import Tensors
from fedexperts.training.local_steps import LocalResult, local_steps
from fedexperts.training.optimizers import ParameterGroup

CHOSEN = "chosen_experts"
"""Personal tensor: the copied expert of each MoE layer, int64 (L,), or (L, num_grafts) with several."""


@dataclass(frozen=True, kw_only=True)
class Flex:
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
        for name in ("graft_lr_scale", "gate_lr_scale"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.calibration_examples < 1:
            raise UserError(f"calibration_examples must be at least 1, not {self.calibration_examples}")
        if not 1 <= self.num_grafts <= LARGEST:
            raise UserError(f"num_grafts must be from 1 to {LARGEST}, not {self.num_grafts}")
        if len(set(self.layers)) < len(self.layers):
            raise UserError(f"layers must not name a layer twice, but is {list(self.layers)}")

    def upload_names(self, parts: ModelParts) -> tuple[str, ...]:
        """LoRA of the non-expert parameters, never an expert."""
        return parts.lora_names

    def _layers(self, parts: ModelParts) -> tuple[MoeLayer, ...]:
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
        """Parameters of the grafts now in the model."""
        prefixes = tuple(f"{seam.addition_name(layer)}." for layer in parts.layers)
        return tuple(name for name, _ in parts.model.named_parameters() if name.startswith(prefixes))

    def blank_personal(self, parts: ModelParts) -> Tensors:
        """Expert 0 chosen everywhere: grafts are of one size whichever is copied."""
        several = () if self.num_grafts == 1 else (self.num_grafts,)
        return {CHOSEN: torch.zeros(len(self._layers(parts)), *several, dtype=torch.int64)}

    def init(self, parts: ModelParts) -> ServerState:
        """LoRA's start."""
        return ServerState(round=0, tensors=current(parts.model, parts.lora_names))

    def download(self, state: ServerState, client_id: str) -> Tensors:
        """The averaged LoRA."""
        return state.tensors

    def install(self, client: Client, personal: Tensors, tensors: Mapping[str, Tensor]) -> Tensors:
        """Load the averaged LoRA and graft the client's own experts, chosen now if it is new."""
        parts = client.parts
        if not personal:
            personal = {CHOSEN: self._choose(client)}
        names = grafting.graft(self._layers(parts), personal[CHOSEN].tolist(), self.graft, client.seed)
        load_tensors(parts.model, tensors)
        load_tensors(parts.model, {name: personal[name] for name in names if name in personal})
        return personal | current(parts.model, names)

    def _choose(self, client: Client) -> Tensor:
        """Eq. 4 on the pretrained model: LoRA's B is still zero here, whatever has been averaged since."""
        batches = client.calibration_batches(self.calibration_examples)
        model, layers = client.parts.model, self._layers(client.parts)
        choices = choose_subsets(
            model, layers, batches, self.num_grafts, seed=client.derive_seed("calibration")
        )
        chosen = torch.tensor([choice.experts for choice in choices])
        return chosen.squeeze(1) if self.num_grafts == 1 else chosen

    def client_update(
        self, client: Client, personal: Tensors, tensors: Mapping[str, Tensor]
    ) -> tuple[Upload, Tensors]:
        """Train LoRA, graft and gate together; send LoRA, keep the rest."""
        personal = self.install(client, personal, tensors)
        parts, own = client.parts, self.personal_names(client.parts)
        meter, layers = GateMeter(), self._layers(parts)
        with seam.watch_experts(layers, meter.see):
            result = self._train(client, personal, own)
        upload = upload_of(client, parts.lora_names, tensors, result.metrics())
        for index, openness in meter.means().items():
            upload.metrics[f"gate_mean.{index}"] = openness
        kept = {CHOSEN: personal[CHOSEN]} | current(parts.model, own) | flatten(result.optimizer_state)
        return upload, kept

    def _train(self, client: Client, personal: Tensors, own: tuple[str, ...]) -> LocalResult:
        keep = client.training.optimizer_state == "kept"
        weights = grafting.names_of_kind(own, is_gate=False)
        gates = grafting.names_of_kind(own, is_gate=True)
        groups = [
            ParameterGroup(names=client.parts.lora_names, lr=client.lr),
            ParameterGroup(names=weights, lr=client.lr * self.graft_lr_scale),
            ParameterGroup(names=gates, lr=client.lr * self.gate_lr_scale),
        ]
        extra: dict[str, Any] = {"optimizer_state": unflatten(personal), "keep_state_of": own} if keep else {}
        return local_steps(
            client.parts.model,
            client.draw_batches(),
            groups,
            client.training,
            seed=client.derive_seed("dropout"),
            on_step=client.on_step,
            **extra,
        )

    def server_update(self, state: ServerState, uploads: Iterable[Upload]) -> ServerState:
        """FedAvg on what travelled."""
        return average(state, uploads)
