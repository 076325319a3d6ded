"""Predict the memory of a client's local steps before they are run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from fedexperts.algorithms.api import Algorithm, Kept, ModelParts, trained_names
from fedexperts.costs.depth import peak_by_depth
from fedexperts.costs.dry_run import BatchShape
from fedexperts.messages import Sent
from fedexperts.moe.surgery.expert_cache import offloaded
from fedexperts.moe.surgery.undo import UndoStack
from fedexperts.tensors import num_bytes
from fedexperts.training.optimizers import blank_state
from fedexperts.training.settings import TrainingSettings


@dataclass(frozen=True, kw_only=True)
class PredictedMemory:
    """Bytes of tensors at the fullest moment of a client's turn, by what they hold.

    The process itself, and what allocators keep of freed memory, come on top (docs/planning.md).
    """

    weights: int
    """Parameters and buffers of the model, whatever trains."""
    gradients: int
    optimizer: int
    copies: int = 0
    """Tensors beside the model: those that came and that the client keeps, copies that the method needs, and
    the start of parameters that are written, to undo it."""
    activations: int
    """All else that lives then: what the backward pass keeps of one batch, and values on their way."""
    offloaded: int = 0
    """Experts that lie in main memory or on disk and are loaded on demand, with their gradients and optimizer
    state. They do not count towards the total, which is of the device."""

    @property
    def total(self) -> int:
        """All together on the device."""
        return self.weights + self.gradients + self.optimizer + self.copies + self.activations


MEMORY_PARTS = tuple(part.name for part in fields(PredictedMemory) if part.name != "offloaded")
"""Fields of :class:`PredictedMemory` that sum to the total, in the order in which they are shown."""


def predict_memory(
    model: Any, trained: Sequence[str], shape: BatchShape, settings: TrainingSettings, copies: int = 0
) -> PredictedMemory:
    """Memory of local steps with the model as it stands, grafts and slots included; nothing is computed.

    Args:
        model: a language model with our experts implementation; its tensors may be on the meta device.
        trained: names of the parameters that local steps train.
        shape: of the fullest batch.
        settings: the section ``[training]``.
        copies: bytes beside the model, by :func:`bytes_of_copies`.
    """
    without = memory_before_activations(model, trained, settings, copies)
    peak = peak_by_depth(model, trained, shape, settings)
    parameters = {name: model.get_parameter(name) for name in trained}
    return replace(without, activations=max(0, peak - sum(_bytes_of_training(parameters, settings))))


def memory_before_activations(
    model: Any, trained: Sequence[str], settings: TrainingSettings, copies: int = 0
) -> PredictedMemory:
    """Return the part of :func:`predict_memory` that does not depend on the batch; activations are 0."""
    parameters, elsewhere = {name: model.get_parameter(name) for name in trained}, offloaded(model)
    here = {name: p for name, p in parameters.items() if name not in elsewhere}
    away = {name: p for name, p in parameters.items() if name in elsewhere}
    gradients, optimizer = _bytes_of_training(here, settings)
    weights = num_bytes(dict(model.named_parameters())) + num_bytes(dict(model.named_buffers()))
    return PredictedMemory(
        weights=weights - num_bytes(elsewhere),
        gradients=gradients,
        optimizer=optimizer,
        copies=copies,
        activations=0,
        offloaded=num_bytes(elsewhere) + sum(_bytes_of_training(away, settings)),
    )


def _bytes_of_training(parameters: Mapping[str, Tensor], settings: TrainingSettings) -> tuple[int, int]:
    """Return the bytes of the gradients and of the optimizer's state of ``parameters``."""
    state = blank_state(parameters, settings)
    return num_bytes(parameters), sum(map(num_bytes, state.values()))


def bytes_of_copies(algorithm: Algorithm, parts: ModelParts, kept: Kept, sent: Sent, undo: UndoStack) -> int:
    """Return the bytes of tensors beside the model during local steps.

    Args:
        algorithm: says what it needs.
        parts: of the model as ``algorithm`` has installed it.
        kept: as installing returned it.
        sent: what came.
        undo: the stack that was active then; what will train is added to it.
    """
    names = trained_names(algorithm, parts, sent)
    undo.will_write({name: parts.model.get_parameter(name) for name in names})
    return algorithm.bytes_beside(parts, kept, sent) + undo.copied_bytes
