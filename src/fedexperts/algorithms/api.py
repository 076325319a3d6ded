"""What an algorithm is: four functions and its hyperparameters."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from fedexperts.data.batches import Batch
from fedexperts.messages import Upload
from fedexperts.moe.surgery.seam import MoeLayer
from fedexperts.seeds import derive_seed
from fedexperts.tensors import Tensors
from fedexperts.training.settings import TrainingSettings, learning_rate_share


@dataclass(frozen=True, kw_only=True)
class ModelParts:
    """The resident model and the names an algorithm may choose among."""

    model: nn.Module
    layers: tuple[MoeLayer, ...]
    lora_names: tuple[str, ...]
    """LoRA parameters on non-expert modules."""


@dataclass(frozen=True, kw_only=True)
class Client:
    """One client's turn: the model, handed over clean, and what the client may do with its data."""

    client_id: str
    round: int
    num_rounds: int
    seed: int
    """The run's seed; purposes are derived from it by name."""
    parts: ModelParts
    training: TrainingSettings
    num_train: int
    """Training examples of this client: its weight in a mean by data."""
    draw_batches: Callable[[], list[Batch]]
    """This round's training batches: the same at every call."""
    calibration_batches: Callable[[int], list[Batch]]
    """Batches of at most so many training examples, the same in every round."""
    on_step: Callable[[float], None] = field(default=lambda loss: None)

    @property
    def lr(self) -> float:
        """This round's learning rate for what travels."""
        return self.training.lr * learning_rate_share(self.round, self.num_rounds, self.training)

    def derive_seed(self, purpose: str) -> int:
        """A seed for ``purpose`` in this client's turn of this round."""
        return derive_seed(self.seed, purpose, self.client_id, self.round)


@dataclass(frozen=True, kw_only=True)
class ServerState:
    """All that the server keeps from round to round."""

    round: int
    """Rounds done."""
    tensors: Tensors


class Algorithm(Protocol):
    """A federated algorithm, itself a frozen dataclass whose fields are its hyperparameters.

    It does no input or output, knows no transport, and keeps nothing between calls: what the server
    remembers is in :class:`ServerState`, what a client remembers is in its personal tensors, and those never
    enter an Upload.
    """

    def init(self, parts: ModelParts) -> ServerState:
        """The server's state before the first round."""

    def download(self, state: ServerState, client_id: str) -> Tensors:
        """What ``client_id`` needs for a round."""

    def upload_names(self, parts: ModelParts) -> tuple[str, ...]:
        """Names that a client may send; the server refuses all others."""

    def install(self, client: Client, personal: Tensors, tensors: Mapping[str, Tensor]) -> Tensors:
        """Make the model the client's own as it stands before local steps; returns its personal tensors."""

    def client_update(
        self, client: Client, personal: Tensors, tensors: Mapping[str, Tensor]
    ) -> tuple[Upload, Tensors]:
        """Install, take local steps, and return what travels and what stays. The model is left as trained."""

    def server_update(self, state: ServerState, uploads: Iterable[Upload]) -> ServerState:
        """Fold the uploads, one at a time and in their order, into the next round's state."""

    def personal_names(self, parts: ModelParts) -> Sequence[str]:
        """Parameters, of those now in the model, that belong to the client alone."""

    def blank_personal(self, parts: ModelParts) -> Tensors:
        """Personal tensors that :meth:`install` can start from without a look at data: to predict sizes."""
