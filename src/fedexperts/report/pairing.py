"""Differences between methods, paired by client and seed, with bootstrap intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from fedexperts.errors import UserError
from fedexperts.report.clients import main_metric
from fedexperts.report.grouping import TASK_SECTIONS, Method, tasks_of
from fedexperts.report.quantities import finite, leaves
from fedexperts.report.reading import Run

REFERENCES = ("local_graft", "local_only", "fedavg")
"""Algorithms to compare with, the strongest simple rival first."""
SCORES = (
    "own_facts_after",
    "shared_facts_after",
    "style_after",
    "exam_personalised",
    "exam_free_after",
    "neutral_rougeL_after",
)
"""Scores of a client in ``result.json`` that are compared beside ROUGE-L, or the loss without it."""
NUM_RESAMPLES = 5000
FEWEST_SEEDS = 3
_ENDS = (0.025, 0.975)
_BOOTSTRAP_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A method's score less the reference's, of the same client and seed."""

    mean: float
    """Over clients, then over seeds."""
    low: float
    high: float
    """Ends of the 95 % interval."""
    num_pairs: int
    num_seeds: int
    by_client: Mapping[str, float]
    """Mean over seeds by client."""

    @property
    def is_finding(self) -> bool:
        """Whether there are seeds enough and the interval excludes 0."""
        return self.num_seeds >= FEWEST_SEEDS and not self.low <= 0 <= self.high


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A method of a task beside the task's reference."""

    method: Method
    reference: Method
    differences: Mapping[str, Difference]
    """By name of the score; without those that no client has of both."""


def less_is_better(score: str) -> bool:
    """Return whether a negative difference of ``score`` is a gain."""
    return score.startswith("loss")


def compare_methods(methods: Sequence[Method], against: str = "") -> list[Compared]:
    """Compare every method with the reference of its task, or with ``against``, where the task has it.

    Raises:
        UserError: ``against`` is neither the name of a method nor of an algorithm.
    """
    names = dict.fromkeys(method.name for method in methods)
    if against and not any(_is_named(method, against) for method in methods):
        raise UserError(
            f"--against {against!r} is no method of this report; it must be one of {', '.join(names)}"
        )
    scores = (f"{main_metric(methods)}_after", *SCORES)
    compared = []
    for group in tasks_of(methods).values():
        reference = _reference(group, (against,) if against else REFERENCES)
        for method in group if reference else ():
            if reference and method is not reference:
                found = {score: difference(method, reference, score) for score in scores}
                known = {score: one for score, one in found.items() if one}
                compared += [Compared(method=method, reference=reference, differences=known)] if known else []
    return compared


def scores_of(compared: Sequence[Compared]) -> list[str]:
    """The scores that any pair has, in order."""
    found = {score for one in compared for score in one.differences}
    return [score for score in ("rougeL_after", "loss_after", *SCORES) if score in found]


def _is_named(method: Method, wanted: str) -> bool:
    return wanted in {method.name, method.algorithm}


def _reference(group: Sequence[Method], wanted: Sequence[str]) -> Method | None:
    """The first of ``wanted`` that is in the group; of several settings of one algorithm the best."""
    found = (method for name in wanted for method in group if _is_named(method, name))
    return next(found, None)


def difference(method: Method, reference: Method, score: str) -> Difference | None:
    """The paired difference of ``score``; None if no client and seed has it of both methods."""
    own, other = _by_seed(method, score), _by_seed(reference, score)
    seeds = [
        {client: value - other[seed][client] for client, value in clients.items() if client in other[seed]}
        for seed, clients in own.items()
        if seed in other
    ]
    seeds = [clients for clients in seeds if clients]
    if not seeds:
        return None
    low, high = bootstrap_interval([list(clients.values()) for clients in seeds])
    names = dict.fromkeys(client for clients in seeds for client in clients)
    return Difference(
        mean=fmean(fmean(clients.values()) for clients in seeds),
        low=low,
        high=high,
        num_pairs=sum(map(len, seeds)),
        num_seeds=len(seeds),
        by_client={name: fmean(own[name] for own in seeds if name in own) for name in names},
    )


def _by_seed(method: Method, score: str) -> dict[str, dict[str, float]]:
    """Scores by seed and client; runs that repeat a seed are averaged."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in method.runs:
        for client, scores in run.result["clients"].items():
            value = finite(scores.get(score))
            if value is not None:
                found.setdefault(_seeds(run), {}).setdefault(client, []).append(value)
    return {seed: {client: fmean(values) for client, values in own.items()} for seed, own in found.items()}


def _seeds(run: Run) -> str:
    """The run's seed and those that a client's examples and model depend on."""
    every = leaves(run.result["settings"])
    own = [(k, v) for k, v in every if k.endswith("seed") and k.partition(".")[0] in TASK_SECTIONS]
    return repr((run.seed, sorted(own)))


def bootstrap_interval(seeds: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The middle 95 % of the mean of seeds' means when seeds, then clients within each, are drawn again."""
    import numpy as np

    generator = np.random.default_rng(_BOOTSTRAP_SEED)
    drawn = generator.integers(len(seeds), size=(NUM_RESAMPLES, len(seeds)))
    means = np.empty(drawn.shape)
    for number, clients in enumerate(seeds):
        places = drawn == number
        again = generator.integers(len(clients), size=(int(places.sum()), len(clients)))
        means[places] = np.asarray(clients)[again].mean(axis=1)
    low, high = np.quantile(means.mean(axis=1), _ENDS)
    return float(low), float(high)
