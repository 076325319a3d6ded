"""How often a run asks its models, as ``check`` predicts it."""

import pytest

from fedexperts.federation import scoring
from fedexperts.running.checking import check_experiment
from fedexperts.running.experiment import run_experiment

SELDOM = [pytest.param(1, "true", marks=pytest.mark.slow), pytest.param(2, "false", marks=pytest.mark.slow)]


@pytest.mark.parametrize(
    ("every", "personalised"), [pytest.param(0, "false", marks=pytest.mark.slow), (2, "true"), *SELDOM]
)
def test_check_counts_the_models_that_the_run_asks(
    make_config, tmp_path, quiet, monkeypatch, every, personalised
):
    answer, asked = scoring.answer_probe, []

    def counted(*args):
        asked.append(1)
        return answer(*args)

    monkeypatch.setattr(scoring, "answer_probe", counted)
    config = make_config(
        "fedavg",
        "rounds=4",
        "training.num_local_steps=1",
        f"evaluation.every={every}",
        f"evaluation.exam.personalised={personalised}",
        "evaluation.exam.num_questions=6",
        "evaluation.retention.num_free_questions=6",
        "evaluation.retention.num_neutral=2",
        "data.partition.num_clients=2",
    )
    run_experiment(config, tmp_path / "run", progress=quiet)
    predicted = check_experiment(config).retention
    assert predicted.num_models == len(asked)
    assert (predicted.num_free_questions, predicted.num_neutral) == (6, 2)
    assert predicted.seconds_at_most > 0


def test_check_of_a_run_that_asks_nothing_says_nothing(make_config):
    off = ("evaluation.exam.source=none", "evaluation.retention.neutral=none")
    report = check_experiment(make_config("fedavg", *off))
    assert report.retention is None
    assert report.as_json()["retention"] is None
