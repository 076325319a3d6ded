"""Files in the forms that people have."""

import gzip
import json
from pathlib import Path

import pytest

from fedexperts.data.files import read_records
from fedexperts.data.settings import DataSettings, PartitionSettings
from fedexperts.data.sources import iterate_examples
from fedexperts.errors import UserError

RECORDS = [
    {"instruction": "Where is Lima?", "response": "In Peru."},
    {"instruction": 'Say "a, b"\nin two lines', "response": "a\nb"},
]
CSV = 'instruction,response\nWhere is Lima?,In Peru.\n"Say ""a, b""\nin two lines","a\nb"\n'


def content_of(name):
    if "csv" in name:
        text = "\ufeff" + CSV
    elif "tsv" in name:
        text = CSV.replace(",", "\t").replace("a\t b", "a, b")
    elif "jsonl" in name:
        text = "".join(json.dumps(record) + "\n" for record in RECORDS)
    else:
        text = json.dumps(RECORDS, indent=1)
    return gzip.compress(text.encode()) if name.endswith(".gz") else text.encode()


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.tsv.gz"]
)
def test_every_form_gives_the_same_records(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(content_of(name))
    assert [record for _, record in read_records(path)] == RECORDS


def test_parquet_is_read_through_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list(RECORDS).to_parquet(str(path))
    assert list(read_records(path)) == [("a.parquet:1", RECORDS[0]), ("a.parquet:2", RECORDS[1])]
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r'file ".*a\.parquet" cannot be read: '):
        list(read_records(path))


def test_a_list_of_files_is_read_in_its_order(tmp_path):
    for name in ("b.json", "a.csv"):
        (tmp_path / name).write_bytes(content_of(name))
    names = [str(tmp_path / name) for name in ("b.json", "a.csv")]
    settings = DataSettings(source=tuple(names), partition=PartitionSettings(kind="iid", num_clients=2))
    assert [example.source_id for example in iterate_examples(settings, seed=0)] == [
        "b.json:1",
        "b.json:2",
        "a.csv:2",
        "a.csv:5",
    ]
    with pytest.raises(UserError, match='missing file "hub_like_name"'):
        list(
            iterate_examples(
                DataSettings(source=(*names, "hub_like_name"), partition=settings.partition), seed=0
            )
        )


def test_the_error_for_an_unknown_form_names_those_that_are_read(tmp_path):
    path = tmp_path / "a.xlsx"
    path.write_bytes(b"PK")
    with pytest.raises(UserError, match=r"of no known form; read are JSON lines .* CSV .* and \.parquet"):
        list(read_records(path))


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.csv", "instruction,response\na,b\nc\n", r"a\.csv:3: a row with another number of values"),
        ("a.csv", "instruction,response\na,b,c\n", r"a\.csv:2: a row with another number of values"),
        ("a.csv", 'instruction,response\n"a,b\n', r"a\.csv.* cannot be read: unexpected end"),
        (
            "a.csv",
            'instruction,response\nc,d\n"a,b\n',
            r"a\.csv.* cannot be read after a\.csv:2: unexpected end",
        ),
        (
            "a.csv",
            "response,instruction,response\na,b,c\n",
            r'a\.csv:1: the header has "response" more than once',
        ),
        ("a.json", '[{"instruction": "a"}, 3]', r"a\.json:2: a JSON int"),
        ("a.json", "[{]", r"a\.json: unreadable JSON .* an array of objects is needed"),
    ],
)
def test_a_damaged_file_is_told_by_its_place(tmp_path, name, text, sentence):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match=sentence):
        list(read_records(path))


def test_what_is_no_file_is_told():
    with pytest.raises(UserError, match='"/dev/null" is neither a file nor a folder'):
        list(read_records(Path("/dev/null")))
