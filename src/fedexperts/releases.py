"""Journal of how often a private run has asked its clients, whether or not the rounds came to count.

Noised information that has left a client cannot be taken back. So a round that is asked again, after a crash
or after going back, is a further release, and nothing cuts this file. Imports no torch.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from fedexperts.errors import UserError
from fedexperts.seals import damaged, read_sealed, write_sealed


@dataclass(frozen=True, kw_only=True)
class Releases:
    """Content of the journal."""

    turns: Mapping[str, int] = field(default_factory=dict)
    """Times that each client was asked for an upload."""
    rounds: Mapping[str, int] = field(default_factory=dict)
    """Times that each round was begun, by its number as text."""

    @property
    def num_repeated_rounds(self) -> int:
        """Times that a round was begun again."""
        return sum(self.rounds.values()) - len(self.rounds)

    @property
    def total(self) -> int:
        """Uploads that were asked for."""
        return sum(self.turns.values())

    def with_round(self, round_number: int, client_ids: Iterable[str]) -> Self:
        """Return the journal after one more round has been asked."""
        return type(self)(
            turns=_counted(self.turns, client_ids), rounds=_counted(self.rounds, [str(round_number)])
        )

    def with_turn(self, client_id: str) -> Self:
        """Return the journal after a client has been asked once more in the same round."""
        return type(self)(turns=_counted(self.turns, [client_id]), rounds=self.rounds)


def _counted(counts: Mapping[str, int], names: Iterable[str]) -> dict[str, int]:
    found = dict(counts)
    for name in names:
        found[name] = found.get(name, 0) + 1
    return found


def read_releases(path: Path) -> Releases:
    """Return the journal in ``path``.

    Raises:
        UserError: it is missing or damaged.
    """
    record = read_sealed(path)
    try:
        return Releases(turns=record["turns"], rounds=record["rounds"])
    except KeyError:
        raise damaged(path) from None


def write_releases(path: Path, releases: Releases) -> None:
    """Make ``releases`` last, which must be done before any client is asked."""
    write_sealed(path, {"turns": dict(releases.turns), "rounds": dict(releases.rounds)})


def check_releases(path: Path, due: int) -> None:
    """Raise UserError unless the journal is whole and has at least the ``due`` uploads of a state."""
    found = read_releases(path).total
    if found < due:
        raise UserError(f"{path} counts {found} uploads asked for, but there were {due}: it is an older copy")
