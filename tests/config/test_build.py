"""Tables to settings classes: what is taken, and how each mistake is told."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from fedexperts.config.build import CLASSES, Source, all_keys, build, to_table
from fedexperts.config.toml import overridden, parse_value, split_overrides
from fedexperts.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Dirichlet:
    kind: Literal["iid", "dirichlet"] = "iid"
    alpha: float = 0.5

    def __post_init__(self):
        if not self.alpha > 0:
            raise UserError(f"alpha must be above 0, not {self.alpha}")


@dataclass(frozen=True, kw_only=True)
class Data:
    source: str = "tinyworld"
    labels: tuple[str, ...] = ()
    sizes: tuple[int, ...] = (1, 2)
    targets: Literal["attention"] | tuple[str, ...] = "attention"
    limit: int | None = None
    is_strict: bool = False
    partition: Dirichlet = field(default_factory=lambda: Dirichlet(kind="dirichlet"))

    def __post_init__(self):
        if not self.source:
            raise UserError("data.source is empty")
        if "?" in self.labels:
            raise ValueError("Labels and question marks do not go together")


@dataclass(frozen=True, kw_only=True)
class Averaged:
    lr_scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Grafted:
    gate: str


@dataclass(frozen=True, kw_only=True)
class Config:
    rounds: int = 10
    lr: float = 3e-3
    data: Data = field(default_factory=Data)
    algorithm: object = field(metadata={CLASSES: {"fedavg": Averaged, "flex": Grafted}})


FEDAVG = {"algorithm": {"name": "fedavg"}}


def config_of(table, *overrides):
    texts = split_overrides(overrides)
    values = {key: parse_value(text) for key, text in texts.items()}
    source = Source(file="run.toml", overrides=texts, known_keys=tuple(all_keys(Config)))
    return build(Config, overridden(FEDAVG | table, values), source)


def message_of(table, *overrides):
    with pytest.raises(UserError) as caught:
        config_of(table, *overrides)
    return str(caught.value)


def test_an_empty_table_is_the_defaults():
    assert config_of({}) == Config(algorithm=Averaged())


def test_every_type_is_read_from_a_file():
    table = {
        "rounds": 3,
        "lr": 1,
        "data": {
            "labels": ["a", "b"],
            "sizes": [],
            "targets": ["q_proj"],
            "limit": 7,
            "is_strict": True,
            "partition": {"alpha": 0.1},
        },
    }
    config = config_of(table)
    assert (config.rounds, config.lr, type(config.lr)) == (3, 1.0, float)
    assert config.data == Data(
        labels=("a", "b"),
        sizes=(),
        targets=("q_proj",),
        limit=7,
        is_strict=True,
        partition=Dirichlet(kind="dirichlet", alpha=0.1),
    )


def test_a_partly_given_section_keeps_the_other_defaults_of_its_place():
    assert config_of({"data": {"partition": {"alpha": 2.0}}}).data.partition.kind == "dirichlet"


def test_the_name_in_a_section_picks_its_class():
    assert config_of({"algorithm": {"name": "flex", "gate": "zero"}}).algorithm == Grafted(gate="zero")


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("lr=1e-3", "lr", 1e-3),
        ("lr=2", "lr", 2.0),
        ("rounds = 4", "rounds", 4),
        ("data.source=some/path.jsonl", "source", "some/path.jsonl"),
        ("data.source=2024", "source", "2024"),
        ("data.source=1e5", "source", "1e5"),
        ("data.source=true", "source", "true"),
        ('data.source="quoted"', "source", "quoted"),
        ("data.source=a=b", "source", "a=b"),
        ("data.source=a\nb = 1", "source", "a\nb = 1"),
        ('data.labels=["a", "b"]', "labels", ("a", "b")),
        ("data.targets=attention", "targets", "attention"),
        ("data.is_strict=true", "is_strict", True),
    ],
)
def test_an_override_reaches_its_field(override, key, value):
    config = config_of({}, override)
    assert getattr(config.data if override.startswith("data.") else config, key) == value


def test_of_two_overrides_of_one_key_the_last_counts():
    assert config_of({"rounds": 1}, "rounds=2", "rounds=3").rounds == 3


def test_an_override_does_not_change_the_table_it_is_laid_over():
    table = {"data": {"source": "a"}}
    overridden(table, {"data.source": "b"})
    assert table == {"data": {"source": "a"}}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"ruonds": 3}, "run.toml: ruonds is not a setting; did you mean rounds?"),
        (
            {"data": {"partition": {"alhpa": 1.0}}},
            "run.toml: data.partition.alhpa is not a setting; did you mean data.partition.alpha?",
        ),
        ({"alpha": 1.0}, "run.toml: alpha is not a setting; did you mean data.partition.alpha?"),
        (
            {"algorithm": {"name": "fedavg", "gate": "zero"}},
            "run.toml: algorithm.gate is not a setting of this algorithm.name; allowed: lr_scale",
        ),
        (
            {"data": {"xyzzy": 1}},
            "run.toml: data.xyzzy is not a setting; allowed here: "
            "is_strict, labels, limit, partition, sizes, source, targets",
        ),
        ({"rounds": 3.0}, "run.toml: rounds must be a whole number, not 3.0"),
        ({"rounds": True}, "run.toml: rounds must be a whole number, not true"),
        ({"rounds": "3"}, 'run.toml: rounds must be a whole number, not "3"'),
        ({"lr": "fast"}, 'run.toml: lr must be a finite number, not "fast"'),
        ({"lr": float("nan")}, "run.toml: lr must be a finite number, not nan"),
        ({"lr": True}, "run.toml: lr must be a finite number, not true"),
        ({"data": {"source": 3}}, "run.toml: data.source must be a text, not 3"),
        ({"data": {"is_strict": 1}}, "run.toml: data.is_strict must be true or false, not 1"),
        ({"data": {"labels": "a"}}, 'run.toml: data.labels must be a list of texts, not "a"'),
        ({"data": {"labels": ["a", 1]}}, 'run.toml: data.labels must be a list of texts, not ["a", 1]'),
        ({"data": {"labels": {"a": 1}}}, "run.toml: data.labels must be a list of texts, not { a = 1 }"),
        ({"data": {"limit": "x"}}, 'run.toml: data.limit must be a whole number, not "x"'),
        (
            {"data": {"targets": "atention"}},
            'run.toml: data.targets must be "attention" or a list of texts, not "atention"; '
            "did you mean attention?",
        ),
        (
            {"data": {"partition": {"kind": "dirichle"}}},
            'run.toml: data.partition.kind must be "iid" or "dirichlet", not "dirichle"; '
            "did you mean dirichlet?",
        ),
        ({"data": 3}, "run.toml: data is a section with keys such as data.source, not 3"),
        (
            {"algorithm": {"name": "flx"}},
            'run.toml: algorithm.name must be "fedavg" or "flex", not "flx"; did you mean flex?',
        ),
        ({"algorithm": {}}, 'run.toml: algorithm.name is missing; it must be "fedavg" or "flex"'),
        (
            {"algorithm": "flex"},
            'run.toml: algorithm is a section; algorithm.name must be "fedavg" or "flex", not "flex"',
        ),
        ({"algorithm": {"name": "flex"}}, "run.toml: algorithm.gate is missing; it must be a text"),
        ({"data": {"partition": {"alpha": -1}}}, "run.toml: data.partition.alpha must be above 0, not -1.0"),
        ({"data": {"source": ""}}, "run.toml: data.source is empty"),
        ({"data": {"labels": ["?"]}}, "run.toml: data: Labels and question marks do not go together"),
    ],
)
def test_a_mistake_in_a_file_is_told_in_one_sentence(table, message):
    assert message_of(table) == message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ruonds=3", "command line: ruonds is not a setting; did you mean rounds?"),
        ("lr=fast", 'command line: lr must be a finite number, not "fast"'),
        ("data=3", "command line: data is a section with keys such as data.source, not 3"),
        ("data.partition.alpha=0", "command line: data.partition.alpha must be above 0, not 0.0"),
        ("rounds.x=1", "command line: rounds.x cannot be set: rounds is 10, not a section"),
        ("rounds", "command line: 'rounds' is not key=value, as in training.lr=3e-3"),
        ("=3", "command line: '=3' is not key=value, as in training.lr=3e-3"),
        ("a..b=3", "command line: 'a..b=3' is not key=value, as in training.lr=3e-3"),
    ],
)
def test_a_mistake_in_an_override_is_told_in_one_sentence(override, message):
    assert message_of({"rounds": 10}, override) == message


@pytest.mark.parametrize(
    "overrides",
    [(), ("algorithm.name=flex", "algorithm.gate=x"), ("data.limit=3", 'data.labels=["a"]', "lr=1")],
)
def test_what_to_table_gives_builds_an_equal_instance(overrides):
    config = config_of({}, *overrides)
    assert config_of(to_table(config)) == config
