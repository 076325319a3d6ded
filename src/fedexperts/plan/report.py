"""A plan as tables for a terminal and as plain data."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from fedexperts.costs.memory import MEMORY_PARTS
from fedexperts.plan.counting import PRECISIONS, Counter
from fedexperts.plan.fitting import (
    Fit,
    SlotFit,
    best_slots,
    changes,
    dtype_of,
    is_tight,
    largest_batch,
    precisions_that_fit,
    slots_that_fit,
    total_bytes,
)
from fedexperts.plan.settings import PlanSettings, parse_memory
from fedexperts.plan.source import Source, find_source

_NOTE = "tensors alone; a process and its allocator take more"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that ``fedexperts plan`` shows."""

    source: Source
    settings: PlanSettings
    counter: Counter
    fits: list[Fit]
    """The method as asked for, by precision; empty without a memory, and for Flux."""
    slots: list[SlotFit]
    """For Flux with a memory."""
    changes: list[Fit]
    """Other ways to hold the model; empty if one of ``fits`` fits."""
    largest_batch: int | None

    @property
    def is_possible(self) -> bool:
        """Whether something that ``run`` can do fits, or no memory was given."""
        runnable = [slot.fits and not slot.not_in_run for slot in self.slots]
        return not self.settings.memory or any([fit.fits for fit in (*self.fits, *self.changes)] + runnable)

    def render(self) -> list[RenderableType]:
        """Tables for a terminal."""
        tables = [self._model_table(), self._expert_table(), self._method_table()]
        return [*tables, self._fit_table()] if self.settings.memory else [*tables]

    def _model_table(self) -> Table:
        counts = self.counter.parameters
        total = sum(counts.values())
        table = _table(f"{self.source.name} ({self.source.origin})", "parameters", "number", "share", "size")
        each = self.counter.other_bytes / max(1, total - counts["routed_experts"])
        for group, number in (*counts.items(), ("all", total)):
            if group == "all":
                table.add_section()
            table.add_row(group, f"{number:,}", f"{number / total:.2%}", _size(number * each))
        if self.source.stored is not None:
            stored = self.source.stored
            kinds = ", ".join(sorted(stored.values_by_dtype))
            table.add_row(f"stored ({kinds})", f"{stored.num_values:,}", "", _size(stored.num_bytes))
        return table

    def _expert_table(self) -> Table:
        experts = self.counter.experts
        title = f"{experts.num_layers} MoE layers of {experts.per_layer} experts, {experts.number:,} in all"
        table = _table(title, "routed experts", "one", "a layer", "all")
        kinds = [
            (f"frozen, {dtype_of(name, self.settings)}", experts.bytes_each[name]) for name in PRECISIONS
        ]
        kinds.append(("tuned: float32, gradient, AdamW", experts.tuned_bytes_each))
        for name, size in kinds:
            table.add_row(name, _size(size), _size(size * experts.per_layer), _size(size * experts.number))
        table.caption = f"{experts.parameters_each:,} parameters each"
        return table

    def _method_table(self) -> Table:
        settings = self.settings
        how = "with" if settings.gradient_checkpointing else "without"
        title = f"{settings.method}: batch {settings.batch} x {settings.seq} tokens, {how} checkpointing"
        table = _table(title, "one client", "amount")
        for name, amount in self._flux_rows() if settings.is_by_slots else self._method_rows():
            table.add_row(name, amount)
        table.caption = _NOTE
        return table

    def _method_rows(self) -> list[tuple[str, str]]:
        counter, memory = self.counter, self.counter.memory
        rows = [(f"trained parameters, {kind}", f"{number:,}") for kind, number in counter.trained.items()]
        rows.append(("LoRA on", ", ".join(counter.targets)))
        rows += [(f"{way} a round", _size(getattr(counter.bytes, way))) for way in ("upload", "download")]
        rows += [(f"memory: {part}", _size(getattr(memory, part))) for part in (*MEMORY_PARTS, "total")]
        return rows

    def _flux_rows(self) -> list[tuple[str, str]]:
        counter, experts = self.counter, self.counter.experts
        each = experts.parameters_each * 4
        every = experts.number * experts.bytes_each["dense"]
        return [
            ("trained parameters of a tuned expert", f"{experts.parameters_each:,}"),
            ("upload a round, each tuned expert", _size(each)),
            ("download, first visit: all routed experts", _size(every)),
            ("download, later: each expert changed since", _size(experts.bytes_each["dense"])),
            ("memory: weights but the routed experts'", _size(counter.other_bytes)),
            ("memory: each tuned expert", _size(experts.tuned_bytes_each)),
            ("memory: activations, beside one tuned", _size(counter.tuned_activations(1))),
            ("memory: activations, beside all tuned", _size(counter.tuned_activations(experts.number))),
            ("memory: profile of every expert", _size(counter.profile)),
        ]

    def _fit_table(self) -> Table:
        title = f"What fits in {self.settings.memory}"
        if self.settings.is_by_slots:
            return self._slot_table(title)
        table = _table(title, "as asked for", "total", "fits", "settings of run")
        table.columns[3].justify = "left"
        for fit in self.fits:
            table.add_row(fit.what, _size(fit.total), _answer(fit), fit.settings)
        if self.changes:
            table.add_section()
        for fit in self.changes:
            table.add_row(fit.what, _size(fit.total), _answer(fit), fit.settings)
        if not self.is_possible:
            table.caption = "nothing of this fits; it takes more memory, a smaller model or shorter examples"
        if self.largest_batch is not None:
            table.caption = f"the largest batch that fits so has about {self.largest_batch:,} examples"
        return table

    def _slot_table(self, title: str) -> Table:
        table = _table(
            title, "frozen experts", "the others", "tuned", "a layer", "slots frozen", "total", "fits"
        )
        table.columns[1].justify = "left"
        memory = parse_memory(self.settings.memory)
        layers = self.counter.experts.num_layers
        last = None
        for slot in self.slots:
            if last not in (None, slot.precision):
                table.add_section()
            last = slot.precision
            tuned, each = ("none: too big", "") if slot.num_tuned is None else _tuned(slot.num_tuned, layers)
            kept = "kept" if slot.merged_per_layer is None else f"merged into {slot.merged_per_layer} a layer"
            precision = dtype_of(slot.precision, self.settings)
            answer = _slot_answer(slot, memory)
            table.add_row(precision, kept, tuned, each, f"{slot.num_frozen:,}", _size(slot.total), answer)
        table.caption = _slot_advice(self.slots)
        return table

    def as_json(self) -> dict[str, Any]:
        """The same as plain data, in bytes."""
        counter, stored = self.counter, self.source.stored
        method: dict[str, Any] = {}
        if not self.settings.is_by_slots:
            memory = asdict(counter.memory) | {"total": counter.memory.total}
            totals = {name: total_bytes(counter, name) for name in PRECISIONS}
            method = {
                "trained": counter.trained,
                "lora_targets": list(counter.targets),
                "bytes_per_round": asdict(counter.bytes),
                "memory": memory,
                "total_by_precision": {name: total for name, total in totals.items() if total is not None},
            }
        return {
            "model": self.source.name,
            "origin": self.source.origin,
            "stored": None if stored is None else stored.values_by_dtype,
            "settings": {
                item.name: _plain(getattr(self.settings, item.name)) for item in fields(PlanSettings)
            },
            "parameters": counter.parameters,
            "experts": asdict(counter.experts) | {"tuned_bytes_each": counter.experts.tuned_bytes_each},
            **method,
            "fits": [asdict(fit) for fit in (*self.fits, *self.changes)],
            "slots": [asdict(slot) | {"settings": slot.settings} for slot in self.slots],
            "largest_batch": self.largest_batch,
            "is_possible": self.is_possible,
        }


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _table(title: str, *columns: str) -> Table:
    table = Table(*columns, title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _size(size: float) -> str:
    """In GB from a gigabyte on, else in MB."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB"


def _answer(fit: Fit) -> str:
    return ("tight" if fit.is_tight else "yes") if fit.fits else "no"


def _slot_answer(slot: SlotFit, memory: int) -> str:
    if slot.num_tuned and not slot.fits:
        return "no, the profile does not"
    if slot.fits and slot.not_in_run:
        return "not in run"
    if not slot.fits:
        return "no"
    return "tight" if is_tight(max(slot.total, slot.profile), memory) else "yes"


def _slot_advice(slots: Sequence[SlotFit]) -> str:
    best = best_slots(slots)
    reasons = {slot.not_in_run for slot in slots if slot.fits and slot.not_in_run}
    advice = f"most experts that run can tune: {best.settings}" if best else "nothing that run can do fits"
    return "; ".join([advice, *sorted(reasons)])


def _tuned(number: int, layers: int) -> tuple[str, str]:
    return f"{number:,}", f"{number / layers:.1f}"


def make_plan(name: str, settings: PlanSettings) -> Plan:
    """Count, and fit where a memory is given.

    Raises:
        UserError: there is no such model, or none with experts.
    """
    source = find_source(name)
    counter = Counter(source.config, settings)
    # Before anything else, so that a model without experts is refused here.
    assert counter.experts.number > 0
    plan = Plan(
        source=source,
        settings=settings,
        counter=counter,
        fits=[],
        slots=[],
        changes=[],
        largest_batch=None,
    )
    if not settings.memory:
        return plan
    memory = parse_memory(settings.memory)
    if settings.is_by_slots:
        return replace(plan, slots=slots_that_fit(counter, memory))
    return _fitted(plan, memory)


def _fitted(plan: Plan, memory: int) -> Plan:
    counter, config = plan.counter, plan.source.config
    fits = precisions_that_fit(counter, memory)
    for name, fit in zip(PRECISIONS, fits, strict=False):
        if fit.fits:
            return replace(plan, fits=fits, largest_batch=largest_batch(counter, memory, name))
    return replace(plan, fits=fits, changes=changes(counter, config, memory))
