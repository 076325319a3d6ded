"""A client counts in the server's mean by its number of training examples."""

import json

import pytest
import torch

from fedexperts.federation.checkpoint import load_checkpoint
from fedexperts.federation.inprocess import InProcess
from fedexperts.run_directory import RunDirectory, read_lines
from fedexperts.running.checking import check_experiment
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
    state = load_checkpoint(RunDirectory(tmp_path / "run")).state
    assert state.tensors.keys() == uploads["client-000"].keys()
    assert not all(
        torch.equal(uploads["client-001"][name], sent) for name, sent in uploads["client-000"].items()
    )
    for name, tensor in state.tensors.items():
        total = sum(number * uploads[client_id][name].double() for client_id, number in NUM_TRAIN.items())
        assert torch.equal(tensor, (total / sum(NUM_TRAIN.values())).to(tensor.dtype)), name


def test_examples_without_a_label_do_not_count(make_config, two_sizes, tmp_path, quiet, monkeypatch):
    """A prompt that fills data.max_tokens leaves nothing to learn, so it adds nothing to the weight."""
    source = tmp_path / "data.jsonl"
    records = [json.loads(line) for line in source.read_text().splitlines()]
    for position, record in enumerate(record for record in records if record["owner"] == "client-001"):
        if position % 2:
            record["instruction"] = f"{position} " + "word " * 400
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    weights, exchange = {}, InProcess.exchange

    def watched(self, downloads):
        for delivery in exchange(self, downloads):
            if delivery.upload.tensors:
                weights[delivery.client_id] = set(delivery.upload.weights.values())
            yield delivery

    monkeypatch.setattr(InProcess, "exchange", watched)
    run_experiment(make_config("fedavg", "rounds=1", data=two_sizes), tmp_path / "run", progress=quiet)
    lines = {line["client"]: line for line in read_lines(tmp_path / "run" / "clients.jsonl")}
    left_out = lines["client-001"]["num_without_label"]
    assert left_out > 0
    assert weights == {"client-000": {20.0}, "client-001": {10.0 - left_out}}


def test_a_client_without_a_usable_test_example_stops_nobody(make_config, two_sizes, tmp_path, quiet, caplog):
    source = tmp_path / "data.jsonl"
    records = [json.loads(line) for line in source.read_text().splitlines()]
    for position, record in enumerate(records):
        if record["owner"] == "client-001":
            record["instruction"] = f"{position} " + "word " * 400
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = make_config("fedavg", "rounds=1", "cohort.on_failure=continue", data=two_sizes)
    told = check_experiment(config).warnings()
    assert [line.split(":")[0] for line in told] == [
        "client-001 has no training example with a label within data.max_tokens",
        "client-001 has no test example with a label within data.max_tokens",
    ]
    result = run_experiment(config, tmp_path / "run", progress=quiet)
    assert result["clients"]["client-000"]["loss_after"] > 0
    assert {failure["client"] for failure in result["failures"]} == {"client-001"}
