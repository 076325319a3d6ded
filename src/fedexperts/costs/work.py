"""Count the work of a client's turn while it runs: arithmetic, memory traffic, and bytes moved.

Every operation is seen as it is dispatched, forward and backward. Matrix products count two floating-point
operations for each multiplication and addition; every other operation counts the bytes that it reads and
writes. An operation that only looks at memory in another way counts nothing.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.flop_counter import flop_registry

from fedexperts.costs.devices import Device
from fedexperts.costs.stopwatch import named_phase, phase_now

_aten = torch.ops.aten
_HALF = (torch.bfloat16, torch.float16)
MAIN_PHASE = "train"
"""Phase of all work outside a stopwatch's phases."""
Place = Literal["host", "disk"]


class Operation(NamedTuple):
    """One kind of operation, by all that its time depends on."""

    phase: str
    is_half: bool
    """Whether its matrix product multiplies numbers of 16 bits."""
    flops: int
    num_bytes: int
    """Read from and written to the memory that holds the model."""
    has_grad: bool
    """Whether it is part of a forward pass that records gradients, or of a backward pass."""

    def seconds(self, device: Device) -> float:
        """Return its time on ``device``."""
        return device.operation_seconds(
            flops=self.flops, num_bytes=self.num_bytes, is_half=self.is_half, has_grad=self.has_grad
        )


@dataclass(frozen=True, kw_only=True)
class PhaseWork:
    """Work of one phase of a turn."""

    flops: int = 0
    memory_bytes: int = 0
    """Read and written by operations."""
    host_bytes: int = 0
    """Moved between main memory and the memory that holds the model."""
    disk_bytes: int = 0
    """Read from or written to disk."""
    seconds: float = 0.0
    """On the device that it was counted for, one operation after the other."""


WORK_FIELDS = tuple(item.name for item in fields(PhaseWork))
"""Fields of :class:`PhaseWork`."""


class WorkMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations run inside it, by phase."""

    def __init__(self) -> None:
        """Nothing counted yet."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: Counter[Operation] = Counter()
        self.moved: Counter[tuple[str, Place, bool]] = Counter()
        """Bytes by phase, place, and whether they moved while the phase computed."""
        self._phase = MAIN_PHASE

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Refuse torch's wrapper of each call, which costs more than the count: nothing here is compiled."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation and count it."""
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        kind = _kind_of(func)
        if kind != "none":
            self._count(func, kind, args, kwargs, made)
        return made

    def _count(self, func: Any, kind: str, args: Any, kwargs: dict[str, Any], made: Any) -> None:
        inputs = _tensors(args)
        if kwargs:
            inputs += _tensors(kwargs.values())
        outputs = _tensors((made,))
        formula = _FORMULAS.get(func)
        flops = formula(args, kwargs, made) if formula else 0
        is_half = flops > 0 and inputs[0].dtype in _HALF
        traffic = _TRAFFIC[kind](inputs, outputs)
        self.operations[Operation(self._phase_now(), is_half, flops, traffic, _has_grad())] += 1

    def _phase_now(self) -> str:
        """Return the phase under way; a backward pass in a thread of its own belongs to the last one seen."""
        self._phase = phase_now() or self._phase
        return self._phase

    def move(self, place: Place, num_bytes: int, phase: str = "", *, ahead: bool = False) -> None:
        """Count bytes that something moved, ``ahead`` while it computed; by default in the phase under
        way."""
        self.moved[phase or self._phase_now(), place, ahead] += num_bytes

    def work(self, device: Device) -> dict[str, PhaseWork]:
        """Return the work of each phase, in the order in which they began, with its time on ``device``."""
        phases = dict.fromkeys([one.phase for one in self.operations] + [phase for phase, *_ in self.moved])
        return {phase: self._of_phase(phase, device) for phase in phases}

    def _of_phase(self, phase: str, device: Device) -> PhaseWork:
        own = {one: count for one, count in self.operations.items() if one.phase == phase}
        waited, ahead = (
            {place: self.moved[phase, place, is_ahead] for place in ("host", "disk")}
            for is_ahead in (False, True)
        )
        seconds = [count * one.seconds(device) for one, count in sorted(own.items())]
        return PhaseWork(
            flops=sum(one.flops * count for one, count in own.items()),
            memory_bytes=sum(one.num_bytes * count for one, count in own.items()),
            host_bytes=waited["host"] + ahead["host"],
            disk_bytes=waited["disk"] + ahead["disk"],
            seconds=max(sum(seconds), _moving(device, ahead)) + _moving(device, waited),
        )


def _moving(device: Device, moved: Mapping[str, int]) -> float:
    return device.moving_seconds(host_bytes=moved["host"], disk_bytes=moved["disk"])


@contextmanager
def counting(meter: WorkMeter | None) -> Iterator[None]:
    """Count the work inside the block with ``meter``; with None do nothing."""
    if meter is None:
        yield
        return
    with named_phase(MAIN_PHASE), meter:
        yield


