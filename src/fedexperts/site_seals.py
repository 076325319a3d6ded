"""Seal what a site keeps of a run, and verify it. Imports no torch.

``site.json`` is at a site what ``checkpoint.json`` is at the server. It has the hashes of the configuration
and of the logs, and the names of the files that must be there and hold their hashes themselves. It is written
after the files, at the end of each turn, and before lines are dropped from a log. So a site may be killed at
any moment: what the record names is there.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from fedexperts.client_folder import RECORD, ClientFolder
from fedexperts.errors import UserError
from fedexperts.run_directory import RECEIVED, RunDirectory
from fedexperts.seals import (
    Check,
    check_file,
    check_log,
    damaged,
    read_sealed,
    read_sealed_bytes,
    write_sealed,
)

_KINDS = {"client": str, "files": dict, "present": list, "logs": dict, "forgotten": list}


def is_at_site(run: RunDirectory) -> bool:
    """Return whether the folder is a site's own, which has no server's state and nothing to resume."""
    return run.site.exists() or any(run.client_folders.glob(f"*/{RECEIVED}"))


def refuse_site(run: RunDirectory, what: str) -> None:
    """Raise UserError if the folder is a site's; ``what`` is done to the server's alone."""
    if is_at_site(run):
        raise UserError(
            f"cannot {what} {run.path}: it is a site's folder; {what} the run at its server, which asks the "
            "site again"
        )


def write_site_record(run: RunDirectory, record: Mapping[str, Any]) -> None:
    """Write ``site.json``."""
    write_sealed(run.site, record, is_private=True)


def read_site_record(run: RunDirectory) -> dict[str, Any]:
    """Return what :func:`write_site_record` wrote.

    Raises:
        UserError: it is missing or damaged.
    """
    if not run.site.exists():
        raise UserError(
            f"{run.site} is missing: it was lost, or an earlier version has begun the run, which wrote none"
        )
    record = read_sealed(run.site)
    if not all(isinstance(record.get(key), kind) for key, kind in _KINDS.items()):
        raise damaged(run.site)
    return record


def present_files(run: RunDirectory) -> list[str]:
    """Return the files that are there and hold their hashes themselves, by their path in the run's folder."""
    own = [path for path in (run.environment, run.base, run.result) if path.exists()]
    found = [*own, *(path for name in (RECEIVED, RECORD) for path in run.client_folders.glob(f"*/{name}"))]
    return sorted(str(path.relative_to(run.path)) for path in found)


def check_config(run: RunDirectory, record: Mapping[str, Any]) -> None:
    """Raise UserError unless ``config.toml`` is as it was written."""
    for name, seal in record["files"].items():
        check_file(run.path / name, seal)


def check_logs(run: RunDirectory, record: Mapping[str, Any]) -> None:
    """Raise UserError unless each log begins with what was written until the record was."""
    for name, seal in record["logs"].items():
        check_log(run.path / name, seal)


def checks_of_site(run: RunDirectory) -> Iterator[Check]:
    """Yield the checks of all that a site keeps of a run."""
    yield partial(read_site_record, run)
    try:
        record = read_site_record(run)
    except UserError:
        record = {"files": {}, "present": [], "logs": {}}
    yield partial(check_config, run, record)
    for name in sorted({*present_files(run), *record["present"]}):
        yield _check_of(run, name)
    for name, seal in record["logs"].items():
        yield partial(check_log, run.path / name, seal)


def _check_of(run: RunDirectory, name: str) -> Check:
    path = run.path / name
    if path.name == RECORD:
        return ClientFolder(path.parent).check_all
    return partial(read_sealed_bytes if path.name == RECEIVED else read_sealed, path)
