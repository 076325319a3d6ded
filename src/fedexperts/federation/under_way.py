"""Keep turns that outlast a round: an upload lies on disk until it makes a step of the server.

In process a turn is computed when it begins, because the work that it counts says how long it takes. Over
Flower it is at work at its site, and only an upload that has come lies on disk.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedexperts.federation.clock import Turn
from fedexperts.federation.norm_guard import Norms
from fedexperts.messages import Upload, decode_upload, encode_upload
from fedexperts.run_directory import write_atomically
from fedexperts.seals import hash_of


@dataclass(frozen=True, kw_only=True)
class TurnUnderWay:
    """A turn that has begun, and the state that it began from."""

    turn: Turn
    received: int
    """Round of the server's state that the client received."""


@dataclass(frozen=True, kw_only=True)
class UploadUnderWay(TurnUnderWay):
    """A turn whose upload lies on the server's disk."""

    line: Mapping[str, Any]
    """Line in clients.jsonl that the upload will have if it counts."""
    norms: Norms | None
    """Norms of the upload, if these are judged."""
    sha256: str
    """Hash of the file that has the upload."""

    @property
    def file(self) -> str:
        """Name of that file; a client has one turn from each state at most."""
        return f"{self.turn.client_id}-from-{self.received:05d}.message"

    def record(self) -> dict[str, Any]:
        """Return all of it as plain data, for the checkpoint."""
        return asdict(self)


def from_record(record: Mapping[str, Any]) -> UploadUnderWay:
    """Return what :meth:`UploadUnderWay.record` gave.

    Raises:
        KeyError, TypeError: the record is of something else.
    """
    norms = record["norms"] and Norms(**record["norms"])
    return UploadUnderWay(**{**record, "turn": Turn(**record["turn"]), "norms": norms})


@dataclass(frozen=True, kw_only=True)
class UploadFolder:
    """Folder of the uploads under way."""

    path: Path

    def write(
        self, upload: Upload, turn: TurnUnderWay, line: Mapping[str, Any], norms: Norms | None
    ) -> UploadUnderWay:
        """Write an upload, and return it as under way."""
        message = encode_upload(upload)
        kept = UploadUnderWay(
            turn=turn.turn, received=turn.received, line=line, norms=norms, sha256=hash_of(message)
        )
        write_atomically(self.path / kept.file, message)
        return kept

    def read(self, one: UploadUnderWay) -> Upload:
        """Return an upload."""
        return decode_upload((self.path / one.file).read_bytes())
