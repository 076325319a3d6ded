"""Read records from files: JSON lines, JSON arrays, CSV and parquet."""

import csv
import gzip
import io
import json
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Final

from fedexperts.errors import UserError, needs_extra

Record = tuple[str, Mapping[str, Any]]
"""File and line (or number of the record), and the record's fields."""

_PLAIN: Final = (".jsonl", ".json", ".csv", ".tsv")
PARQUET: Final = ".parquet"
SUFFIXES: Final = (*_PLAIN, *(f"{suffix}.gz" for suffix in _PLAIN), PARQUET)
"""Ends of the names of files that are read."""

FORMS: Final = (
    "read are JSON lines (.jsonl, .json), a JSON array of objects (.json), CSV with a header (.csv, .tsv), "
    "each also as .gz, and .parquet"
)


def read_records(path: Path, *, key: str = "data.source") -> Iterator[Record]:
    """Yield each record of a file, or of a folder's files in the order of their names.

    ``key`` is the setting that an error about the file names.
    """
    if path.is_file():
        yield from _read_file(path, path.name, key)
        return
    if path.exists() and not path.is_dir():
        raise UserError(f'{key}: "{path}" is neither a file nor a folder.')
    for file in files_in(path, key=key):
        yield from _read_file(file, file.relative_to(path).as_posix(), key)


def files_in(folder: Path, *, key: str = "data.source") -> list[Path]:
    """Return the files of a folder and its subfolders that can be read, in the order of their names."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name.endswith(SUFFIXES))
    if not files:
        raise UserError(f'{key}: folder "{folder}" holds no file that ends in {", ".join(SUFFIXES)}.')
    return files


def _read_file(path: Path, name: str, key: str) -> Iterator[Record]:
    if not name.endswith(SUFFIXES):
        raise UserError(f'{key}: file "{path}" is of no known form; {FORMS}.')
    reader = _reader_of(name.removesuffix(".gz"))
    read = ""
    try:
        for where, record in reader(path, name):
            read = f" after {where}"
            yield where, record
    except (OSError, EOFError, zlib.error, csv.Error, UnicodeDecodeError) as error:
        raise UserError(f'{key}: file "{path}" cannot be read{read}: {error}.') from error


def _reader_of(name: str) -> Callable[[Path, str], Iterator[Record]]:
    if name.endswith((".csv", ".tsv")):
        return _read_csv
    if name.endswith(PARQUET):
        return _read_parquet
    return _read_json if name.endswith(".json") else _read_lines


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _read_json(path: Path, name: str) -> Iterator[Record]:
    """Read a JSON array where the file begins with one, else JSON lines."""
    with _open(path) as file:
        begins_array = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    if not begins_array:
        yield from _read_lines(path, name)
        return
    with _open(path) as file:
        try:
            records = json.loads(file.read())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name}: unreadable JSON ({error}); an array of objects is needed.") from None
    for number, record in enumerate(records, start=1):
        yield f"{name}:{number}", _object(record, f"{name}:{number}")


def _read_lines(path: Path, name: str) -> Iterator[Record]:
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{name}:{number}"
            if line.strip():
                yield where, _parse(line, where)


def _parse(line: bytes, where: str) -> Mapping[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: unreadable JSON ({error}); one object on each line is needed.") from None
    return _object(record, where)


def _object(record: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(record, dict):
        raise UserError(f"{where}: a JSON {type(record).__name__}, but one object for each record is needed.")
    return record


def _read_csv(path: Path, name: str) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if ".tsv" in name[-7:] else ","
    with io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="") as lines:
        rows = csv.DictReader(lines, delimiter=delimiter, strict=True)
        twice = [field for field, number in Counter(rows.fieldnames or ()).items() if number > 1]
        if twice:
            raise UserError(f'{name}:1: the header has "{twice[0]}" more than once.')
        for row in rows:
            where = f"{name}:{rows.line_num}"
            if None in row or None in row.values():
                raise UserError(f"{where}: a row with another number of values than the header.")
            yield where, row


def _read_parquet(path: Path, name: str) -> Iterator[Record]:
    try:
        import datasets  # an optional dependency
    except ImportError:
        raise needs_extra(f'file "{path}"', "datasets", "hub") from None
    try:
        rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        for number, row in enumerate(rows, start=1):
            yield f"{name}:{number}", row
    except Exception as error:  # the library raises many kinds for a damaged file
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f'file "{path}" cannot be read: {type(error).__name__}: {reason}') from error
