"""Runs to methods: runs that differ in nothing but a seed are one method, told by what differs.

The keys that vary under ``data``, ``model`` and ``evaluation`` make a *task*: scores are only compared, and
the best only marked, within one task. How often a run is evaluated is no part of it. The other varying keys
go into the method's label, beside the name of its algorithm, where they vary among the runs of that
algorithm; keys of ``adapter`` also where they differ from what most methods have. A rate that a search chose
for a whole algorithm stays out. Where that makes long labels, the names that the suite gives to its variants
are taken instead.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from fedexperts.report.quantities import Spread, leaves, spread
from fedexperts.report.reading import Run

TASK_SECTIONS = ("data", "model", "evaluation")
"""Sections whose settings make a task."""
_HOW_OFTEN = "evaluation.every"
"""Of the evaluation this alone changes no score: rounds may be of different lengths."""
_ALGORITHM = "algorithm.name"
_LONG = 30
"""Letters from which on names of settings are long."""
Flat = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way of training on one task, and its runs in order of seed."""

    name: str
    """Algorithm and the varied keys, as ``flex gate_init=-4``, or the name of its variant in the suite."""
    algorithm: str
    """Name of its algorithm."""
    task: str
    """The varied keys of data, model and evaluation; empty where the suite has one task."""
    runs: tuple[Run, ...]

    @property
    def label(self) -> str:
        """Name and task in one."""
        return f"{self.name} · {self.task}" if self.task else self.name

    def spread(self, path: str) -> Spread | None:
        """The spread over the runs of the number at ``path`` in their results."""
        return spread(run.numbers.get(path) for run in self.runs)


def settings_of(run: Run) -> Flat:
    """The run's settings by dotted key without seeds, or a name made from one; lists as tuples."""
    flat = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in leaves(run.result["settings"])
        if key != "name" and key.rpartition(".")[2] != "seed"
    }
    flat.setdefault(_ALGORITHM, run.result["method"])
    return flat


def varied_keys(all_settings: Sequence[Flat]) -> tuple[str, ...]:
    """The keys whose values are not the same everywhere (absent is a value), in order of appearance."""
    keys = dict.fromkeys(key for settings in all_settings for key in settings)
    return tuple(key for key in keys if len({repr(one.get(key, "absent")) for one in all_settings}) > 1)


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Each key's shortest ending that no other key has; a section's ``name`` keeps its section."""
    parts = {key: tuple(key.split(".")) for key in keys}
    names = {}
    for key, path in parts.items():
        length = 2 if path[-1] in {"name", "kind"} and len(path) > 1 else 1
        while length < len(path) and sum(other[-length:] == path[-length:] for other in parts.values()) > 1:
            length += 1
        names[key] = ".".join(path[-length:])
    return names


def value_text(value: Any) -> str:
    """A setting as it reads in TOML, strings without quotes."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return " + ".join(value_text(part) for part in value) or "none"
    return "none" if value in (None, "") else str(value)


