"""FedAvg: McMahan et al., AISTATS 2017, arXiv 1602.05629, Algorithm 1, on LoRA parameters.

With ``experts`` it is the naive federated MoE that FLEx argues against: every routed expert is trained in
full by every client, sent, and averaged.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from fedexperts.algorithms.aggregation import average, current, load_tensors, upload_of
from fedexperts.algorithms.api import Client, ModelParts, ServerState
from fedexperts.errors import UserError
from fedexperts.messages import Upload
from fedexperts.moe.surgery import seam
from fedexperts.tensors import Tensors
from fedexperts.training.local_steps import local_steps
from fedexperts.training.optimizers import ParameterGroup


@dataclass(frozen=True, kw_only=True)
class FedAvg:
    """Average what every client trains, by its number of examples."""

    experts: bool = False
    """Also train, send and average all routed experts."""
    experts_lr_scale: float = 1.0
    """Learning rate of the experts as a multiple of ``training.lr``."""

    def __post_init__(self) -> None:
        """Refuse an idle or impossible rate."""
        if not self.experts_lr_scale > 0:
            raise UserError(f"experts_lr_scale must be above 0, not {self.experts_lr_scale}")
        if self.experts_lr_scale != 1.0 and not self.experts:
            raise UserError(f"experts_lr_scale is {self.experts_lr_scale}, but has no effect without experts")

    def upload_names(self, parts: ModelParts) -> tuple[str, ...]:
        """LoRA, and each expert's tensors by name."""
        return parts.lora_names + (seam.expert_names(parts.layers) if self.experts else ())

    def personal_names(self, parts: ModelParts) -> tuple[str, ...]:
        """Nothing is personal."""
        return ()

    def blank_personal(self, parts: ModelParts) -> Tensors:
        """Nothing is personal."""
        return {}

    def init(self, parts: ModelParts) -> ServerState:
        """The model's own tensors."""
        return ServerState(round=0, tensors=current(parts.model, self.upload_names(parts)))

    def download(self, state: ServerState, client_id: str) -> Tensors:
        """All of the state."""
        return state.tensors

    def install(self, client: Client, personal: Tensors, tensors: Mapping[str, Tensor]) -> Tensors:
        """Load the averaged tensors."""
        load_tensors(client.parts.model, tensors)
        return {}

    def client_update(
        self, client: Client, personal: Tensors, tensors: Mapping[str, Tensor]
    ) -> tuple[Upload, Tensors]:
        """Algorithm 1, ClientUpdate."""
        self.install(client, personal, tensors)
        parts = client.parts
        fused = tuple(sorted(seam.fused_names(tensors.keys() - set(parts.lora_names))))
        result = local_steps(
            parts.model,
            client.draw_batches(),
            [
                ParameterGroup(names=parts.lora_names, lr=client.lr),
                ParameterGroup(names=fused, lr=client.lr * self.experts_lr_scale),
            ],
            client.training,
            seed=client.derive_seed("dropout"),
            on_step=client.on_step,
        )
        return upload_of(client, self.upload_names(parts), tensors, result.metrics()), {}

    def server_update(self, state: ServerState, uploads: Iterable[Upload]) -> ServerState:
        """Algorithm 1, the server's mean."""
        return average(state, uploads)


@dataclass(frozen=True, kw_only=True)
class FedAvgExperts(FedAvg):
    """:class:`FedAvg` with ``experts`` on, under a name of its own."""

    experts: bool = True
    """Train, send and average all routed experts."""
