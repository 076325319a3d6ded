"""Divide a local step's time among the parts of the model, forward and backward, by torch's profiler.

A backward operation carries the number of the forward operation that it belongs to, so that it is counted to
the same part. The profiler slows small operations down; its shares are told, not its seconds.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from fedexperts.models.groups import attention_blocks
from fedexperts.moe.surgery.seam import find_moe_layers

_MARK = "part: "
_OTHER = "loss, rotary angles, residual sums"
_OPTIMIZER = "optimizer"
_BETWEEN = "clipping, counting and Python between"
_BACKWARD = "autograd::engine::evaluate_function: "


@contextmanager
def named_parts(model: Any) -> Iterator[None]:
    """Name each part's forward pass to the profiler, for the length of the block."""
    handles = []
    for module, part in _parts(model).items():
        open_marks: list[Any] = []

        def enter(*_: Any, marks: list[Any] = open_marks, part: str = part) -> None:
            marks.append(record_function(_MARK + part))
            marks[-1].__enter__()

        def leave(*_: Any, marks: list[Any] = open_marks) -> None:
            marks.pop().__exit__(None, None, None)

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _parts(model: Any) -> dict[nn.Module, str]:
    modules = dict(model.named_modules())
    parts: dict[nn.Module, str] = {model: _OTHER}
    for name, module in modules.items():
        last = name.rpartition(".")[2]
        if "Norm" in type(module).__name__:
            parts[module] = "norms"
        elif last.startswith("shared_expert"):
            parts[module] = "shared expert"
    parts |= {modules[name]: "attention with LoRA" for name in attention_blocks(model)}
    for layer in find_moe_layers(model):
        parts |= {layer.experts: "routed experts", layer.router: "router"}
    parts[model.get_input_embeddings()] = "embedding and logits"
    parts[model.get_output_embeddings()] = "embedding and logits"
    return parts


def shares_by_part(model: Any, run: Callable[[], object]) -> dict[str, dict[str, float]]:
    """Share of ``run``'s time by part: ``forward``, ``backward``, and ``operations``, what torch worked.

    The shares of forward and backward sum to 1; the rest of a part's time is Python around its operations.
    """
    run()
    profiled = profile(activities=[ProfilerActivity.CPU], acc_events=True)
    with named_parts(model), profiled, record_function("all"):
        run()
    events = list(profiled.events())
    whole = next(event for event in events if event.name == "all")
    seconds: dict[str, dict[str, float]] = defaultdict(
        lambda: {"forward": 0.0, "backward": 0.0, "operations": 0.0}
    )
    part_of_number = _forward(events, seconds)
    _backward(events, seconds, part_of_number)
    for event in events:
        if event.name.startswith("Optimizer."):
            seconds[_OPTIMIZER]["forward"] += event.cpu_time_total
            seconds[_OPTIMIZER]["operations"] += _operations_in(event)
    total = whole.cpu_time_total
    counted = sum(part["forward"] + part["backward"] for part in seconds.values())
    seconds[_BETWEEN]["forward"] = max(total - counted, 0.0)
    return {part: {kind: value / total for kind, value in kinds.items()} for part, kinds in seconds.items()}


def _forward(events: list[Any], seconds: dict[str, dict[str, float]]) -> dict[int, str]:
    """Count each mark's own time, without the marks inside it; returns the part of each sequence number."""
    part_of_number: dict[int, str] = {}
    for event in events:
        part = _part_of(event)
        if part is None:
            continue
        if event.name.startswith(_MARK):
            seconds[part]["forward"] += event.cpu_time_total
            outer = _part_of(event.cpu_parent)
            if outer is not None:
                seconds[outer]["forward"] -= event.cpu_time_total
        else:
            if _is_top_operation(event):
                seconds[part]["operations"] += event.cpu_time_total
            if event.sequence_nr >= 0:
                part_of_number.setdefault(event.sequence_nr, part)
    return part_of_number


def _backward(
    events: list[Any], seconds: dict[str, dict[str, float]], part_of_number: dict[int, str]
) -> None:
    for event in events:
        if event.name.startswith(_BACKWARD):
            numbers = [child.sequence_nr for child in event.cpu_children if child.sequence_nr >= 0]
            part = part_of_number.get(numbers[0], _OTHER) if numbers else _OTHER
            seconds[part]["backward"] += event.cpu_time_total
            seconds[part]["operations"] += _operations_in(event)


def _part_of(event: Any) -> str | None:
    while event is not None:
        if event.name.startswith(_MARK):
            return str(event.name.removeprefix(_MARK))
        event = event.cpu_parent
    return None


def _is_operation(event: Any) -> bool:
    return bool(event.name.startswith("aten::"))


def _is_top_operation(event: Any) -> bool:
    return _is_operation(event) and not (event.cpu_parent is not None and _is_operation(event.cpu_parent))


def _operations_in(event: Any) -> float:
    """Time of the outermost operations below ``event``."""
    if _is_operation(event):
        return float(event.cpu_time_total)
    return sum(_operations_in(child) for child in event.cpu_children)
