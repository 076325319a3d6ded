"""Load a model whose routed experts stay on disk: in memory it is everything but those.

Each layer's fused parameters lie in a temporary file that is mapped (``disk_tensors.py``), written one expert
at a time. The model runs, and surgery reads from it, as if it were resident. A layer that is put into slots
lets its file go: what it then holds in memory are its slots.
"""

from typing import Any

from torch import nn

from fedexperts.disk_tensors import empty_on_disk
from fedexperts.models.checkpoint import Checkpoint
from fedexperts.models.compact import load_rest
from fedexperts.moe.surgery import seam
from fedexperts.tensors import Tensors, num_bytes


class ExpertsOnDisk:
    """Pretrained experts of a checkpoint, by layer; see :class:`fedexperts.moe.surgery.undo.Originals`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Read nothing yet."""
        self._checkpoint = checkpoint

    def fused(self, layer: int) -> Tensors:
        """Return the fused parameters (E, ...) of a layer in a new file, with one expert in memory at a
        time."""
        place = self._checkpoint.layers[layer]
        fused = empty_on_disk({name: getattr(place.experts, name) for name in place.parameter_names()})
        for expert, weights in enumerate(self._checkpoint.experts(layer)):
            for name, weight in weights.items():
                fused[name][expert] = weight
        return fused

    def expert(self, layer: int, expert: int) -> Tensors:
        """Read one expert's weights into memory."""
        return self._checkpoint.expert(layer, expert)


def load_on_disk(checkpoint: Checkpoint) -> Any:
    """Load the model of ``checkpoint``, frozen, as :func:`fedexperts.models.load.load_model` does, bit for
    bit.

    Raises:
        UserError: the checkpoint lacks a tensor, or one has another shape.
    """
    model: Any = load_rest(checkpoint.folder, checkpoint.skeleton, checkpoint.rest())
    experts = ExpertsOnDisk(checkpoint)
    for place, stored in zip(seam.find_moe_layers(model), checkpoint.layers, strict=True):
        for name, weight in experts.fused(stored.index).items():
            setattr(place.experts, name, nn.Parameter(weight, requires_grad=False))
    model.eval().requires_grad_(False)
    seam.install_implementation(model)
    return model


def bytes_in_memory(model: nn.Module) -> int:
    """Return the bytes of a model's tensors without those of its routed experts."""
    experts = {
        f"{layer.name}.{name}" for layer in seam.find_moe_layers(model) for name in layer.parameter_names()
    }
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return num_bytes({name: tensor for name, tensor in tensors.items() if name not in experts})
