"""Degenerate cases are equalities between algorithms."""

import pytest
import torch
from safetensors.torch import load_file

from fedexperts.federation.checkpoint import load_checkpoint
from fedexperts.run_directory import RunDirectory, read_json
from fedexperts.running.experiment import run_experiment


def test_flex_with_a_closed_gate_is_fedavg_on_non_experts(make_config, tmp_path, quiet):
    """A gate of exactly 0 lets nothing of the graft out and no gradient in."""
    closed = ("algorithm.graft.gate_init=zero", "algorithm.graft.gate_bias=-1e4")
    flex = run_experiment(make_config("flex", *closed), tmp_path / "flex", progress=quiet)
    fedavg = run_experiment(make_config("fedavg"), tmp_path / "fedavg", progress=quiet)
    assert flex["server_state_sha256"] == fedavg["server_state_sha256"]
    assert flex["mean"] == fedavg["mean"]
    assert flex["exam"]["global"] == fedavg["exam"]["global"]


def test_one_client_fedavg_is_local_only(make_config, tmp_path, quiet):
    alone = "data.partition.num_clients=1"
    fedavg = run_experiment(make_config("fedavg", alone), tmp_path / "fedavg", progress=quiet)
    local = run_experiment(make_config("local_only", alone), tmp_path / "local", progress=quiet)
    assert fedavg["mean"] == local["mean"]


@pytest.mark.slow
def test_only_flex_and_local_only_keep_anything(make_config, tmp_path, quiet):
    for method, keeps in (("fedavg", False), ("local_only", True)):
        run_experiment(make_config(method), tmp_path / method, progress=quiet)
        hashes = read_json(tmp_path / method / "result.json")["personal_sha256"].values()
        assert all(bool(value) == keeps for value in hashes)


def test_flex_without_a_graft_and_with_averaged_experts_is_fedavg_with_all_experts(
    make_config, tmp_path, quiet
):
    flex = make_config("flex", "algorithm.num_grafts=0", "algorithm.experts=true")
    flex = run_experiment(flex, tmp_path / "flex", progress=quiet)
    fedavg = run_experiment(make_config("fedavg_experts"), tmp_path / "fedavg", progress=quiet)
    assert flex["server_state_sha256"] == fedavg["server_state_sha256"]
    assert flex["mean"] == fedavg["mean"]


def test_an_own_model_as_received_changes_neither_what_is_sent_nor_what_is_kept(make_config, tmp_path, quiet):
    runs = {
        model: run_experiment(
            make_config("flex", f"algorithm.own_model={model}"), tmp_path / model, progress=quiet
        )
        for model in ("trained", "received")
    }
    trained, received = runs.values()
    assert received["server_state_sha256"] == trained["server_state_sha256"]
    assert received["personal_sha256"] == trained["personal_sha256"]
    assert received["mean"]["loss_before"] == trained["mean"]["loss_before"]
    assert received["mean"]["loss_after"] != trained["mean"]["loss_after"]


def test_an_own_model_as_received_holds_what_the_server_sent(make_config, tmp_path, quiet):
    """Snapshot of the model that was scored last: LoRA is the server's, bit for bit."""
    result = run_experiment(make_config("flex_plus"), tmp_path / "run", progress=quiet)
    state = load_checkpoint(RunDirectory(tmp_path / "run")).state
    for client_id in result["clients"]:
        adapted = load_file(tmp_path / "run" / "clients" / client_id / "adapted.safetensors")
        shared = [name for name in adapted if name in state.tensors]
        assert shared
        assert all(torch.equal(adapted[name], state.tensors[name]) for name in shared)
