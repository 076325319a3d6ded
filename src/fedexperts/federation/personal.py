"""Keep a client's own tensors on its own disk.

Each version is named by the round that made it. A client goes on from the version of the last round in which
the server accepted its upload, and writes a new one; so a round that is done again gives the same tensors,
and nothing that was refused is ever gone on from.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedexperts.algorithms.api import Kept
from fedexperts.client_folder import ClientFolder
from fedexperts.errors import UserError
from fedexperts.run_directory import write_atomically
from fedexperts.seals import check_file, hash_of_file
from fedexperts.tensors import Tensors, first_non_finite, sha256_of

_PARAMETERS, _BESIDE, _OPTIMIZER = "parameters", "beside", "optimizer"


class PersonalStore:
    """Folder of one or more clients' kept tensors."""

    def __init__(self, folder: Path) -> None:
        """``folder`` holds one folder for each client."""
        self._folder = folder

    def folder(self, client_id: str) -> Path:
        """Return the client's own folder."""
        return self._folder / client_id

    def files(self, client_id: str) -> ClientFolder:
        """Return what reads and writes the client's own folder."""
        return ClientFolder(self.folder(client_id))

    def load(self, client_id: str, kept_round: int) -> Kept:
        """Return the version of ``kept_round``; empty for round 0, and where that round kept nothing.

        Raises:
            UserError: the version is lost or damaged.
        """
        path = self.files(client_id).version(kept_round)
        return Kept() if path is None else read_kept(path)

    def save(
        self,
        client_id: str,
        kept: Kept,
        *,
        round_number: int,
        kept_round: int,
        keep_states: int = 1,
        num_older: int = 1,
    ) -> None:
        """Write the version of ``round_number``, and drop those that none of the kept states needs.

        See :meth:`fedexperts.client_folder.ClientFolder.write_version` for the numbers.

        Raises:
            UserError: a value is not finite; nothing is written.
        """
        flat = refuse_non_finite(kept)
        self.files(client_id).write_version(
            partial(save_file, flat) if kept else None,
            round_number=round_number,
            kept_round=kept_round,
            keep_states=keep_states,
            num_older=num_older,
        )


def refuse_non_finite(kept: Kept) -> Tensors:
    """Return all tensors as they are written; raise UserError where a value is not finite."""
    flat = _flat(kept)
    bad = first_non_finite(flat)
    if bad is not None:
        raise UserError(f"its own tensor {bad!r} has values that are not finite")
    return flat


def _flat(kept: Kept) -> Tensors:
    """All tensors in one file, each under its section; an optimizer's under ``what/parameter``."""
    sections: dict[str, Mapping[str, Any]] = {_PARAMETERS: kept.parameters, _BESIDE: kept.beside}
    state = {f"{what}/{name}": t for name, states in kept.optimizer.items() for what, t in states.items()}
    sections[_OPTIMIZER] = state
    return {
        f"{part}/{name}": tensor for part, tensors in sections.items() for name, tensor in tensors.items()
    }


def read_kept(path: Path) -> Kept:
    """Return what :meth:`PersonalStore.save` wrote to ``path``.

    Raises:
        UserError: the file is missing, truncated, or something else.
    """
    sections: dict[str, Any] = {_PARAMETERS: {}, _BESIDE: {}, _OPTIMIZER: {}}
    for full, tensor in read_tensors(path).items():
        part, _, name = full.partition("/")
        if part not in sections:
            raise UserError(f"tensors in {path} cannot be read: {full!r} is in no section")
        if part == _OPTIMIZER:
            what, _, name = name.partition("/")
            sections[part].setdefault(name, {})[what] = tensor
        else:
            sections[part][name] = tensor
    return Kept(**sections)


def kept_sha256(kept: Kept) -> str:
    """Hash what a client keeps, the optimizer's state apart; empty if it keeps nothing."""
    return sha256_of(kept.beside, kept.parameters) if kept else ""


def write_tensors(path: Path, tensors: Tensors) -> str:
    """Write tensors atomically as safetensors; return the file's SHA-256."""
    write_atomically(path, partial(save_file, tensors))
    return hash_of_file(path)


def read_tensors(path: Path, sha256: str = "") -> Tensors:
    """Return the tensors in ``path``, whose pages are read when they are touched.

    Args:
        path: the file.
        sha256: the hash that it must have; empty for any.

    Raises:
        UserError: the file is missing, truncated, or something else.
    """
    try:
        if sha256:
            check_file(path, sha256)
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"tensors in {path} cannot be read: {error}") from None
