"""Messages: round trip, size known beforehand, and garbage refused."""

import pytest
import torch

from fedexperts.errors import UserError
from fedexperts.messages import (
    HEADER_BLOCK,
    Download,
    Upload,
    decode_download,
    decode_upload,
    encode_download,
    encode_upload,
    predict_bytes,
)


def tensors(count: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return {f"layer.{i}.weight": torch.randn(i + 1, 3, generator=generator).to(dtype) for i in range(count)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 7, 40])
def test_the_size_of_a_message_is_known_beforehand(count, dtype):
    sent = tensors(count, dtype)
    upload = Upload(tensors=sent, weights=dict.fromkeys(sent, 1.5), metrics={"train_loss": 1 / 3})
    assert len(encode_upload(upload)) == predict_bytes(sent, is_upload=True)
    assert len(encode_download(Download(round=1, task="train", tensors=sent))) == predict_bytes(
        sent, is_upload=False
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_sent_arrives(dtype):
    sent = tensors(5, dtype)
    upload = Upload(
        tensors=sent,
        weights={name: i + 0.1 for i, name in enumerate(sent)},
        metrics={"a": 0.1},
        report={"b": [1]},
    )
    arrived = decode_upload(encode_upload(upload))
    assert all(torch.equal(arrived.tensors[name], sent[name]) for name in sent)
    assert (arrived.weights, arrived.metrics, arrived.report) == (
        upload.weights,
        upload.metrics,
        upload.report,
    )


def test_a_longer_report_only_adds_blocks():
    short, long = (encode_upload(Upload(report={"text": "x" * size})) for size in (10, HEADER_BLOCK))
    assert len(long) - len(short) == HEADER_BLOCK


@pytest.mark.parametrize("cut", [0, 3, 100, HEADER_BLOCK, HEADER_BLOCK + 20])
def test_a_truncated_message_is_refused(cut):
    message = encode_upload(
        Upload(tensors=tensors(3, torch.float32), weights=dict.fromkeys(tensors(3, torch.float32), 1.0))
    )
    with pytest.raises(UserError, match="cannot be read"):
        decode_upload(message[:cut])


@pytest.mark.parametrize("garbage", [b"", b"\x80\x04pickle", b"FXM1\xff\xff\xff\xff", b"\x00" * 9000])
def test_garbage_is_refused(garbage):
    with pytest.raises(UserError, match="cannot be read"):
        decode_download(garbage)


def test_a_download_is_not_an_upload():
    with pytest.raises(UserError, match="is not an upload"):
        decode_upload(encode_download(Download(round=1, task="train", tensors={})))
