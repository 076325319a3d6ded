"""Clients by name: found, ambiguous, unknown, and not recorded."""

import json

import pytest

from fedexperts.errors import UserError
from fedexperts.running.client_names import resolve_client


@pytest.fixture
def run(tmp_path):
    """A finished run of four clients, of which two have one name and one has none."""
    (tmp_path / "config.toml").touch()
    names = ["herald", "ledger", "ledger", ""]
    clients = {f"client-{number:03d}": {"name": name} for number, name in enumerate(names)}
    (tmp_path / "result.json").write_text(json.dumps({"clients": clients}))
    return tmp_path


def test_a_client_is_found_by_its_id_and_by_its_name(run):
    assert resolve_client(run, "client-002") == "client-002"
    assert resolve_client(run, "herald") == "client-000"


def test_an_id_goes_before_a_name(run):
    result = json.loads((run / "result.json").read_text())
    result["clients"]["client-000"]["name"] = "client-001"
    (run / "result.json").write_text(json.dumps(result))
    assert resolve_client(run, "client-001") == "client-001"


def refusal(run, client):
    with pytest.raises(UserError) as caught:
        resolve_client(run, client)
    return str(caught.value)


def test_a_name_of_two_clients_is_refused_with_both(run):
    assert refusal(run, "ledger").endswith("give one of the ids client-001 (ledger), client-002 (ledger)")


@pytest.mark.parametrize("client", ["hera", ""])
def test_an_unknown_name_is_refused_with_those_there_are(client, run):
    told = "client-000 (herald), client-001 (ledger), client-002 (ledger), client-003"
    assert refusal(run, client) == f"client {client!r} is not in {run}: it must be one of {told}"


def test_an_unfinished_run_knows_its_clients_by_id(run):
    (run / "result.json").unlink()
    (run / "clients/client-000").mkdir(parents=True)
    assert resolve_client(run, "client-000") == "client-000"
    assert refusal(run, "herald").endswith("it must be one of client-000")


def test_of_many_clients_some_are_listed(run):
    clients = {f"client-{number:03d}": {"name": ""} for number in range(25)}
    (run / "result.json").write_text(json.dumps({"clients": clients}))
    assert refusal(run, "herald").endswith("client-019 and 5 more")
