"""Call a user's functions after each round of a run."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from fedexperts.errors import UserError
from fedexperts.running.progress import Progress, relayed_progress


class Callback:
    """Receives each round's figures; override what you need.

    An exception stops the run. The round that it was called for is kept, so the run can be resumed.
    """

    def after_round(self, record: Mapping[str, Any]) -> None:
        """Take a finished round's line of ``rounds.jsonl``, e.g. ``record["train_loss"]``; read-only."""

    def finished(self, result: Mapping[str, Any]) -> None:
        """Take ``result.json`` once the run has finished, also if it had before it was resumed; read-only."""


class _AfterRound(Callback):
    """A plain function in place of a callback."""

    def __init__(self, function: Callable[[Mapping[str, Any]], object]) -> None:
        self._function = function

    def after_round(self, record: Mapping[str, Any]) -> None:
        self._function(record)


AnyCallback = Callback | Callable[[Mapping[str, Any]], object]
"""A callback, or a function that is called with each round's record."""


def as_callbacks(given: Sequence[AnyCallback]) -> tuple[Callback, ...]:
    """Return ``given`` with functions wrapped.

    Raises:
        UserError: one is neither a callback nor a function.
    """
    for one in given:
        if not isinstance(one, Callback) and (isinstance(one, type) or not callable(one)):
            raise UserError(f"a callback must be a function or a fedexperts.Callback, not {one!r}")
    return tuple(one if isinstance(one, Callback) else _AfterRound(one) for one in given)


def with_callbacks(progress: Progress, callbacks: Sequence[Callback]) -> Progress:
    """Return progress that also calls ``callbacks`` when a round has been made to last."""

    def send(event: str, *values: Any) -> None:
        getattr(progress, event)(*values)
        if event == "round_finished":
            for callback in callbacks:
                callback.after_round(MappingProxyType(values[1]))

    return relayed_progress(send)
