"""Local steps on tensors without storage: the peak memory of a client's turn, counted before it is run.

The very loop that trains runs on a copy of the model whose tensors have shapes and dtypes but no bytes, and
every storage is counted from the operation that makes it until it is let go. So whatever a family keeps for
its backward pass is in the figure, and what is recomputed, freed early or never made is not.

What is counted is tensors. A process needs more: libraries, and on a CPU what the C library's allocator
keeps of freed memory and what oneDNN caches for each shape (docs/planning.md has measurements).
"""

import copy
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fedexperts.costs.known_shapes import KnownShapes, tensors_in
from fedexperts.data.batches import IGNORED_LABEL, Batch
from fedexperts.moe.surgery import seam
from fedexperts.training.local_steps import local_steps
from fedexperts.training.optimizers import OptimizerState, ParameterGroup, blank_state
from fedexperts.training.settings import TrainingSettings

_aten = torch.ops.aten
_SEEN = "_seen_by_meter"


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """Sizes that a batch's memory depends on."""

    examples: int
    length: int
    """Tokens of an example, padding included."""
    labels: int
    """Positions of the whole batch whose next token is learnt: those have logits."""


def peak_of_local_steps(
    model: Any,
    trained: Sequence[str],
    shape: BatchShape,
    settings: TrainingSettings,
    beside: AbstractContextManager[None] | None = None,
) -> int:
    """Largest number of bytes in tensors at once during local steps, the model's own not counted.

    That is gradients, the optimizer's state, activations and whatever lives between them. One step is run
    with the optimizer's state there from the beginning, as it is in all steps but the first. Routing is taken
    as even: its shape matters to experts in slots only. With accumulation, every micro-batch is counted as
    the largest. ``model`` is left as it is, and nothing is computed.

    Args:
        model: with adapters, grafts and slots in place; its tensors may be on the meta device.
        trained: names of the parameters that local steps train.
        shape: of each batch.
        settings: the section ``[training]``.
        beside: entered for the length of the step, to count more than memory.
    """
    return _metered(model, trained, shape, settings, beside).peak


@dataclass(frozen=True, kw_only=True)
class Stretches:
    """Peaks of the stretches of a local step that end where experts are called, forward or backward."""

    forward: tuple[int, ...]
    """Before the first layer's experts, between layers, and from the last to the backward pass."""
    backward: tuple[int, ...]
    """From one layer's experts to the next before them, and to the end of the step."""


def stretches_of_local_steps(
    model: Any, trained: Sequence[str], shape: BatchShape, settings: TrainingSettings
) -> Stretches:
    """Return the peaks of which :func:`peak_of_local_steps` returns the largest."""
    peaks, num_layers = _metered(model, trained, shape, settings).peaks, len(seam.find_moe_layers(model))
    return Stretches(forward=tuple(peaks[: num_layers + 1]), backward=tuple(peaks[num_layers + 1 :]))


def _metered(
    model: Any,
    trained: Sequence[str],
    shape: BatchShape,
    settings: TrainingSettings,
    beside: AbstractContextManager[None] | None = None,
) -> "Meter":
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with _ShapesOnly(mode):
        fake = copy.deepcopy(model)
    blank = blank_state({name: model.get_parameter(name) for name in trained}, settings)
    with mode, _meter_of(fake, mode) as meter:
        batch, state = _fake_batch(shape), _fake_state(blank)
        meter.num_labels = _labels_of_a_part(shape, settings)
        with meter, beside or nullcontext():
            local_steps(
                fake,
                [batch],
                [ParameterGroup(names=tuple(trained), lr=1e-3)],
                settings,
                seed=0,
                optimizer_state=state,
            )
    return meter


