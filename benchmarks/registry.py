"""Registry of benchmarks: how each is measured, shown, and tried out quickly."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import (
    client_memory,
    clock,
    clustering,
    compaction,
    job_tables,
    local_steps,
    many_clients,
    memory,
    memory_plan,
    merge_error,
    quantization,
    selection,
    server_memory,
    slots,
    transports,
    utility,
    workers,
)
from benchmarks.tables import Table, machine_text, markdown, marks, put_into


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One benchmark."""

    measure: Callable[..., dict[str, Any]]
    """Takes ``model.name`` and gives figures ready for JSON."""
    tables: Callable[[Mapping[str, Any]], list[Table]]
    """Figures to tables."""
    quick: Mapping[str, Any] = field(default_factory=dict)
    """Just enough to see that it works; the figures mean nothing."""


def _end_to_end(model: str, **options: Any) -> dict[str, Any]:
    """TRL comes with the extra ``bench`` alone; tables can be made without it."""
    from benchmarks import end_to_end

    return end_to_end.measure(model, **options)


BENCHMARKS: Mapping[str, Benchmark] = {
    "local_steps": Benchmark(
        measure=local_steps.measure, tables=job_tables.local_steps, quick={"repeats": 1, "num_steps": 2}
    ),
    "end_to_end": Benchmark(
        measure=_end_to_end, tables=job_tables.end_to_end, quick={"repeats": 1, "num_local_steps": 2}
    ),
    "memory": Benchmark(measure=memory.measure, tables=job_tables.memory, quick={"repeats": 1, "many": 12}),
    "workers": Benchmark(
        measure=workers.measure,
        tables=workers.tables,
        quick={"repeats": 1, "num_local_steps": 1, "sizes": workers.QUICK_SIZES},
    ),
    "client_memory": Benchmark(
        measure=client_memory.measure, tables=client_memory.tables, quick=client_memory.QUICK
    ),
    "server_memory": Benchmark(
        measure=server_memory.measure,
        tables=server_memory.tables,
        quick={"repeats": 1, "numbers": (4,), "sizes": (1.0,)},
    ),
    "clock": Benchmark(
        measure=clock.measure,
        tables=clock.tables,
        quick={"repeats": 1, "copied_bytes": 2**20, "num_local_steps": 1, "rounds": 1},
    ),
    "memory_plan": Benchmark(measure=memory_plan.measure, tables=memory_plan.tables, quick={"cases": 1}),
    "compaction": Benchmark(
        measure=compaction.measure,
        tables=compaction.tables,
        quick={"repeats": 1, "sizes": compaction.QUICK_SIZES},
    ),
    "quantization": Benchmark(
        measure=quantization.measure,
        tables=quantization.tables,
        quick={"repeats": 1, "num_steps": 1, "num_batches": 1, "length": 8},
    ),
    "selection": Benchmark(
        measure=selection.measure, tables=selection.tables, quick={"repeats": 1, **selection.QUICK}
    ),
    "clustering": Benchmark(
        measure=clustering.measure,
        tables=clustering.tables,
        quick={"repeats": 1, "shapes": clustering.SHAPES[:1]},
    ),
    "many_clients": Benchmark(
        measure=many_clients.measure, tables=many_clients.tables, quick={"sizes": (11, 12)}
    ),
    "merge_error": Benchmark(
        measure=merge_error.measure, tables=merge_error.tables, quick={"seeds": 1, "num_examples": 8}
    ),
    "utility": Benchmark(
        measure=utility.measure,
        tables=utility.tables,
        quick={"seeds": 1, "num_examples": 2, "repeats": 1, "pairs": (1,)},
    ),
    "transports": Benchmark(
        measure=transports.measure, tables=transports.tables, quick={"rounds": 1, "num_local_steps": 1}
    ),
    "slots": Benchmark(
        measure=slots.measure, tables=slots.tables, quick={"repeats": 1, "num_steps": 1, "length": 8}
    ),
}


def write_into(path: Path, name: str, record: Mapping[str, Any]) -> bool:
    """Put a benchmark's tables, and their machine, into the document at ``path`` if it has their marks."""
    document = path.read_text()
    if marks(name)[0] not in document:
        return False
    path.write_text(put_into(document, name, document_text(name, record)))
    return True


def document_text(name: str, record: Mapping[str, Any]) -> str:
    """What the document says of one record, as ``benchmarks/results/<name>.json`` holds it."""
    return f"{machine_text(record['machine'])}\n\n{markdown(BENCHMARKS[name].tables(record['figures']))}"
