"""Guarantees that every registered method shares."""

import pickle

import pytest
import torch
from flower_grid import InMemoryGrid, app_node
from leaving import Leaving, expected_of

from fedexperts.algorithms import ALGORITHMS
from fedexperts.algorithms.api import Algorithm
from fedexperts.config.build import is_required
from fedexperts.config.load import resolved_toml
from fedexperts.federation import flower_client, rounds
from fedexperts.federation.flower_server import serve
from fedexperts.federation.personal import read_kept
from fedexperts.federation.runtime import ClientRuntime
from fedexperts.run_directory import RunDirectory, read_json, read_lines
from fedexperts.running.checking import check_experiment
from fedexperts.running.experiment import run_experiment
from fedexperts.running.export import export_client, load_personalised, opened_model

SMALL = (
    "rounds=2",
    "data.partition.num_clients=2",
    "training.num_local_steps=1",
    "evaluation.max_test_examples=1",
    "evaluation.exam.num_questions=2",
    "evaluation.retention.num_free_questions=1",
    "evaluation.retention.num_neutral=1",
)
REQUIRED = {
    "experts_per_layer": 2,
    "mu": 0.1,
    "server_lr": 0.1,
    "strength": 0.1,
    "federated_rounds": 1,
    "personal_layers": 1,
    "head_steps": 1,
    "variant": "T",
}
"""Values of settings that have no default."""
FEW_TUNED = ("algorithm.num_tuned=4", "algorithm.merged_per_layer=2")
NEEDS = {
    "fedrep": ("training.num_local_steps=2",),
    "flux": FEW_TUNED,
    "flux_plus": FEW_TUNED,
    "fmes": ("algorithm.num_tuned=4",),
    "graft_and_merge": FEW_TUNED,
}
"""Further settings that a method cannot do without, or without which it is another one."""


FORMS = {"flex in 4 bits": ("flex", "model.experts_bits=4", "algorithm.graft.lora_rank=2")}
"""A method on frozen experts in another form."""
FROZEN = sorted(name for name, one in ALGORITHMS.items() if one.changes_experts is Algorithm.changes_experts)
FORMS_OF_ALL = {f"{name} in 3 bits": (name, "model.experts_bits=3") for name in FROZEN} | {
    "fedavg in rows": ("fedavg", "model.experts_kernel=rows")
}


def config_of(make_config, method, *overrides):
    method, *form = (FORMS | FORMS_OF_ALL).get(method, (method,))
    needed = (
        f"algorithm.{name}={REQUIRED[name]}"
        for name, item in ALGORITHMS[method].__dataclass_fields__.items()
        if is_required(item)
    )
    return make_config(method, *SMALL, *needed, *NEEDS.get(method, ()), *form, *overrides)


def identity(folder):
    result = read_json(folder / "result.json")
    names = ("server_state_sha256", "personal_sha256", "mean", "exam", "bytes", "routing", "parameters")
    losses = [line["train_loss"] for line in read_lines(folder / "rounds.jsonl")]
    return {name: result[name] for name in names} | {"losses": losses}


SLOW_FORMS = [pytest.param(form, marks=pytest.mark.slow) for form in FORMS_OF_ALL]


@pytest.fixture(params=[*sorted(ALGORITHMS), *FORMS, *SLOW_FORMS])
def method(request):
    """Every method of the registry in turn, and forms of frozen experts."""
    return request.param


OF_EACH_KIND = {"fedamole", "fedrep", "flex", "flux", "scaffold"}
"""Methods whose state differs in kind: fast tests take these over Flower and export them, slow ones all."""


def of_each_kind():
    every = sorted({*ALGORITHMS, *FORMS, *FORMS_OF_ALL})
    return [pytest.param(one, marks=[] if one in OF_EACH_KIND else pytest.mark.slow) for one in every]


@pytest.fixture
def uploads(monkeypatch):
    """Names of all tensors, in the model or beside it, that uploads brought."""
    sent = {"tensors": set(), "beside": set()}
    refusal = rounds.refusal

    def record(upload, *rest):
        sent["tensors"].update(upload.tensors)
        sent["beside"].update(upload.beside)
        return refusal(upload, *rest)

    monkeypatch.setattr(rounds, "refusal", record)
    return sent


@pytest.fixture
def leaving(monkeypatch):
    """Everything that the clients would send if they were sites."""
    found, handle = Leaving(), ClientRuntime.handle

    def record(self, client_id, download):
        upload = handle(self, client_id, download)
        found.add(download.task, upload)
        return upload

    monkeypatch.setattr(ClientRuntime, "handle", record)
    return found


def test_it_reaches_another_process_as_it_is(make_config, method):
    config = config_of(make_config, method)
    again = pickle.loads(pickle.dumps(config))
    assert again == config
    assert type(again.algorithm) is type(config.algorithm)


def test_a_run_keeps_its_promises(method, make_config, tmp_path, quiet, uploads, leaving):
    config, folder = config_of(make_config, method), tmp_path / "run"
    result = run_experiment(config, folder, progress=quiet)

    assert result["failures"] == []
    assert result["frozen_unchanged"], "the resident model is as it was loaded"
    for direction in ("upload", "download"):
        assert result["bytes"][f"{direction}_counted"] == result["bytes"][f"{direction}_predicted"] > 0
    assert result["parameters"]["trained"] > 0

    kept = [read_kept(path) for path in folder.glob("clients/*/personal-round-*.safetensors")]
    own = {name for one in kept for name in one.parameters}
    assert not own & uploads["tensors"], "a personal parameter was sent"
    if method in ALGORITHMS:
        assert leaving.table() == expected_of(method), f"what leaves a site with {method} has changed"


@pytest.mark.parametrize("method", of_each_kind())
def test_check_says_what_a_run_sends_and_the_export_computes_as_the_run(method, make_config, tmp_path, quiet):
    config, folder = config_of(make_config, method), tmp_path / "run"
    predicted = check_experiment(config)
    run_experiment(config, folder, progress=quiet)
    first = [line for line in read_lines(folder / "clients.jsonl") if line["round"] == 1]
    assert [line["upload_bytes"] for line in first] == [one.upload for one in predicted.bytes]

    export_client(folder, "client-001", tmp_path / "out")
    tokens = torch.arange(3, 40).unsqueeze(0)
    with opened_model(folder, "client-001", "after") as (bench, _, _), torch.no_grad():
        in_the_run = bench.parts.model(input_ids=tokens).logits
    with torch.no_grad():
        assert torch.equal(load_personalised(tmp_path / "out").model(input_ids=tokens).logits, in_the_run)


@pytest.mark.parametrize("method", of_each_kind())
def test_over_flower_and_killed_between_rounds_it_ends_in_the_same_bits(method, make_config, tmp_path, quiet):
    run_experiment(config_of(make_config, method), tmp_path / "whole", progress=quiet)
    config = config_of(make_config, method, "transport.name=flower")
    folder = tmp_path / "flower"
    folder.mkdir()
    run_config = {
        "experiment": resolved_toml(config),
        "run-token": "token",
        "personal-folder": str(folder / "clients"),
    }

    class Died(Exception):
        pass

    def node(position, dies_in):
        answer = app_node(flower_client.app, run_config, {"partition-id": position})

        def answered(message):
            if position == 1 and message.metadata.group_id == dies_in:
                raise Died
            return answer(message)

        return answered

    def server(dies_in):
        grid = InMemoryGrid({900 - position: node(position, dies_in) for position in range(2)})
        serve(grid, config, RunDirectory(folder))

    with pytest.raises(Died):
        server("train 2")
    server("")
    assert identity(folder) == identity(tmp_path / "whole")
