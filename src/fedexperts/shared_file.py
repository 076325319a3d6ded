"""A temporary file that a process can give to those that it starts."""

import os
import tempfile
import weakref
from collections.abc import Callable
from multiprocessing.reduction import DupFd
from typing import Any


class SharedFile:
    """A binary temporary file, closed and deleted with its last holder in any process.

    The file has no name (if the system allows that), so nothing is left of it even when the process is
    killed. It lies in the folder for temporary files, which the environment variable TMPDIR changes. It can
    be among the arguments of a process that is being started; that process reads the same file.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        """Make a new file, or take over one that is open under ``descriptor``."""
        self.file: Any = _new_file() if descriptor is None else os.fdopen(descriptor, "rb")
        self.close = weakref.finalize(self, self.file.close)

    @property
    def descriptor(self) -> int:
        """Number under which the file is open in this process."""
        return int(self.file.fileno())

    def __reduce__(self) -> tuple[Callable[[Any], "SharedFile"], tuple[Any]]:
        self.file.flush()
        return _received, (DupFd(self.descriptor),)


def _new_file() -> Any:
    return tempfile.TemporaryFile(prefix="fedexperts-")


def _received(descriptor: Any) -> SharedFile:
    return SharedFile(descriptor.detach())
