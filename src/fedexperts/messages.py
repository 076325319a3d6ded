"""Messages between server and client, and their bytes on the wire.

A message is one block of JSON, padded with spaces to :data:`HEADER_BLOCK` bytes, and up to three safetensors
blobs: ``tensors`` (always), then ``beside`` and ``tables`` where they hold anything. A message's size
therefore follows from the names, shapes and dtypes of its tensors alone: it can be predicted to the byte, and
its length says nothing about the figures in the header. Nothing is unpickled.
"""

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import load_file
from safetensors.torch import save as save_safetensors
from torch import Tensor

from fedexperts.errors import UserError
from fedexperts.tensors import Tensors

HEADER_BLOCK = 4096
"""Bytes of the JSON part of every message."""

WEIGHTS = "__weights__"
"""Reserved name inside an upload's first blob: the weights of its tensors, float64, in the order of their
names."""

LONGEST_FAILURE = 1000
"""Characters of a failure that are sent; the rest is cut."""

LARGEST_ANSWER = 64 * 2**20
"""Bytes of an answer that carries scores, counts or a report, but no tensors of a model."""

Buffer = bytes | memoryview
LoadBlob = Callable[[memoryview], Tensors]
"""Function that returns the tensors of a safetensors blob."""

_PREFIX = struct.Struct("<4sIQQ")
_MAGIC = b"FXM2"


@dataclass(frozen=True, kw_only=True)
class Sent:
    """Tensors and orders that the server sends to one client."""

    tensors: Tensors = field(default_factory=dict)
    """They go into the model: parameters and experts by name."""
    beside: Tensors = field(default_factory=dict)
    """They do not: control variates, moments, utilities, counts, masks."""
    orders: Mapping[str, Any] = field(default_factory=dict)
    """A few small plain values, such as a rank; per-expert and per-client data go as tensors."""


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """Turn that an upload answers; the server counts one upload of each."""

    run: str = ""
    round_number: int = 0
    client_id: str = ""


@dataclass(frozen=True, kw_only=True)
class Download:
    """One client's message from the server in one round."""

    round_number: int
    task: str
    """``train``; ``evaluate`` or ``evaluate_fully``: score before and after local steps, and keep nothing;
    ``evaluate_base``: score the pretrained model."""
    sent: Sent = field(default_factory=Sent)
    kept_round: int = 0
    """Last round whose upload of this client the server accepted, 0 before the first: the client goes on
    from what it kept then."""
    config_sha256: str = ""
    """Hash of the resolved configuration; a client that was started from another one refuses."""
    run: str = ""
    """Name of the run, unlike any other's, which the answer repeats."""
    largest_answer: int = LARGEST_ANSWER
    """Bytes of the answer above which it is refused undecoded; known to the server alone, and never sent."""


@dataclass(frozen=True, kw_only=True)
class Upload:
    """One client's answer."""

    tensors: Tensors = field(default_factory=dict)
    """They come out of the model; the server averages them."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weight of each of ``tensors`` in the server's mean, by name."""
    beside: Tensors = field(default_factory=dict)
    """For the server's half of the algorithm, or its evaluation: variates, counts, utilities, routing."""
    tables: Tensors = field(default_factory=dict)
    """Measured by the algorithm, per layer or per expert, for the log and the report."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Figures that every algorithm has, such as ``train_loss``."""
    measured: dict[str, float] = field(default_factory=dict)
    """Further figures of the algorithm, for the log and the report."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall-clock seconds by phase of the client's turn."""
    work: dict[str, float] = field(default_factory=dict)
    """Counted work of the turn, ``phase.quantity`` to number; empty without a clock."""
    report: dict[str, Any] = field(default_factory=dict)
    """A Flower node's description of itself; empty in every other answer."""
    failure: str = ""
    """Reason why the client has nothing to send; empty when it has."""
    stamp: Stamp = Stamp()
    """Turn that it answers."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Tensors that a client must send in a round, no more and no less; they may be on the meta device."""

    tensors: Tensors = field(default_factory=dict)
    beside: Tensors = field(default_factory=dict)
    tables: Tensors = field(default_factory=dict)


