"""Files of a run on disk: names, atomic writing, and reading. Imports no torch.

========================  ==========================================================================
``config.toml``           the resolved configuration, the only record of what ran
``environment.json``      versions, commit, hardware, threads
``base.json``             figures of the untouched model
``rounds.jsonl``          one line a round
``clients.jsonl``         one line for each client and round
``releases.json``         with ``[privacy]``: how often each client was asked, never set back
``checkpoint.json``       the last round that counts; written last, so that it is the moment of commit
``site.json``             at a site, in place of ``checkpoint.json``: what it keeps, with hashes
``state/``                the server's tensors of the last rounds, and copies of their ``checkpoint.json``
``clients/<id>/``         what one client keeps: personal tensors by round, adapted tensors, predictions;
                          at a site also ``received``, the message with the tensors that the server sent last
``result.json``           the figures; its presence says that the run is finished
``.claim``, ``.lock``     lock files; see :meth:`RunDirectory.claim`
========================  ==========================================================================
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from fedexperts.errors import UserError

SCHEMA_VERSION = 3
"""Version of ``result.json``, ``rounds.jsonl`` and ``clients.jsonl``; see docs/run_directory.md."""

SEAL = "sha256"
"""Key of a sealed JSON object: the hash of all its other keys and values; see :mod:`fedexperts.seals`."""
RECEIVED = "received"
"""At a site: the server's last message, in its client's folder."""

CLAIM, LOCK = ".claim", ".lock"
"""Lock files: of the process that was asked for a run or a suite, and of the one that writes a run."""


Content = bytes | Callable[[Path], object]
"""All that goes into a file, or what writes it to the path that it is given."""


def write_atomically(
    path: Path, content: Content, *, is_private: bool = False, syncs_folder: bool = True
) -> None:
    """Write all of ``content`` or nothing: a reader, or a crash, sees the old file or the new one.

    Args:
        path: the file.
        content: all of it.
        is_private: let nobody but the owner read the file, or list its folder.
        syncs_folder: after a loss of power the file is there under its name. Without it that holds once the
            next file is written to the same folder.

    Raises:
        OSError: the disk is full, for one; the old file is then untouched and nothing else is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_private:
        make_private(path.parent)
    partial = path.with_name(f".{path.name}.partial")
    mode = 0o600 if is_private else 0o666
    try:
        with _named_in_errors(path):
            # Made first, so that nobody else can read a private file while it is written.
            with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
                if is_private:
                    os.fchmod(file.fileno(), mode)
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                if not callable(content):
                    file.write(content)
            if callable(content):
                content(partial)
            # Opened again: what writes to a path may put another file there, as safetensors does.
            with partial.open("rb+") as file:
                if stat.S_IMODE(os.fstat(file.fileno()).st_mode) != mode:
                    os.fchmod(file.fileno(), mode)
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    if syncs_folder:
        _sync_folder(path.parent)


@contextmanager
def _named_in_errors(path: Path) -> Iterator[None]:
    """Give an error of writing the name of the file, which the system does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def make_private(folder: Path) -> None:
    """Let nobody but the owner enter ``folder``, which is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    if stat.S_IMODE(folder.stat().st_mode) != 0o700:
        folder.chmod(0o700)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Mapping[str, Any], *, is_private: bool = False) -> None:
    """Write ``value`` atomically as indented JSON; NaN and infinity become null."""
    write_atomically(path, as_json(value), is_private=is_private)


def as_json(value: Mapping[str, Any]) -> bytes:
    """Return the text that :func:`write_json` writes."""
    return json.dumps(_finite(value), indent=1, sort_keys=False, allow_nan=False).encode() + b"\n"


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
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def append_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Append one JSON line for each record."""
    with _named_in_errors(path), path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(_finite(record), allow_nan=False) + "\n" for record in records)
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; none if it does not exist. A half-written last line is left out.

    Raises:
        UserError: another line is not JSON.
    """
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} line {number} is not JSON: {error}") from None
    return records


class GrowingHash:
    """Hash of a file to which lines are only ever appended; each byte is read once."""

    def __init__(self, path: Path) -> None:
        """Read nothing yet."""
        self._path, self._num_bytes, self._digest = path, 0, hashlib.sha256()

    def seal(self) -> dict[str, Any]:
        """Return number and hash of all bytes that are now in the file."""
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._num_bytes)
                while piece := file.read(1 << 20):
                    self._digest.update(piece)
                    self._num_bytes += len(piece)
        return {"num_bytes": self._num_bytes, SEAL: self._digest.hexdigest()}


def name_at_sites(folder: Path, token: str) -> str:
    """Return the name of a run's folder at its sites, by the server's folder and the run's token."""
    return f"{folder.name}-{token[:8]}"


