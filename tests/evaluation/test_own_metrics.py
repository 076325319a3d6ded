"""A metric of the user's own gets what its registration promises."""

import pytest
import torch

from fedexperts.evaluation.own_metrics import OWN_METRICS, own_scores
from fedexperts.evaluation.settings import EvaluationSettings


def test_a_metric_gets_model_examples_and_format_and_records_no_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[object] = []

    def seen(*arguments: object) -> dict[str, float]:
        given.extend((*arguments, torch.is_grad_enabled()))
        return {"seen": 1}

    monkeypatch.setitem(OWN_METRICS, "seen", seen)
    model, examples, format = object(), (), object()
    scores = own_scores(model, examples, format, EvaluationSettings(own_metrics=("seen",)))
    assert (given, scores) == ([model, examples, format, False], {"seen": 1.0})
