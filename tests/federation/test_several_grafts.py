"""FLEx with several grafts per layer: through a run, over Flower, out of it and back."""

import pytest
import torch
from test_flower_apps import run_over_grid, same

from fedexperts.errors import UserError
from fedexperts.federation import rounds
from fedexperts.federation.personal import PersonalStore
from fedexperts.run_directory import read_json, read_lines
from fedexperts.running.experiment import run_experiment
from fedexperts.running.export import export_client, load_personalised, opened_model

TWO = ("rounds=1", "algorithm.num_grafts=2")
IDS = torch.arange(3, 40).unsqueeze(0)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture
def run(make_config, tmp_path, quiet, monkeypatch):
    """A finished run, with the names that its uploads had."""
    sent = set()
    refusal = rounds.refusal

    def record(upload, *rest):
        sent.update(upload.tensors)
        return refusal(upload, *rest)

    monkeypatch.setattr(rounds, "refusal", record)
    run_experiment(make_config("flex", *TWO), tmp_path / "run", progress=quiet)
    return tmp_path / "run", sent


def test_two_experts_of_each_layer_are_kept_and_never_sent(run):
    folder, sent = run
    kept = PersonalStore(folder / "clients").load("client-000", 1)
    chosen = kept.beside["chosen_experts"]
    assert chosen.shape == (2, 2)
    assert {name.split(".graft.")[1].split(".")[0] for name in kept.parameters} == {"0", "1"}
    assert not any(".graft." in name for name in sent)
    result = read_json(folder / "result.json")
    assert result["clients"]["client-000"]["algorithm"] == {"chosen_experts": chosen.tolist()}
    assert result["frozen_unchanged"]
    assert all(
        0 < mean < 1
        for line in read_lines(folder / "clients.jsonl")
        for mean in line["algorithm"]["gate_mean"]
    )


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_export_gives_the_same_bits(run, when, tmp_path):
    folder, _ = run
    with opened_model(folder, "client-001", when) as (bench, _, _):
        in_the_run = logits(bench.parts.model)
    export_client(folder, "client-001", tmp_path / "out", when=when)
    assert torch.equal(logits(load_personalised(tmp_path / "out").model), in_the_run)


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
    with pytest.raises(UserError, match="num_grafts must be from 0 to 8, not 9"):
        make_config("flex", "algorithm.num_grafts=9")
    with pytest.raises(UserError, match=r"algorithm\.num_grafts is 7: a layer has only 6 experts to copy"):
        run_experiment(make_config("flex", "algorithm.num_grafts=7"), tmp_path / "run", progress=quiet)
