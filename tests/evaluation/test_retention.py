"""Free answers and neutral instructions: what is asked, and how answers are scored."""

import json
from dataclasses import replace

import pytest

from fedexperts.data.federated import load_federated_data
from fedexperts.data.settings import DataSettings, FieldMap, PartitionSettings
from fedexperts.data.split import SPLITS
from fedexperts.data.tinyworld import CATEGORIES, restyle
from fedexperts.errors import UserError
from fedexperts.evaluation.multiple_choice import load_exam
from fedexperts.evaluation.retention import RetentionProbe, answer_probe, load_probe, retention_scores
from fedexperts.evaluation.rouge import contained_share
from fedexperts.evaluation.settings import EvaluationSettings, ExamSettings, RetentionSettings

REAL = DataSettings(source="mine.jsonl", partition=PartitionSettings(kind="iid", num_clients=2))


def settings(exam=None, **retention):
    exam = ExamSettings(num_questions=30) if exam is None else exam
    return EvaluationSettings(max_new_tokens=8, exam=exam, retention=RetentionSettings(**retention))


def scored(model, format, probe, settings):
    return retention_scores(probe, answer_probe(model, format, probe, settings))


def test_a_model_that_knows_every_answer_scores_one(taught_model, format, examples):
    probe = RetentionProbe(questions=tuple(examples), neutral=tuple(examples))
    assert scored(taught_model, format, probe, settings()) == {
        "exam_free": 1.0,
        "exam_free_contained": 1.0,
        "exam_free_rougeL": 1.0,
        "neutral_rougeL": 1.0,
    }


def test_each_part_is_compared_with_its_own_answers(taught_model, format, examples):
    wrong = tuple(replace(example, response="far away") for example in examples)
    scores = scored(
        taught_model, format, RetentionProbe(questions=tuple(examples), neutral=wrong), settings()
    )
    assert scores["exam_free"] == 1.0
    assert scores["neutral_rougeL"] < 0.5


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batches_and_their_padding_change_no_score(taught_model, format, examples, batch_size):
    halves = [replace(example, response=example.response.split()[0]) for example in examples]
    probe = RetentionProbe(questions=tuple(halves), neutral=tuple(reversed(examples)))
    whole = scored(taught_model, format, probe, settings())
    assert 0 < whole["exam_free_rougeL"] < 1
    assert scored(taught_model, format, probe, replace(settings(), batch_size=batch_size)) == whole


def test_a_part_that_is_not_asked_has_no_score(taught_model, format, examples):
    only = RetentionProbe(neutral=tuple(examples))
    assert set(scored(taught_model, format, only, settings())) == {"neutral_rougeL"}
    assert scored(taught_model, format, RetentionProbe(), settings()) == {}


def test_an_answer_contains_the_right_words_in_a_row_whatever_their_case():
    told = ["start Rosa stop job Miller stop end of wire", "milleress", "the grey dog", "a dog that is grey"]
    assert contained_share(told, ["miller", "miller", "grey dog.", "grey dog"]) == 0.5


def test_free_questions_are_those_of_the_exam_without_choices():
    exam = {each.question: each for each in load_exam(ExamSettings(), data_source="tinyworld", seed=4)}
    for form in ("text", "letter"):
        asked = load_probe(settings(ExamSettings(answer_form=form)), DataSettings(), 4).questions
        assert len(asked) == 32
        for example in asked:
            question = exam[example.instruction]
            assert example.response == question.choices[question.answer]


def test_no_more_free_questions_are_asked_than_the_exam_has():
    assert len(load_probe(settings(ExamSettings(num_questions=6)), DataSettings(), 0).questions) == 6


def test_neutral_instructions_are_of_every_category_and_answered_plainly():
    neutral = load_probe(settings(), DataSettings(), 0).neutral
    assert [each.label for each in neutral] == [*CATEGORIES] * 4
    assert all(each.response == restyle(each, "neutral").response for each in neutral)


def test_no_client_has_a_neutral_instruction():
    asked = {(each.instruction, each.context) for each in load_probe(settings(), DataSettings(), 0).neutral}
    with load_federated_data(DataSettings(), 0) as data:
        own = {
            (each.instruction, each.context)
            for client in data.client_ids
            for split in SPLITS
            for each in data.examples(client, split)
        }
    assert len(asked) == 32
    assert not asked & own


@pytest.mark.parametrize(
    ("data", "retention"), [(REAL, {}), (DataSettings(), {"num_free_questions": 0, "neutral": "none"})]
)
def test_without_exam_and_neutral_instructions_nothing_is_asked(data, retention):
    assert load_probe(settings(**retention), data, 0) == RetentionProbe()


def test_neutral_instructions_come_from_a_file_by_the_fields_of_the_data(tmp_path):
    rows = [{"q": f"q{number}", "a": f"a{number}"} for number in range(50)] + [{"q": "empty", "a": " "}]
    (tmp_path / "neutral.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = replace(REAL, fields=FieldMap(instruction="q", response="a"))
    own = settings(neutral=str(tmp_path / "neutral.jsonl"), num_neutral=20)
    drawn = load_probe(own, data, 0).neutral
    assert len(drawn) == 20
    assert load_probe(own, data, 0).neutral == drawn != load_probe(own, data, 1).neutral
    assert all(each.response == each.instruction.replace("q", "a") for each in drawn)


@pytest.mark.parametrize(
    ("retention", "sentence"),
    [
        ({"neutral": ""}, "neutral is empty; it must be auto, none, tinyworld or a file"),
        ({"num_neutral": -1}, "num_neutral is -1; it must be at least 0"),
        ({"num_free_questions": -2}, "num_free_questions is -2; it must be at least 0"),
    ],
)
def test_a_setting_outside_its_range_is_refused(retention, sentence):
    with pytest.raises(UserError, match=rf"evaluation\.retention\.{sentence}"):
        RetentionSettings(**retention)


def test_a_file_without_any_instruction_is_refused(tmp_path):
    with pytest.raises(UserError, match=r'retention\.neutral: missing file ".*none.jsonl"'):
        load_probe(settings(neutral=str(tmp_path / "none.jsonl")), REAL, 0)
    (tmp_path / "empty.jsonl").write_text('{"instruction": "q", "response": ""}\n')
    with pytest.raises(UserError, match="has no instruction with a response"):
        load_probe(settings(neutral=str(tmp_path / "empty.jsonl")), REAL, 0)
    (tmp_path / "neutral.doc").touch()
    with pytest.raises(UserError, match=r'^evaluation\.retention\.neutral: file ".*" is of no known form'):
        load_probe(settings(neutral=str(tmp_path / "neutral.doc")), REAL, 0)
