"""Mutated messages through decoder, ledger and edge: a reason, or an upload of the due form."""

import json
import math
import random
import struct
from collections import Counter
from dataclasses import replace

import pytest
import torch

from fedexperts.federation.cohort import CohortSettings
from fedexperts.federation.edge import LARGEST_WEIGHT, read_answer, refusal
from fedexperts.federation.ledger import Ledger
from fedexperts.federation.transport import Delivery
from fedexperts.messages import HEADER_BLOCK, Expected, Stamp, Upload, encode_upload
from fedexperts.tensors import first_non_finite, shapes_of

PREFIX = struct.Struct("<4sIQQ")
START = {"layer.a": torch.arange(6.0).reshape(2, 3), "layer.b": torch.ones(4)}
HONEST = Upload(
    tensors={name: tensor + 0.1 for name, tensor in START.items()},
    weights=dict.fromkeys(START, 24.0),
    beside={"tokens": torch.arange(5)},
    tables={"gate_mean": torch.rand(2)},
    metrics=dict.fromkeys(("train_loss", "num_examples", "num_labels", "num_tokens"), 3.0)
    | {"num_untrained": 0.0},
    seconds={"train": 0.5},
    work={"train.flops": 1e9},
    stamp=Stamp(run="run", round_number=4, client_id="north"),
)
EXPECTED = Expected(
    tensors=shapes_of(HONEST.tensors), beside=shapes_of(HONEST.beside), tables=shapes_of(HONEST.tables)
)
LARGEST = 1 << 16


def some_json(rng, depth=0):
    made = [
        lambda: None,
        lambda: rng.choice([True, False]),
        lambda: rng.randrange(-(2**70), 2**70),
        lambda: rng.choice([math.nan, math.inf, -math.inf, 1e308, -0.0, 5e-324]),
        lambda: "".join(chr(rng.randrange(1, 0x10FFFF)) for _ in range(rng.randrange(9))),
        lambda: "\ud800" * rng.randrange(1, 4),
        lambda: "x" * rng.randrange(3000),
        lambda: [some_json(rng, depth + 1) for _ in range(rng.randrange(4))],
        lambda: {str(some_json(rng, 3))[:20]: some_json(rng, depth + 1) for _ in range(rng.randrange(4))},
        lambda: json.loads("[" * 300 + "]" * 300),
    ]
    return rng.choice(made[: 7 if depth > 2 else None])()


def with_header(change):
    def mutate(rng, message):
        header = json.loads(message[PREFIX.size : HEADER_BLOCK])
        text = change(rng, header)
        text = text if isinstance(text, bytes) else json.dumps(header).encode()
        return message[: PREFIX.size] + text.ljust(HEADER_BLOCK - PREFIX.size) + message[HEADER_BLOCK:]

    return mutate


def with_blob(change):
    """Change the JSON of the first safetensors blob, whose length then changes with it."""

    def mutate(rng, message):
        magic, size, first, second = PREFIX.unpack_from(message)
        (length,) = struct.unpack_from("<Q", message, size)
        listed = json.loads(message[size + 8 : size + 8 + length])
        change(rng, listed)
        text = json.dumps(listed).encode()
        blob = struct.pack("<Q", len(text)) + text + message[size + 8 + length : size + first]
        head = PREFIX.pack(magic, size, len(blob), second)
        return head + message[PREFIX.size : size] + blob + message[size + first :]

    return mutate


def place(rng, message):
    return sorted(rng.randrange(len(message) + 1) for _ in range(2))


