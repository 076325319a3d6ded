"""Say of a run directory which files are not as they were written, and what to do. Imports no torch."""

import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fedexperts.client_folder import RECORD, ClientFolder
from fedexperts.errors import UserError
from fedexperts.integrity import (
    advice,
    first_problem,
    has_clients,
    lost_records,
    problem_of_round,
    read_record,
    told,
)
from fedexperts.run_directory import RunDirectory
from fedexperts.seals import Check, read_sealed
from fedexperts.site_seals import checks_of_site, is_at_site


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Health of a run's files."""

    problems: tuple[str, ...]
    """A sentence for each file that is missing or damaged."""
    to_do: str = ""
    """Advice about them."""


def examine(folder: Path) -> Diagnosis:
    """Verify every hash in a run directory, or in a run's folder at a site or on a Flower node.

    Raises:
        UserError: the folder is neither.
    """
    run = RunDirectory(folder)
    if is_at_site(run):
        problems = tuple(dict.fromkeys(told(checks_of_site(run))))
        return Diagnosis(problems=problems, to_do=_AT_SITE if problems else "")
    if not (run.config.exists() or run.checkpoint.exists()):
        return _examine_node(folder)
    made_last = list(told(_of_made_last(run)))
    reached, state = _reached(run), first_problem(run)
    older = [*_of_older_states(run, reached), *lost_records(run, reached)]
    known = [*([state] if state else []), *made_last, *older]
    versions = [one for one in told(_of_versions(run, reached)) if not any(one in more for more in known)]
    problems = tuple(dict.fromkeys([*known, *versions]))
    return Diagnosis(problems=problems, to_do=_to_do(run, state, bool(made_last)) if problems else "")


def _of_made_last(run: RunDirectory) -> Iterator[Check]:
    """Checks of the files that a resumed run makes anew."""
    for path in (run.environment, run.result):
        if path.exists() or (path == run.environment and run.checkpoint.exists()):
            yield partial(read_sealed, path)
    if has_clients(run):
        for path in sorted(run.client_folders.glob(f"*/{RECORD}")):
            yield ClientFolder(path.parent).check_made_last


def _of_versions(run: RunDirectory, reached: int) -> Iterator[Check]:
    """Checks of clients' tensors, also where no state that is kept needs them any more."""
    if has_clients(run):
        for path in sorted(run.client_folders.glob(f"*/{RECORD}")):
            with suppress(UserError):  # a damaged record is told already
                yield from ClientFolder(path.parent).check_versions(reached)


def _of_older_states(run: RunDirectory, reached: int) -> Iterator[str]:
    for number in run.kept_rounds():
        problem = problem_of_round(run, number) if number < reached else next(_of_copy(run, number), "")
        if problem and number <= reached:
            yield f"the state of round {number} cannot be gone back to: {problem}"


def _of_copy(run: RunDirectory, number: int) -> Iterator[str]:
    return told([partial(read_record, run.state_record(number))])


def _reached(run: RunDirectory) -> int:
    """Return the round that the run would be resumed from; -1 if nobody can tell."""
    try:
        return int(read_record(run.checkpoint)["round"])
    except UserError:
        return -1


def _to_do(run: RunDirectory, state: str, is_made_last: bool) -> str:
    if state:
        return advice(run)
    if not is_made_last:
        return "nothing: the run can be resumed and reported; only the way back to earlier rounds is lost"
    where = shlex.quote(str(run.path))
    remove = f"delete {shlex.quote(str(run.result))}, then " if run.result.exists() else ""
    return f"{remove}make these files anew, the same bit for bit, with: fedexperts run --resume {where}"


def _examine_node(folder: Path) -> Diagnosis:
    records = sorted([*folder.glob(RECORD), *folder.glob(f"*/{RECORD}")])
    if not records:
        raise UserError(f"{folder} holds no run (no config.toml), and no client's folder (*/{RECORD})")
    problems = tuple(told(ClientFolder(path.parent).check_all for path in records))
    return Diagnosis(problems=problems, to_do=_AT_NODE if problems else "")


_AT_NODE = (
    "put the files back from a copy, or go back with fedexperts rewind on the server: its last states have "
    "versions of their own here"
)
_AT_SITE = (
    "put the files back from a copy; config.toml and received are written anew when the server next asks the "
    "site, and of the last personal tensors there are older versions, which fedexperts rewind on the server "
    "goes back to"
)
