"""Remember what operations make of tensors without storage, by the shapes of their inputs.

A step repeats the same operations on the same shapes thousands of times: for every layer, expert
and parameter. torch works out each result anew, which takes most of a dry run. Here it does so once for
each operation and shapes of inputs, and results are made from what is remembered.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


class _Unknown(Exception):
    """An input whose result is not remembered."""


@dataclass(frozen=True)
class _Made:
    """One tensor that an operation makes."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    source: int | None
    """Input of which it is a view; None for a storage of its own."""
    offset: int
    """In the storage; of a view, from its source's."""


class KnownShapes:
    """Results of operations below autograd on tensors of one mode."""

    def __init__(self, mode: FakeTensorMode) -> None:
        """Remember nothing yet."""
        self._mode = mode
        self._known: dict[Any, Sequence[_Made | int] | _Made | int | None] = {}

    def answer(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return what ``func`` returns."""
        if func is _device and type(args[0]) is FakeTensor:
            return args[0].fake_device
        inputs: list[FakeTensor] = []
        try:
            key = (func, _key_of(args, inputs), _key_of(tuple(kwargs.items()), inputs))
            known = self._known.get(key, _NEW)
        except (_Unknown, TypeError):  # an argument that is no plain data
            return func(*args, **kwargs)
        if known is None:
            return func(*args, **kwargs)
        if known is _NEW:
            before = [_look_of(one) for one in inputs]
            made = func(*args, **kwargs)
            is_kept = before == [_look_of(one) for one in inputs]
            self._known[key] = _remembered(made, inputs) if is_kept else None
            return made
        if isinstance(known, list | tuple):
            return type(known)([self._make(one, inputs) for one in known])
        return self._make(known, inputs)

    def _make(self, what: _Made | int, inputs: Sequence[FakeTensor]) -> Tensor:
        if isinstance(what, int):
            return inputs[what]
        with torch._C._DisableTorchDispatch():
            made = torch.empty_strided(what.size, what.stride, dtype=what.dtype, device="meta")
            if what.source is not None:
                source = inputs[what.source]
                made.set_(
                    source.untyped_storage(), source.storage_offset() + what.offset, what.size, what.stride
                )
        return FakeTensor(self._mode, made, what.device)


_NEW: Any = object()
_device = torch.ops.prim.device.default


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_in(one)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def _look_of(tensor: FakeTensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.fake_device


def _key_of(value: Any, inputs: list[FakeTensor]) -> Any:
    """Return what a result's shapes depend on; list tensors."""
    kind = type(value)
    if kind is tuple or kind is list:
        return tuple([_key_of(one, inputs) for one in value])
    if kind is FakeTensor:
        inputs.append(value)
        return _look_of(value)
    if isinstance(value, Tensor):
        raise _Unknown
    return kind, value


def _remembered(made: Any, inputs: Sequence[FakeTensor]) -> Any:
    """Return what the same result is made from the next time; None if it cannot be."""
    if not isinstance(made, list | tuple):
        return _remembered_tensor(made, inputs)
    several = [_remembered_tensor(one, inputs) for one in made]
    if None in several:
        return None
    taken = {one.untyped_storage()._cdata for one in inputs}
    own = [key for one in made if (key := one.untyped_storage()._cdata) not in taken]
    return type(made)(several) if len(own) == len(set(own)) else None  # no two share a new storage


def _remembered_tensor(made: Any, inputs: Sequence[FakeTensor]) -> _Made | int | None:
    if type(made) is not FakeTensor:
        return None
    storage = made.untyped_storage()
    source = None
    for index, one in enumerate(inputs):
        if made is one:
            return index
        if source is None and storage._cdata == one.untyped_storage()._cdata:
            source = index
    offset = int(made.storage_offset())
    if source is None:
        if offset or storage.nbytes() != _nbytes(made):
            return None
    else:
        offset -= int(inputs[source].storage_offset())
    return _Made(tuple(made.shape), made.stride(), made.dtype, made.fake_device, source, offset)


def _nbytes(tensor: Tensor) -> int:
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