def flipped(rng, message):
    changed = bytearray(message)
    for _ in range(rng.randrange(1, 6)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwritten(rng, message):
    begin, end = place(rng, message)
    return message[:begin] + rng.randbytes(end - begin) + message[end:]


def cut_out(rng, message):
    begin, end = place(rng, message)
    return message[:begin] + message[end:]


def doubled(rng, message):
    begin, end = place(rng, message)
    return message[:end] + message[begin:]


def zeroed(rng, message):
    begin, end = place(rng, message)
    return message[:begin] + bytes(end - begin) + message[end:]


def other_lengths(rng, message):
    numbers = [rng.choice([0, 1, rng.randrange(2**12), rng.randrange(2**64), 2**64 - 1]) for _ in range(2)]
    return PREFIX.pack(b"FXM2", HEADER_BLOCK, *numbers) + message[PREFIX.size :]


def other_start(rng, message):
    size = rng.choice([0, 24, 4095, rng.randrange(2**32)])
    return PREFIX.pack(rng.choice([b"FXM1", b"\0\0\0\0", b"FXM2"]), size, 10, 10) + message[PREFIX.size :]


def field_replaced(rng, header):
    header[rng.choice([*header])] = some_json(rng)


def field_dropped(rng, header):
    del header[rng.choice([*header])]


def figure_replaced(rng, header):
    figures = header[rng.choice(["metrics", "measured", "seconds", "work"])]
    figures[rng.choice([*figures, "a b", "../x", "\ud800", "é", "train_loss", ""])] = some_json(rng)


def huge_number(rng, header):
    header["metrics"]["train_loss"] = "NUMBER"
    return json.dumps(header).replace('"NUMBER"', rng.choice(["1e999", "9" * 400, "-1e400"])).encode()


def repeated_key(rng, header):
    return json.dumps(header)[:-1].encode() + b', "round": 4, "metrics": {}}'


def no_json(rng, header):
    return rng.choice([b"null", b"[]", b"{", b"\xff\xfe", b'"text"', b"[" * 4000])


def blob_dtype(rng, listed):
    kinds = ["F8_E4M3", "F8_E5M2", "C64", "BOOL", "U64", "F4", "I64", "F64", "BF16", "", None, 3]
    listed[rng.choice([*listed])]["dtype"] = rng.choice(kinds)


def blob_shape(rng, listed):
    shapes = [[], [0], [2**62, 4], [-1], [6], [1] * 70, [2.5], "23", None, [3, 2], [2**64]]
    listed[rng.choice([*listed])]["shape"] = rng.choice(shapes)


def blob_offsets(rng, listed):
    listed[rng.choice([*listed])]["data_offsets"] = [rng.randrange(-5, 200), rng.randrange(2**40)]


def blob_names(rng, listed):
    name = rng.choice([*listed])
    listed[rng.choice(["__weights__", "__metadata__", "\ud800", "", "layer.c", "../x"])] = listed.pop(name)


def blob_many(rng, listed):
    for number in range(rng.randrange(1, 300)):
        listed[f"more.{number}"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def tensor_changed(change):
    def mutate(rng, message):
        name = rng.choice([*HONEST.tensors])
        tensors = HONEST.tensors | {name: change(HONEST.tensors[name])}
        return encode_upload(replace(HONEST, tensors=tensors))

    return mutate


def weights_of(number):
    return lambda rng, message: encode_upload(replace(HONEST, weights=dict.fromkeys(START, number)))


def stamp_of(**changes):
    return lambda rng, message: encode_upload(replace(HONEST, stamp=replace(HONEST.stamp, **changes)))


MUTATIONS = {
    "as it is": lambda rng, message: message,
    "bits flipped": flipped,
    "overwritten": overwritten,
    "cut out": cut_out,
    "doubled": doubled,
    "zeroed": zeroed,
    "cut short": lambda rng, message: message[: rng.randrange(len(message))],
    "longer": lambda rng, message: message + rng.randbytes(rng.randrange(1, 300)),
    "much too long": lambda rng, message: message + bytes(LARGEST),
    "noise": lambda rng, message: rng.randbytes(rng.randrange(9000)),
    "other lengths": other_lengths,
    "other start": other_start,
    "field replaced": with_header(field_replaced),
    "field dropped": with_header(field_dropped),
    "figure replaced": with_header(figure_replaced),
    "huge number": with_header(huge_number),
    "repeated key": with_header(repeated_key),
    "no JSON": with_header(no_json),
    "a failure": with_header(lambda rng, header: header.update(failure=str(some_json(rng)))),
    "blob dtype": with_blob(blob_dtype),
    "blob shape": with_blob(blob_shape),
    "blob offsets": with_blob(blob_offsets),
    "blob names": with_blob(blob_names),
    "blob many": with_blob(blob_many),
    "NaN": tensor_changed(lambda tensor: tensor * math.nan),
    "infinite": tensor_changed(lambda tensor: tensor + math.inf),
    "far": tensor_changed(lambda tensor: tensor * 1e30),
    "float64": tensor_changed(lambda tensor: tensor.double()),
    "complex": tensor_changed(lambda tensor: tensor.to(torch.complex64)),
    "float8": tensor_changed(lambda tensor: tensor.to(torch.float8_e4m3fn)),
    "booleans": tensor_changed(lambda tensor: tensor > 0),
    "one dimension more": tensor_changed(lambda tensor: tensor[None]),
    "no number": tensor_changed(lambda tensor: tensor[:0]),
    "weight 0": weights_of(0.0),
    "weight NaN": weights_of(math.nan),
    "weight 1e300": weights_of(1e300),
    "another run": stamp_of(run="other"),
    "another round": stamp_of(round_number=-(2**62)),
    "another client": stamp_of(client_id="\udfff" * 300),
}


def judge(message, ledger):
    """Return the upload, and the reason why it is refused or nothing, as a round of the server does."""
    upload, num_bytes = read_answer(lambda: message, LARGEST)
    delivery = Delivery(client_id="north", upload=upload, download_bytes=0, upload_bytes=num_bytes)
    if not upload.failure:
        kind, reason = ledger.fence(delivery)
        if kind:
            return upload, reason
    return upload, refusal(upload, EXPECTED, START, CohortSettings(max_change_norm=100.0))


def has_due_form(upload):
    groups = ("tensors", "beside", "tables")
    pairs = [(getattr(upload, group), getattr(EXPECTED, group)) for group in groups]
    return (
        all(own.keys() == due.keys() for own, due in pairs)
        and all(
            (own[name].shape, own[name].dtype) == (due[name].shape, due[name].dtype)
            for own, due in pairs
            for name in due
        )
        and all(first_non_finite(own) is None for own, _ in pairs)
        and all(0 < weight <= LARGEST_WEIGHT for weight in upload.weights.values())
        and all(math.isfinite(value) for value in upload.metrics.values())
    )


@pytest.mark.parametrize("number", [1_500, pytest.param(100_000, marks=pytest.mark.slow)])
def test_no_message_gets_through_but_an_upload_of_the_due_form(number):
    rng, honest = random.Random(number), encode_upload(HONEST)
    came, refused = Counter(), Counter()
    for kind in rng.choices([*MUTATIONS], k=number):
        upload, reason = judge(MUTATIONS[kind](rng, honest), Ledger(run="run", round_number=4))
        came[kind] += 1
        refused[kind] += bool(reason)
        assert has_due_form(upload) or reason, kind
        assert len(reason) < 3000, kind
        assert reason == " ".join(reason.encode("utf-8", "strict").decode().split()), kind
    assert came.keys() == MUTATIONS.keys()
    assert refused["as it is"] == 0
    harmless = {"as it is", "repeated key", "field replaced", "figure replaced", "bits flipped", "a failure"}
    assert {kind for kind in came if not refused[kind]} <= harmless


def test_a_second_upload_of_a_round_is_refused_whatever_it_brings():
    ledger, honest = Ledger(run="run", round_number=4), encode_upload(HONEST)
    assert judge(honest, ledger)[1] == ""
    assert judge(honest, ledger)[1].endswith(
        "it is the client's second one in this round, of the same content"
    )
