"""Worker processes: run experiments side by side, each worker one at a time, and relay what they tell.

A worker starts when it gets its first run and keeps its imports for the next; a dead one is replaced.
"""

import logging
import os
import pickle
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from logging.handlers import QueueHandler
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from fedexperts.config.schema import RunConfig
from fedexperts.errors import UserError
from fedexperts.running.progress import Progress, relayed_progress

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")

DONE, RAISED, LOGGED = "done", "raised", "logged"
"""What a worker sends besides the events of Progress: a result, an exception, a log record."""

GRACE_SECONDS = 5.0
"""Time that an interrupted worker has to leave its run in order before it is killed."""

INTERRUPTED = 130
"""Exit code of an interrupted worker."""

_SPAWN = get_context("spawn")
_package = logging.getLogger("fedexperts")


class RunExperiment(Protocol):
    """The signature of :func:`run_experiment`."""

    def __call__(
        self, config: RunConfig, run_directory: Path, *, progress: Progress, resume: bool
    ) -> dict[str, Any]:
        """Run or go on with one experiment and return its result."""


class Workers:
    """Processes for up to ``num_workers`` runs at once; a context manager that leaves no process behind."""

    def __init__(self, num_workers: int, run: RunExperiment) -> None:
        """``run`` is called in the workers, which import it by its name."""
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers = [_Worker(run) for _ in range(num_workers)]
        for worker in self._workers:
            self._idle.put(worker)
        # Ctrl-C is for the main thread: a worker inherits the mask of the thread that starts it. The resource
        # tracker of Python, were it started with the first worker, would undo the mask.
        resource_tracker.ensure_running()
        self._threads = ThreadPoolExecutor(
            num_workers, initializer=signal.pthread_sigmask, initargs=(signal.SIG_BLOCK, {signal.SIGINT})
        )

    def run(
        self, config: RunConfig, run_directory: Path, *, progress: Progress, resume: bool
    ) -> dict[str, Any]:
        """Run one experiment in a worker that has nothing to do; to be called inside :meth:`map`."""
        worker = self._idle.get()
        try:
            return worker.run(config, run_directory, progress, resume=resume)
        finally:
            self._idle.put(worker)

    def map(self, function: Callable[[Item], Outcome], items: Sequence[Item]) -> Iterator[Outcome]:
        """Call ``function`` for as many items at once as there are workers; outcomes in the items' order.

        An exception of any call is raised as soon as it happens.
        """
        futures = [self._threads.submit(function, item) for item in items]
        waiting = set(futures)
        for future in futures:
            while not future.done():
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for one in done:
                    one.result()
            yield future.result()

    def __enter__(self) -> Self:
        """Start nothing yet."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Let idle workers end; after an exception interrupt those that are running, and soon kill them."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        try:
            for worker in self._workers:
                worker.close(interrupt=kind is not None)
            deadline = time.monotonic() + GRACE_SECONDS
            for worker in self._workers:
                worker.join(max(0.0, deadline - time.monotonic()))
        finally:
            for worker in self._workers:
                worker.kill()
            self._threads.shutdown()


class _Worker:
    """The parent's side of one process."""

    def __init__(self, run: RunExperiment) -> None:
        self._run = run
        self._process: BaseProcess | None = None
        self._pipe: Connection[Any, Any] | None = None
        self._is_closed = False
        self._starting = threading.Lock()

    def run(
        self, config: RunConfig, run_directory: Path, progress: Progress, *, resume: bool
    ) -> dict[str, Any]:
        try:
            pipe = self._connect()
            pipe.send((config, run_directory, resume))
            return _follow(pipe, run_directory.name, progress)
        except (EOFError, ConnectionError):
            raise UserError(self._end()) from None

    def _connect(self) -> "Connection[Any, Any]":
        with self._starting:
            if self._is_closed:
                raise EOFError
            if self._pipe is None:
                self._pipe, theirs = _SPAWN.Pipe()
                arguments = (theirs, self._run, _package.level)
                self._process = _SPAWN.Process(target=_serve, args=arguments, daemon=True)
                self._process.start()
                theirs.close()
            return self._pipe

    def _end(self) -> str:
        """Forget the process that has ended, and say how it did."""
        process, self._pipe = self._process, None
        if process is None or self._is_closed:
            return "interrupted"
        process.join()
        code = process.exitcode or 0
        if code == -signal.SIGKILL:
            return "its process was killed; if memory ran out, fewer --jobs need less of it"
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return f"its process ended {how} before the run did"

    def close(self, *, interrupt: bool) -> None:
        """Take no more runs."""
        with self._starting:
            self._is_closed = True
        if self._process is not None and interrupt:
            self._process.terminate()
        elif self._pipe is not None:
            self._pipe.close()

    def join(self, seconds: float) -> None:
        if self._process is not None:
            self._process.join(seconds)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()


def _follow(pipe: "Connection[Any, Any]", name: str, progress: Progress) -> dict[str, Any]:
    """Relay what the worker tells of its run until it sends the result."""
    while True:
        event, *values = pipe.recv()
        if event == DONE:
            return dict(values[0])
        if event == RAISED:
            raise values[0]
        if event == LOGGED:
            record = values[0]
            record.msg = f"{name}: {record.msg}"
            _package.handle(record)
        else:
            getattr(progress, event)(*values)


def _serve(pipe: "Connection[Any, Any]", run: RunExperiment, log_level: int) -> None:
    """Run what comes through ``pipe`` until it is closed; the body of a worker process."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sending = threading.Lock()

    def send(*message: Any) -> None:
        with sending:
            pipe.send(message)

    _package.handlers, _package.propagate = [_Sender(send)], False
    _package.setLevel(log_level)
    # A parent that is gone, or that interrupts, wants no answer.
    with suppress(EOFError, ConnectionError):
        try:
            while True:
                config, run_directory, resume = pipe.recv()
                try:
                    result = run(config, run_directory, progress=relayed_progress(send), resume=resume)
                except Exception as error:
                    send(RAISED, _portable(error))
                else:
                    send(DONE, result)
        except KeyboardInterrupt:
            # The run has been left in order; taking all libraries down would only keep the user waiting.
            os._exit(INTERRUPTED)


class _Sender(QueueHandler):
    """Hands log records to the parent."""

    def __init__(self, send: Callable[..., None]) -> None:
        super().__init__(None)  # type: ignore[arg-type]
        self._send = send

    def enqueue(self, record: logging.LogRecord) -> None:
        self._send(LOGGED, record)


def _portable(error: Exception) -> Exception:
    """``error`` with its traceback as a note, or one that says the same if it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    if not isinstance(error, UserError):
        error.add_note(traceback.format_exc())
    return error
