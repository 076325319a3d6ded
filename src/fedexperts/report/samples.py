"""The section "Sample answers": what clients' own models answered, within their task and outside it."""

from collections.abc import Iterator, Sequence

from fedexperts.errors import UserError
from fedexperts.report.grouping import Method
from fedexperts.report.reading import Run
from fedexperts.report.tables import Table, make_table
from fedexperts.run_directory import RunDirectory, read_json

_ORIGINS = {"predictions": "own test split", "off_task": "outside its task"}
"""Origins of prompts, by their part of a file of answers."""


def sample_tables(methods: Sequence[Method]) -> list[Table]:
    """A table for the first seed of each method: prompts, the data's responses, and the answers.

    Raises:
        UserError: no run has kept any.
    """
    tables = [table for method in methods for table in _table(method)]
    if not tables:
        raise UserError(
            "--samples has no effect: no run has kept answers in clients/*/predictions.json; set "
            "evaluation.num_predictions above 0 and keep rougeL or exact_match in evaluation.metrics"
        )
    return tables


def _table(method: Method) -> list[Table]:
    run = method.runs[0]
    rows = list(_answers(run))
    caption = f"{method.label}, seed {run.seed}: answers of clients' own models after local steps"
    titles = ["client", "asked from", "prompt", "response in the data", "answer"]
    return [make_table(caption, titles, rows, num_text=len(titles), is_folded=True)] if rows else []


def _answers(run: Run) -> Iterator[list[str]]:
    folder = RunDirectory(run.folder).client_folders if run.folder else None
    for client in run.result["clients"] if folder else ():
        path = folder / client / "predictions.json"
        answers = read_json(path) if path.is_file() else {}
        for part, origin in _ORIGINS.items():
            for kept in answers.get(part, ()):
                texts = (str(kept.get(name, "–")) for name in ("prompt", "response", "prediction"))
                yield [client, origin, *texts]
