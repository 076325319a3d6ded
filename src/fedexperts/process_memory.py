"""Measure and limit the anonymous memory of this process: what it must really have, unlike mapped files.

Only Linux tells and limits it (``RssAnon`` and ``VmData`` of /proc/self/status, ``RLIMIT_DATA``).
"""

import ctypes
import os
import resource
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from fedexperts.errors import UserError

TOLERANCE = 1.1
"""Multiple of a client's memory above which its turn is refused: the plan that fills it counts tensors, and
allocators take more."""

SAMPLE_SECONDS = 0.002

_STATUS = Path("/proc/self/status")
_NO_ROOM = ("can't allocate memory", "not enough memory", "bad_alloc")
"""Words by which torch tells that the system refused it memory; it raises a plain RuntimeError."""
_SMALL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16", "LRU_CACHE_CAPACITY": "16"}
"""Environment by which oneDNN, and torch over it, keep few products: hundreds of MB in bfloat16 otherwise."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Names of glibc's mallopt, from malloc.h."""
_LARGE_BYTES = 2**16


def can_be_measured() -> bool:
    """Return whether this system tells the anonymous memory of a process."""
    return _STATUS.is_file() and "RssAnon:" in _STATUS.read_text()


def anonymous_bytes() -> int:
    """Return the anonymous memory of this process now."""
    return _status("RssAnon")


def _status(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise UserError(f"this system does not tell a process its memory: {_STATUS} has no {name}")


def return_freed_memory() -> None:
    """Have glibc, where it is the allocator, give freed blocks back that lie below others in use."""
    _call_glibc("malloc_trim", 0)


def hold_little() -> None:
    """Have glibc, where it is the allocator, give each large block back to the system when it is freed, and
    have oneDNN keep few compiled products; to be called before the first product."""
    os.environ.update(_SMALL_CACHES)
    return_freed_blocks(_LARGE_BYTES)


def return_freed_blocks(num_bytes: int = 2**20) -> None:
    """Have glibc, where it is the allocator, give each block of so many bytes or more back when it is freed.

    By itself it keeps blocks of up to 32 MB, and how much then lies unused depends on who freed what when.
    """
    _call_glibc("mallopt", _MMAP_THRESHOLD, num_bytes)
    _call_glibc("mallopt", _TRIM_THRESHOLD, num_bytes)


def _call_glibc(name: str, *values: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None)
    if function is not None:
        function(*values)


class PeakMemory:
    """Largest anonymous memory while it watches, looked at every few milliseconds."""

    def __enter__(self) -> Self:
        self.bytes = anonymous_bytes()
        self._is_over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._watcher.join()
        self.look()

    def _watch(self) -> None:
        while not self._is_over.wait(SAMPLE_SECONDS):
            self.look()

    def look(self) -> None:
        """Look once more, now."""
        self.bytes = max(self.bytes, anonymous_bytes())


class MemoryGuard:
    """Measures the memory of clients' turns in this process, and ends those that take too much."""

    def __init__(self, own_bytes: int, memory_bytes: Mapping[str, int]) -> None:
        """Count from ``own_bytes``, which the process takes without a model.

        A client's limit is :data:`TOLERANCE` times its ``memory_bytes``; 0 is no limit.
        """
        self._own_bytes, self._memory_bytes = own_bytes, memory_bytes
        self._peak: PeakMemory | None = None

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Measure a turn from the reading of its message on; :attr:`peak_bytes` is its peak from then on."""
        return_freed_memory()
        with PeakMemory() as self._peak:
            yield

    @property
    def peak_bytes(self) -> int:
        """Largest memory of the last turn, above what the process takes without a model."""
        if self._peak is None:
            return 0
        return max(self._peak.bytes - self._own_bytes, 0)

    @contextmanager
    def confined(self, client_id: str) -> Iterator[None]:
        """Give a client's algorithm its memory and no more.

        Raises:
            UserError: the system refused it memory, or it took more than it has.
        """
        limit = int(self._memory_bytes.get(client_id, 0) * TOLERANCE)
        if not limit:
            yield
            return
        try:
            with _no_more_data(limit + self._own_bytes - anonymous_bytes()):
                yield
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and not any(words in str(error) for words in _NO_ROOM):
                raise
            raise UserError(self._sentence("was refused more memory at", limit)) from None
        if self._peak is not None:
            self._peak.look()
        if self.peak_bytes > limit:
            raise UserError(self._sentence("took", limit))

    def _sentence(self, what: str, limit: int) -> str:
        return (
            f"its process {what} {self.peak_bytes / 1e6:,.1f} MB, but its limit is {limit / 1e6:,.1f} MB, "
            f"{TOLERANCE:g} times the memory of its device (the {self._own_bytes / 1e6:,.0f} MB of the "
            "process without a model are not counted)"
        )


@contextmanager
def _no_more_data(num_bytes: int) -> Iterator[None]:
    """Have the system refuse this process more than ``num_bytes`` of private writable memory from now on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = _status("VmData") + max(num_bytes, 0)
    lowest = min(one for one in (wanted, soft, hard) if one != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_DATA, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
