"""Figures to tables, in the terminal and in a document; the same figures always give the same text."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.matmul_roof import SQUARE

Figures = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A title, the heads of the columns, and rows of text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables_of(name: str, figures: Figures) -> list[Table]:
    """The tables of one benchmark's ``figures``."""
    return _TABLES[name](figures)


def show(tables: Sequence[Table], console: Console) -> None:
    """Print them."""
    for table in tables:
        shown = RichTable(title=table.title, title_justify="left")
        for position, column in enumerate(table.columns):
            shown.add_column(column, justify="left" if position == 0 else "right")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)


def markdown(tables: Sequence[Table]) -> str:
    """The same as Markdown."""
    blocks = []
    for table in tables:
        lines = [table.columns, ("---", *["---:"] * (len(table.columns) - 1)), *table.rows]
        blocks.append(f"**{table.title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(blocks)


def put_into(document: str, name: str, text: str) -> str:
    """``document`` with ``text`` between the marks of ``name``."""
    begin, end = marks(name)
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    assert pattern.search(document), f"the document has no marks {begin} and {end}"
    return pattern.sub(lambda _: f"{begin}\n\n{text}\n\n{end}", document)


def marks(name: str) -> tuple[str, str]:
    """Where the figures of ``name`` begin and end in a document."""
    return f"<!-- figures of {name}: by python -m benchmarks -->", f"<!-- end of {name} -->"


def write_into(path: Path, name: str, record: Mapping[str, Any]) -> None:
    """Put a benchmark's tables, and what they were measured on, into the document at ``path``."""
    path.write_text(put_into(path.read_text(), name, document_text(name, record)))


def document_text(name: str, record: Mapping[str, Any]) -> str:
    """What the document says of one record, as ``benchmarks/results/<name>.json`` holds it."""
    return f"{_machine(record['machine'])}\n\n{markdown(tables_of(name, record['figures']))}"


def _machine(machine: Mapping[str, Any]) -> str:
    packages = ", ".join(
        f"{name} {machine['packages'][name]}" for name in ("torch", "transformers", "peft", "trl")
    )
    return (
        f"{machine['processor']}, {machine['num_processors']} processors, {machine['threads']} threads, "
        f"{machine['memory_bytes'] / 1e9:.0f} GB; {packages}; commit {machine['commit'][:8]}; load average "
        f"beforehand {machine['load_average_before']:.2f}."
    )


def _local_steps(figures: Figures) -> list[Table]:
    names = {
        "ours": "fedexperts, local steps on ready batches",
        "ours_with_data": "fedexperts, reading, encoding and drawing included",
        "flex": "fedexperts, FLEx on the same batches (grafts and gates too)",
        "trainer": "transformers Trainer on the same batches",
    }
    rate = figures["tokens_per_second"]
    rows = [(title, *_spread(rate[name], "{:,.0f}")) for name, title in names.items()]
    title = (
        f"Tokens per second ({figures['num_steps']} steps of {figures['batch_size']} examples, "
        f"{figures['num_tokens']:,} tokens)"
    )
    ratio = ("Trainer's seconds over ours, pair by pair", *_spread(figures["trainer_over_ours"], "{:.2f}"))
    return [
        Table(title=title, columns=("", "median", "least", "most"), rows=(*rows, ratio)),
        _roof(figures),
        _shares(figures["shares"]),
    ]


def _roof(figures: Figures) -> Table:
    roof = figures["roof"]
    own_rate = roof["flops_per_step"] / roof["seconds_per_step"]["own_shapes"]
    measured = figures["seconds"]["ours"]["median"] / figures["num_steps"]
    rows = (
        (
            f"one product of {SQUARE} x {SQUARE} matrices",
            f"{roof['square_flops_per_second'] / 1e9:.0f}",
            _milliseconds(roof["seconds_per_step"]["square"]),
            f"{figures['share_of_square_roof']:.0%}",
        ),
        (
            "the step's own products, one by one",
            f"{own_rate / 1e9:.0f}",
            _milliseconds(roof["seconds_per_step"]["own_shapes"]),
            f"{figures['share_of_own_shapes_roof']:.0%}",
        ),
        (
            "fedexperts, the whole step",
            f"{roof['flops_per_step'] / measured / 1e9:.0f}",
            _milliseconds(measured),
            "100%",
        ),
    )
    return Table(
        title=f"Matmul roof for the {roof['flops_per_step'] / 1e9:.2f} GFLOP of a step, forward and backward",
        columns=("", "GFLOP/s", "ms per step", "share of our step"),
        rows=rows,
    )


def _shares(shares: Mapping[str, Mapping[str, float]]) -> Table:
    order = sorted(shares, key=lambda part: -(shares[part]["forward"] + shares[part]["backward"]))
    rows = [
        (
            part,
            _percent(shares[part]["forward"]),
            _percent(shares[part]["backward"]),
            _percent(shares[part]["forward"] + shares[part]["backward"]),
        )
        for part in order
    ]
    operations = sum(part["operations"] for part in shares.values())
    rows.append(("all tensor operations together", "", "", _percent(operations)))
    rows.append(("Python and dispatch around them", "", "", _percent(1 - operations)))
    return Table(
        title="Where the time of our step goes (under torch's profiler, which slows small operations)",
        columns=("part", "forward", "backward", "together"),
        rows=tuple(rows),
    )


def _end_to_end(figures: Figures) -> list[Table]:
    names = {
        "ours": "fedexperts",
        "recipe": "usual recipe: a new SFTTrainer for each client and round",
        "kinder": "the same, with every example tokenized once beforehand",
    }
    rows = [(title, *_spread(figures["seconds_of_rounds"][name], "{:.2f}")) for name, title in names.items()]
    rows += [
        (
            f"{title}, loading model and data included",
            *_spread(figures["seconds_with_loading"][name], "{:.2f}"),
        )
        for name, title in (("ours", "fedexperts"), ("recipe", "usual recipe"))
    ]
    ratios = {
        "recipe_over_ours": "usual recipe over ours, pair by pair",
        "kinder_over_ours": "tokenized beforehand over ours",
        "recipe_over_ours_with_loading": "usual recipe over ours, loading included",
    }
    rows += [(title, *_spread(figures[name], "{:.2f}")) for name, title in ratios.items()]
    title = (
        f"Seconds of {figures['rounds']} rounds of FedAvg on LoRA over {figures['clients']} clients, "
        f"{figures['num_local_steps']} local steps of {figures['batch_size']} examples"
    )
    return [
        Table(title=title, columns=("", "median", "least", "most"), rows=tuple(rows)),
        _losses(figures["losses"], figures["loss_apart"]),
        *(_phases(names[name], figures["phases"][name]) for name in ("ours", "recipe")),
    ]


def _losses(losses: Mapping[str, Mapping[str, float]], apart: Mapping[str, float]) -> Table:
    rows = (
        ("before the first round", "", f"{losses['start']['held_out']:.4f}"),
        ("fedexperts", f"{losses['ours']['last_round']:.4f}", f"{losses['ours']['held_out']:.4f}"),
        ("usual recipe", f"{losses['recipe']['last_round']:.4f}", f"{losses['recipe']['held_out']:.4f}"),
        ("difference", f"{apart['last_round']:+.1%}", f"{apart['held_out']:+.1%}"),
    )
    return Table(
        title="Losses, in nats: the same examples, batched differently",
        columns=("", "training, last round", "global model, held-out examples"),
        rows=rows,
    )


def _phases(title: str, phases: Mapping[str, float]) -> Table:
    total = sum(phases.values())
    return Table(
        title=f"Where the time goes: {title}",
        columns=("phase", "seconds", "share"),
        rows=tuple((name, f"{value:.2f}", _percent(value / total)) for name, value in phases.items()),
    )


def _memory(figures: Figures) -> list[Table]:
    columns = ("", f"{figures['few']} clients", f"{figures['many']} clients")
    names = {"loaded": "model and data loaded, MB", "peak": "peak of the whole run, MB", "seconds": "seconds"}
    rows = [
        (
            title,
            *(
                f"{figures['kinds'][kind][str(number)]['median']:.0f}"
                for number in (figures["few"], figures["many"])
            ),
        )
        for kind, title in names.items()
    ]
    rows.append(("peak, many clients over few", "", f"{figures['many_over_few']:.3f}"))
    return [
        Table(title="Peak resident memory of FLEx, as many turns in all", columns=columns, rows=tuple(rows))
    ]


def _spread(values: Mapping[str, Any], form: str) -> tuple[str, str, str]:
    return form.format(values["median"]), form.format(values["min"]), form.format(values["max"])


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"


def _percent(share: float) -> str:
    return f"{share:.1%}"


_TABLES: Mapping[str, Callable[[Figures], list[Table]]] = {
    "local_steps": _local_steps,
    "end_to_end": _end_to_end,
    "memory": _memory,
}
