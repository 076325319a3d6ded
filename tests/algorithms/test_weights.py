"""A client counts in the server's mean by its number of training examples."""

import json

import pytest
import torch

from fedexperts.federation.checkpoint import load_checkpoint
from fedexperts.federation.inprocess import InProcess
from fedexperts.run_directory import RunDirectory
from fedexperts.running.experiment import run_experiment

NUM_EXAMPLES = {"client-000": 32, "client-001": 16}
NUM_TRAIN = {"client-000": 20, "client-001": 10}
"""Of 32 examples 8 are for the test and 4 for validation, of 16 half as many."""


@pytest.fixture
def two_sizes(tmp_path):
    """The section [data] with two clients of different size."""
    records = [
        {"instruction": f"Count to {index} for {owner}.", "response": "one, two", "owner": owner}
        for owner, number in NUM_EXAMPLES.items()
        for index in range(number)
    ]
    source = tmp_path / "data.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    return {"source": str(source), "fields": {"client": "owner"}, "partition": {"kind": "natural"}}


@pytest.fixture
def uploads(monkeypatch):
    """What each client sent to be averaged, as it comes from the transport."""
    found, exchange = {}, InProcess.exchange

    def watched(self, downloads):
        for delivery in exchange(self, downloads):
            if delivery.upload.tensors:
                found[delivery.client_id] = delivery.upload.tensors
            yield delivery

    monkeypatch.setattr(InProcess, "exchange", watched)
    return found


@pytest.mark.parametrize("method", ["fedavg", "fedavg_experts", "flex"])
def test_the_server_takes_the_mean_weighted_by_examples(
    method, make_config, two_sizes, uploads, tmp_path, quiet
):
    run_experiment(make_config(method, "rounds=1", data=two_sizes), tmp_path / "run", progress=quiet)
    state = load_checkpoint(RunDirectory(tmp_path / "run"))
    assert state.tensors.keys() == uploads["client-000"].keys()
    assert not all(
        torch.equal(uploads["client-001"][name], sent) for name, sent in uploads["client-000"].items()
    )
    for name, tensor in state.tensors.items():
        total = sum(number * uploads[client_id][name].double() for client_id, number in NUM_TRAIN.items())
        assert torch.equal(tensor, (total / sum(NUM_TRAIN.values())).to(tensor.dtype)), name
