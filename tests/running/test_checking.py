"""The tables of ``fedexperts check`` on a terminal."""

import io
import re

import pytest
from rich.console import Console

from fedexperts.errors import UserError
from fedexperts.running.checking import check_experiment


@pytest.mark.parametrize("width", [60, 100])
def test_every_client_label_and_number_can_be_read(make_config, width):
    report = check_experiment(make_config("flex"))
    console = Console(file=io.StringIO(), width=width)
    console.print(*report.render(), sep="\n")
    shown = console.file.getvalue()
    assert max(map(len, shown.splitlines())) <= width
    assert "…" not in shown
    words = shown.replace(",", " ").split()
    for client_id, facts in report.as_json()["clients"].items():
        assert client_id in words
        for label, count in facts["labels"].items():
            assert count == 0 or {label, str(count)} <= set(words)
    upload = report.as_json()["bytes_by_client_of_round_1"][0]["upload"]
    assert f"{upload:,} bytes" in shown


FLUX = ("algorithm.num_tuned=4", "algorithm.merged_per_layer=1")


def shown_of(report):
    console = Console(file=io.StringIO(), width=140)
    console.print(*report.render(), sep="\n")
    return console.file.getvalue()


@pytest.mark.slow
def test_the_first_rounds_roles_are_those_that_the_server_plans(make_config):
    report = check_experiment(make_config("flux", *FLUX, "cohort.memory_gb=[1.0]"))
    for role in report.roles.values():
        # Of a role of four 30 % are exploited in the first round, which is one; the others are explored.
        sizes = role.sizes
        assert (sum(sizes.tuned), sum(sizes.explored), sizes.merged) == (1, 3, len(sizes.tuned))
        assert 0 < role.memory_bytes < 10**9
    assert (
        set(report.roles) == set(report.as_json()["roles"]) == {row.row.client_id for row in report.clients}
    )
    assert "explored: by layer" in shown_of(report)


def test_without_a_limit_no_memory_of_a_role_is_told(make_config):
    roles = check_experiment(make_config("flux", FLUX[0], "algorithm.others=kept")).roles
    assert {(role.sizes.merged, role.memory_bytes) for role in roles.values()} == {(None, None)}


def test_a_median_holds_the_uploads_of_a_round(make_config):
    mean, median = (
        check_experiment(make_config("fedavg", f"aggregation.kind={kind}")) for kind in ("mean", "median")
    )
    assert median.server_bytes == mean.server_bytes * (1 + len(mean.clients))


def test_a_clocks_prediction_is_drawn_as_a_time_line(make_config):
    report = check_experiment(make_config("fedavg", "clock.device=['phone', 'l20']"))
    for told in report.clock.phases_by_client.values():
        assert told["download"] + told["train"] + told["upload"] == pytest.approx(told["total"], rel=1e-12)
    rows = [line for line in shown_of(report).splitlines() if line.startswith("client-")]
    bars = [line.split()[-1] for line in rows if set("↑·") & set(line)]
    assert [len(bar) for bar in bars] == [24] * 3
    assert [bar.count("·") > 12 for bar in bars] == [False, True, False]
    assert report.roles == {}
    assert "roles" not in report.as_json()


def test_clusters_of_inputs_are_shown_by_client(make_config):
    partition = (
        "data.partition.kind=clusters",
        "data.partition.num_clusters=2",
        "data.partition.min_examples=4",
    )
    report = check_experiment(make_config("fedavg", *partition))
    assert "Clusters of inputs" in shown_of(report)
    for own in report.as_json()["clients"].values():
        assert sum(own["clusters"].values()) == own["train"] + own["validation"] + own["test"]


RECEIVED = "algorithm.own_model=received"


@pytest.mark.parametrize(
    ("key", "beside"),
    [
        ("algorithm.calibration_file", ("algorithm.calibration=other",)),
        ("algorithm.off_task", ()),
        ("algorithm.prompt_gate", (RECEIVED,)),
        ("training.replay", ()),
    ],
)
def test_public_texts_that_are_missing_are_told_before_anything_is_trained(make_config, key, beside):
    config = make_config("flex", f"{key}=nowhere.jsonl", *beside)
    with pytest.raises(UserError, match=rf'^{re.escape(key)}: missing file "nowhere.jsonl"$'):
        check_experiment(config)
