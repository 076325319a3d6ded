"""A client's own tensors on its own disk.

Each version is named by the round that made it. A client in round r starts from its last version before r
and writes version r, so that a round that is done again after a crash gives the same tensors again.
"""

import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from fedexperts.errors import UserError
from fedexperts.run_directory import write_atomically
from fedexperts.tensors import Tensors

_VERSION = re.compile(r"^personal-round-(\d+)\.safetensors$")


class PersonalStore:
    """Folder of one or more clients' personal tensors."""

    def __init__(self, folder: Path) -> None:
        """``folder`` holds one folder for each client."""
        self._folder = folder

    def folder(self, client_id: str) -> Path:
        """The client's own folder."""
        return self._folder / client_id

    def load(self, client_id: str, *, before_round: int) -> Tensors:
        """The newest version older than ``before_round``; empty if there is none."""
        versions = [version for version in self._versions(client_id) if version < before_round]
        return read_tensors(self._path(client_id, max(versions))) if versions else {}

    def save(self, client_id: str, tensors: Tensors, *, round: int) -> None:
        """Write the version of ``round``, and drop all but it and the one it was made from."""
        if tensors:
            write_tensors(self._path(client_id, round), tensors)
            older = sorted(version for version in self._versions(client_id) if version < round)
            for version in older[:-1]:
                self._path(client_id, version).unlink()

    def forget_after(self, round: int) -> None:
        """Drop versions of later rounds: left by a crash, of rounds that do not count."""
        for folder in self._folder.glob("*"):
            for version in self._versions(folder.name):
                if version > round:
                    self._path(folder.name, version).unlink()

    def _path(self, client_id: str, round: int) -> Path:
        return self.folder(client_id) / f"personal-round-{round:05d}.safetensors"

    def _versions(self, client_id: str) -> list[int]:
        matches = (_VERSION.match(path.name) for path in self.folder(client_id).glob("personal-round-*"))
        return [int(match[1]) for match in matches if match]


def write_tensors(path: Path, tensors: Tensors) -> None:
    """Write tensors atomically as safetensors."""
    write_atomically(path, save_safetensors(tensors))


def read_tensors(path: Path) -> Tensors:
    """Inverse of :func:`write_tensors`.

    Raises:
        UserError: the file is missing, truncated, or something else.
    """
    try:
        return load_safetensors(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise UserError(f"tensors in {path} cannot be read: {error}") from None
