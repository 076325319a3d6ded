"""Tables of the benchmarks of a whole job: local steps, end to end, memory."""

from collections.abc import Mapping

from benchmarks.matmul_roof import SQUARE
from benchmarks.tables import Figures, Table, milliseconds, percent, spread_texts


def local_steps(figures: Figures) -> list[Table]:
    """Of ``benchmarks/local_steps.py``."""
    names = {
        "ours": "fedexperts, local steps on ready batches",
        "ours_with_data": "fedexperts, reading, encoding and drawing included",
        "flex": "fedexperts, FLEx on the same batches (grafts and gates too)",
        "trainer": "transformers Trainer on the same batches",
    }
    rate = figures["tokens_per_second"]
    rows = [(title, *spread_texts(rate[name], "{:,.0f}")) for name, title in names.items()]
    title = (
        f"Tokens per second ({figures['num_steps']} steps of {figures['batch_size']} examples, "
        f"{figures['num_tokens']:,} tokens)"
    )
    ratio = (
        "Trainer's seconds over ours, pair by pair",
        *spread_texts(figures["trainer_over_ours"], "{:.2f}"),
    )
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
            milliseconds(roof["seconds_per_step"]["square"]),
            f"{figures['share_of_square_roof']:.0%}",
        ),
        (
            "the step's own products, one by one",
            f"{own_rate / 1e9:.0f}",
            milliseconds(roof["seconds_per_step"]["own_shapes"]),
            f"{figures['share_of_own_shapes_roof']:.0%}",
        ),
        (
            "fedexperts, the whole step",
            f"{roof['flops_per_step'] / measured / 1e9:.0f}",
            milliseconds(measured),
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
            percent(shares[part]["forward"]),
            percent(shares[part]["backward"]),
            percent(shares[part]["forward"] + shares[part]["backward"]),
        )
        for part in order
    ]
    operations = sum(part["operations"] for part in shares.values())
    rows.append(("all tensor operations together", "", "", percent(operations)))
    rows.append(("Python and dispatch around them", "", "", percent(1 - operations)))
    return Table(
        title="Where the time of our step goes (under torch's profiler, which slows small operations)",
        columns=("part", "forward", "backward", "together"),
        rows=tuple(rows),
    )


def end_to_end(figures: Figures) -> list[Table]:
    """Of ``benchmarks/end_to_end.py``."""
    names = {
        "ours": "fedexperts",
        "workers": f"fedexperts, {figures.get('workers')} workers with one thread each",
        "recipe": "usual recipe: a new SFTTrainer for each client and round",
        "kinder": "the same, with every example tokenized once beforehand",
    }
    rows = [
        (names[name], *spread_texts(seconds, "{:.2f}"))
        for name, seconds in figures["seconds_of_rounds"].items()
    ]
    rows += [
        (
            f"{short}, loading model and data included",
            *spread_texts(figures["seconds_with_loading"][name], "{:.2f}"),
        )
        for name, short in (("ours", "fedexperts"), ("workers", names["workers"]), ("recipe", "usual recipe"))
        if name in figures["seconds_with_loading"]
    ]
    ratios = {
        "recipe_over_ours": "usual recipe over ours, pair by pair",
        "kinder_over_ours": "tokenized beforehand over ours",
        "recipe_over_workers": "usual recipe over ours with workers",
        "ours_over_workers": "ours in one process over ours with workers",
        "recipe_over_ours_with_loading": "usual recipe over ours, loading included",
    }
    rows += [
        (title, *spread_texts(figures[name], "{:.2f}")) for name, title in ratios.items() if name in figures
    ]
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
        rows=tuple((name, f"{value:.2f}", percent(value / total)) for name, value in phases.items()),
    )


def memory(figures: Figures) -> list[Table]:
    """Of ``benchmarks/memory.py``."""
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
