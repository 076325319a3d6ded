"""A run that has not finished: its rounds so far."""

from pathlib import Path

from fedexperts.report.quantities import numbers_of, text, title_of
from fedexperts.report.reading import progress_of
from fedexperts.report.tables import Table, make_table
from fedexperts.run_directory import RunDirectory, read_lines

_ALWAYS = ("train_loss", "upload_bytes", "download_bytes", "num_failed", "seconds.total")


def rounds_so_far(directory: Path) -> Table | None:
    """Return the rounds of a run without result, one a row; None where ``directory`` holds none.

    Only numbers that some round has become columns: evaluations come every ``evaluation.every`` rounds.

    Raises:
        UserError: a whole line of ``rounds.jsonl`` is not JSON.
    """
    run = RunDirectory(directory)
    lines = [] if run.result.exists() else read_lines(run.rounds)
    if not lines:
        return None
    rounds = [numbers_of(line) for line in lines]
    evaluated = sorted({name for one in rounds for name in one if name.startswith("evaluation.")})
    paths = [*_ALWAYS, *evaluated]
    rows = [
        [str(line["round"]), *(text(path, one.get(path)) for path in paths)]
        for line, one in zip(lines, rounds, strict=True)
    ]
    return make_table(f"Rounds so far ({progress_of(directory)})", ["round", *map(title_of, paths)], rows)
