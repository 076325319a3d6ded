"""Exams from tinyworld and from files, and what is said of a bad file."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from fedexperts.data.examples import Question
from fedexperts.errors import UserError
from fedexperts.evaluation.multiple_choice import load_exam
from fedexperts.evaluation.settings import ExamFields, ExamSettings

GOOD = {"question": "Where?", "choices": ["Peru", "Norway", "Chile"], "answer": 2, "subject": "geography"}
QUESTION = Question(question="Where?", choices=("Peru", "Norway", "Chile"), answer=2, subject="geography")


def write(path: Path, *records: dict[str, Any]) -> Path:
    text = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def load(path: Path, num_questions: int = 0, **settings: Any) -> list[Question]:
    exam = ExamSettings(source=str(path), num_questions=num_questions, **settings)
    return load_exam(exam, data_source="tinyworld", seed=0)


def test_auto_is_tinyworlds_exam_for_tinyworlds_data_only() -> None:
    exam = ExamSettings(num_questions=12)
    assert len(load_exam(exam, data_source="tinyworld", seed=0)) == 12
    assert load_exam(exam, data_source="dolly.jsonl", seed=0) == []
    assert load_exam(ExamSettings(source="none"), data_source="tinyworld", seed=0) == []


@pytest.mark.parametrize("answer", [2, "2", "C", "c"])
def test_an_answer_is_an_index_or_a_letter(tmp_path: Path, answer: int | str) -> None:
    assert load(write(tmp_path / "exam.jsonl", GOOD | {"answer": answer})) == [QUESTION]


def test_choices_may_be_numbered_fields(tmp_path: Path) -> None:
    """The layout in which MMLU is often kept."""
    record = {"question": "Where?", "subject": "geography", "answer": "2"}
    record |= {"choice0": "Peru", "choice1": "Norway", "choice2": "Chile"}
    assert load(write(tmp_path / "exam.jsonl.gz", record)) == [QUESTION]


def test_fields_may_have_other_names(tmp_path: Path) -> None:
    record = {"q": "Where?", "options": GOOD["choices"], "gold": 2, "topic": "geography"}
    fields = ExamFields(question="q", choices="options", answer="gold", subject="topic")
    assert load(write(tmp_path / "exam.jsonl", record), fields=fields) == [QUESTION]


def test_letters_are_asked_for_by_a_setting(tmp_path: Path) -> None:
    (question,) = load(write(tmp_path / "exam.jsonl", GOOD), answer_form="letter")
    assert question.choices == ("A", "B", "C")
    assert question.question.endswith("C. Chile")


def test_questions_are_drawn_by_the_seed_and_keep_their_order(tmp_path: Path) -> None:
    path = write(tmp_path / "exam.jsonl", *(GOOD | {"question": f"{number:03d}"} for number in range(50)))
    drawn = {
        seed: [
            question.question
            for question in load_exam(
                ExamSettings(source=str(path), num_questions=10), data_source="", seed=seed
            )
        ]
        for seed in (0, 0, 1)
    }
    assert drawn[0] == sorted(drawn[0])
    assert len(set(drawn[0])) == 10
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 3}, r'"answer" is 3; it must be an index from 0 to 2 or a letter from A to C'),
        ({"answer": "D"}, r"\"answer\" is 'D'"),
        ({"answer": True}, r'"answer" is True'),
        ({"answer": "Chile"}, r"\"answer\" is 'Chile'"),
        ({"question": " "}, r"\"question\" is ' '; it must be a text that is not empty"),
        ({"choices": "Peru"}, r"\"choices\" must be a list, not 'Peru'"),
        ({"choices": ["Peru", 3, "x"]}, r'"choices" is 3; it must be a text'),
        ({"choices": ["Peru", "Peru"]}, "two different choices or more"),
        ({"choices": ["Peru"]}, "two different choices or more"),
    ],
)
def test_a_bad_question_is_named_by_file_and_line(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "exam.jsonl", GOOD, GOOD | change)
    with pytest.raises(UserError, match=rf"exam\.jsonl:2: .*{message}"):
        load(path)


def test_a_bad_numbered_choice_is_named_by_file_and_line(tmp_path: Path) -> None:
    record = {"question": "Where?", "answer": 0, "choice0": "Peru", "choice1": ""}
    with pytest.raises(UserError, match=r"exam\.jsonl:1: .*\"choice1\" is ''; it must be a text"):
        load(write(tmp_path / "exam.jsonl", record))


@pytest.mark.parametrize("field", ["question", "choices", "answer"])
def test_a_missing_field_is_named_with_its_setting(tmp_path: Path, field: str) -> None:
    path = write(tmp_path / "exam.jsonl", {name: value for name, value in GOOD.items() if name != field})
    with pytest.raises(UserError, match=rf'"{field}" \(evaluation\.exam\.fields\.{field}\) is missing'):
        load(path)


def test_a_subject_that_was_named_must_be_there(tmp_path: Path) -> None:
    path = write(tmp_path / "exam.jsonl", GOOD)
    with pytest.raises(UserError, match=r'"topic" \(evaluation\.exam\.fields\.subject\) is missing'):
        load(path, fields=ExamFields(subject="topic"))


def test_files_that_cannot_be_used_are_told_by_the_setting(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluation\.exam\.source: missing file"):
        load(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="has no question"):
        load(write(tmp_path / "empty.jsonl"))
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(b"no gzip")
    with pytest.raises(UserError, match=r"evaluation\.exam\.source: file"):
        load(broken)
    with pytest.raises(UserError, match=r"num_questions is 2; it must be at most the 1 questions"):
        load(write(tmp_path / "exam.jsonl", GOOD), num_questions=2)
