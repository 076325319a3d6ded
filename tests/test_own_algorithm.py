"""Algorithms from outside: docs/own_algorithm.md runs as it stands, and entry points are found and judged."""

import importlib
import re
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import fedexperts
from fedexperts import cli
from fedexperts.algorithms import ALGORITHMS
from fedexperts.algorithms.api import Algorithm, upload_of
from fedexperts.algorithms.fedavg import FedAvg
from fedexperts.config.load import load_config
from fedexperts.config.plugins import load_plugins
from fedexperts.errors import UserError
from fedexperts.evaluation.own_metrics import OWN_METRICS
from fedexperts.federation.edge import evaluation_refusal
from fedexperts.messages import Upload
from fedexperts.running.experiment import run_experiment
from fedexperts.training.local_steps import Correction

PAGE = (Path(__file__).parents[1] / "docs/own_algorithm.md").read_text(encoding="utf-8")
CLASS, USE, METRIC = re.findall("```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(autouse=True)
def nothing_stays_registered():
    """Every test begins and ends with the methods of this package, and no metric."""
    kept = dict(ALGORITHMS), dict(OWN_METRICS)
    load_plugins.cache_clear()
    yield
    for registry, before in zip((ALGORITHMS, OWN_METRICS), kept, strict=True):
        registry.clear()
        registry.update(before)
    load_plugins.cache_clear()


def in_another_process():
    """Forget what a script registered; classes of a script that has ended are gone anyway."""
    del ALGORITHMS["my_fedprox"]


def test_the_page_s_script_runs_and_its_folder_needs_the_registration(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text(CLASS + USE)
    names = runpy.run_path("script.py", run_name="__main__")
    result = names["result"]
    assert (tmp_path / "runs/my_fedprox/report.html").is_file()
    assert result.method == "my_fedprox"
    assert result.json["settings"]["algorithm"] == {"name": "my_fedprox", "mu": 1.0}
    assert fedexperts.resume(result.folder, progress=False).json == result.json
    assert isinstance(result.generate("Who are you?", client="client-001"), str)
    exported = result.export(tmp_path / "out", client="server")
    assert fedexperts.load_personalised(exported).model

    in_another_process()
    capsys.readouterr()
    for command in (
        ["run", "--resume", "runs/my_fedprox"],
        ["generate", "runs/my_fedprox", "Hi", "--model=base"],
    ):
        assert cli.main(command) == cli.MISTAKE
        (line,) = capsys.readouterr().err.splitlines()
        assert (
            'algorithm "my_fedprox" is not registered: call fedexperts.register_algorithm("my_fedprox"'
            in line
        )
        assert 'entry point in group "fedexperts.algorithms"' in line
    assert cli.main(["report", "runs/my_fedprox"]) == cli.OK


@pytest.fixture
def my_fedprox(tmp_path, monkeypatch):
    """The page's class, in a module that other processes could import too."""
    (tmp_path / "my_package.py").write_text(CLASS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("my_package").MyFedProx
    del sys.modules["my_package"]


def states(folder):
    return [record["server_state_sha256"] for record in fedexperts.open_run(folder).rounds]


@pytest.mark.slow
def test_the_page_s_fedprox_differs_from_fedavg_in_every_round(my_fedprox, make_config, tmp_path, quiet):
    fedexperts.register_algorithm("my_fedprox", my_fedprox)
    run_experiment(make_config("fedavg"), tmp_path / "fedavg", progress=quiet)
    for name, mu in (("idle", 0.0), ("pulled", 1.0)):
        run_experiment(make_config("my_fedprox", f"algorithm.mu={mu}"), tmp_path / name, progress=quiet)
    assert states(tmp_path / "idle") == states(tmp_path / "fedavg"), "mu = 0 is FedAvg bit for bit"

    lines = (tmp_path / "pulled/clients.jsonl").read_text().splitlines()
    assert len(lines) == 6
    assert all(re.search(r'"num_corrections": [1-9]', line) for line in lines), "no turn was left uncorrected"
    assert all(a != b for a, b in zip(states(tmp_path / "pulled"), states(tmp_path / "fedavg"), strict=True))


@dataclass(frozen=True, kw_only=True)
class Forgetful(Algorithm):
    """Its correction has effect in the first round only."""

    def client_update(self, client, kept, sent):
        kept = self.install(client, kept, sent)
        correction = Correction(
            gradient=lambda name, value, grad: grad * 2 if client.round_number == 1 else None
        )
        result = client.train(self.trained(client.parts, sent), correction=correction)
        return upload_of(client, self.shared_names(client.parts), sent, result), kept


def test_a_correction_that_is_forgotten_from_the_second_turn_on_stops_the_run(make_config, tmp_path, quiet):
    fedexperts.register_algorithm("forgetful", Forgetful)
    with pytest.raises(UserError, match=r"round 2 .*correction returned no gradient in any local step"):
        run_experiment(make_config("forgetful"), tmp_path / "run", progress=quiet)


@dataclass
class Thawed(Algorithm):
    """A dataclass that is not frozen."""


class Undecorated(FedAvg):
    """Inherits a dataclass, and is none."""

    mu: float = 0.1


@pytest.mark.parametrize(
    ("name", "cls", "said"),
    [
        ("flex", Forgetful, r'name "flex" is taken by fedexperts\.algorithms\.flex\.Flex'),
        ("my fedprox", Forgetful, r"algorithm name 'my fedprox' must be a letter followed by"),
        ("mine", dict, r"must be a subclass of fedexperts\.algorithms\.api\.Algorithm, not <class 'dict'>"),
        ("mine", Forgetful(), r"must be a subclass"),
        ("mine", Algorithm, r"must be a subclass"),
        ("mine", Thawed, r"Thawed must be a frozen dataclass; put @dataclass"),
        ("mine", Undecorated, r"Undecorated must be a frozen dataclass"),
    ],
)
def test_what_is_no_algorithm_is_refused_in_a_sentence(name, cls, said):
    with pytest.raises(UserError, match=said):
        fedexperts.register_algorithm(name, cls)
    assert ALGORITHMS.get(name) is not cls


def test_a_class_may_be_defined_again_under_its_name():
    again = dataclass(frozen=True, kw_only=True)(
        type("Forgetful", (Algorithm,), {"__module__": __name__, "__qualname__": "Forgetful"})
    )
    fedexperts.register_algorithm("mine", Forgetful)
    fedexperts.register_algorithm("mine", again)
    assert ALGORITHMS["mine"] is again


def install(folder, *lines):
    """Lay down what pip leaves of a package with these entry points."""
    info = folder / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("\n".join(lines))


def test_an_entry_point_is_known_to_whoever_reads_a_configuration(my_fedprox, tmp_path):
    install(tmp_path, "[fedexperts.algorithms]", "my_fedprox = my_package:MyFedProx")
    (tmp_path / "mine.toml").write_text("[algorithm]\nname = 'my_fedprox'\nmu = 0.5")
    assert load_config(tmp_path / "mine.toml").algorithm == my_fedprox(mu=0.5)


@pytest.mark.parametrize(
    ("group", "line", "said"),
    [
        (
            "algorithms",
            "mine = my_package:Missing",
            r'entry point mine = "my_package:Missing" in group "fedexperts\.algorithms" of the package '
            r"my-package cannot be loaded: AttributeError",
        ),
        (
            "algorithms",
            "mine = nowhere:Missing",
            "cannot be loaded: ModuleNotFoundError: No module named 'nowhere'",
        ),
        ("algorithms", "flex = my_package:MyFedProx", r'is refused: algorithm name "flex" is taken by'),
        ("algorithms", "mine = my_package:Kept", r"is refused: algorithm \"mine\" must be a subclass"),
        ("metrics", "mine = my_package:__name__", r'is refused: metric "mine" must be a function'),
    ],
)
def test_a_broken_entry_point_is_one_error_every_time(group, line, said, my_fedprox, tmp_path):
    install(tmp_path, f"[fedexperts.{group}]", line)
    (tmp_path / "fedavg.toml").write_text("[algorithm]\nname = 'fedavg'")
    for _ in range(2):
        with pytest.raises(UserError, match=said):
            load_config(tmp_path / "fedavg.toml")


def words_of_the_page():
    names = {"fedexperts": fedexperts}
    exec(METRIC, names)
    return names["words"]


def test_the_page_s_metric_is_measured_before_and_after_and_averaged(make_config, tmp_path, quiet):
    words = words_of_the_page()
    assert {"words": words} == OWN_METRICS
    config = make_config("fedavg", "evaluation.own_metrics=['words']", "evaluation.every=1")
    run_experiment(config, tmp_path / "run", progress=quiet)
    result = fedexperts.open_run(tmp_path / "run")
    with fedexperts.load_data(config) as data:
        for client_id, client in result.clients.items():
            counts = [len(one.response.split()) for one in data.examples(client_id, "test")[:2]]
            mean = sum(counts) / len(counts)
            own = client["algorithm"]
            assert own == {"words_per_response_before": mean, "words_per_response_after": mean}
            assert mean > 0
    means = [client["algorithm"]["words_per_response_after"] for client in result.clients.values()]
    assert result.mean["words_per_response_after"] == pytest.approx(sum(means) / 3, rel=1e-15)  # fsum
    assert (
        result.rounds[0]["evaluation"]["words_per_response_after"] == result.mean["words_per_response_after"]
    )


def test_a_metric_that_is_not_registered_stops_before_anything_is_loaded(make_config, tmp_path, quiet):
    config = make_config("fedavg", "evaluation.own_metrics=['words']", "model.name=missing")
    said = (
        r'own_metrics: metric "words" is not registered: call fedexperts\.register_metric\("words", \.\.\.\)'
    )
    with pytest.raises(UserError, match=said):
        run_experiment(config, tmp_path / "run", progress=quiet)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (0.5, r'metric "mine" must return numbers by name, not 0\.5'),
        ({"loss": 0.5}, r"returns 'loss', a name that another score has"),
        ({"a b": 0.5}, r"returns a number whose name 'a b' must be a letter followed by"),
        ({"f1": float("nan")}, r'metric "mine": f1 must be a finite number, not nan'),
        ({"f1": "high"}, r"f1 must be a finite number, not 'high'"),
    ],
)
def test_what_a_metric_returns_is_judged(returned, said, make_config, tmp_path, quiet):
    fedexperts.register_metric("mine", lambda model, examples, format: returned)
    config = make_config("fedavg", "evaluation.own_metrics=['mine']", "rounds=0")
    with pytest.raises(UserError, match=said):
        run_experiment(config, tmp_path / "run", progress=quiet)


def test_the_server_refuses_a_measured_name_that_is_none():
    assert evaluation_refusal(Upload(measured={"f1_after": 0.5}), {}, ()) == ""
    refused = evaluation_refusal(Upload(measured={"a b": 0.5}), {}, ())
    assert refused == "evaluation refused: measured have the name 'a b'"


def test_a_metric_s_name_can_be_taken_once():
    fedexperts.register_metric("length", len)
    fedexperts.register_metric("length", len)
    with pytest.raises(UserError, match='metric name "length" is taken by'):
        fedexperts.register_metric("length", max)
