"""Download and Upload: all that crosses the wire, and the bytes it crosses as.

A message is a block of JSON, padded with spaces to a multiple of :data:`HEADER_BLOCK` bytes, and a
safetensors blob. The padding makes a message's size follow from the tensors alone, so that it can be
predicted to the byte and its length says nothing of what the client reports. Nothing is ever unpickled.
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from fedexperts.errors import UserError
from fedexperts.tensors import Tensors

HEADER_BLOCK = 4096
"""The JSON part is padded to a multiple of this many bytes."""

WEIGHTS = "__weights__"
"""Reserved tensor name: the weights of an upload's tensors, float64, in the order of their names."""

_PREFIX = struct.Struct("<4sI")
_MAGIC = b"FXM1"


@dataclass(frozen=True, kw_only=True)
class Download:
    """What the server sends to one client in one round."""

    round: int
    task: str
    """``train``; ``evaluate`` or ``evaluate_fully``: score before and after local steps, and keep no tensor;
    ``evaluate_base``: score the untouched model."""
    tensors: Tensors
    config_sha256: str = ""
    """Hash of the resolved configuration; a client that was started from another one refuses."""


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What one client sends back."""

    tensors: Tensors = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    """How much each tensor counts in the server's mean, by tensor name."""
    metrics: dict[str, float] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    """Further facts as JSON."""
    failure: str = ""
    """Why the client has nothing to send; empty when it has."""


def _encode(header: Mapping[str, Any], tensors: Tensors) -> bytes:
    text = json.dumps(header, sort_keys=True).encode()
    size = math.ceil((len(text) + _PREFIX.size) / HEADER_BLOCK) * HEADER_BLOCK
    block = _PREFIX.pack(_MAGIC, size) + text.ljust(size - _PREFIX.size)
    return block + save_safetensors(tensors)


def _decode(message: bytes) -> tuple[dict[str, Any], Tensors]:
    try:
        magic, size = _PREFIX.unpack_from(message)
        if magic != _MAGIC or size > len(message):
            raise ValueError("not a FedExperts message")
        header = json.loads(message[_PREFIX.size : size])
        return dict(header), load_safetensors(message[size:])
    except Exception as error:
        raise UserError(f"message of {len(message)} bytes cannot be read: {error}") from error


def encode_download(download: Download) -> bytes:
    """The bytes of a download."""
    header = {"round": download.round, "task": download.task, "config_sha256": download.config_sha256}
    return _encode(header, download.tensors)


def decode_download(message: bytes) -> Download:
    """Inverse of :func:`encode_download`; raises UserError for anything else."""
    header, tensors = _decode(message)
    try:
        return Download(tensors=tensors, **header)
    except TypeError as error:
        raise UserError(f"message of {len(message)} bytes is not a download: {error}") from error


def encode_upload(upload: Upload) -> bytes:
    """The bytes of an upload."""
    header = asdict(upload) | {"tensors": None, "weights": None}
    names = sorted(upload.tensors)
    tensors = dict(upload.tensors)
    if names:
        tensors[WEIGHTS] = torch.tensor([upload.weights[name] for name in names], dtype=torch.float64)
    return _encode(header, tensors)


def decode_upload(message: bytes) -> Upload:
    """Inverse of :func:`encode_upload`; raises UserError for anything else."""
    header, tensors = _decode(message)
    weights = tensors.pop(WEIGHTS, torch.empty(0, dtype=torch.float64)).tolist()
    if len(weights) != len(tensors):
        raise UserError(f"upload has {len(tensors)} tensors and {len(weights)} weights")
    header |= {"tensors": tensors, "weights": dict(zip(sorted(tensors), weights, strict=True))}
    try:
        return Upload(**header)
    except TypeError as error:
        raise UserError(f"message of {len(message)} bytes is not an upload: {error}") from error


def predict_bytes(tensors: Mapping[str, Tensor], *, is_upload: bool) -> int:
    """Size of the message that carries tensors of these names, shapes and dtypes (the device may be meta).

    Follows the safetensors format: 8 bytes, a JSON header padded to 8, then the values, widest dtype first.
    Assumes that the report fits one header block, which holds for every algorithm of ours.
    """
    specs = [
        (name, _dtype_name(t), list(t.shape), t.numel() * t.element_size()) for name, t in tensors.items()
    ]
    if is_upload and specs:
        specs.append((WEIGHTS, "F64", [len(specs)], 8 * len(specs)))
    specs.sort(key=lambda spec: (-_DTYPE_BYTES[spec[1]], spec[0]))
    return HEADER_BLOCK + 8 + _header_bytes(specs) + sum(size for *_, size in specs)


def _header_bytes(specs: Iterable[tuple[str, str, list[int], int]]) -> int:
    header, offset = {}, 0
    for name, dtype, shape, size in specs:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return math.ceil(len(text) / 8) * 8


_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_DTYPE_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


def _dtype_name(tensor: Tensor) -> str:
    return _DTYPES[tensor.dtype]