def peak_of_forward(model: Any, shape: BatchShape) -> int:
    """Largest number of bytes in tensors at once while ``model`` runs on a batch without gradients, its own
    not counted, and with logits of one position: what a profile takes."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with _ShapesOnly(mode):
        fake = copy.deepcopy(model).eval()
    with mode, _meter_of(fake, mode) as meter, torch.no_grad():
        batch = _fake_batch(shape)
        with meter:
            fake(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                use_cache=False,
                logits_to_keep=1,
            )
    return meter.peak


class _ShapesOnly(TorchFunctionMode):
    """Copies made meanwhile have the tensors' shapes, dtypes and devices, but no bytes and no values.

    A copy of a meta tensor is said to be on a CPU: on the meta device attention would take another way.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        """Copies belong to ``mode``."""
        super().__init__()
        self._mode = mode

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer to the two ways in which ``deepcopy`` copies parameters and other tensors."""
        if func is torch._C.TensorBase.clone:
            return self._empty(args[0])
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            return memo.setdefault(id(tensor), self._empty(tensor).requires_grad_(tensor.requires_grad))
        return func(*args, **(kwargs or {}))

    def _empty(self, tensor: Tensor) -> Tensor:
        device = "cpu" if tensor.is_meta else tensor.device
        with torch._C.DisableTorchFunction(), self._mode:
            return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)


def _fake_batch(shape: BatchShape) -> Batch:
    size = (shape.examples, shape.length)
    return Batch(
        input_ids=torch.zeros(size, dtype=torch.long),
        attention_mask=torch.ones(size, dtype=torch.long),
        labels=torch.full(size, IGNORED_LABEL),
        num_examples=shape.examples,
        num_labels=shape.labels,
    )


def _labels_of_a_part(shape: BatchShape, settings: TrainingSettings) -> int:
    """Labels of the largest micro-batch, if every example has as many."""
    num_parts = min(settings.accumulation, shape.examples)
    return -(-shape.labels * -(-shape.examples // num_parts) // shape.examples)


def _fake_state(blank: OptimizerState) -> OptimizerState:
    return {
        name: {key: torch.zeros_like(value, device="cpu") for key, value in kept.items()}
        for name, kept in blank.items()
    }


@contextmanager
def _meter_of(model: nn.Module, mode: FakeTensorMode) -> Iterator["Meter"]:
    """A meter that is told each MoE layer's top-k before the layer runs, and when it runs."""
    meter = Meter(mode)

    def tell(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        meter.top_k = inputs[1].shape[1]
        meter.end_stretch()
        hidden: Any = inputs[0]
        if hidden.requires_grad:
            hidden.register_hook(lambda _: meter.end_stretch())

    handles = [layer.experts.register_forward_pre_hook(tell) for layer in seam.find_moe_layers(model)]
    try:
        yield meter
    finally:
        for handle in handles:
            handle.remove()


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of live storages, and answers to the few operations whose result depends on data."""

    def __init__(self, mode: FakeTensorMode) -> None:
        """Nothing counted yet; tensors are of ``mode``."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = KnownShapes(mode)
        self.live = 0
        self.peaks = [0]
        """Peaks of stretches of the step."""
        self.num_labels, self.top_k, self._rows_each = 0, 1, 0
        self._bytes: dict[int, int] = {}

    @property
    def peak(self) -> int:
        """Largest number of bytes that were live at once."""
        return max(self.peaks)

    def end_stretch(self) -> None:
        """Begin another stretch, of which the peak is kept on its own."""
        self.peaks.append(self.live)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Refuse torch's wrapper of each call, which takes time: nothing here is compiled."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation on tensors without storage, and count what it makes."""
        kwargs = kwargs or {}
        for tensor in tensors_in((args, kwargs)):
            # First seen as an input: made before the count began, so the model's.
            self._see(tensor, counts=False)
        made = self.answer(func, args, kwargs)
        for tensor in tensors_in(made):
            self._see(tensor, counts=True)
        return made

    def _see(self, tensor: Tensor, *, counts: bool) -> None:
        if _SEEN in tensor.__dict__:
            return
        tensor.__dict__[_SEEN] = True
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._bytes:
            self._bytes[key] = storage.nbytes() if counts else 0
            self.live += self._bytes[key]
            self.peaks[-1] = max(self.peaks[-1], self.live)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._bytes.pop(key)

    def answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of one operation; made up where it depends on data."""
        if func is _aten._local_scalar_dense.default:
            return self._number(args[0])
        if func is _aten.nonzero.default:
            return self._pairs(args[0]) if args[0].dim() == 2 else _all_positions(args[0])
        if func is _aten.index.Tensor and args[1][0] is not None and args[1][0].dtype == torch.bool:
            return args[0].new_empty((self.num_labels, *args[0].shape[args[1][0].dim() :]))
        if func is _aten._grouped_mm.default:
            return _grouped(*args, **kwargs)
        return self._known.answer(func, args, kwargs)

    def _number(self, tensor: Tensor) -> float:
        """A tensor's one value: 1 is a number that optimizers can divide by, and a mask is never all ones."""
        if tensor.dtype == torch.bool:
            return False
        return 1.0 if tensor.is_floating_point() else self._rows_each

    def _pairs(self, is_hit_ST: Tensor) -> Tensor:
        """(R, 2) for an even routing of T tokens to S slots, each token to ``top_k`` of them."""
        num_slots, num_tokens = is_hit_ST.shape
        self._rows_each = min(num_tokens, -(-num_tokens * self.top_k // num_slots))
        return is_hit_ST.new_empty((num_slots * self._rows_each, 2), dtype=torch.int64)


def _all_positions(mask: Tensor) -> Tensor:
    return mask.new_empty((mask.numel(), mask.dim()), dtype=torch.int64)


def _grouped(left: Tensor, right: Tensor, offsets: Tensor, *_: Any, **__: Any) -> Tensor:
    """Return a grouped product: rows by experts' matrices, or a matrix for each expert from its rows."""
    if right.dim() == 3:
        return left.new_empty((left.shape[0], right.shape[2]))
    return left.new_empty((len(offsets), left.shape[0], right.shape[1]))
