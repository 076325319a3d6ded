"""Experiment files to RunConfig and back."""

import pytest

from fedexperts.algorithms import ALGORITHMS
from fedexperts.config.build import is_required
from fedexperts.config.load import (
    build_config,
    config_sha256,
    difference,
    load_config,
    resolved_toml,
    settings_sha256,
    to_table,
)
from fedexperts.errors import UserError


@pytest.fixture
def experiment(tmp_path):
    path = tmp_path / "flex.toml"
    path.write_text('rounds = 3\n[algorithm]\nname = "flex"\n[training]\nlr = 1\n')
    return path


def test_file_and_overrides_make_one_configuration(experiment):
    config = load_config(experiment, ["training.lr=3e-3", "algorithm.graft.gate_bias=-4"])
    assert (config.rounds, config.training.lr, config.algorithm.graft.gate_bias) == (3, 3e-3, -4.0)


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_the_resolved_configuration_loads_as_an_equal_one(name, tmp_path):
    required = {
        key: "T" if key == "variant" else 1
        for key, item in ALGORITHMS[name].__dataclass_fields__.items()
        if is_required(item)
    }
    config = build_config({"algorithm": {"name": name, **required}}, "run.toml", ["training.lr=1e-3"])
    resolved = tmp_path / "config.toml"
    resolved.write_text(resolved_toml(config))
    again = load_config(resolved)
    assert again == config
    assert config_sha256(again) == config_sha256(config) == settings_sha256(to_table(config))


def test_the_resolved_configuration_has_every_key():
    table = to_table(build_config({"algorithm": {"name": "fedavg"}}, "run.toml"))
    assert table["data"]["partition"]["alpha"] == 0.5
    assert list(table)[:3] == ["seed", "rounds", "threads"]


def test_one_setting_changes_the_hash_and_is_the_difference(experiment):
    old, new = load_config(experiment), load_config(experiment, ["training.lr=0.01"])
    assert config_sha256(old) != config_sha256(new)
    assert difference(old, new) == ["training.lr: 1.0 -> 0.01"]
    assert difference(old, old) == []


def test_a_difference_shows_keys_that_one_side_lacks(experiment):
    new = build_config({"algorithm": {"name": "local_only"}, "rounds": 3}, "run.toml", ["training.lr=1"])
    lines = difference(load_config(experiment), new)
    assert 'algorithm.name: "flex" -> "local_only"' in lines
    assert 'algorithm.graft.gate: "sigmoid" -> (none)' in lines


def test_an_integer_for_a_number_is_the_same_configuration():
    one, other = (
        build_config({"algorithm": {"name": "fedavg"}, "training": {"lr": lr}}, "run.toml") for lr in (1, 1.0)
    )
    assert config_sha256(one) == config_sha256(other)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"rounds = \n", "is not valid TOML: Invalid value (at line 1, column 10)"),
        (b"rounds = 1\nrounds = 2\n", "is not valid TOML: Cannot overwrite a value (at line 2, column 11)"),
        (b"name = '\xff'\n", "is not UTF-8 text (byte 8)"),
        (b"[matrix]\nseed = [0]\n", "is a suite and no experiment: fedexperts compare {path}"),
        (b"seed = -1\n[algorithm]\nname = 'flex'", "seed must be at least 0, not -1"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(content, message, tmp_path):
    path = tmp_path / "x.toml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(caught.value) == f"{path}: {message.format(path=path)}"


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    path = tmp_path / "x.toml"
    path.write_bytes(b"\xef\xbb\xbfrounds = 2\n[algorithm]\nname = 'flex'\n")
    assert load_config(path).rounds == 2


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path):
    with pytest.raises(UserError, match=r"none\.toml: there is no such file"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(UserError, match="is a folder, not a TOML file"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.partition.alpha=-1", "command line: data.partition.alpha is -1.0; it must be finite"),
        ("rank=2", "command line: rank is not a setting; did you mean adapter.rank?"),
        (
            "algorithm.graft.gat=none",
            "command line: algorithm.graft.gat is not a setting; did you mean algori",
        ),
        ("training.lr=0", "command line: training.lr must be above 0, not 0.0"),
        ("algorithm.name=fedavg_expert", "did you mean fedavg_experts?"),
        ("model.dtype=float16", 'command line: model.dtype must be "float32" or "bfloat16", not "float16"'),
    ],
)
def test_real_settings_tell_their_mistakes_with_the_full_key(override, message, experiment):
    with pytest.raises(UserError) as caught:
        load_config(experiment, [override])
    assert message in str(caught.value)
