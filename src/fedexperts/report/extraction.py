"""Make the tables of extraction tests: of one run, and of the methods of a suite."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedexperts.report.grouping import Method, paths_in
from fedexperts.report.tables import Table, make_table, method_table

_TITLES = ("model", "canaries", "extracted", "best similarity", "of others extracted", "best similarity")


def extraction_table(found: Mapping[str, Any]) -> Table:
    """Return a row for each model of ``extraction.json``; "of others" are canaries that nobody trained on."""
    settings = found["settings"]
    caption = (
        f"Extracted: one of {settings['num_generations']} continuations of {settings['prefix_tokens']} tokens"
        f" has a similarity of {found['similarity']} or more to the rest"
    )
    rows = [
        [
            row["model"],
            f"{row['planted']['num_texts']:,}",
            *_figures(row["planted"]),
            *_figures(row["not_planted"]),
        ]
        for row in found["models"]
    ]
    return make_table(caption, _TITLES, rows)


def method_extraction_table(methods: Sequence[Method]) -> list[Table]:
    """Return a row for each method: shares of canaries that its models gave away; no table without a test."""
    caption = "Canaries extracted from clients' own models, the server's and the pretrained one"
    return method_table(caption, methods, paths_in(methods, "extraction"))


def _figures(own: Mapping[str, float]) -> list[str]:
    return [f"{own['num_extracted']:,} ({own['rate']:.0%})", f"{own['mean_best_similarity']:.2f}"]
