"""The server app and the client app over a Grid in memory: the same run as in process, bit for bit."""

import logging

import pytest
from flower_grid import InMemoryGrid, app_node
from flwr.app import Context, RecordDict

from fedexperts.config.load import resolved_toml
from fedexperts.costs.privacy import epsilon_of
from fedexperts.errors import UserError
from fedexperts.federation import flower_client, flower_server
from fedexperts.federation.flower_events import heard
from fedexperts.federation.flower_server import serve
from fedexperts.releases import Releases, read_releases, write_releases
from fedexperts.run_directory import RunDirectory, read_json, read_lines
from fedexperts.running.experiment import run_experiment


def same(run):
    """What a run over Flower must share with the run in process."""
    result = read_json(run / "result.json")
    names = ("server_state_sha256", "personal_sha256", "mean", "exam", "retention", "bytes", "routing")
    losses = [line["train_loss"] for line in read_lines(run / "rounds.jsonl")]
    return {name: result[name] for name in (*names, "parameters")} | {"losses": losses}


def run_over_grid(config, folder, nodes=(0, 1, 2), wrap=lambda position, node: node, make_grid=InMemoryGrid):
    """A run whose clients are nodes of a Grid in memory; node ids are new in every run of the server."""
    run_config = {
        "experiment": resolved_toml(config),
        "run-token": "token",
        "personal-folder": str(folder / "clients"),
    }
    grid = make_grid(
        {
            900 - position: wrap(
                position, app_node(flower_client.app, run_config, {"partition-id": position})
            )
            for position in nodes
        }
    )
    run = RunDirectory(folder)
    folder.mkdir(exist_ok=True)
    serve(grid, config, run)
    return read_json(run.result)


@pytest.mark.slow
def test_a_run_over_flower_is_the_run_in_process(make_config, tmp_path, quiet):
    run_experiment(make_config("flex", "rounds=1"), tmp_path / "inprocess", progress=quiet)
    run_over_grid(make_config("flex", "rounds=1", "transport.name=flower"), tmp_path / "flower")
    assert same(tmp_path / "flower") == same(tmp_path / "inprocess")


class Died(Exception):
    pass


def dies(position, node):
    """A node with which the server ends in round 2."""

    def answer(message):
        if position == 1 and message.metadata.group_id == "train 2":
            raise Died
        return node(message)

    return answer


@pytest.mark.slow
def test_a_run_over_flower_goes_on_after_its_server_died(make_config, tmp_path, quiet):
    config = make_config("flex", "transport.name=flower", "rounds=2")
    run_experiment(make_config("flex", "rounds=2"), tmp_path / "whole", progress=quiet)

    with pytest.raises(Died):
        run_over_grid(config, tmp_path / "cut", wrap=dies)
    assert len(read_lines(tmp_path / "cut" / "rounds.jsonl")) == 1
    run_over_grid(config, tmp_path / "cut")
    assert same(tmp_path / "cut") == same(tmp_path / "whole")


@pytest.mark.slow
def test_what_was_released_before_the_server_died_counts(make_config, tmp_path):
    private = ("privacy.clip_norm=0.5", "privacy.noise_multiplier=2", "privacy.noise=client")
    config = make_config("fedavg", "transport.name=flower", "rounds=2", *private)
    with pytest.raises(Died):
        run_over_grid(config, tmp_path / "cut", wrap=dies)
    found = run_over_grid(config, tmp_path / "cut")["privacy"]
    assert (found["epsilon"], found["num_repeated_rounds"]) == (epsilon_of(config.privacy, 3), 1)


@pytest.mark.parametrize(("noise", "turns"), [("client", 2), ("server", 1)])
def test_a_client_that_noises_twice_in_a_round_has_released_twice(noise, turns, make_config, tmp_path):
    given = ("privacy.clip_norm=1", "privacy.noise_multiplier=1", "cohort.max_change_factor=0")
    config = make_config("fedavg", *given, f"privacy.noise={noise}")
    run = RunDirectory(tmp_path)
    write_releases(run.releases, Releases().with_round(1, ["client-000"]))
    flower_server.release_counter(config, run)("client-000")
    assert read_releases(run.releases) == Releases(turns={"client-000": turns}, rounds={"1": 1})


