"""Decide which configurations fit a memory budget, and suggest changes when none does."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from fedexperts.plan.counting import PRECISIONS, SETTINGS, Counter, Precision
from fedexperts.plan.settings import BY_SLOTS, LARGEST_SHARE, PlanSettings

MERGED_PER_LAYER = (8, 4, 2, 1)
"""Numbers of merged experts per layer that a Flux plan is worked out for, besides keeping all."""
_NOT_IN_RUN = "run holds Flux's frozen experts in model.dtype alone"


def is_tight(total: int, memory: int) -> bool:
    """Return whether ``total`` fits in ``memory``, but leaves little for the process and its allocator."""
    return LARGEST_SHARE * memory < total <= memory


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One way of holding the model, and whether it fits."""

    what: str
    total: int
    """Bytes at the fullest moment."""
    fits: bool
    is_tight: bool
    """Whether it fits with less than a tenth of the memory left."""
    settings: str
    """Settings of ``run``, as on its command line, in which it differs from what was asked for."""


@dataclass(frozen=True, kw_only=True)
class SlotFit:
    """As many tuned experts as a memory has room for, with the others frozen in one way (papers.md E.5)."""

    precision: Precision
    """Of the frozen experts."""
    merged_per_layer: int | None
    """Merged experts that stand for all that are not tuned; None keeps each of them."""
    num_tuned: int | None
    """In all layers together; None where not even the frozen ones fit."""
    num_frozen: int
    """Kept or merged, in all layers."""
    total: int
    """Bytes at the fullest moment with so many tuned, or with none."""
    profile: int
    """Bytes while every expert is profiled."""
    fits: bool
    """Whether at least one expert is tuned, and the profile fits too."""
    not_in_run: str
    """Reason why ``run`` cannot do it; empty where it can."""

    @property
    def settings(self) -> str:
        """Return settings of ``run`` under which it takes this turn."""
        merged = self.merged_per_layer
        others = "algorithm.others=kept" if merged is None else f"algorithm.merged_per_layer={merged}"
        return f"algorithm.name={BY_SLOTS} algorithm.num_tuned={self.num_tuned} {others}"


def total_bytes(counter: Counter, precision: Precision) -> int | None:
    """At the fullest moment, with frozen experts in ``precision``; None where the method changes them."""
    if precision == "dense":
        return counter.memory.total
    least = least_bytes(counter, precision)
    return None if least is None else least + counter.rows_activations


def least_bytes(counter: Counter, precision: Precision) -> int | None:
    """:func:`total_bytes` without activations, which takes no dry run."""
    if precision == "dense":
        return counter.before_activations.total
    return None if counter.changes_experts else counter.before_activations_in(precision).total


def precisions_that_fit(counter: Counter, memory: int) -> list[Fit]:
    """The plan as it stands, for each precision of the frozen experts."""
    totals = ((name, total_bytes(counter, name)) for name in PRECISIONS)
    return [
        _fit(_name(name, counter), total, memory, SETTINGS[name])
        for name, total in totals
        if total is not None
    ]


def _fit(what: str, total: int, memory: int, settings: str) -> Fit:
    return Fit(
        what=what,
        total=total,
        fits=total <= memory,
        is_tight=is_tight(total, memory),
        settings=settings.strip(),
    )


def _name(precision: Precision, counter: Counter) -> str:
    held = "all weights" if counter.trains_all_experts else "frozen experts"
    return f"{held} in {dtype_of(precision, counter.settings)}"


def dtype_of(precision: Precision, settings: PlanSettings) -> str:
    """Return the dtype of frozen experts in ``precision``."""
    return settings.dtype if precision == "dense" else precision


def slots_that_fit(counter: Counter, memory: int) -> list[SlotFit]:
    """For Flux: how many experts can be tuned, for each precision and for each way with the others."""
    return [_slots(counter, memory, name, merged) for name in PRECISIONS for merged in _ways(counter)]


def best_slots(slots: Iterable[SlotFit]) -> SlotFit | None:
    """Return what ``run`` can do with the most tuned experts; of equals, that which merges the least."""
    fitting = [slot for slot in slots if slot.fits and not slot.not_in_run]
    return max(fitting, key=lambda slot: (slot.num_tuned, slot.num_frozen), default=None)


def _ways(counter: Counter) -> Iterator[int | None]:
    yield None
    yield from (merged for merged in MERGED_PER_LAYER if merged < counter.experts.per_layer)


def _slots(counter: Counter, memory: int, precision: Precision, merged: int | None) -> SlotFit:
    room = counter.room(precision)
    num_merged = None if merged is None else counter.experts.num_layers * merged
    most = room.most_tuned(memory, num_merged)
    return SlotFit(
        precision=precision,
        merged_per_layer=merged,
        num_tuned=most,
        num_frozen=room.frozen(most or 0, num_merged),
        total=room.total(most or 0, num_merged),
        profile=counter.profile,
        fits=bool(most) and counter.profile <= memory,
        not_in_run="" if precision == "dense" else _NOT_IN_RUN,
    )


def largest_batch(counter: Counter, memory: int, precision: Precision) -> int | None:
    """Examples of the largest batch that fits, from the activations of one and of two such batches."""
    batch = counter.settings.batch
    now, then = (total_bytes(each, precision) for each in (counter, counter.with_batch(2 * batch)))
    if now is None or then is None or now > memory:
        return None
    return batch + (memory - now) * batch // (then - now)


def changes(counter: Counter, config: Any, memory: int) -> list[Fit]:
    """Return changes that may fit, from the least to the most that is given up."""
    settings = counter.settings
    others = []
    checkpointing, small_batch = "training.gradient_checkpointing=true", "training.batch_size=1"
    if not settings.gradient_checkpointing:
        changed = replace(settings, gradient_checkpointing=True)
        others.append(("gradient checkpointing", checkpointing, changed))
    if settings.batch > 1:
        small = replace(settings, gradient_checkpointing=True, batch=1)
        if settings.gradient_checkpointing:
            others.append(("a batch of 1", small_batch, small))
        else:
            others.append(("checkpointing and a batch of 1", f"{checkpointing} {small_batch}", small))
    fits = []
    for what, keys, changed in others:
        other = Counter(config, changed)
        for precision in PRECISIONS:
            fit = _changed(what, keys, other, memory, precision)
            fits += [fit] if fit else []
    return fits + _as_flux(Counter(config, replace(settings, method=BY_SLOTS)), memory)


def _changed(what: str, keys: str, counter: Counter, memory: int, precision: Precision) -> Fit | None:
    least = least_bytes(counter, precision)
    if least is None or least > memory:
        return None
    total = total_bytes(counter, precision)
    assert total is not None, "it has a least"
    return _fit(f"{what}, {_name(precision, counter)}", total, memory, f"{keys} {SETTINGS[precision]}")


def _as_flux(counter: Counter, memory: int) -> list[Fit]:
    """Return the same memory with experts tuned in part, a tenth of it left to the process."""
    roomy = int(LARGEST_SHARE * memory)
    best = best_slots(_slots(counter, roomy, "dense", merged) for merged in _ways(counter))
    if best is None:
        return []
    merged = best.merged_per_layer
    others = "kept" if merged is None else f"merged into {merged} a layer"
    what = f"method {BY_SLOTS}: {best.num_tuned:,} experts tuned, the others {others}"
    return [_fit(what, max(best.total, best.profile), memory, best.settings)]
