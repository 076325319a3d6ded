"""Count one upload of each client and round, and refuse replays and what comes too late by name."""

from dataclasses import dataclass, field

from fedexperts.federation.transport import Delivery
from fedexperts.messages import Stamp, Upload, plain_text
from fedexperts.tensors import sha256_of

FENCES = {
    "other_run": "it is of another run",
    "old_round": "it is of another round",
    "other_client": "it is another client's",
    "repeated": "this client's upload has come already",
    "late": "it did not come in time",
    "surplus": "enough others had come before it",
    "stale": "the server had made too many steps since its client began",
}
"""Reasons for which an upload does not count whatever it brings; rounds.jsonl counts them by these names."""

EXPECTED = ("surplus", "stale")
"""Those that the settings bring about."""
NO_FAILURES = ("repeated", *EXPECTED)
"""Those that are no failure of the client: its first upload counts, or nobody waited for it."""


def content_sha256(upload: Upload) -> str:
    """Hash the tensors of an upload; figures such as seconds are left out."""
    return sha256_of(upload.tensors, upload.beside, upload.tables)


@dataclass(kw_only=True)
class Ledger:
    """Uploads that have come in one round of one run."""

    run: str
    round_number: int
    hashes: dict[str, str] = field(default_factory=dict)
    """Content of each client's upload, by client."""

    def fence(self, delivery: Delivery) -> tuple[str, str]:
        """Return why an upload does not count, as a key of :data:`FENCES` and as a sentence; or nothing."""
        if delivery.fenced:
            return delivery.fenced, delivery.upload.failure or f"upload refused: {FENCES[delivery.fenced]}"
        stamp, client_id = delivery.upload.stamp, delivery.client_id
        content = content_sha256(delivery.upload)
        reasons = {
            "other_run": stamp.run != self.run and "it is of another run",
            "old_round": stamp.round_number != self.round_number and f"it is of round {stamp.round_number}",
            "other_client": stamp.client_id != client_id and f"it is of client {_shown(stamp)}",
            "repeated": client_id in self.hashes and self._repeated(client_id, content),
        }
        for kind, reason in reasons.items():
            if reason:
                return kind, f"upload refused: {reason}"
        self.hashes[client_id] = content
        return "", ""

    def _repeated(self, client_id: str, content: str) -> str:
        same = "the same" if self.hashes[client_id] == content else "another"
        return f"it is the client's second one in this round, of {same} content"


def _shown(stamp: Stamp) -> str:
    return repr(plain_text(stamp.client_id)[:60])
