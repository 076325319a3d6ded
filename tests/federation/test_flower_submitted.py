"""A run that ``flwr run`` submits by itself: its settings are completed alike for server and clients."""

import tomllib
from importlib import resources
from pathlib import Path

import pytest

from fedexperts.config.load import build_config
from fedexperts.errors import UserError
from fedexperts.federation.flower_submitted import completed

APP = Path(__file__).parents[2] / "examples" / "flower_app" / "pyproject.toml"


def table_of(text):
    return tomllib.loads(text)["tool"]["flwr"]["app"]


def test_the_example_app_has_the_apps_that_the_launcher_sends():
    template = resources.files("fedexperts") / "assets" / "flower_app" / "pyproject.toml"
    assert table_of(APP.read_text())["components"] == table_of(template.read_text())["components"]


def test_the_example_is_an_experiment_for_the_two_nodes_that_flower_simulates(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = completed(table_of(APP.read_text())["config"], 41)
    config = build_config(tomllib.loads(settings["experiment"]), "example")
    assert (config.data.partition.num_clients, config.transport.name) == (2, "flower")
    folder = tmp_path / "fedexperts-runs" / "flower-41"
    assert settings["run-directory"] == str(folder)
    assert settings["personal-folder"] == str(folder / "clients")
    assert len(settings["run-token"]) == 16


def test_in_a_deployment_nodes_have_places_of_their_own():
    given = {"experiment": '[transport]\nconnection = "lab"\n', "run-directory": "/data/run"}
    settings = completed(given, 41)
    assert (settings["run-directory"], settings["personal-folder"]) == ("/data/run", "")


def test_settings_of_the_launcher_stay_as_they_are():
    given = {"experiment": "rounds = 1", "run-directory": "/run", "run-token": "0123", "personal-folder": ""}
    assert completed(given, 41) == given


def test_an_experiment_that_is_no_toml_is_refused():
    with pytest.raises(UserError, match=r"^experiment in pyproject.toml is not valid TOML: "):
        completed({"experiment": "rounds 2"}, 41)
