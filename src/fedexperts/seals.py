"""Seal files with their SHA-256 when they are written, and refuse those that have changed since.

Imports no torch.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedexperts.errors import UserError
from fedexperts.run_directory import SEAL, as_json, read_json, write_atomically, write_json

Check = Callable[[], object]
"""Raises UserError where a file is missing or not as it was written."""

_DIGEST_BYTES = hashlib.sha256().digest_size


def hash_of(content: bytes) -> str:
    """Return the SHA-256 of ``content`` in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def hash_of_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sealed(path: Path, value: Mapping[str, Any], *, is_private: bool = False) -> None:
    """Write ``value`` atomically as JSON, and its hash inside."""
    write_json(path, {**value, SEAL: hash_of(as_json(value))}, is_private=is_private)


def read_sealed(path: Path) -> dict[str, Any]:
    """Return what :func:`write_sealed` wrote to ``path``.

    Raises:
        UserError: the file is missing or damaged.
    """
    value = read_json(path)
    if value.pop(SEAL, None) != hash_of(as_json(value)):
        raise damaged(path)
    return value


def read_perhaps_sealed(path: Path) -> dict[str, Any]:
    """Return a JSON object without its seal, if it has one.

    Raises:
        UserError: the file is missing, or has a seal that is not its content's.
    """
    value = read_json(path)
    seal = value.pop(SEAL, None)
    if seal is not None and seal != hash_of(as_json(value)):
        raise damaged(path)
    return value


def write_sealed_bytes(path: Path, content: bytes, *, is_private: bool = False) -> None:
    """Write ``content`` atomically, and its hash behind it."""

    def write(to: Path) -> None:
        with to.open("wb") as file:
            file.write(content)
            file.write(hashlib.sha256(content).digest())

    write_atomically(path, write, is_private=is_private)


def read_sealed_bytes(path: Path) -> bytes:
    """Return what :func:`write_sealed_bytes` wrote to ``path``.

    Raises:
        UserError: the file is missing or damaged.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing")
    with path.open("rb") as file:
        content = file.read(max(0, path.stat().st_size - _DIGEST_BYTES))
        if file.read() != hashlib.sha256(content).digest():
            raise damaged(path)
    return content


def damaged(path: Path) -> UserError:
    """Return the error of a file that is not as it was written."""
    return UserError(f"{path} is damaged: its SHA-256 is not the one it was written with")


def check_file(path: Path, sha256: str) -> None:
    """Raise UserError if the file ``path`` is missing, or does not have the hash ``sha256``."""
    if not path.is_file():
        raise UserError(f"{path} is missing")
    if hash_of_file(path) != sha256:
        raise damaged(path)


def seal_of_log(content: bytes) -> dict[str, Any]:
    """Return number and hash of the bytes of a log."""
    return {"num_bytes": len(content), SEAL: hash_of(content)}


def check_log(path: Path, seal: Mapping[str, Any]) -> None:
    """Raise UserError if the file ``path`` does not begin with what ``seal`` was made of; more may follow."""
    due = int(seal["num_bytes"])
    content = b""
    if path.exists():
        with path.open("rb") as file:
            content = file.read(due)
    if due and not path.exists():
        raise UserError(f"{path} is missing")
    if len(content) < due:
        raise UserError(f"{path} is damaged: it has {len(content)} bytes where {due} were written")
    if hash_of(content) != seal[SEAL]:
        raise damaged(path)
