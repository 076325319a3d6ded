"""Register metrics that are defined outside this package, and compute them."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fedexperts.data.examples import Example
from fedexperts.data.prompts import PromptFormat
from fedexperts.errors import UserError
from fedexperts.evaluation.settings import EvaluationSettings
from fedexperts.plugins import is_redefined, not_registered, refuse_bad_name

OwnMetric = Callable[[Any, Sequence[Example], PromptFormat], Mapping[str, float]]
"""Takes the model, test examples and the prompt format; returns finite numbers by name."""

OWN_METRICS: dict[str, OwnMetric] = {}
"""Name in ``evaluation.own_metrics`` to function."""

TAKEN = ("loss", "perplexity", "rougeL", "exact_match")
"""Names that the scores of every evaluation have."""


def register_metric(name: str, function: OwnMetric) -> None:
    """Make ``function`` available in ``evaluation.own_metrics``.

    The function takes the model, a sequence of test examples (``instruction``, ``context``, ``response``)
    and the prompt format, and returns finite numbers by name. It is called for every client's model before
    and after local steps, without recording gradients, and must leave the model as it was. A number ``f1``
    becomes ``f1_before`` and ``f1_after`` in the client's entry of ``result.json`` under ``algorithm``, and
    in the means over clients. The registration holds for this process; elsewhere, install the function as an
    entry point in the group ``fedexperts.metrics``.

    Raises:
        UserError: the name is taken or malformed, or ``function`` cannot be called.
    """
    refuse_bad_name("metric", name)
    if not callable(function):
        raise UserError(f'metric "{name}" must be a function of model, examples and format, not {function!r}')
    known = OWN_METRICS.get(name)
    if known is not None and not is_redefined(known, function):
        raise UserError(f'metric name "{name}" is taken by {known!r}: choose another')
    OWN_METRICS[name] = function


def refuse_unknown_metrics(settings: EvaluationSettings) -> None:
    """Raise UserError if ``evaluation.own_metrics`` names a metric that is not registered."""
    for name in settings.own_metrics:
        if name not in OWN_METRICS:
            raise UserError(f"evaluation.own_metrics: {not_registered('metric', name)}")


@torch.no_grad()
def own_scores(
    model: Any, examples: Sequence[Example], format: PromptFormat, settings: EvaluationSettings
) -> dict[str, float]:
    """Return what the metrics of ``evaluation.own_metrics`` give for ``model``.

    Raises:
        UserError: a metric is not registered, or returns what cannot be recorded.
    """
    refuse_unknown_metrics(settings)
    scores: dict[str, float] = {}
    for name in settings.own_metrics:
        for key, value in _checked(name, OWN_METRICS[name](model, examples, format)).items():
            if key in TAKEN or key in scores:
                raise UserError(f'metric "{name}" returns {key!r}, a name that another score has')
            scores[key] = value
    return scores


def _checked(name: str, returned: Any) -> dict[str, float]:
    if not isinstance(returned, Mapping):
        raise UserError(f'metric "{name}" must return numbers by name, not {returned!r}')
    scores = {}
    for key, value in returned.items():
        refuse_bad_name(f'metric "{name}" returns a number whose', key)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f'metric "{name}": {key} must be a finite number, not {value!r}')
        scores[key] = float(value)
    return scores
