"""The Python API: names, results, callbacks, and docs/api.md, made from docstrings and current."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fedexperts
from fedexperts import cli
from fedexperts.api_reference import reference
from fedexperts.config.load import resolved_toml, to_table
from fedexperts.errors import UserError
from fedexperts.run_directory import read_lines
from fedexperts.seals import read_sealed

PAGE = Path(__file__).parents[1] / "docs/api.md"
SMALL = {"data.partition.num_clients": 2, "training.num_local_steps": 1, "evaluation.matrix": False}


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == reference(), "run `python -m fedexperts.api_reference`"


def test_importing_the_package_and_making_an_error_imports_no_torch():
    code = "import fedexperts, sys; fedexperts.UserError; dir(fedexperts); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_type_checkers_see_every_public_name_and_none_hides_a_package():
    source = Path(fedexperts.__file__)
    nodes = [node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.ImportFrom)]
    seen = {alias.asname for node in nodes for alias in node.names if alias.asname}
    assert seen == set(fedexperts.__all__) - {"__version__"}
    modules = {path.stem for path in source.parent.iterdir() if path.suffix in ("", ".py")}
    assert modules & set(fedexperts.__all__) == {"toolbox"}
    assert all(getattr(fedexperts, name) for name in fedexperts.__all__)
    with pytest.raises(AttributeError, match="no attribute 'training_wheels'"):
        _ = fedexperts.training_wheels


def test_the_toolbox_is_sorted_and_every_name_is_documented():
    names = fedexperts.toolbox.__all__
    assert names == sorted(set(names))
    for name in names:
        value = getattr(fedexperts.toolbox, name)
        assert value.__name__ == name
        assert value.__doc__
        assert not value.__doc__.startswith(f"{name}("), "a dataclass without docstring has its signature"


class Kept(fedexperts.Callback):
    """Remembers what it was told, and stops a run after the round ``until``."""

    def __init__(self, until=0):
        self.records, self.result, self.until = [], None, until

    def after_round(self, record):
        self.records.append(dict(record))
        with pytest.raises(TypeError):
            record["round"] = 0
        if record["round"] == self.until:
            raise ZeroDivisionError

    def finished(self, result):
        self.result = dict(result)


def test_a_run_with_callbacks_is_stopped_resumed_and_read(make_config, tmp_path):
    config, folder = fedexperts.load_config(make_config("flex"), SMALL), tmp_path / "run"
    first, losses = Kept(until=1), []
    with pytest.raises(ZeroDivisionError):
        fedexperts.run(config, to=folder, progress=False, callbacks=[first])
    with pytest.raises(
        UserError, match=r"no result\.json to report on yet \(unfinished, 1 of 2 rounds done\)"
    ):
        fedexperts.open_run(folder)
    second = Kept()
    callbacks = [second, lambda record: losses.append(record["train_loss"])]
    result = fedexperts.resume(folder, progress=False, callbacks=callbacks)

    lines = read_lines(folder / "rounds.jsonl")
    assert (first.records, second.records) == (lines[:1], lines[1:])
    assert losses == [lines[1]["train_loss"]]
    assert result.json == second.result == read_sealed(folder / "result.json")
    assert first.result is None
    assert (result.name, result.method, result.seed, result.rounds) == ("run", "flex", 3, tuple(lines))
    assert (result.mean, result.clients) == (result.json["mean"], result.json["clients"])
    assert to_table(config) == result.json["settings"]

    assert result.report() == folder / "report.html"
    assert result.plots() == fedexperts.open_run(str(folder)).plots()
    plot = result.plot("rounds")
    paths = plot.save(tmp_path / "plots")
    assert paths[0].name == "rounds-1.svg"
    assert [path.read_text() for path in paths] == [svg for _, svg in plot.pictures] != []
    assert [path.with_suffix(".csv").read_text() for path in paths] == [*plot.tables]
    assert plot._repr_html_().count("<svg") == len(paths)
    with pytest.raises(UserError, match=r"plot 'loss' is not in this report: it must be one of .*rounds"):
        result.plot("loss")
    with pytest.raises(UserError, match="client 'nobody' is not in"):
        result.generate("Hi", client="nobody")


def test_what_is_no_callback_is_refused_before_the_run(make_config, tmp_path):
    for wrong in (7, Kept):
        with pytest.raises(UserError, match=r"a callback must be a function or a fedexperts\.Callback, not"):
            fedexperts.run(make_config("fedavg"), to=tmp_path / "run", callbacks=[wrong])
    assert not (tmp_path / "run").exists()


def test_a_configuration_comes_from_a_file_a_mapping_or_a_configuration(make_config, tmp_path):
    config = make_config("flex", "training.lr=0.5")
    file = tmp_path / "mine.toml"
    file.write_text(resolved_toml(make_config("flex")))
    for overrides in ({"training.lr": 0.5}, ["training.lr=0.5"]):
        for experiment in (file, str(file), to_table(make_config("flex")), make_config("flex")):
            assert fedexperts.load_config(experiment, overrides) == config
    table = to_table(config) | {"model": {"name": Path(config.model.name)}}
    metrics = ("loss", "rougeL")
    changed = fedexperts.load_config(table, {"evaluation.metrics": metrics, "data.template": "chat"})
    assert (changed.evaluation.metrics, changed.data.template) == (metrics, "chat")
    assert changed.model == config.model
    with pytest.raises(UserError, match="overrides must be a mapping or a list of texts"):
        fedexperts.load_config(file, "training.lr=0.5")
    with pytest.raises(UserError, match=r"experiment: rounds must be a whole number, not \"many\""):
        fedexperts.load_config({"algorithm": {"name": "flex"}, "rounds": "many"})


def test_model_data_and_check_are_those_of_a_run(make_config, tmp_path):
    table = {"model": to_table(make_config("flex"))["model"]}
    loaded = fedexperts.load_model(table)
    assert len(fedexperts.toolbox.find_moe_layers(loaded.model)) == len(loaded.layers) == 2
    assert fedexperts.check(make_config("flex")).as_json()["rounds"] == 2
    with fedexperts.load_data(make_config("flex")) as data:
        assert len(data.client_ids) == 3
        assert data.examples("client-000", "train")


def test_a_comparison_has_the_results_of_its_runs_and_the_reasons_of_the_rest(make_config, tmp_path):
    (tmp_path / "base.toml").write_text(resolved_toml(fedexperts.load_config(make_config("fedavg"), SMALL)))
    (tmp_path / "empty").mkdir()
    bad = f"[[variant]]\nname = 'bad'\n'model.name' = '{tmp_path / 'empty'}'"
    (tmp_path / "suite.toml").write_text(
        "\n".join(["base = 'base.toml'", "[[variant]]", "name = 'good'", bad])
    )
    compared = fedexperts.compare(tmp_path / "suite.toml", {"rounds": 1}, to=tmp_path / "out", progress=False)
    assert list(compared.results) == ["good"]
    assert len(compared.results["good"].rounds) == 1
    assert str(tmp_path / "empty") in compared.failed["bad"]
    assert compared.report().is_file()
    with pytest.raises(UserError, match="is a suite directory: open one of the runs in"):
        fedexperts.open_run(tmp_path / "out")


def test_tensorboard_has_every_number_of_the_rounds_and_the_means(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = fedexperts.TensorBoard(tmp_path)
    for number, loss in ((1, 3.0), (2, 2.5)):
        record = {"round": number, "train_loss": loss, "cohort": ["a"], "seconds": {"train": 0.5}}
        board.after_round(record)
    board.finished({"mean": {"loss_after": 0.25}, "rounds": 2})
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    scalars = {
        tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    assert scalars == {
        "train_loss": [(1, 3.0), (2, 2.5)],
        "seconds/train": [(1, 0.5), (2, 0.5)],
        "mean/loss_after": [(2, 0.25)],
    }


def test_without_tensorboard_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"tensorboard: run pip install -e '\.\[tensorboard\]'"):
        fedexperts.TensorBoard(tmp_path)


def test_the_command_line_and_the_api_name_folders_alike(make_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = fedexperts.load_config(make_config("fedavg"), SMALL | {"rounds": 0})
    Path("mine.toml").write_text(resolved_toml(config))
    assert cli.main(["run", "mine.toml", "--quiet"]) == cli.OK
    assert fedexperts.run("mine.toml", progress=False).folder == Path("runs/mine-2")
    assert fedexperts.run(config, progress=False).folder == Path("runs/fedavg-1")