def test_a_partition_that_the_data_has_not_is_refused(make_config, tmp_path):
    with pytest.raises(UserError, match="partition-id is 3, but the data has only 3 clients"):
        run_over_grid(make_config("fedavg", "transport.name=flower"), tmp_path / "run", nodes=(0, 3))


def node_config_refused(config, tmp_path, node_config, run_config):
    run_config = {"experiment": resolved_toml(config), "run-token": "token"} | run_config
    grid = InMemoryGrid({1: app_node(flower_client.app, run_config, node_config)})
    with pytest.raises(UserError) as refusal:
        serve(grid, config, RunDirectory(tmp_path))
    return str(refusal.value)


def test_a_node_says_what_its_start_lacked(make_config, tmp_path):
    config = make_config("fedavg", "transport.name=flower", "transport.connection=lab")
    lacks_place = node_config_refused(config, tmp_path, {"partition-id": 0}, {"personal-folder": ""})
    assert "personal-folder" in lacks_place
    lacks_client = node_config_refused(config, tmp_path, {}, {"personal-folder": str(tmp_path)})
    assert "partition-id is None" in lacks_client


def test_a_node_of_another_configuration_is_refused(make_config, tmp_path):
    config = make_config("fedavg", "transport.name=flower")
    other = {"experiment": resolved_toml(make_config("fedavg")), "personal-folder": str(tmp_path)}
    reason = node_config_refused(config, tmp_path, {"partition-id": 0}, other)
    assert "was started from another configuration than the server's" in reason


def test_a_deployed_client_keeps_what_is_its_own_on_its_node(make_config, tmp_path, capsys):
    config = make_config("flex", "transport.name=flower", "transport.connection=lab", "rounds=1")
    run_config = {"experiment": resolved_toml(config), "run-token": "token", "personal-folder": ""}
    nodes = {
        position: app_node(
            flower_client.app,
            run_config,
            {"partition-id": position, "personal-folder": str(tmp_path / f"node-{position}")},
        )
        for position in range(3)
    }
    run = RunDirectory(tmp_path / "server")
    run.path.mkdir()
    serve(InMemoryGrid(nodes), config, run)
    result = read_json(run.result)
    assert result["matrix"] is None, "a client has its own test split alone"
    assert [client["labels"] for client in result["clients"].values()] == [{}, {}, {}]
    assert not run.client_folders.exists()
    for position in range(3):
        kept = tmp_path / f"node-{position}" / "token"
        assert [path.name for path in kept.iterdir()] == [f"client-{position:03d}"]
    events = [event for line in capsys.readouterr().out.splitlines() if (event := heard(line))]
    finished = [arguments for name, arguments in events if name == "round_finished"]
    assert finished == [[1, read_lines(run.rounds)[0]]]


def test_what_ends_the_server_app_is_said_and_so_are_warnings(make_config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger("fedexperts"), "handlers", [])
    config = make_config("fedavg", "transport.name=flower", "evaluation.exam.source=nowhere.jsonl")
    given = {"experiment": resolved_toml(config), "run-directory": str(tmp_path), "run-token": "token"}
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=given)
    with pytest.raises(UserError, match=r"nowhere\.jsonl") as refusal:
        flower_server.app(InMemoryGrid({}), context)
    logging.getLogger("fedexperts.federation").warning("client %s is slow", "a")
    events = [heard(line) for line in capsys.readouterr().out.splitlines()]
    assert events[-2:] == [("failed", [str(refusal.value)]), ("warned", ["client a is slow"])]


def test_a_line_that_is_no_event_is_left_alone():
    assert heard("INFO: fedexperts") is None
