"""Write a report from a run or suite directory."""

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from fedexperts.errors import UserError
from fedexperts.report.markdown import markdown
from fedexperts.report.page import page
from fedexperts.report.pictures import pictures as figures_as_svg
from fedexperts.report.reading import read_suite
from fedexperts.report.sections import Content, content_of
from fedexperts.report.tables import as_csv
from fedexperts.run_directory import write_atomically


def write_report(
    directory: Path,
    *,
    against: str = "",
    has_samples: bool = False,
    csv: Path | None = None,
    pictures: Path | None = None,
) -> tuple[Path, Path]:
    """Write ``report.html`` and ``REPORT.md`` into a run or suite directory, and return both paths.

    Everything is read from the run directories, so that the same directories give the same bytes. Runs of a
    suite that have not finished are listed with how far they came.

    Args:
        directory: of one run or of a suite.
        against: the method that the others are compared with, as in :func:`content_of`.
        has_samples: whether to show the answers that runs have kept.
        csv: a folder for the numbers of every picture; None for no files.
        pictures: a folder for every figure as an SVG; None for no files.

    Raises:
        UserError: ``directory`` is neither, nothing in it has finished, a result is of another schema
            version, or ``against`` or ``has_samples`` finds nothing.
    """
    directory = Path(directory)
    content = content_of(read_suite(directory), against=against, has_samples=has_samples)
    paths = directory / "report.html", directory / "REPORT.md"
    for path, text in zip(paths, (page(content), markdown(content)), strict=True):
        write_text(path, text)
    beside = [numbers_of_pictures(content, csv)] if csv else []
    beside += [figures_as_svg(content, pictures)] if pictures else []
    for path, text in chain.from_iterable(beside):
        write_text(path, text)
    return paths


def numbers_of_pictures(content: Content, folder: Path) -> Iterator[tuple[Path, str]]:
    """The path and text of a file of comma-separated numbers for every picture of ``content``."""
    for section in content.sections:
        panels = [(figure.title, panel) for figure in section.figures for panel in figure.panels]
        for number, (title, panel) in enumerate(panels, start=1):
            words = re.findall("[a-z0-9]+", f"{title} {panel.title}".lower())
            name = f"{section.title.lower().replace(' ', '_')}-{number}-{'-'.join(words)[:60]}".rstrip("-")
            yield folder / f"{name}.csv", as_csv(panel.table)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` atomically; raise UserError where that cannot be done."""
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