_STATE_RECORD = re.compile(r"checkpoint-round-(\d+)\.json")


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
        self.site = path / "site.json"
        self.releases = path / "releases.json"
        self.result = path / "result.json"
        self.extraction = path / "extraction.json"
        self.state = path / "state"
        self.under_way = path / "under_way"
        self.client_folders = path / "clients"
        self.flower_token = path / "flower_token"
        self.log_hashes = {path: GrowingHash(path) for path in (self.rounds, self.clients)}

    def name_on_nodes(self) -> str:
        """Return the run's name, unlike any other's, in messages over Flower; empty in process."""
        return self.flower_token.read_text() if self.flower_token.exists() else ""

    def state_record(self, round_number: int) -> Path:
        """Return the copy of ``checkpoint.json`` as that round left it."""
        return self.state / f"checkpoint-round-{round_number:05d}.json"

    def kept_rounds(self) -> list[int]:
        """Return the rounds whose state has a record, the last first."""
        found = (_STATE_RECORD.match(path.name) for path in self.state.glob("checkpoint-round-*.json"))
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def received(self, client_id: str) -> Path:
        """Return the file, at a site, of what the server sent last."""
        return self.client_folders / client_id / RECEIVED

    def check_start(self, *, resume: bool) -> None:
        """Check that a new run may take the folder, or that there is a run to resume.

        Raises:
            UserError: the folder is in use (new run), or holds no run (resume).
        """
        if resume and not self.config.exists():
            raise UserError(f"cannot resume {self.path}: it holds no run (no config.toml)")
        if not resume and is_in_use(self.path):
            raise UserError(
                f"output folder {self.path} is already in use: choose another with --to, "
                f"or continue it with --resume {self.path}"
            )

    @contextmanager
    def claim(self, *, resume: bool) -> Iterator[None]:
        """Hold the folder for the process that was asked for the run, from before it exists to the run's end.

        A new run that a mistake of the user's stops before anything has begun leaves no folder behind, so
        that the corrected run can have its name.

        Raises:
            UserError: as in :meth:`check_start`, or another process has claimed the folder.
        """
        self.check_start(resume=resume)
        with hold_folder(self.path, "run directory"):
            self.check_start(resume=resume)
            try:
                yield
            except UserError:
                if not resume:
                    self._remove_unstarted()
                raise

    def _remove_unstarted(self) -> None:
        """Delete a folder in which nothing has begun; the caller has claimed it."""
        own = [path.name for path in (self.config, self.environment, self.flower_token)]
        with suppress(UserError), self.lock():
            if not {path.name for path in self.path.iterdir()} <= {*own, LOCK, CLAIM}:
                return
            for name in (*own, LOCK, CLAIM):
                (self.path / name).unlink(missing_ok=True)
            # Whoever comes from here on claims the folder anew, and may keep it.
            with suppress(OSError):
                self.path.rmdir()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold what the run writes for the process that writes it: over Flower, not the one that claimed it.

        Raises:
            UserError: another process is running it.
        """
        with _locked(self.path / LOCK, f"run directory {self.path}"):
            yield

    def is_locked(self) -> bool:
        """Return whether a process of this machine writes the run. For a moment nobody else can begin to."""
        try:
            with self.lock():
                return False
        except UserError:
            return True


def is_in_use(folder: Path) -> bool:
    """Whether ``folder`` has visible files; the locks and the partial file of a killed process are hidden."""
    try:
        return any(not name.startswith(".") for name in os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return False


def refuse_used(folder: Path) -> None:
    """Raise UserError if ``folder``, into which something is to be written, is a file or holds anything."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"output folder {folder} is already in use")


def unused_folder(folder: Path, stem: str) -> Path:
    """Return ``<folder>/<stem>-<number>`` with the first number that is free."""
    number = 1
    while (folder / f"{stem}-{number}").exists():
        number += 1
    return folder / f"{stem}-{number}"


@contextmanager
def hold_folder(folder: Path, kind: str) -> Iterator[None]:
    """Make ``folder`` where it is missing, and hold it for this process until the block ends.

    Raises:
        UserError: another process holds it; ``kind`` says in the message what it is.
    """
    with _claimed(folder, f"{kind} {folder}"):
        yield


def _claimed(folder: Path, what: str) -> IO[bytes]:
    """Make ``folder`` and lock its claim; the process that had claimed it may delete it at any moment."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            if _is_no_folder(folder):
                raise
        except FileNotFoundError as error:
            # So it is in /proc, and under the working directory of this process once that is deleted.
            raise UserError(f"folder {folder} cannot be made: {error.strerror}") from None
        with suppress(FileNotFoundError):
            return _locked(folder / CLAIM, what)


def _is_no_folder(path: Path) -> bool:
    with suppress(FileNotFoundError):
        return not stat.S_ISDIR(path.lstat().st_mode)
    return False


def _locked(path: Path, what: str) -> IO[bytes]:
    """Open and lock the file ``path``; the operating system releases the lock however the process ends."""
    import fcntl

    while True:
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A lock on a file that was deleted meanwhile keeps nobody out.
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BlockingIOError:
            file.close()
            raise UserError(f"{what} is in use by another process") from None
        except FileNotFoundError:
            pass
        file.close()
