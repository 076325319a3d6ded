"""Keep examples in a temporary file instead of in memory."""

import json
import os
import tempfile
import weakref

from fedexperts.data.examples import Example


class ExampleSpool:
    """A temporary file of examples, one JSON object on each line, read by byte position.

    The file has no name (if the system allows that), so nothing is left of it even when the process is
    killed. It lies in the folder for temporary files, which the environment variable TMPDIR changes.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="fedexperts-")  # noqa: SIM115  (closed by `close`)
        self._is_flushed = True
        self.close = weakref.finalize(self, self._file.close)
        self.size_bytes = 0

    def append(self, example: Example) -> None:
        """Write ``example`` at the end, from ``size_bytes`` on."""
        line = json.dumps(vars(example), ensure_ascii=False).encode() + b"\n"
        self._file.write(line)
        self._is_flushed = False
        self.size_bytes += len(line)

    def read(self, start: int, stop: int) -> list[Example]:
        """Read the examples between two byte positions at which examples begin or end."""
        if not self._is_flushed:
            self._file.flush()
            self._is_flushed = True
        block = os.pread(self._file.fileno(), stop - start, start)
        assert len(block) == stop - start
        return [Example(**json.loads(line)) for line in block.splitlines()]
