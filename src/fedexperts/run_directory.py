"""What a run leaves on disk: names, atomic writing, and reading. Imports no torch.

========================  ==========================================================================
``config.toml``           the resolved configuration, the only record of what ran
``environment.json``      versions, commit, hardware, threads
``base.json``             figures of the untouched model
``rounds.jsonl``          one line a round
``clients.jsonl``         one line for each client and round
``checkpoint.json``       the last round that counts; written last, so that it is the moment of commit
``state/``                the server's tensors
``clients/<id>/``         what one client keeps: personal tensors by round, adapted tensors, predictions
``result.json``           the figures; its presence says that the run is finished
========================  ==========================================================================
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedexperts.errors import UserError

SCHEMA_VERSION = 1
"""Version of ``result.json``, ``rounds.jsonl`` and ``clients.jsonl``; see docs/run_directory.md."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write all of ``content`` or nothing: a reader, or a crash, sees the old file or the new one.

    Raises:
        OSError: the disk is full, for one; the old file is then untouched and nothing else is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write ``value`` atomically as indented JSON; NaN and infinity become null."""
    text = json.dumps(_finite(value), indent=1, sort_keys=False, allow_nan=False)
    write_atomically(path, text.encode() + b"\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The object in ``path``.

    Raises:
        UserError: the file is missing, or is not a JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except ValueError as error:
        raise UserError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def append_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Append one JSON line for each record."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(_finite(record), allow_nan=False) + "\n" for record in records)
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; none if it does not exist. A half-written last line is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def keep_lines_until(path: Path, round: int) -> None:
    """Drop the records of rounds after ``round``: what a crash left behind of a round that does not count."""
    records = read_lines(path)
    kept = [json.dumps(record) + "\n" for record in records if record["round"] <= round]
    if path.exists():
        write_atomically(path, "".join(kept).encode())


class RunDirectory:
    """Paths inside one run's folder."""

    def __init__(self, path: Path) -> None:
        """Nothing is created or read."""
        self.path = path
        self.config = path / "config.toml"
        self.environment = path / "environment.json"
        self.base = path / "base.json"
        self.rounds = path / "rounds.jsonl"
        self.clients = path / "clients.jsonl"
        self.checkpoint = path / "checkpoint.json"
        self.result = path / "result.json"
        self.state = path / "state"
        self.client_folders = path / "clients"

    def create(self, *, resume: bool) -> None:
        """Make the folder for a new run, or check that there is one to resume.

        Raises:
            UserError: the folder is in use (new run), or holds no run (resume).
        """
        if resume and not self.config.exists():
            raise UserError(f"cannot resume {self.path}: it holds no run (no config.toml)")
        # A process killed before config.toml was whole leaves no more than a lock and a partial file.
        visible = (path for path in self.path.glob("*") if not path.name.startswith("."))
        if not resume and any(visible):
            raise UserError(
                f"output folder {self.path} is already in use: choose another with --to, "
                f"or continue it with --resume {self.path}"
            )
        self.path.mkdir(parents=True, exist_ok=True)

    def remove_unstarted(self) -> None:
        """Take away a folder in which nothing has begun, so that a corrected run can have its name."""
        own = {path.name for path in (self.config, self.environment)} | {".lock"}
        if {path.name for path in self.path.iterdir()} <= own:
            for name in own:
                (self.path / name).unlink(missing_ok=True)
            self.path.rmdir()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process; the operating system releases the lock however the process ends.

        Raises:
            UserError: another process is running it.
        """
        import fcntl

        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"run directory {self.path} is in use by another process") from None
            yield
