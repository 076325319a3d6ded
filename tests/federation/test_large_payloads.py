"""Messages of more than 2 GiB: coded, cut by Flower, put together again, spooled and judged."""

from pathlib import Path

import pytest
import torch
from flwr.app import Message
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

from fedexperts.federation.edge import read_answer
from fedexperts.federation.spool import Spool
from fedexperts.federation.wire import pack, unpack
from fedexperts.messages import Upload, encode_upload

NUM_VALUES = 575_000_000
LARGEST_OBJECT = 6 * 2**20
"""Bytes of what Flower sends at one time: chunks of 5 MiB, and their heads."""


def available_bytes():
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


@pytest.mark.slow
@pytest.mark.skipif(available_bytes() < 13e9, reason="it takes 10 GB of memory")
def test_an_upload_of_more_than_2_gib_arrives_bit_for_bit(tmp_path, monkeypatch):
    for name in ("run_id", "node_id", "task_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1)
    values = torch.arange(NUM_VALUES, dtype=torch.float32)
    tensors = {"large": values[: NUM_VALUES * 19 // 20], "small": values[NUM_VALUES * 19 // 20 :]}
    assert tensors["large"].nbytes > 2**31
    blob = encode_upload(Upload(tensors=tensors, weights=dict.fromkeys(tensors, 1.0)))
    num_bytes, kept = len(blob), Spool(tmp_path).keep(through_flower(blob))
    del blob
    upload, counted = read_answer(kept, num_bytes)
    assert not upload.failure
    assert counted == num_bytes
    assert all(torch.equal(upload.tensors[name], sent) for name, sent in tensors.items())


def through_flower(blob):
    """Cut a message into the objects that Flower sends one by one, and join them as a receiver does."""
    message = Message(pack(blob), 1, "train")
    contents = {name: part.deflate() for name, part in get_all_nested_objects(message).items()}
    root = message.object_id
    del message
    assert max(map(len, contents.values())) < LARGEST_OBJECT
    return unpack(inflate_object_from_contents(root, contents).content)