def methods_of(runs: Sequence[Run]) -> tuple[Method, ...]:
    """The runs as methods: by task in order of appearance, within it the best mean ROUGE-L first."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(repr(sorted(settings_of(run).items())), []).append(run)
    grouped = [sorted(group, key=lambda run: (run.seed, run.name)) for group in groups.values()]
    methods = _named_as_variants(_label([settings_of(group[0]) for group in grouped], grouped))
    tasks = list(dict.fromkeys(method.task for method in methods))
    return tuple(sorted(methods, key=lambda method: (tasks.index(method.task), *_rank(method))))


def _rank(method: Method) -> tuple[float, float, str]:
    score, loss = method.spread("mean.rougeL_after"), method.spread("mean.loss_after")
    return (-score.mean if score else 1.0, loss.mean if loss else float("inf"), method.name)


def _label(all_settings: list[Flat], groups: list[list[Run]]) -> list[Method]:
    names = short_names(dict.fromkeys(key for settings in all_settings for key in settings))
    varied = varied_keys(all_settings)
    task_keys = [key for key in varied if key.partition(".")[0] in TASK_SECTIONS and key != _HOW_OFTEN]
    methods = []
    for settings, group in zip(all_settings, groups, strict=True):
        same = [other for other in all_settings if other[_ALGORITHM] == settings[_ALGORITHM]]
        told = {*varied_keys(same), *_uncommon(settings, all_settings)}
        own = [key for key in varied if key in told and key not in task_keys]
        own = _without_defaults(own, all_settings)
        name = " ".join([str(settings[_ALGORITHM]), *_pairs(settings, own, names)])
        task = " ".join(_pairs(settings, task_keys, names))
        methods.append(Method(name=name, algorithm=str(settings[_ALGORITHM]), task=task, runs=tuple(group)))
    return methods


def variant_of(run: Run) -> str:
    """Return the name that a suite gives to the run and to those of other seeds."""
    return run.name.removesuffix(f"-seed-{run.seed}")


def _named_as_variants(methods: list[Method]) -> list[Method]:
    """Return the methods under their variants' names, without the task's, if those of settings are long.

    They stay as they are unless each method has one variant, and is the same variant in every task.
    """
    if max((len(method.name) for method in methods), default=0) <= _LONG:
        return methods
    found: dict[str, set[str]] = {}
    for group in tasks_of(methods).values():
        variants = [{variant_of(run) for run in method.runs} for method in group]
        begun = _common_start([name for names in variants for name in names]) if _has_tasks(methods) else ""
        for method, own in zip(group, variants, strict=True):
            found.setdefault(method.name, set()).update(name.removeprefix(begun) for name in own)
    names = {old: next(iter(new)) for old, new in found.items() if len(new) == 1}
    if len(names) < len(found) or "" in names.values() or len(set(names.values())) < len(names):
        return methods
    return [replace(method, name=names[method.name]) for method in methods]


def _has_tasks(methods: Sequence[Method]) -> bool:
    return len({method.task for method in methods}) > 1


def _common_start(names: Sequence[str]) -> str:
    """Return the parts between hyphens with which all names begin."""
    columns = zip(*(name.split("-") for name in names), strict=False)
    return "".join(f"{parts[0]}-" for parts in takewhile(lambda parts: len(set(parts)) == 1, columns))


def _without_defaults(keys: Iterable[str], all_settings: Sequence[Flat]) -> list[str]:
    """Leave out keys that some runs lack and all others share, unless no other key of their section stays."""
    found = list(keys)
    varied = {key for key in found if len({repr(one[key]) for one in all_settings if key in one}) > 1}
    told = {key.rpartition(".")[0] for key in varied}
    kept = []
    for key in found:
        section = key.rpartition(".")[0]
        if key in varied or section not in told:
            kept.append(key)
            told.add(section)
    return kept


def _uncommon(settings: Flat, all_settings: Sequence[Flat]) -> Iterable[str]:
    """Keys of the adapter whose value is not the one that most have; of equals, the first is taken for it."""
    for key, value in settings.items():
        if key.startswith("adapter."):
            values = Counter(repr(one[key]) for one in all_settings if key in one)
            if repr(value) != values.most_common(1)[0][0]:
                yield key


def _pairs(settings: Flat, keys: Iterable[str], names: Mapping[str, str]) -> list[str]:
    return [f"{names[key]}={value_text(settings[key])}" for key in keys if key in settings]


def paths_in(methods: Iterable[Method], section: str) -> tuple[str, ...]:
    """The paths of all numbers under ``section`` of the methods' results, in order of appearance."""
    every = (path for method in methods for run in method.runs for path in run.numbers)
    return tuple(dict.fromkeys(path for path in every if path.startswith(f"{section}.")))


def tasks_of(methods: Sequence[Method]) -> dict[str, list[Method]]:
    """Methods by task, both in order."""
    tasks: dict[str, list[Method]] = {}
    for method in methods:
        tasks.setdefault(method.task, []).append(method)
    return tasks
