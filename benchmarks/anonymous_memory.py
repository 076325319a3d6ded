"""Anonymous memory of this process: what it must really have, unlike the pages of files that it maps."""

import threading
from pathlib import Path

SAMPLE_SECONDS = 0.003


def anonymous_megabytes() -> float:
    """``RssAnon`` now, in megabytes of 10^6 bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise AssertionError("this benchmark needs Linux: there is no RssAnon in /proc/self/status")


class PeakMemory:
    """Largest anonymous memory while it watches, looked at every few milliseconds."""

    def __enter__(self) -> "PeakMemory":
        self.megabytes = anonymous_megabytes()
        self._is_over = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._watcher.join()
        self._look()

    def _watch(self) -> None:
        while not self._is_over.wait(SAMPLE_SECONDS):
            self._look()

    def _look(self) -> None:
        self.megabytes = max(self.megabytes, anonymous_megabytes())
