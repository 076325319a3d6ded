"""Files that one client keeps on its own disk, and the record of their hashes. Imports no torch.

Everything in the folder is the owner's alone to read. ``kept.json`` has the SHA-256 of each file, so a
version that is lost or damaged is never taken for one that never was.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from fedexperts.errors import UserError
from fedexperts.run_directory import Content, make_private, write_atomically
from fedexperts.seals import Check, check_file, damaged, hash_of, hash_of_file, read_sealed, write_sealed

RECORD = "kept.json"
_PERSONAL = "personal-round-{:05d}.safetensors"


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """The content of ``kept.json``."""

    first_kept_round: int | None = None
    """First round that kept tensors: a later one without a version has lost it."""
    files: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of each file by name."""

    @property
    def versions(self) -> dict[int, str]:
        """Names of the versions of the tensors, by the round that made them."""
        rounds = {int(name[15:20]): name for name in self.files if name.startswith("personal-round-")}
        return dict(sorted(rounds.items()))


class ClientFolder:
    """One client's folder."""

    def __init__(self, path: Path) -> None:
        """Nothing is created or read."""
        self.path = path

    def write(self, name: str, content: bytes) -> None:
        """Write a file that is no version of the tensors, such as predictions."""
        self._write(name, content)
        kept = self._kept() if (self.path / RECORD).exists() else _Kept()
        self._note(kept.first_kept_round, {**kept.files, name: hash_of(content)})

    def write_version(
        self,
        content: Content | None,
        *,
        round_number: int,
        kept_round: int,
        keep_states: int,
        num_older: int = 1,
    ) -> None:
        """Write the tensors that a round made, and drop the versions that no kept state needs.

        Args:
            content: the tensors, or what writes them to a path; None for a round that keeps nothing.
            round_number: the round.
            kept_round: the last round that counted, whose version this one was made from.
            keep_states: number of the server's last states that can be gone back to.
            num_older: versions that stay of those as old as the oldest of these states, or older.
        """
        known = self._kept() if (self.path / RECORD).exists() else _Kept()
        if content is None:
            if not (self.path / RECORD).exists():
                self._note(None, {})
            return
        name = _PERSONAL.format(round_number)
        self._write(name, content)
        counted = [number for number in known.versions if number <= kept_round]
        keep = _needed(counted, round_number - keep_states, num_older)
        dropped = {old for number, old in known.versions.items() if number not in keep} - {name}
        files = {old: seal for old, seal in known.files.items() if old not in dropped}
        first = round_number if known.first_kept_round is None else known.first_kept_round
        self._note(first, {**files, name: hash_of_file(self.path / name)})
        for old in dropped:
            (self.path / old).unlink(missing_ok=True)

    def has(self, name: str) -> bool:
        """Return whether the file was ever written.

        Raises:
            UserError: it was, but is missing or damaged.
        """
        seals = self._kept().files if (self.path / RECORD).exists() else {}
        if name in seals:
            check_file(self.path / name, seals[name])
        return name in seals

    def version(self, kept_round: int) -> Path | None:
        """Return the file with the tensors of a round; None where it kept nothing, and for round 0.

        Raises:
            UserError: it is missing or damaged.
        """
        name = self.check(kept_round)
        return self.path / name if name else None

    def check(self, kept_round: int) -> str:
        """Return the name of the version of ``kept_round``; empty where it kept nothing, and for round 0.

        Raises:
            UserError: it is missing or damaged.
        """
        if not kept_round:
            return ""
        kept = self._kept()
        name = self._version(kept, kept_round)
        if name:
            check_file(self.path / name, kept.files[name])
        return name

    def check_made_last(self) -> None:
        """Raise UserError unless the files that are no versions are there, as they were written."""
        kept = self._kept()
        for name in kept.files.keys() - set(kept.versions.values()):
            check_file(self.path / name, kept.files[name])

    def check_versions(self, last_round: int) -> Iterator[Check]:
        """Yield the checks of the versions that rounds until ``last_round`` made."""
        kept = self._kept()
        for made_in, name in kept.versions.items():
            if made_in <= last_round:
                yield partial(check_file, self.path / name, kept.files[name])

    def check_all(self) -> None:
        """Raise UserError unless all files are there, as they were written."""
        for name, seal in self._kept().files.items():
            check_file(self.path / name, seal)

    def _version(self, kept: _Kept, kept_round: int) -> str:
        if kept_round in kept.versions:
            return kept.versions[kept_round]
        if kept.first_kept_round is not None and kept_round >= kept.first_kept_round:
            path = self.path / _PERSONAL.format(kept_round)
            raise UserError(f"the tensors that the client kept after round {kept_round} are lost: no {path}")
        return ""

    def _kept(self) -> _Kept:
        path = self.path / RECORD
        record = read_sealed(path)
        try:
            return _Kept(first_kept_round=record["first_kept_round"], files=record["files"])
        except KeyError:
            raise damaged(path) from None

    def _write(self, name: str, content: Content) -> None:
        make_private(self.path.parent)
        # The record that names the file is written next, and syncs the folder.
        write_atomically(self.path / name, content, is_private=True, syncs_folder=False)

    def _note(self, first_kept_round: int | None, files: Mapping[str, str]) -> None:
        make_private(self.path.parent)
        record = {"first_kept_round": first_kept_round, "files": dict(files)}
        write_sealed(self.path / RECORD, record, is_private=True)


def _needed(counted: Iterable[int], oldest: int, num_older: int) -> set[int]:
    """Return the versions that a client needs in the rounds after ``oldest``, the first state kept."""
    later = {number for number in counted if number > oldest}
    return later | set(sorted(set(counted) - later)[-num_older:])
