"""The weighted mean of uploads, per tensor, over those who sent it."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fedexperts.algorithms.api import Client, ServerState
from fedexperts.errors import UserError
from fedexperts.messages import Upload
from fedexperts.moe.surgery import seam
from fedexperts.tensors import Tensors, WeightedMean, copy_of, is_finite


def average(state: ServerState, uploads: Iterable[Upload]) -> ServerState:
    """FedAvg per tensor: each name's mean over the uploads that bring it, by their weights.

    A name that nobody brought keeps its value. Only one upload is held at a time.
    """
    mean = WeightedMean()
    for upload in uploads:
        mean.add(upload.tensors, upload.weights)
    return ServerState(round=state.round + 1, tensors=mean.mean(like=state.tensors))


def check_upload(upload: Upload, state: ServerState) -> None:
    """Refuse an upload that could harm the mean.

    Raises:
        UserError: an unknown name, another shape or dtype, a value or weight that is not finite, or a weight
            that is not above 0.
    """
    for name, tensor in upload.tensors.items():
        if name not in state.tensors:
            raise UserError(f"tensor {name!r} is not one that travels")
        expected = state.tensors[name]
        if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
            raise UserError(
                f"tensor {name!r} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}, where "
                f"{tuple(expected.shape)} and {expected.dtype} are due"
            )
        if not is_finite(tensor):
            raise UserError(f"tensor {name!r} has values that are not finite")
        weight = upload.weights[name]
        if not 0 < weight < float("inf"):
            raise UserError(f"weight of tensor {name!r} is {weight}, but must be above 0 and finite")


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Write ``tensors`` into the model's parameters, or experts, of the same names.

    Raises:
        UserError: the model has no such tensor, or one of another shape.
    """
    try:
        views = seam.tensor_views(model, tensors)
    except KeyError as error:
        raise UserError(f"the model has no tensor named {error}") from error
    with torch.no_grad():
        for name, view in views.items():
            if view.shape != tensors[name].shape:
                raise UserError(
                    f"tensor {name!r} has shape {tuple(tensors[name].shape)}, the model's {tuple(view.shape)}"
                )
            view.copy_(tensors[name])


def upload_of(
    client: Client, names: Sequence[str], before: Mapping[str, Tensor], metrics: dict[str, float]
) -> Upload:
    """The model's tensors called ``names``, each weighted by the client's number of training examples.

    ``num_unchanged`` counts those that the local steps left bit for bit as they came.
    """
    tensors = copy_of(seam.tensor_views(client.parts.model, names))
    unchanged = sum(torch.equal(tensor, before[name]) for name, tensor in tensors.items())
    return Upload(
        tensors=tensors,
        weights=dict.fromkeys(tensors, float(client.num_train)),
        metrics=metrics | {"num_unchanged": float(unchanged)},
    )


def current(model: nn.Module, names: Iterable[str]) -> Tensors:
    """Copies of the model's tensors called ``names``."""
    return copy_of(seam.tensor_views(model, names))
