"""Times of rivals taken in turns, and what is told of them: the median, and how far they spread."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def in_turns(rivals: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Each rival's seconds, as A B A B ..., so that a slow minute of the machine falls on all of them.

    Every rival runs once beforehand and that time is thrown away.
    """
    for run in rivals.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(repeats):
        for name, run in rivals.items():
            seconds[name].append(run())
    return seconds


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least and largest, and all the values in their order."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "values": list(values),
    }


def paired_ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, Any]:
    """Spread of ``slow[i] / fast[i]``: each pair was measured one right after the other."""
    return spread([a / b for a, b in zip(slow, fast, strict=True)])