def count_moved(place: Place, num_bytes: int, *, ahead: bool = False) -> None:
    """Tell the clock that a method moved bytes from or to main memory or disk: experts loaded on demand.

    Without a clock nothing happens. Autograd hands dispatch modes, and so the meter, on to the threads of a
    backward pass.

    Args:
        place: where they came from or went to.
        num_bytes: how many.
        ahead: whether they moved while the phase computed, which then lasts as long as the longer of both.
    """
    meters = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, WorkMeter)]
    if meters:
        meters[-1].move(place, num_bytes, ahead=ahead)


def as_figures(work: Mapping[str, PhaseWork]) -> dict[str, float]:
    """Return ``work`` as the flat figures that a message carries, zeros left out."""
    return {
        f"{phase}.{name}": float(value)
        for phase, own in work.items()
        for name in WORK_FIELDS
        if (value := getattr(own, name))
    }


def from_figures(figures: Mapping[str, float]) -> dict[str, PhaseWork]:
    """Return what :func:`as_figures` was given."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in figures.items():
        phase, _, name = key.rpartition(".")
        found.setdefault(phase, {})[name] = value if name == "seconds" else int(value)
    return {phase: PhaseWork(**own) for phase, own in found.items()}


def _has_grad() -> bool:
    # A backward pass runs with gradients off; torch knows the node of the graph that it is at.
    return torch.is_grad_enabled() or torch._C._current_autograd_node() is not None


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _num_bytes(tensor: Tensor) -> int:
    """Return the bytes that a pass over the tensor touches: of an expanded one, those that are stored."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def _all(tensors: Iterable[Tensor]) -> int:
    return sum(map(_num_bytes, tensors))


_TRAFFIC: Mapping[str, Callable[[list[Tensor], list[Tensor]], int]] = {
    "compute": lambda inputs, outputs: _all(inputs) + _all(outputs),
    "gather": lambda inputs, outputs: 2 * _all(outputs) + _all(inputs[1:]),
    "scatter": lambda inputs, outputs: 3 * _num_bytes(inputs[-1]) + _all(inputs[1:-1]),
}
"""Bytes by kind: a gather reads the rows that it returns, a scatter reads its source and adds it to rows."""

_GATHERS = {"index_select", "index", "gather", "embedding"}
_SCATTERS = {"index_add_", "index_add", "index_put_", "index_put", "_index_put_impl_", "scatter_add_"}
_SCATTERS |= {"scatter_add", "scatter_", "scatter"}
_IDLE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_local_scalar_dense"}
_IDLE |= {"detach", "lift_fresh", "is_same_size", "_unsafe_view", "_reshape_alias", "set_"}


@cache
def _kind_of(func: Any) -> str:
    """Return ``none`` for an operation that touches no memory, such as a view."""
    name = func.overloadpacket.__name__
    returns = func._schema.returns
    is_view = bool(returns) and all(
        one.alias_info is not None and not one.alias_info.is_write for one in returns
    )
    if name in _IDLE or is_view or not returns or func.namespace == "prim":
        return "none"
    if name in _GATHERS:
        return "gather"
    return "scatter" if name in _SCATTERS else "compute"


Formula = Callable[[tuple[Any, ...], Mapping[str, Any], Any], int]


def _from_library(packet: Any) -> Formula:
    counted = flop_registry[packet]
    return lambda args, kwargs, made: int(counted(*args, **kwargs, out_val=made))


def _own(count: Callable[[tuple[Any, ...]], int]) -> Formula:
    def counted(args: tuple[Any, ...], *_: Any) -> int:
        return count(args)

    return counted


def _grouped(args: tuple[Any, ...]) -> int:
    """Count a product of rows grouped by expert: each row meets one expert's matrix, in either direction."""
    left, right = args[:2]
    return int(2 * left.shape[0] * left.shape[1] * right.shape[-1])


def _attention(query: Tensor, key: Tensor, value: Tensor, *, num_keys: int, num_values: int) -> int:
    """Count products of queries and keys, and of shares and values."""
    batch, heads, rows, width = query.shape
    pairs = 2 * batch * heads * rows * key.shape[2]
    return int(pairs * (num_keys * width + num_values * value.shape[-1]))


def _flash_forward(args: tuple[Any, ...]) -> int:
    return _attention(*args[:3], num_keys=1, num_values=1)


def _flash_backward(args: tuple[Any, ...]) -> int:
    """The backward pass makes the shares again, then the gradients of all three and of the shares."""
    return _attention(*args[1:4], num_keys=3, num_values=2)


_FORMULAS: Mapping[Any, Formula] = {
    **{
        getattr(packet, overload): _from_library(packet)
        for packet in flop_registry
        if hasattr(packet, "overloads")
        for overload in packet.overloads()
    },
    _aten._grouped_mm.default: _own(_grouped),
    _aten._scaled_dot_product_flash_attention_for_cpu.default: _own(_flash_forward),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _own(_flash_backward),
}
"""Floating-point operations of matrix products: torch's own formulas, and those that it lacks."""
