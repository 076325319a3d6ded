"""Verify a run directory against the hashes in its ``checkpoint.json``, and go back to a state that is whole.

Imports no torch.
"""

import shlex
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from fedexperts.client_folder import ClientFolder
from fedexperts.errors import UserError
from fedexperts.releases import check_releases
from fedexperts.run_directory import RunDirectory, write_atomically
from fedexperts.seals import Check, check_file, check_log, damaged, hash_of_file, read_sealed
from fedexperts.site_seals import is_at_site, refuse_site

Record = dict[str, Any]
_KINDS = {"round": int, "files": dict, "logs": dict, "kept_rounds": dict}


def committed_files(run: RunDirectory) -> dict[str, str]:
    """Return the hashes of the files that are written once, by their path inside the run's folder."""
    return {path.name: hash_of_file(path) for path in (run.config, run.flower_token) if path.exists()}


def read_record(path: Any) -> Record:
    """Return ``checkpoint.json``, or a state's copy of it.

    Raises:
        UserError: it is missing or damaged.
    """
    record = read_sealed(path)
    if not all(isinstance(record.get(key), kind) for key, kind in _KINDS.items()):
        raise damaged(path)
    return record


def problems_of(run: RunDirectory, record: Record) -> Iterator[str]:
    """Return a sentence for each file of a state that is missing or not as it was written."""
    return told(_checks(run, record))


def told(checks: Iterable[Check]) -> Iterator[str]:
    """Yield a sentence for each check that fails."""
    for check in checks:
        try:
            check()
        except UserError as error:
            yield str(error)


def _checks(run: RunDirectory, record: Record) -> Iterator[Check]:
    for name, seal in record["files"].items():
        yield partial(check_file, run.path / name, seal)
    yield partial(read_sealed, run.base)
    if "num_releases" in record:
        yield partial(check_releases, run.releases, record["num_releases"])
    for name, seal in record["logs"].items():
        yield partial(check_log, run.path / name, seal)
    if has_clients(run):
        for client_id, kept_round in record["kept_rounds"].items():
            yield partial(ClientFolder(run.client_folders / client_id).check, kept_round)


def has_clients(run: RunDirectory) -> bool:
    """Return whether the clients' folders are in the run's: not if they are on the nodes of a deployment."""
    if is_at_site(run):
        return True
    settings = _settings(run)
    if not settings:
        return any(run.client_folders.glob("*"))
    return not settings.get("transport", {}).get("connection", "")


