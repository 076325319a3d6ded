"""Read examples from the generated world, files on disk, or a Hugging Face data set."""

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Final

from fedexperts.data.examples import Example
from fedexperts.data.files import SUFFIXES, Record, read_records
from fedexperts.data.generated import generate_tinyworld
from fedexperts.data.records import RecordReader
from fedexperts.data.settings import TINYWORLD, DataSettings
from fedexperts.errors import UserError, needs_extra

_HUB_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def iterate_examples(settings: DataSettings, seed: int) -> Iterator[Example]:
    """Yield every example of ``settings.source`` in a fixed order; ``seed`` only affects the generated
    world."""
    if settings.source == TINYWORLD:
        yield from generate_tinyworld(settings, seed)
        return
    reader = RecordReader.from_settings(settings)
    for where, record in _records(settings):
        yield reader.read(record, where)


def _records(settings: DataSettings) -> Iterator[Record]:
    paths = paths_of(settings)
    if paths:
        _refuse_hub_settings(settings)
        return chain.from_iterable(map(read_records, paths))
    return read_hub(settings)


def paths_of(settings: DataSettings) -> list[Path]:
    """Return the files and folders that ``data.source`` names; none where it is a data set of the hub.

    Raises:
        UserError: one of them is missing.
    """
    listed = isinstance(settings.source, tuple)
    found = []
    for name in settings.source if isinstance(settings.source, tuple) else (settings.source,):
        path = Path(name).expanduser()
        if path.exists():
            found.append(path)
        elif listed or _looks_like_path(name):
            raise UserError(f'data.source: missing file "{name}".')
    return found


def read_hub(settings: DataSettings) -> Iterator[Record]:
    """Yield each record of a Hugging Face data set, downloaded or from its cache, with its number from 1."""
    name = str(settings.source)
    if not _HUB_NAME.fullmatch(name):
        raise UserError(f'data.source is "{name}", which is neither a file nor a name like "owner/name".')
    try:
        import datasets  # an optional dependency
    except ImportError:
        user = f'data.source "{name}" is no file, and as a Hugging Face data set it'
        raise needs_extra(user, "datasets", "hub") from None
    try:
        rows = datasets.load_dataset(
            name, settings.hub_config or None, split=settings.hub_split, revision=settings.revision or None
        )
    except Exception as error:  # the library raises many kinds for a wrong name, split or network
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f'data.source: split "{settings.hub_split}" of the Hugging Face data set "{name}" cannot be '
            f"loaded: {type(error).__name__}: {reason}"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{name}:{settings.hub_split}:{number}", row


def _looks_like_path(source: str) -> bool:
    return (
        source.endswith((*SUFFIXES, ".gz", "/"))
        or source.startswith((".", "/", "~"))
        or "\\" in source
        or source.count("/") > 1
    )


def _refuse_hub_settings(settings: DataSettings) -> None:
    for name, default in (("hub_config", ""), ("hub_split", "train"), ("revision", "")):
        if getattr(settings, name) != default:
            raise UserError(f'data.{name} has no effect: data.source "{settings.source}" is on this disk.')
