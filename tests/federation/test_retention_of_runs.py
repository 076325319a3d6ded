"""Retention in a whole run: whose it is, when it is measured, and that it changes nothing else."""

import pytest

from fedexperts.evaluation.retention import RETENTION_SCORES
from fedexperts.run_directory import read_json, read_lines
from fedexperts.running.experiment import run_experiment

FEW = (
    "evaluation.exam.num_questions=6",
    "evaluation.retention.num_free_questions=4",
    "evaluation.retention.num_neutral=3",
)


@pytest.fixture
def finished(make_config, tmp_path, quiet):
    """Runs FLEx for two rounds and returns result and rounds."""

    def run(name, *overrides):
        config = make_config("flex", *FEW, "evaluation.matrix=false", "evaluation.every=1", *overrides)
        result = run_experiment(config, tmp_path / name, progress=quiet)
        return result, read_lines(tmp_path / name / "rounds.jsonl")

    return run


def test_every_model_is_asked_before_and_after(finished):
    result, lines = finished("run")
    retention = result["retention"]
    assert (retention["num_free_questions"], retention["num_neutral"]) == (4, 3)
    for name in RETENTION_SCORES:
        assert set(retention[name]) == {"base", "global", "before", "personalised"}
        for when, whose in (("before", "before"), ("after", "personalised")):
            own = [client[f"{name}_{when}"] for client in result["clients"].values()]
            assert retention[name][whose] == result["mean"][f"{name}_{when}"] == sum(own) / len(own)
        assert f"{name}_global" in lines[0]["evaluation"]


def test_answers_of_every_kind_are_kept_as_far_as_asked(finished, tmp_path):
    finished("run", "evaluation.num_predictions=2")
    kept = [read_json(path) for path in (tmp_path / "run" / "clients").glob("*/predictions.json")]
    assert len(kept) == 3
    for answers in kept:
        assert (len(answers["predictions"]), len(answers["off_task"])) == (2, 4)
        for asked in ([each["prompt"] for each in answers[part]] for part in ("predictions", "off_task")):
            assert len(set(asked)) == len(asked)
        assert answers["off_task"] != answers["predictions"]
    first, *others = [[each["response"] for each in answers["off_task"]] for answers in kept]
    assert all(responses == first for responses in others)


def test_asking_changes_no_bit_of_the_training(finished):
    asked, _ = finished("asked")
    off = ("evaluation.retention.num_free_questions=0", "evaluation.retention.neutral=none")
    unasked, lines = finished("unasked", *off)
    assert unasked["retention"] is None
    assert not [name for name in lines[0]["evaluation"] if name.startswith(("exam_free", "neutral"))]
    for same in ("server_state_sha256", "personal_sha256", "exam", "routing"):
        assert asked[same] == unasked[same]
    assert {name: asked["mean"][name] for name in unasked["mean"]} == unasked["mean"]


def test_clients_models_can_be_left_out(finished):
    result, _ = finished("run", "evaluation.exam.personalised=false")
    found = result["retention"]["neutral_rougeL"]
    assert (found["before"], found["personalised"]) == (None, None)
    assert found["base"] is not None
    assert found["global"] is not None


def test_data_without_exam_have_no_retention_and_no_fault(make_config, tmp_path, quiet):
    rows = "".join(f'{{"instruction": "q{n}", "response": "r{n}"}}\n' for n in range(30))
    (tmp_path / "mine.jsonl").write_text(rows)
    data = {
        "source": str(tmp_path / "mine.jsonl"),
        "partition": {"kind": "iid", "num_clients": 2},
    }
    config = make_config("fedavg", "rounds=1", "evaluation.matrix=false", data=data)
    result = run_experiment(config, tmp_path / "run", progress=quiet)
    assert (result["exam"], result["retention"]) == (None, None)


@pytest.mark.slow
def test_the_diagonal_of_the_matrix_is_each_client_s_own_score(make_config, tmp_path, quiet):
    same = ("evaluation.max_test_examples=3", "evaluation.matrix_examples=3", "evaluation.max_new_tokens=24")
    same += ("evaluation.matrix=true",)
    result = run_experiment(make_config("flex", "rounds=1", *FEW, *same), tmp_path / "run", progress=quiet)
    for name in ("loss", "rougeL"):
        own = [result["matrix"][name][place][place] for place in range(3)]
        assert own == [client[f"{name}_after"] for client in result["clients"].values()]
    assert len({cell for row in result["matrix"]["loss"] for cell in row}) == 9
