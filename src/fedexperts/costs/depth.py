"""Count the memory of a deep model's local steps from two shallow copies of it.

Decoder layers repeat: all alike, or in a short pattern. What is alive at a given point of a step grows by the
same bytes with each repetition, so dry runs of the first few layers, one repetition apart, say what all of
them take, to the byte. The peak of each stretch between two calls of experts is extended on its own, because
the fullest moment of a deep model may be another than that of a shallow one.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from fedexperts.costs.dry_run import (
    BatchShape,
    Stretches,
    peak_of_forward,
    peak_of_local_steps,
    stretches_of_local_steps,
)
from fedexperts.moe.surgery import seam
from fedexperts.training.settings import TrainingSettings

_LONGEST_PATTERN = 8
_MOST_UNLIKE = 4


def peak_by_depth(model: Any, trained: Sequence[str], shape: BatchShape, settings: TrainingSettings) -> int:
    """Return what :func:`peak_of_local_steps` returns, from fewer layers where the model's layers repeat."""
    repeats = find_repeats(model, trained)
    if repeats is None or settings.accumulation > 1:
        return peak_of_local_steps(model, trained, shape, settings)
    fewest = repeats.unlike + 2 * repeats.period
    runs = []
    for depth in (fewest, fewest + repeats.period):
        with repeats.shortened(depth):
            present = {name for name, _ in model.named_parameters()}
            names = [name for name in trained if name in present]
            runs.append(stretches_of_local_steps(model, names, shape, settings))
    few, more = runs
    peak = _extended(few, more, (len(repeats.layers) - fewest) // repeats.period - 1)
    return peak_of_local_steps(model, trained, shape, settings) if peak is None else peak


def forward_peak_by_depth(model: Any, shape: BatchShape) -> int:
    """Return what :func:`peak_of_forward` returns: without gradients every repetition takes the same."""
    repeats = find_repeats(model, ())
    if repeats is None:
        return peak_of_forward(model, shape)
    with repeats.shortened(repeats.unlike + 2 * repeats.period):
        return peak_of_forward(model, shape)


def _extended(few: Stretches, more: Stretches, further: int) -> int | None:
    """Return the peak of a model ``further`` repetitions deeper than ``more``, itself one deeper than
    ``few``; None where the backward pass does not show its layers."""
    calls, per = (len(more.forward) - len(few.forward), len(more.backward) - len(few.backward))
    if per < calls:
        return None
    pairs = [
        *zip(few.forward[-calls - 1 :], more.forward[-calls - 1 :], strict=True),
        *zip(few.backward[:per], more.backward[:per], strict=True),
        # The last repetitions and the end of the step, whose places are counted from the end: where gradients
        # of a layer are larger than what it keeps for them, memory grows until there.
        *zip(few.backward, more.backward[per:], strict=True),
    ]
    return max(*more.forward, *(later + (later - earlier) * further for earlier, later in pairs))


@dataclass(frozen=True, kw_only=True)
class Repeats:
    """The decoder layers of a model, and how they repeat."""

    owner: nn.Module
    attribute: str
    layers: nn.ModuleList
    unlike: int
    """First layers that are not part of the pattern."""
    period: int
    """Layers of one repetition."""

    @contextmanager
    def shortened(self, depth: int) -> Iterator[None]:
        """Leave the model its first ``depth`` layers inside the block."""
        setattr(self.owner, self.attribute, nn.ModuleList(self.layers[:depth]))
        try:
            yield
        finally:
            setattr(self.owner, self.attribute, self.layers)


def find_repeats(model: Any, trained: Sequence[str]) -> Repeats | None:
    """Return how the decoder layers repeat; None where they do not, or too seldom."""
    parts = seam.find_moe_layers(model)[0].name.split(".")
    at = next((index for index, part in enumerate(parts) if part.isdecimal()), 0)
    path = ".".join(parts[:at])
    layers = model.get_submodule(path) if at else None
    if not isinstance(layers, nn.ModuleList):
        return None
    wanted = set(trained)
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or [""] * len(layers)
    looks = [
        (kind, _look(layer, f"{path}.{index}", wanted))
        for index, (kind, layer) in enumerate(zip(kinds, layers, strict=True))
    ]
    found = _pattern(looks)
    if found is None:
        return None
    owner, _, attribute = path.rpartition(".")
    return Repeats(
        owner=model.get_submodule(owner),
        attribute=attribute,
        layers=layers,
        unlike=found[0],
        period=found[1],
    )


def _look(layer: nn.Module, path: str, trained: set[str]) -> tuple[Any, ...]:
    """Return all that a layer's memory depends on."""
    return (
        *((name, type(module)) for name, module in layer.named_modules()),
        *((n, p.shape, p.dtype, f"{path}.{n}" in trained) for n, p in layer.named_parameters()),
        *((name, buffer.shape, buffer.dtype) for name, buffer in layer.named_buffers()),
    )


def _pattern(looks: Sequence[Any]) -> tuple[int, int] | None:
    """Return the number of first layers outside the pattern and its length, the fewest layers first."""
    for unlike, period in sorted(
        ((u, p) for u in range(_MOST_UNLIKE + 1) for p in range(1, _LONGEST_PATTERN + 1)),
        key=lambda found: found[0] + 3 * found[1],
    ):
        rest = looks[unlike:]
        if len(rest) >= 4 * period and not len(rest) % period and rest[period:] == rest[:-period]:
            return unlike, period
    return None