def _encode(header: Mapping[str, Any], sections: tuple[Tensors, Tensors, Tensors]) -> bytes:
    text = json.dumps(header, sort_keys=True).encode()
    room = HEADER_BLOCK - _PREFIX.size
    if len(text) > room:
        raise UserError(
            f"the plain data of a message take {len(text)} bytes, but {room} is the most: send what there is "
            "per layer, expert or client as tensors"
        )
    first, *others = sections
    blobs = [save_safetensors(first), *(save_safetensors(one) if one else b"" for one in others)]
    prefix = _PREFIX.pack(_MAGIC, HEADER_BLOCK, len(blobs[0]), len(blobs[1]))
    return b"".join((prefix, text.ljust(room), *blobs))


def _load_copy(blob: memoryview) -> Tensors:
    return load_safetensors(bytes(blob))


def load_on_disk(blob: memoryview) -> Tensors:
    """Return the tensors of a safetensors blob, which is copied to a temporary file that they lie in."""
    with NamedTemporaryFile(prefix="fedexperts-") as file:
        file.write(blob)
        file.flush()
        return load_file(file.name)


def _decode(message: Buffer, load: LoadBlob = _load_copy) -> tuple[dict[str, Any], list[Tensors]]:
    message = memoryview(message)
    try:
        header, ends = _read_header(message)
        start, sections = HEADER_BLOCK, []
        for end in ends:
            sections.append(load(message[start:end]) if end > start else {})
            start = end
        return header, sections
    except Exception as error:
        reason = plain_text(f"{type(error).__name__}: {error}")
        raise UserError(f"message of {len(message)} bytes cannot be read: {reason}") from error


def _read_header(message: memoryview) -> tuple[dict[str, Any], list[int]]:
    """Return a message's plain data, and where each of its blobs ends."""
    magic, size, *lengths = _PREFIX.unpack_from(message)
    ends = [size + lengths[0], size + sum(lengths), len(message)]
    if magic != _MAGIC or size != HEADER_BLOCK or ends != sorted(ends):
        raise ValueError("not a FedExperts message")
    header = json.loads(bytes(message[_PREFIX.size : size]))
    if not isinstance(header, dict):
        raise ValueError(f"its header is a JSON {type(header).__name__}")
    return header, ends


def brings_tensors(message: Buffer) -> bool:
    """Return whether an answer is no failure, as far as its header says; its tensors are not looked at."""
    try:
        return _read_header(memoryview(message))[0].get("failure") == ""
    except Exception:
        return False


def plain_text(text: str) -> str:
    """Return ``text`` as one line of at most :data:`LONGEST_FAILURE` characters that every file takes."""
    line = " ".join(text[: 2 * LONGEST_FAILURE].split())
    return line.encode("utf-8", "replace").decode()[:LONGEST_FAILURE]