def _settings(run: RunDirectory) -> dict[str, Any]:
    """Return the configuration as plain data; nothing where it cannot be read."""
    try:
        return tomllib.loads(run.config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def check_config_of(run: RunDirectory) -> None:
    """Raise UserError unless ``config.toml`` is as the last state, where that can be read, says."""
    try:
        seals = read_record(run.checkpoint)["files"]
    except UserError:
        return
    if run.config.name in seals:
        check_file(run.config, seals[run.config.name])


def check_resumable(run: RunDirectory) -> None:
    """Raise UserError, with what can be saved, unless all that a resumed run reads is as it was written."""
    problem = first_problem(run)
    if problem:
        raise UserError(f"cannot resume {run.path}: {problem}; {advice(run)}")
    if run.checkpoint.exists():
        _refuse_forgotten(run, read_record(run.checkpoint), "resume")


def _refuse_forgotten(run: RunDirectory, record: Record, what: str) -> None:
    if record.get("forgotten"):
        named = ", ".join(record["forgotten"])
        raise UserError(
            f"cannot {what} {run.path}: {named} has been forgotten, and with it the tensors to go on from"
        )


def first_problem(run: RunDirectory) -> str:
    """Return what is wrong with the state that a run would be resumed from, or nothing."""
    try:
        if run.checkpoint.exists():
            return next(problems_of(run, read_record(run.checkpoint)), "")
        refuse_lost_checkpoint(run)
        return ""
    except UserError as error:
        return str(error)


def refuse_lost_checkpoint(run: RunDirectory) -> None:
    """Raise UserError if rounds have counted, so that a missing ``checkpoint.json`` is a loss."""
    if any(run.kept_rounds()) or any(path.exists() for path in run.log_hashes):
        raise UserError(f"{run.checkpoint} is missing")


def advice(run: RunDirectory) -> str:
    """Say what can be saved of a run whose last state is not whole."""
    whole = whole_rounds(run)
    if whole:
        command = f"fedexperts rewind {shlex.quote(str(run.path))} --to-round {whole[0]}"
        return f"the state of round {whole[0]} is whole, and this goes back to it: {command}"
    return (
        "no state that is kept is whole: put the file back from a copy, or run the experiment anew; "
        "fedexperts export still gives every model whose own files are whole"
    )


def lost_records(run: RunDirectory, reached: int) -> Iterator[str]:
    """Yield a sentence for each state of the last ``keep_states`` rounds whose record is missing."""
    num_kept = _settings(run).get("keep_states", 1)
    for number in range(reached, max(reached - num_kept, -1), -1):
        path = run.state_record(number)
        if not path.exists() and any(run.state.glob(f"state-round-{number:05d}.*")):
            yield f"{path} is missing"


def whole_rounds(run: RunDirectory) -> list[int]:
    """Return the rounds whose state can be gone back to, the last first."""
    return [number for number in run.kept_rounds() if not problem_of_round(run, number)]


def problem_of_round(run: RunDirectory, round_number: int) -> str:
    """Return what is wrong with the state of a round that is kept, or nothing."""
    try:
        return next(problems_of(run, read_record(run.state_record(round_number))), "")
    except UserError as error:
        return str(error)


def rewind(run: RunDirectory, round_number: int) -> None:
    """Make the state of ``round_number`` the one to resume from; the result of a finished run is deleted.

    Raises:
        UserError: the state is not kept, is not whole, or another process runs the run; or it is a site's.
    """
    refuse_site(run, "rewind")
    with run.claim(resume=True), run.lock():
        kept = run.kept_rounds()
        if round_number not in kept:
            told = ", ".join(map(str, sorted(kept))) or "none"
            raise UserError(
                f"cannot go back to round {round_number}: the states that {run.path} keeps are of "
                f"rounds {told} (keep_states says how many stay)"
            )
        problem = problem_of_round(run, round_number)
        if problem:
            raise UserError(f"cannot go back to round {round_number}: {problem}")
        _refuse_forgotten(run, read_record(run.state_record(round_number)), "rewind")
        run.result.unlink(missing_ok=True)
        write_atomically(run.checkpoint, run.state_record(round_number).read_bytes())


def drop_states(run: RunDirectory, last_round: int, keep_states: int) -> None:
    """Delete the states after ``last_round``, and those before it but the last ``keep_states - 1``.

    Files that a kept state names stay: uploads under way, and older states that these began from.
    """
    kept = [number for number in run.kept_rounds() if number <= last_round][:keep_states]
    ends = tuple(f"-round-{number:05d}" for number in kept)
    named = {run.path / name for number in kept for name in _files_of(run, number)}
    # Records first: a crash in between leaves files that nothing names, and no state without its files.
    files = sorted(run.state.glob("*-round-*"), key=lambda path: path.suffix != ".json")
    for path in (*files, *run.under_way.glob("*")):
        is_kept = path.parent == run.state and path.stem.endswith(ends)
        if not is_kept and path not in named:
            path.unlink()


def _files_of(run: RunDirectory, round_number: int) -> list[str]:
    """Return the names of the files of a state that is kept; none if its record is damaged."""
    try:
        return list(read_record(run.state_record(round_number))["files"])
    except UserError:
        return []


def cut_logs(run: RunDirectory, logs: Mapping[str, Record]) -> None:
    """Drop from the logs all that came after the state whose seals are ``logs``."""
    for path in run.log_hashes:
        due = int(logs[path.name]["num_bytes"]) if path.name in logs else 0
        if path.exists() and path.stat().st_size > due:
            with path.open("rb") as file:
                write_atomically(path, file.read(due))
