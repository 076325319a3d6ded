"""Keep messages on disk until their turn comes."""

import os
import tempfile
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path


class Spool:
    """One file without a name, so that nothing of it is left however the process ends.

    It gives the disk back when neither it nor a function that reads a message is there any more.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Make it in ``folder``, or where temporary files are."""
        self._file = tempfile.TemporaryFile(prefix="fedexperts-", dir=folder)  # noqa: SIM115
        self._end = 0
        weakref.finalize(self, self._file.close)

    def keep(self, message: bytes) -> Callable[[], bytes]:
        """Write a message; return a function that reads it."""
        start, self._end = self._end, self._end + len(message)
        self._file.seek(start)
        self._file.write(message)
        self._file.flush()
        return partial(self._read, start, len(message))

    def _read(self, start: int, number: int) -> bytes:
        """Return ``number`` bytes; one call of the system gives 2 GiB at most."""
        found = b""
        while len(found) < number:
            part = os.pread(self._file.fileno(), number - len(found), start + len(found))
            if not part:
                raise OSError(f"{number - len(found)} bytes of a spooled message are missing")
            found = found + part if found else part
        return found
