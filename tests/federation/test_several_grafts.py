"""FLEx with several grafts per layer: through a run, over Flower, out of it and back."""

import pytest
import torch
from test_flower_apps import run_over_grid, same

from fedexperts.errors import UserError
from fedexperts.federation import rounds
from fedexperts.federation.personal import PersonalStore
from fedexperts.run_directory import read_json, read_lines
from fedexperts.running.experiment import run_experiment
from fedexperts.running.export import export_client, load_personalised, personalised_of_run

TWO = ("rounds=1", "algorithm.num_grafts=2")
IDS = torch.arange(3, 40).unsqueeze(0)


def logits(personalised):
    with torch.no_grad():
        return personalised.model(input_ids=IDS).logits


@pytest.fixture
def run(make_config, tmp_path, quiet, monkeypatch):
    """A finished run, with the names that its uploads had."""
    sent = set()
    check = rounds.check_upload
    monkeypatch.setattr(
        rounds, "check_upload", lambda upload, state: (sent.update(upload.tensors), check(upload, state))
    )
    run_experiment(make_config("flex", *TWO), tmp_path / "run", progress=quiet)
    return tmp_path / "run", sent


def test_two_experts_of_each_layer_are_kept_and_never_sent(run):
    folder, sent = run
    kept = PersonalStore(folder / "clients").load("client-000", before_round=2)
    assert kept["chosen_experts"].shape == (2, 2)
    names = [name for name in kept if name != "chosen_experts"]
    assert {name.split(".graft.")[1].split(".")[0] for name in names} == {"0", "1"}
    assert not any(".graft." in name for name in sent)
    result = read_json(folder / "result.json")
    assert result["clients"]["client-000"]["chosen_experts"] == kept["chosen_experts"].tolist()
    assert result["frozen_unchanged"]
    assert all(0 < line["gate_mean.1"] < 1 for line in read_lines(folder / "clients.jsonl"))


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_export_gives_the_same_bits(run, when, tmp_path):
    folder, _ = run
    in_the_run = logits(personalised_of_run(folder, "client-001", when)[0])
    export_client(folder, "client-001", tmp_path / "out", when=when)
    assert torch.equal(logits(load_personalised(tmp_path / "out")), in_the_run)


def test_a_run_over_flower_is_the_run_in_process(run, make_config, tmp_path):
    run_over_grid(make_config("flex", *TWO, "transport.name=flower"), tmp_path / "flower")
    assert same(tmp_path / "flower") == same(run[0])


def test_closed_gates_are_federated_averaging(make_config, tmp_path, quiet):
    closed = (
        "algorithm.graft.gate_init=zero",
        "algorithm.graft.gate_bias=-1e4",
        "algorithm.gate_lr_scale=1e-6",
    )
    run_experiment(make_config("flex", *TWO, *closed), tmp_path / "flex", progress=quiet)
    run_experiment(make_config("fedavg", "rounds=1"), tmp_path / "fedavg", progress=quiet)
    ends = [read_json(tmp_path / name / "result.json")["server_state_sha256"] for name in ("flex", "fedavg")]
    assert ends[0] == ends[1]


def test_number_of_grafts_is_within_bounds(make_config, tmp_path, quiet):
    with pytest.raises(UserError, match="num_grafts must be from 1 to 8, not 9"):
        make_config("flex", "algorithm.num_grafts=9")
    with pytest.raises(UserError, match=r"algorithm\.num_grafts is 7: a layer has only 6 experts to copy"):
        run_experiment(make_config("flex", "algorithm.num_grafts=7"), tmp_path / "run", progress=quiet)
