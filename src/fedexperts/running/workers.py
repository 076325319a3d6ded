"""Run experiments side by side in worker processes, each of which runs one at a time."""

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fedexperts.config.schema import RunConfig
from fedexperts.errors import UserError
from fedexperts.processes import LOGGED, Tell, WorkerEnded, Workers, relay_log
from fedexperts.running.progress import Progress, relayed_progress

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


class RunExperiment(Protocol):
    """The signature of :func:`run_experiment`."""

    def __call__(
        self, config: RunConfig, run_directory: Path, *, progress: Progress, resume: bool
    ) -> dict[str, Any]:
        """Run or go on with one experiment and return its result."""


RunHere = Callable[[RunConfig, Path, bool], dict[str, Any]]


class RunWorkers(Workers[RunHere]):
    """Processes for up to ``num_workers`` runs at once."""

    def __init__(self, num_workers: int, run: RunExperiment) -> None:
        """``run`` is called in the workers, which import it by its name."""
        super().__init__(num_workers, partial(_open_runs, run))

    def run(
        self, config: RunConfig, run_directory: Path, *, progress: Progress, resume: bool
    ) -> dict[str, Any]:
        """Run one experiment in a worker that has nothing to do; to be called inside :meth:`map`."""

        def relay(event: str, *values: Any) -> None:
            if event == LOGGED:
                relay_log(event, *values, prefix=f"{run_directory.name}: ")
            else:
                getattr(progress, event)(*values)

        try:
            return self.call(_run, config, run_directory, resume, on_event=relay)
        except WorkerEnded as error:
            if error.exit_code == -signal.SIGKILL:
                reason = "its process was killed; if memory ran out, fewer --jobs need less of it"
                raise UserError(reason) from None
            raise UserError(f"its process {error}") from None

    def map(self, function: Callable[[Item], Outcome], items: Sequence[Item]) -> Iterator[Outcome]:
        """Call ``function`` for as many items at once as there are workers; outcomes in the items' order.

        An exception of any call is raised as soon as it happens.
        """
        futures = [self.submit(function, item) for item in items]
        waiting = set(futures)
        for future in futures:
            while not future.done():
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for one in done:
                    one.result()
            yield future.result()


@contextmanager
def _open_runs(run: RunExperiment, tell: Tell) -> Iterator[RunHere]:
    """Give a worker what runs one experiment and tells of its progress."""
    progress = relayed_progress(tell)
    yield lambda config, directory, resume: run(config, directory, progress=progress, resume=resume)


def _run(run: RunHere, config: RunConfig, run_directory: Path, resume: bool) -> dict[str, Any]:
    return run(config, run_directory, resume)
