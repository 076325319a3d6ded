"""Messages: round trip, size known beforehand, and garbage refused."""

import json

import pytest
import torch

from fedexperts.errors import UserError
from fedexperts.messages import (
    HEADER_BLOCK,
    WEIGHTS,
    Download,
    Expected,
    Sent,
    Upload,
    decode_download,
    decode_upload,
    encode_download,
    encode_upload,
    plain_text,
    predict_download_bytes,
    predict_upload_bytes,
)

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
)


def tensors(count: int, dtypes: tuple[torch.dtype, ...] = DTYPES) -> dict[str, torch.Tensor]:
    """Tensors of many sizes; their order by name is not that by dtype."""
    generator = torch.Generator().manual_seed(count)
    return {
        f"layer.{i}.é": (torch.randn(i % 11, 3, generator=generator) * 9).to(dtypes[i % len(dtypes)])
        for i in range(count)
    }


def full(count: int) -> Upload:
    sent = tensors(count)
    return Upload(
        tensors=sent,
        weights={name: i + 0.1 for i, name in enumerate(sent)},
        beside=tensors(count // 2),
        tables=tensors(count // 3),
        metrics={"train_loss": 1 / 3},
        measured={"drift": 1e-30},
        work={"train.flops": 2.0},
        seconds={"train": 0.5},
        failure="",
    )


@pytest.mark.parametrize("count", [0, 1, 7, 40, 1200])
def test_the_size_of_a_message_is_known_beforehand(count):
    """Per-expert data do not outgrow the header: 1,200 tensors and their weights travel as tensors."""
    upload = full(count)
    expected = Expected(
        **{
            what: {name: tensor.to("meta") for name, tensor in getattr(upload, what).items()}
            for what in ("tensors", "beside", "tables")
        }
    )
    assert len(encode_upload(upload)) == predict_upload_bytes(expected)
    sent = Sent(tensors=upload.tensors, beside=upload.beside, orders={"rank": 4})
    assert len(encode_download(Download(round_number=1, task="train", sent=sent))) == predict_download_bytes(
        sent
    )


def test_everything_that_is_sent_arrives():
    upload = full(30)
    arrived = decode_upload(encode_upload(upload))
    for what in ("tensors", "beside", "tables"):
        sent, received = getattr(upload, what), getattr(arrived, what)
        assert sent.keys() == received.keys()
        assert all(torch.equal(received[name], sent[name]) for name in sent)
    for what in ("weights", "metrics", "measured", "seconds", "work", "failure", "report"):
        assert getattr(arrived, what) == getattr(upload, what)
    download = Download(
        round_number=3,
        task="train",
        sent=Sent(tensors=tensors(3), beside=tensors(2), orders={"rank": 2}),
        kept_round=2,
        config_sha256="ab",
    )
    received = decode_download(encode_download(download))
    assert (received.round_number, received.kept_round, received.sent.orders) == (3, 2, {"rank": 2})
    assert torch.equal(received.sent.beside["layer.1.é"], download.sent.beside["layer.1.é"])


def test_plain_data_that_outgrow_the_header_are_refused_where_they_are_made():
    with pytest.raises(UserError, match="send what there is per layer, expert or client as tensors"):
        encode_upload(Upload(measured={f"expert_{e}": 1.0 for e in range(512)}))


@pytest.mark.parametrize("cut", [0, 3, 100, HEADER_BLOCK, HEADER_BLOCK + 20])
def test_a_truncated_message_is_refused(cut):
    with pytest.raises(UserError, match="cannot be read"):
        decode_upload(encode_upload(full(6))[:cut])


@pytest.mark.parametrize("garbage", [b"", b"\x80\x04pickle", b"FXM2" + b"\xff" * 40, b"\x00" * 9000])
def test_garbage_is_refused(garbage):
    with pytest.raises(UserError, match="cannot be read"):
        decode_download(garbage)


def test_a_download_is_not_an_upload():
    with pytest.raises(UserError, match="message has a JSON NoneType for 'metrics'"):
        decode_upload(encode_download(Download(round_number=1, task="train")))


def with_header(message: bytes, **changes: object) -> bytes:
    """The message with other fields in its header, as only a hostile client writes them."""
    prefix, header = message[:24], json.loads(message[24:HEADER_BLOCK])
    text = json.dumps(header | changes).encode() if changes else b"[]"
    return prefix + text.ljust(HEADER_BLOCK - 24) + message[HEADER_BLOCK:]


NESTED = json.loads("[" * 500 + "]" * 500)


@pytest.mark.parametrize(
    "changes",
    [
        {"metrics": None},
        {"metrics": []},
        {"metrics": {"train_loss": "x"}},
        {"metrics": {"train_loss": True}},
        {"metrics": {"train_loss": float("nan")}},
        {"measured": {"a": float("inf")}},
        {"seconds": "12"},
        {"seconds": {"train": {}}},
        {"report": [1]},
        {"report": 1},
        {"failure": None},
        {"failure": 7},
        {"metrics": {"deep": NESTED}},
        {},
    ],
)
def test_a_field_of_another_type_is_refused(changes):
    with pytest.raises(UserError):
        decode_upload(with_header(encode_upload(full(3)), **changes))


def test_json_nested_beyond_all_measure_is_refused():
    message = encode_upload(Upload())
    deep = b'{"report":' + b"[" * 2000 + b"]" * 2000 + b"}"
    with pytest.raises(UserError):
        decode_upload(message[:24] + deep.ljust(HEADER_BLOCK - 24) + message[HEADER_BLOCK:])


def test_a_failure_is_a_line_that_every_file_takes():
    upload = decode_upload(with_header(encode_upload(Upload()), failure="a\ud800b\n" + "x" * 3000))
    upload.failure.encode("utf-8")
    assert upload.failure.startswith("a?b x")
    assert len(upload.failure) <= 1000


@pytest.mark.parametrize("letter", ["x", "猫", "😀", "\x01"])
def test_a_failure_fits_into_a_message_whatever_it_is_written_in(letter):
    """In JSON an emoji takes twelve bytes: a thousand of them are three headers long."""
    failure = decode_upload(encode_upload(Upload(failure=letter * 5000))).failure
    assert len(failure) > 100
    assert set(failure) == {letter}
    assert plain_text("") == ""


def test_weights_must_be_one_float64_for_each_tensor():
    wrong = full(3)
    message = encode_upload(Upload(tensors={**wrong.tensors}, weights=wrong.weights))
    arrived = decode_upload(message)
    assert WEIGHTS not in arrived.tensors
    with pytest.raises(UserError, match="its weights are"):
        decode_upload(encode_download(Download(round_number=1, task="t", sent=Sent(tensors=wrong.tensors))))
