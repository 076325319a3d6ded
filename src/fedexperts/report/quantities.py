"""A value with its spread over runs, and how values are written for a reader."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

POINTS = frozenset({"rougeL", "exact_match", "accuracy", "exam"})
"""Metrics that are shares of 1 in files and are written as points of 100."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean and sample standard deviation over runs; ``std`` is None where one run alone has the value."""

    mean: float
    std: float | None
    num_values: int
    num_missing: int = 0


def finite(value: Any) -> float | None:
    """``value`` as a float, or None where it is absent, not a number, or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def lookup(tree: Any, path: str) -> float | None:
    """The finite number at a dotted ``path`` of nested mappings, or None; e.g. ``mean.rougeL_after``."""
    for name in path.split("."):
        if not isinstance(tree, Mapping):
            return None
        tree = tree.get(name)
    return finite(tree)


def spread(values: Iterable[Any]) -> Spread | None:
    """The spread of the finite ``values``; None where there are none. The missing are counted, not hidden."""
    every = [finite(value) for value in values]
    present = [value for value in every if value is not None]
    if not present:
        return None
    std = stdev(present) if len(present) > 1 else None
    missing = len(every) - len(present)
    return Spread(mean=fmean(present), std=std, num_values=len(present), num_missing=missing)


def three_digits(value: float) -> str:
    """Three significant digits without an exponent: 1230, 12.3, 0.123."""
    value = float(f"{value:.3g}")
    if value == 0:
        return "0"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def count_text(value: float) -> str:
    """A count with a thin separator of thousands: 1,234,567."""
    return f"{value:,.0f}"


def _scale(value: float, units: tuple[tuple[float, str], ...]) -> tuple[float, str]:
    rounded = float(f"{abs(value):.3g}")
    for size, unit in units:
        if rounded >= size:
            return size, unit
    return units[-1]


_BYTE_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
_SECOND_UNITS = ((5400.0, "h"), (90.0, "min"), (1.0, "s"))
_SECONDS_PER = {"h": 3600.0, "min": 60.0, "s": 1.0}


def bytes_text(value: float) -> str:
    """Bytes in decimal units with three significant digits: 934 B, 12.3 kB, 1.23 MB."""
    size, unit = _scale(value, _BYTE_UNITS)
    return f"{three_digits(value / size)} {unit}"


def seconds_text(value: float) -> str:
    """Seconds, minutes from 90 s, hours from 90 min, with three significant digits."""
    unit = _scale(value, _SECOND_UNITS)[1]
    return f"{three_digits(value / _SECONDS_PER[unit])} {unit}"


def _with_std(value: Spread, text: str, std_text: str | None) -> str:
    if value.std is not None and std_text is not None:
        text = f"{text} ± {std_text}"
    return f"{text} (n = {value.num_values})" if value.num_missing else text


def points_spread(value: Spread | None) -> str:
    """A share of 1 as points of 100 with one decimal: ``61.2 ± 1.3``."""
    if value is None:
        return "–"
    return _with_std(
        value, f"{100 * value.mean:.1f}", None if value.std is None else f"{100 * value.std:.1f}"
    )


def plain_spread(value: Spread | None) -> str:
    """A loss or the like with three decimals, three significant digits from 10 upwards."""
    if value is None:
        return "–"
    decimals = 3 if abs(value.mean) < 10 else 2 if abs(value.mean) < 100 else 1
    std = None if value.std is None else f"{value.std:.{decimals}f}"
    return _with_std(value, f"{value.mean:,.{decimals}f}", std)


def bytes_spread(value: Spread | None) -> str:
    """Bytes in one unit, with the spread only where runs differ."""
    if value is None:
        return "–"
    size, _ = _scale(value.mean, _BYTE_UNITS)
    std = f"{three_digits(value.std / size)}" if value.std else None
    return _with_std(value, bytes_text(value.mean), std)


def seconds_spread(value: Spread | None) -> str:
    """Seconds in one unit with the spread in the same unit."""
    if value is None:
        return "–"
    unit = _scale(value.mean, _SECOND_UNITS)[1]
    mean = three_digits(value.mean / _SECONDS_PER[unit])
    decimals = len(mean.partition(".")[2])
    std = None if value.std is None else f" ± {value.std / _SECONDS_PER[unit]:.{decimals}f}"
    return _with_std(value, f"{mean}{std or ''} {unit}", None)


def is_points(metric: str) -> bool:
    """Whether ``metric`` (with or without ``_before`` and the like) is written as points of 100."""
    return any(part in metric for part in POINTS)


def metric_spread(metric: str, value: Spread | None) -> str:
    """``value`` written as its metric is: points of 100 for shares, three decimals for losses."""
    return points_spread(value) if is_points(metric) else plain_spread(value)
