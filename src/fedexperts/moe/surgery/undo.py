"""Undo surgery on a resident model: a stack of what was done, unwound bit for bit at the end of a block.

Grafts, slots, quantised banks, LoRA, written experts and training push their undo here. Pretrained experts
come back from disk where the model has a checkpoint; without one they are copied before the first write.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from torch import Tensor, nn

from fedexperts.tensors import equal_bits

Step = Callable[[], None]


class Originals(Protocol):
    """Pretrained experts on disk; see :class:`fedexperts.models.checkpoint.Checkpoint`."""

    def fused(self, layer: int) -> dict[str, Tensor]:
        """Return the fused parameters (E, ...) of an MoE layer by name."""

    def expert(self, layer: int, expert: int) -> dict[str, Tensor]:
        """Return one expert's weights by the names of its fused parameters."""


class Layer(Protocol):
    """The part of :class:`fedexperts.moe.surgery.seam.MoeLayer` that is needed here."""

    @property
    def index(self) -> int: ...

    @property
    def name(self) -> str: ...

    @property
    def experts(self) -> nn.Module: ...

    def parameter_names(self) -> tuple[str, ...]: ...


class UndoStack:
    """Steps that take a model back to what it was when the stack was made."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer], originals: Originals | None = None) -> None:
        """Remember which parameters there are; without ``originals`` changed experts are copied first."""
        self.model, self.originals = model, originals
        self.written: dict[str, None] = {}
        """Names of the tensors of the model that were written or trained, in that order."""
        self._trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._layer_of = {
            f"{layer.name}.{name}": layer for layer in layers for name in layer.parameter_names()
        }
        self._saved: set[str] = set()
        self.copied_bytes = 0
        """Bytes of the copies made so far, those of experts left out: a run reads them back from disk."""
        self._steps: list[Step] = []

    def push(self, step: Step) -> None:
        """Add a step, to be run before all that were added earlier."""
        self._steps.append(step)

    def will_write(self, tensors: Mapping[str, Tensor]) -> None:
        """Save parameters that were there from the beginning, before they are written or trained.

        Args:
            tensors: by the parameter's name in the model; a fused parameter stands for all its experts.
        """
        for name, tensor in tensors.items():
            self.written[name] = None
            if name in self._layer_of:
                self.will_change_experts(self._layer_of[name])
            elif name in self._trains and name not in self._saved:
                self._saved.add(name)
                self.copied_bytes += tensor.numel() * tensor.element_size()
                self.push(_copy_back(tensor))

    def will_change_experts(self, layer: Layer) -> None:
        """Have the layer's pretrained experts put back at the end, from disk or from a copy made now."""
        if layer.name in self._saved:
            return
        self._saved.add(layer.name)
        if self.originals is None:
            copies = {n: getattr(layer.experts, n).detach().clone() for n in layer.parameter_names()}
            self.push(lambda: _put_back(layer, copies))
        else:
            originals = self.originals
            self.push(lambda: _put_back(layer, originals.fused(layer.index)))

    def forget(self) -> None:
        """Leave the model changed: nothing that was done until now is undone."""
        self._steps.clear()

    def unwind(self) -> None:
        """Run all steps, the last first; the first error is raised when all have run."""
        errors: list[Exception] = []
        while self._steps:
            try:
                self._steps.pop()()
            except Exception as error:
                errors.append(error)
        for name, parameter in self.model.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(self._trains.get(name, False))
        self.model.eval()
        if errors:
            raise errors[0]


def _copy_back(tensor: Tensor) -> Step:
    saved = tensor.detach().clone()

    def undo() -> None:
        tensor.detach().copy_(saved)

    return undo


def _put_back(layer: Layer, fused: Mapping[str, Tensor]) -> None:
    for name, weight in fused.items():
        stored = getattr(layer.experts, name)
        if stored.shape == weight.shape:
            stored.detach().copy_(weight)
        else:
            setattr(layer.experts, name, nn.Parameter(weight.to(stored.device), requires_grad=False))


_ACTIVE: ContextVar[UndoStack | None] = ContextVar("undo stack", default=None)


def active_stack() -> UndoStack | None:
    """Return the stack of the innermost :func:`undone` block, or None outside of any."""
    return _ACTIVE.get()


def push_undo(step: Step) -> None:
    """Add a step to the active stack; outside of any block the change is left to the caller."""
    stack = _ACTIVE.get()
    if stack is not None:
        stack.push(step)


def will_train(parameters: Mapping[str, Tensor]) -> None:
    """Let the active stack, if any, save ``parameters`` before an optimizer changes them in place."""
    stack = _ACTIVE.get()
    if stack is not None:
        stack.will_write(parameters)


@contextmanager
def undone(
    model: nn.Module, layers: Sequence[Layer], originals: Originals | None = None
) -> Iterator[UndoStack]:
    """Undo at the end of the block, whatever happened in it, all surgery and training done to ``model``."""
    stack = UndoStack(model, layers, originals)
    token = _ACTIVE.set(stack)
    try:
        yield stack
    finally:
        _ACTIVE.reset(token)
        stack.unwind()


def first_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """Return the first name whose bits differ between two sets of tensors, or None."""
    return next(
        (name for name in expected if name not in found or not equal_bits(found[name], expected[name])), None
    )
