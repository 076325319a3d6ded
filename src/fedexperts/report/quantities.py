"""Numbers with their spread over runs, and how a reader sees them: texts, units and titles."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from statistics import fmean, stdev
from typing import Any

TITLES = {
    "train_loss": "training loss",
    "evaluation.exam_global": "exam accuracy, server's model",
    "evaluation.exam_free_global": "exam in free answers, server's model",
    "evaluation.neutral_rougeL_global": "ROUGE-L on neutral instructions, server's model",
    "exam.personalised": "exam personalised, by choice",
    "retention.exam_free.personalised": "exam personalised, free",
    "retention.neutral_rougeL.personalised": "neutral personalised",
    "evaluation.loss_after": "test loss after local steps",
    "evaluation.loss_before": "test loss before local steps",
    "evaluation.rougeL_after": "ROUGE-L after local steps",
    "evaluation.rougeL_before": "ROUGE-L before local steps",
    "evaluation.exact_match_after": "exact match after local steps",
    "evaluation.own_facts_after": "facts taught here, after local steps",
    "evaluation.shared_facts_after": "facts taught to others alone, after local steps",
    "evaluation.style_after": "ROUGE-L of the wording alone, after local steps",
    "bytes.upload_per_client_round": "upload per client and round",
    "bytes.download_per_client_round": "download per client and round",
    "seconds.total": "time",
    "num_test_truncated": "test, truncated",
    "num_without_label": "without label",
    "num_test_without_label": "test, without label",
    "num_test_trained_elsewhere": "test, trained elsewhere",
    "num_prompts_cut": "test prompts cut",
    "algorithm.gate_mean": "opening of the graft gates (0 shut, 1 open)",
    "algorithm.chosen_experts": "experts chosen to graft",
    "algorithm.memory_peak_bytes": "memory of the client's process: peak",
    "algorithm.memory_planned_bytes": "memory of the client's process: planned",
    "asynchronous.staleness_mean": "staleness of a step's uploads, mean",
    "asynchronous.staleness_max": "staleness of a step's uploads, largest",
    "extraction.personal.planted_rate": "clients' own models",
    "extraction.server.planted_rate": "server's model",
    "extraction.base.planted_rate": "pretrained model",
    "extraction.personal.planted_mean_best_similarity": "best similarity, clients' own",
    "extraction.server.planted_mean_best_similarity": "best similarity, server's",
    "extraction.base.planted_mean_best_similarity": "best similarity, pretrained",
    "extraction.personal.not_planted_mean_best_similarity": "of canaries not trained on, clients' own",
    "extraction.server.not_planted_mean_best_similarity": "of these, server's",
    "extraction.base.not_planted_mean_best_similarity": "of these, pretrained",
    "algorithm.profile_error": "error of the profile that was used",
    "algorithm.profile_error_fresh": "error of a fresh profile in as few bits",
}
"""Titles of what does not read well as it is spelled in the files."""

_SECTIONS = ("mean.", "bytes.", "seconds.", "parameters.", "algorithm.", "num_")
_POINTS = ("rougeL", "exact_match", "_facts_", "style_", "accuracy", "exam", "routing.share", "planted_rate")
_BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
_SECONDS = ((5400.0, 3600.0, "h"), (90.0, 60.0, "min"), (0.0, 1.0, "s"))


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


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested mappings with its dotted path."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def numbers_of(tree: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of nested mappings by dotted path, e.g. ``mean.rougeL_after``."""
    found = ((path, finite(value)) for path, value in leaves(tree))
    return {path: value for path, value in found if value is not None}


def spread(values: Iterable[Any]) -> Spread | None:
    """The spread of the finite ``values``; None where there are none. The missing are counted, not hidden."""
    every = [finite(value) for value in values]
    present = [value for value in every if value is not None]
    if not present:
        return None
    std = stdev(present) if len(present) > 1 else None
    missing = len(every) - len(present)
    return Spread(mean=fmean(present), std=std, num_values=len(present), num_missing=missing)


def mean_of(values: Iterable[Any]) -> Any:
    """The mean of numbers, or of lists of them place by place; None where nobody has a finite number."""
    every = list(values)
    lists = [value for value in every if isinstance(value, list)]
    if lists:
        return [mean_of(place) for place in zip_longest(*lists)]
    present = [value for value in map(finite, every) if value is not None]
    return fmean(present) if present else None


def title_of(path: str) -> str:
    """The words for a dotted path of ``result.json`` or of a line of the logs."""
    if path in TITLES:
        return TITLES[path]
    for section in _SECTIONS:
        path = path.removeprefix(section)
    return path.replace("rougeL", "ROUGE-L").replace(".", " ").replace("_", " ")


def heading(path: str) -> str:
    """:func:`title_of` as the beginning of a sentence."""
    title = title_of(path)
    return title[:1].upper() + title[1:]


def factor_of(path: str) -> float:
    """The number that a drawing multiplies values at ``path`` by: 100 where they are points of 100."""
    return 100.0 if is_points(path) else 1.0


def is_points(path: str) -> bool:
    """Return whether the number at ``path`` is a share of 1, written as points of 100."""
    return any(part in path for part in _POINTS)


def text(path: str, value: Spread | float | None, *, has_std: bool = True) -> str:
    """``value`` as the number at ``path`` is written: ``61.2 ± 1.3``, ``0.412``, ``12.3 kB``, ``10.0 min``.

    A number of runs follows where some runs lack the value; a dash stands for a value that no run has.
    """
    if value is None:
        return "–"
    if not isinstance(value, Spread):
        value = Spread(mean=value, std=None, num_values=1)
    size, decimals, unit = _scale(path, value.mean)
    parts = [f"{value.mean / size:,.{decimals}f}"]
    if has_std and value.std is not None and (value.std or unit == ""):
        parts.append(f"± {value.std / size:,.{decimals}f}")
    parts += [unit] if unit else []
    parts += [f"(n = {value.num_values})"] if value.num_missing and has_std else []
    return " ".join(parts)


def _scale(path: str, mean: float) -> tuple[float, int, str]:
    """Return the divisor of a number at ``path``, its decimals, and its unit."""
    if is_points(path):
        return 0.01, 1, ""
    if path.startswith("seconds"):
        size, unit = next((size, unit) for least, size, unit in _SECONDS if mean >= least)
        return size, _three_digits(mean / size), unit
    if path.endswith(("_counted", "_predicted")):
        return 1.0, 0, "B"
    if "bytes" in path:
        rounded = float(f"{abs(mean):.3g}")
        size, unit = next((pair for pair in _BYTES if rounded >= pair[0]), _BYTES[-1])
        return size, _three_digits(mean / size), unit
    if path.startswith(("num_", "parameters")):
        return 1.0, 0, ""
    return 1.0, 3 if abs(mean) < 10 else 2 if abs(mean) < 100 else 1, ""


def _three_digits(value: float) -> int:
    """The decimals that give three significant digits: 1230, 12.3, 0.123."""
    rounded = float(f"{value:.3g}")
    return max(0, 2 - math.floor(math.log10(abs(rounded)))) if rounded else 0


def signed_text(path: str, difference: float) -> str:
    """A difference of two numbers at ``path`` with its sign, without one where it is written as 0."""
    written = text(path, abs(difference))
    sign = "+" if difference > 0 else "\N{MINUS SIGN}"
    return f"{sign}{written}" if re.search("[1-9]", written) else written