def _cut(text: str) -> str:
    """Return as much of ``text`` as a header has room for: one character may take twelve bytes of JSON."""
    while len(json.dumps(text)) > HEADER_BLOCK // 2:
        text = text[: len(text) * 3 // 4]
    return text


def encode_download(download: Download) -> bytes:
    """Return the bytes of a download.

    Raises:
        UserError: its orders do not fit into the header.
    """
    sent = download.sent
    header = {
        "round": download.round_number,
        "task": download.task,
        "kept_round": download.kept_round,
        "config_sha256": download.config_sha256,
        "run": download.run,
        "orders": dict(sent.orders),
    }
    return _encode(header, (sent.tensors, sent.beside, {}))


def decode_download(message: Buffer, load: LoadBlob = _load_copy) -> Download:
    """Read what :func:`encode_download` wrote; raise UserError for anything else.

    ``load`` reads each blob: into memory, or as :func:`load_on_disk` does.
    """
    header, (tensors, beside, _) = _decode(message, load)
    orders = _field(header, "orders", dict)
    return Download(
        round_number=_field(header, "round", int),
        task=_field(header, "task", str),
        sent=Sent(tensors=tensors, beside=beside, orders=orders),
        kept_round=_field(header, "kept_round", int),
        config_sha256=_field(header, "config_sha256", str),
        run=_field(header, "run", str),
    )


def encode_upload(upload: Upload) -> bytes:
    """Return the bytes of an upload.

    Raises:
        UserError: its plain data do not fit into the header.
    """
    tensors = dict(upload.tensors)
    if tensors:
        listed = [upload.weights[name] for name in sorted(tensors)]
        tensors[WEIGHTS] = torch.tensor(listed, dtype=torch.float64)
    header = {
        "metrics": upload.metrics,
        "measured": upload.measured,
        "seconds": upload.seconds,
        "work": upload.work,
        "report": upload.report,
        "failure": _cut(plain_text(upload.failure)),
        "run": upload.stamp.run,
        "round": upload.stamp.round_number,
        "client": upload.stamp.client_id,
    }
    return _encode(header, (tensors, upload.beside, upload.tables))


def decode_upload(message: bytes) -> Upload:
    """Read what :func:`encode_upload` wrote; raise UserError for anything else, whatever it is."""
    header, (tensors, beside, tables) = _decode(message)
    weights = tensors.pop(WEIGHTS, torch.empty(0, dtype=torch.float64))
    if weights.dtype != torch.float64 or weights.shape != (len(tensors),):
        raise UserError(
            f"upload has {len(tensors)} tensors, but its weights are {weights.dtype} {tuple(weights.shape)}"
        )
    return Upload(
        tensors=tensors,
        weights=dict(zip(sorted(tensors), weights.tolist(), strict=True)),
        beside=beside,
        tables=tables,
        metrics=_figures(header, "metrics"),
        measured=_figures(header, "measured"),
        seconds=_figures(header, "seconds"),
        work=_figures(header, "work"),
        report=_field(header, "report", dict),
        failure=plain_text(_field(header, "failure", str)),
        stamp=Stamp(
            run=_field(header, "run", str),
            round_number=_field(header, "round", int),
            client_id=_field(header, "client", str),
        ),
    )


def _field(header: Mapping[str, Any], name: str, kind: type) -> Any:
    value = header.get(name)
    if type(value) is not kind:
        raise UserError(f"message has a JSON {type(value).__name__} for {name!r}, not a {kind.__name__}")
    return value


def _figures(header: Mapping[str, Any], name: str) -> dict[str, float]:
    figures: dict[str, Any] = _field(header, name, dict)
    for key, value in figures.items():
        if type(value) not in (int, float) or not math.isfinite(value):
            raise UserError(f"{name} {plain_text(key)[:60]!r} is not a finite number")
    return {key: float(value) for key, value in figures.items()}


def predict_upload_bytes(expected: Expected) -> int:
    """Return the size of the message that carries these tensors, to the byte."""
    weights = {WEIGHTS: torch.empty(len(expected.tensors), dtype=torch.float64, device="meta")}
    tensors = {**expected.tensors, **(weights if expected.tensors else {})}
    return _predict_bytes(tensors, expected.beside, expected.tables)


def predict_download_bytes(sent: Sent) -> int:
    """Return the size of the message that carries ``sent``, to the byte."""
    return _predict_bytes(sent.tensors, sent.beside, {})


def _predict_bytes(first: Mapping[str, Tensor], *others: Mapping[str, Tensor]) -> int:
    return HEADER_BLOCK + _blob_bytes(first) + sum(_blob_bytes(one) for one in others if one)


_ORDER = (
    (torch.bool, "BOOL"),
    (torch.uint8, "U8"),
    (torch.int8, "I8"),
    (torch.float8_e5m2, "F8_E5M2"),
    (torch.float8_e4m3fn, "F8_E4M3"),
    (torch.int16, "I16"),
    (torch.uint16, "U16"),
    (torch.float16, "F16"),
    (torch.bfloat16, "BF16"),
    (torch.int32, "I32"),
    (torch.uint32, "U32"),
    (torch.float32, "F32"),
    (torch.complex64, "C64"),
    (torch.float64, "F64"),
    (torch.int64, "I64"),
    (torch.uint64, "U64"),
)
"""Names of dtypes in safetensors, in the order in which it sorts them; the last come first in a file."""
_RANK = {dtype: (-rank, name) for rank, (dtype, name) in enumerate(_ORDER)}


def _blob_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Size of a safetensors blob: 8 bytes, a JSON header padded to 8, then the values."""
    specs = sorted(
        (*_RANK[t.dtype], name, list(t.shape), t.numel() * t.element_size()) for name, t in tensors.items()
    )
    sizes = sum(size for *_, size in specs)
    return 8 + _header_bytes((name, dtype, shape, size) for _, dtype, name, shape, size in specs) + sizes


def _header_bytes(specs: Iterable[tuple[str, str, list[int], int]]) -> int:
    header, offset = {}, 0
    for name, dtype, shape, size in specs:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return math.ceil(len(text) / 8) * 8
