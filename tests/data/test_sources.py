import builtins
import gzip
import json

import pytest

from fedexperts.data.settings import DataSettings, FieldMap, PartitionSettings
from fedexperts.data.sources import iterate_examples
from fedexperts.errors import UserError

RECORD = {"instruction": "Where is Lima?", "context": "", "response": "In Peru.", "category": "open_qa"}
IID = PartitionSettings(kind="iid", num_clients=2)


def read(source, **options):
    options = {"partition": IID, **options}
    return list(iterate_examples(DataSettings(source=str(source), **options), seed=0))


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.jsonl.gz", "data.json.gz"])
def test_a_file_of_json_lines_is_read(write_lines, name):
    example, other = read(write_lines([RECORD, RECORD | {"context": "Lima is in Peru."}], name))
    assert (example.instruction, example.response, example.label) == ("Where is Lima?", "In Peru.", "open_qa")
    assert other.context == "Lima is in Peru."
    assert (example.source_id, other.source_id) == (f"{name}:1", f"{name}:2")


def test_a_folder_is_read_in_the_order_of_its_names(write_lines, tmp_path):
    (tmp_path / "more").mkdir()
    for name in ("b.jsonl", "more/c.jsonl.gz", "a.json"):
        write_lines([RECORD], name)
    (tmp_path / "README.md").write_text("not data")
    assert [e.source_id for e in read(tmp_path)] == ["a.json:1", "b.jsonl:1", "more/c.jsonl.gz:1"]


def test_blank_lines_are_no_records(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(f"{json.dumps(RECORD)}\n\n{json.dumps(RECORD)}\n\n")
    assert [e.source_id for e in read(path)] == ["data.jsonl:1", "data.jsonl:3"]


def test_input_and_output_stand_in_for_context_and_response(write_lines):
    (example,) = read(write_lines([{"instruction": "i", "input": "c", "output": "r"}]))
    assert (example.context, example.response, example.label) == ("c", "r", "")


def test_a_field_that_was_named_has_no_stand_in(write_lines):
    path = write_lines([{"instruction": "i", "input": "c", "output": "r"}])
    with pytest.raises(
        UserError, match=r'"answer" \(data\.fields\.response\) is missing; .* instruction, input'
    ):
        read(path, fields=FieldMap(response="answer"))


def test_fields_are_read_by_the_map(write_lines):
    path = write_lines([{"question": "q", "passage": None, "answer": "a", "topic": 3, "site": 1595}])
    fields = FieldMap(
        instruction="question", context="passage", response="answer", label="topic", client="site"
    )
    (example,) = read(path, fields=fields)
    assert (example.instruction, example.context, example.response) == ("q", "", "a")
    assert (example.label, example.client) == ("3", "1595")


def test_a_missing_field_is_named_with_file_and_line_and_those_present(write_lines):
    path = write_lines([RECORD, {"instruction": "i", "answer": "a"}])
    sentence = (
        r'data\.jsonl:2: field "response" \(data\.fields\.response\) is missing; .* instruction, answer'
    )
    with pytest.raises(UserError, match=sentence):
        read(path)


@pytest.mark.parametrize("record", [{"instruction": "i", "response": "r"}, RECORD | {"category": ""}])
def test_a_label_is_required_where_the_partition_goes_by_it(write_lines, record):
    path = write_lines([record])
    with pytest.raises(UserError, match=r'data\.jsonl:1: field "category" \(data\.fields\.label\) is'):
        read(path, partition=PartitionSettings(kind="dirichlet", num_clients=2))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b'{"instruction": ', r"data\.jsonl:2: unreadable JSON"),
        (b'\xff{"a": 1}', r"data\.jsonl:2: unreadable JSON"),
        (b"[1, 2]", r"data\.jsonl:2: a JSON list"),
        (b'{"instruction": ["a"], "response": "r"}', r'data\.jsonl:2: field "instruction" is of type list'),
        (b'{"instruction": "\\ud800", "response": "r"}', r'data\.jsonl:2: field "instruction" is not valid'),
        (b'{"instruction": "i", "response": "r", "category": {}}', r'field "category" is of type dict'),
    ],
)
def test_an_unreadable_line_is_told_by_file_and_number(tmp_path, line, sentence):
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps(RECORD).encode() + b"\n" + line + b"\n")
    with pytest.raises(UserError, match=sentence):
        read(path)


@pytest.mark.parametrize("name", ["nowhere.jsonl", "./nowhere", "/nowhere/at/all", "data/nowhere.json.gz"])
def test_a_missing_file_is_called_so(name):
    with pytest.raises(UserError, match=f'missing file "{name}"'):
        read(name)


def test_a_cut_or_false_gzip_file_is_refused(tmp_path):
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(RECORD).encode() * 100)[:40])
    with pytest.raises(UserError, match="cannot be read"):
        read(path)
    path.write_bytes(b"plain")
    with pytest.raises(UserError, match="cannot be read"):
        read(path)


def test_a_folder_without_json_lines_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no file that ends in"):
        read(tmp_path)


def test_hub_settings_are_refused_for_a_file(write_lines):
    with pytest.raises(UserError, match=r"data\.revision has no effect"):
        read(write_lines([RECORD]), revision="main")


def test_a_hub_data_set_is_read_through_datasets(write_lines, monkeypatch, tmp_path):
    """The library itself loads a folder here, under a name that would be the hub's."""
    datasets = pytest.importorskip("datasets")
    write_lines([RECORD, RECORD | {"category": "closed_qa"}], "train.jsonl")
    load = datasets.load_dataset
    asked = []

    def load_here(name, config, *, split, revision):
        asked.append((name, config, split, revision))
        return load(str(tmp_path), split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_here)
    examples = read("owner/name", revision="v1")
    assert asked == [("owner/name", None, "train", "v1")]
    assert [example.label for example in examples] == ["open_qa", "closed_qa"]
    assert [example.source_id for example in examples] == ["owner/name:train:1", "owner/name:train:2"]


def test_a_hub_data_set_that_cannot_be_loaded_is_one_sentence(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def unreachable(*arguments, **options):
        raise ConnectionError("no route to the hub\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    sentence = r'Hugging Face data set "owner/name" cannot be loaded: ConnectionError: no route to the hub$'
    with pytest.raises(UserError, match=sentence):
        read("owner/name")


def test_a_hub_data_set_without_the_library_says_what_to_install(monkeypatch):
    real_import = builtins.__import__

    def without_datasets(name, *arguments):
        if name == "datasets":
            raise ImportError(name)
        return real_import(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(UserError, match=r"datasets: run pip install -e '\.\[hub\]'"):
        read("owner/name")


def test_a_name_that_is_neither_file_nor_data_set_is_refused():
    with pytest.raises(UserError, match="neither a file nor a name"):
        read("what is this")
