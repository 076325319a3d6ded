"""Degenerate cases are equalities between algorithms."""

from fedexperts.run_directory import read_json
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


def test_only_flex_and_local_only_keep_anything(make_config, tmp_path, quiet):
    for method, keeps in (("fedavg", False), ("local_only", True)):
        run_experiment(make_config(method), tmp_path / method, progress=quiet)
        hashes = read_json(tmp_path / method / "result.json")["personal_sha256"].values()
        assert all(bool(value) == keeps for value in hashes)
