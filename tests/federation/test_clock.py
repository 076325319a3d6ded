"""The simulated clock: turns by phase, the slowest client, hours of absence, targets, and a whole run."""

import json
from dataclasses import replace

import pytest
from flower_grid import InMemoryGrid, app_node

from fedexperts.config.load import load_config, resolved_toml
from fedexperts.costs.devices import DEVICES, Device
from fedexperts.costs.stopwatch import Stopwatch
from fedexperts.costs.traffic import PredictedBytes
from fedexperts.costs.work import PhaseWork
from fedexperts.errors import UserError
from fedexperts.federation import flower_client
from fedexperts.federation.clock import Clock
from fedexperts.federation.clock_settings import ClockSettings
from fedexperts.federation.flower_server import serve
from fedexperts.federation.personal import PersonalStore
from fedexperts.federation.transport import TransportSettings
from fedexperts.run_directory import RunDirectory, read_json, read_lines
from fedexperts.running import experiment
from fedexperts.running.checking import check_experiment
from fedexperts.running.experiment import run_experiment
from fedexperts.running.predicted_clock import predict_clock
from fedexperts.running.simulated import summary_of
from fedexperts.running.workbench import open_workbench

CLIENTS = ("a", "b", "c", "d")
HOUR = 3600.0
MINE = Device(
    half_tflops=1.0,
    float32_tflops=1.0,
    memory_gb_per_s=1.0,
    host_gb_per_s=1.0,
    disk_gb_per_s=1.0,
    memory_gb=1.0,
    download_mbit=8.0,
    upload_mbit=4.0,
)
"""A megabyte a second down, half a megabyte up."""
RUN = (
    'clock.device=["l20", "phone"]',
    "clock.available_hours=12",
    "clock.available_spread=24",
    "clock.straggler_share=1",
    "clock.straggler_factor=1e6",
    "clock.target=loss_after",
    "clock.target_value=1000",
    "evaluation.every=1",
    "evaluation.matrix=false",
    'evaluation.metrics=["loss"]',
    "evaluation.exam.source=none",
    "evaluation.retention.neutral=none",
    "training.num_local_steps=1",
)


def clock_of(**settings):
    chosen = {"device": "custom", "custom": MINE} if "device" not in settings else {}
    return Clock(settings=ClockSettings(**chosen, **settings), client_ids=CLIENTS, seed=0)


def turn(clock, client, seconds=1.0, *, later=0.0, size=1_000_000):
    work = {"train": PhaseWork(seconds=seconds)}
    work |= {"profile_overlapped": PhaseWork(seconds=later)} if later else {}
    return clock.turn(client, work, download_bytes=size, upload_bytes=size)


def test_a_turn_is_download_work_and_upload():
    assert turn(clock_of(), "a") == {"download": 1.0, "train": 1.0, "upload": 2.0, "total": 4.0}


def test_the_slowest_client_rules_the_round_and_rounds_add_up():
    clock = clock_of(server_gb_per_s=0.006)
    for client, seconds in zip(CLIENTS, (1.0, 9.0, 2.0, 3.0), strict=True):
        turn(clock, client, seconds)
    first = clock.end_round()
    # Four uploads of 10^6 bytes, three passes over each, at 6 * 10^6 bytes a second.
    assert first["seconds"] == {"turns": 12.0, "aggregate": 2.0, "overlapped_left": 0.0, "total": 14.0}
    assert (first["slowest"], first["start"], first["end"]) == ("b", 0.0, 14.0)
    turn(clock, "a")
    second = clock.end_round()
    assert (second["start"], second["end"]) == (14.0, 18.5)


@pytest.mark.parametrize(("later", "left"), [(1.5, 0.0), (5.0, 3.0)])
def test_what_overlaps_prolongs_the_round_by_what_is_left_of_it_alone(later, left):
    clock = clock_of(server_gb_per_s=0.0015)
    assert turn(clock, "a", later=later)["total"] == 4.0
    assert clock.end_round()["seconds"]["overlapped_left"] == left


def test_transfers_that_overlap_hide_behind_work_or_it_behind_them():
    assert turn(clock_of(overlap_transfer=True), "a", 1.0)["total"] == 3.0
    assert turn(clock_of(overlap_transfer=True), "a", 7.0)["total"] == 7.0


def test_stragglers_are_as_many_as_asked_for_and_slower_in_everything():
    clock = clock_of(straggler_share=0.5, straggler_factor=3.0)
    totals = sorted(turn(clock, client)["total"] for client in CLIENTS)
    assert totals == [4.0, 4.0, 12.0, 12.0]
    assert len(clock.describe()["stragglers"]) == 2


def test_a_client_works_in_its_hours_alone():
    clock = clock_of(available_hours=8.0)
    assert turn(clock, "a", 8 * HOUR - 3.0)["wait"] == 0.0
    assert turn(clock, "b", 8 * HOUR - 2.0)["wait"] == 16 * HOUR
    assert turn(clock, "c", 24 * HOUR - 3.0)["total"] == 56 * HOUR
    clock.end_round()
    clock.now = 9 * HOUR
    assert turn(clock, "a")["wait"] == 15 * HOUR


def test_hours_begin_at_a_time_of_each_clients_own():
    clock = clock_of(available_hours=8.0, available_spread=24.0)
    waits = [turn(clock, client)["wait"] for client in CLIENTS]
    assert len(set(waits)) > 1
    assert max(waits) <= 16 * HOUR


def test_devices_are_cycled_or_drawn_by_the_seed():
    cycled = ClockSettings(device=("l20", "phone"))
    assert list(cycled.device_names(CLIENTS, 0).values()) == ["l20", "phone", "l20", "phone"]
    drawn = ClockSettings(device=("l20", "phone"), shares=(1.0, 3.0))
    many = [f"client-{number}" for number in range(400)]
    names = drawn.device_names(many, 0)
    assert names == drawn.device_names(many, 0)
    assert names != drawn.device_names(many, 1)
    assert 60 < list(names.values()).count("l20") < 140
    assert drawn.device_names(many[5:6], 0)[many[5]] == names[many[5]]


def test_named_devices_run_below_their_peak_and_a_link_can_be_chosen():
    device = ClockSettings(device="l20", link="mobile", utilisation=0.5).devices(("a",), 0)["a"]
    assert device.half_tflops == DEVICES["l20"].half_tflops / 2
    assert device.memory_gb_per_s == DEVICES["l20"].memory_gb_per_s
    assert device.upload_mbit == 12.61
    assert ClockSettings(device="custom", custom=MINE).devices(("a",), 0)["a"] == MINE


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ("clock.device=abacus",),
            'clock.device is "abacus"; it must be one of l20, rtx_4090, laptop, phone, custom',
        ),
        (("clock.device=[]",), "clock.device is an empty list"),
        (("clock.device=custom",), "clock.device is custom, but there is no section clock.custom"),
        (
            ("clock.device=l20", "clock.link=string"),
            'clock.link is "string"; it must be one of gigabit, broadband, mobile',
        ),
        (("clock.device=l20", "clock.shares=[1, 2]"), "clock.shares has 2 numbers for 1 devices"),
        (
            ("clock.device=l20", "clock.utilisation=0"),
            "clock.utilisation must be above 0 and at most 1, not 0",
        ),
        (("clock.device=l20", "clock.straggler_share=0.5"), "neither has an effect without the other"),
        (("clock.device=l20", "clock.available_spread=3"), "clock.available_spread has no effect while"),
        (("clock.device=l20", "clock.target=loss_after"), "must be given together"),
        (
            ("clock.device=l20", "clock.target=beauty", "clock.target_value=1"),
            'clock.target is "beauty", which is not evaluated',
        ),
        (("clock.device=l20", "clock.limits_memory=true"), "clock.limits_memory has no effect with this"),
        (("clock.utilisation=0.5",), "clock.device is missing"),
        (("clock.device=custom", "clock.custom.disk_gb_per_s=1"), "clock.custom.half_tflops is missing"),
    ],
)
def test_a_wrong_clock_is_refused_in_one_sentence(make_config, overrides, sentence):
    with pytest.raises(UserError) as refused:
        make_config("fedavg", *overrides)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_clock_is_written_and_read_as_it_was(make_config, tmp_path):
    mine = replace(MINE, no_grad_operation_us=2.5)
    rates = (f"clock.custom.{name}={value}" for name, value in vars(mine).items())
    for config in (make_config("fedavg"), make_config("fedavg", 'clock.device=["l20", "custom"]', *rates)):
        (tmp_path / "config.toml").write_text(resolved_toml(config))
        assert load_config(tmp_path / "config.toml") == config


def line(number, end, score=None):
    sizes = {"upload_bytes": 10, "download_bytes": 1, "seconds": {"total": 0.5}}
    found = {} if score is None else {"evaluation": {"rougeL_after": score, "loss_after": 1 - score}}
    return {"round": number, "simulated": {"end": end}, **sizes, **found}


LINES = [line(1, 5.0, 0.2), line(2, 9.0), line(3, 14.0, 0.6), line(4, 20.0, 0.5), line(5, 26.0)]


@pytest.mark.parametrize(
    ("target", "value", "found"),
    [
        ("rougeL_after", 0.5, (3, 14.0, 33)),
        ("rougeL_after", 0.6, (3, 14.0, 33)),
        ("rougeL_after", 0.65, (5, 26.0, 55)),
        ("rougeL_after", 0.9, (None, None, None)),
        ("loss_after", 0.41, (3, 14.0, 33)),
        ("loss_after", 0.9, (1, 5.0, 11)),
    ],
)
def test_a_target_is_reached_by_the_first_evaluation_that_is_as_good(target, value, found):
    clock = clock_of(target=target, target_value=value)
    summary = summary_of(clock, LINES, [], {"rougeL_after": 0.7, "loss_after": 0.3})
    assert (summary["round_of_target"], summary["seconds_to_target"], summary["bytes_to_target"]) == found
    assert summary["seconds"] == 26.0


@pytest.fixture(scope="module")
def clocked(tmp_path_factory):
    return {"folder": tmp_path_factory.mktemp("clocked") / "run"}


@pytest.fixture
def clocked_run(clocked, make_config, quiet):
    """A finished run with a clock, made once."""
    if "config" not in clocked:
        clocked["config"] = make_config("fedavg", *RUN)
        run_experiment(clocked["config"], clocked["folder"], progress=quiet)
    return clocked["config"], clocked["folder"]


def simulated(folder):
    """All that the clock wrote of a run; measured seconds are another's every time."""
    rounds, clients = (read_lines(folder / f"{name}.jsonl") for name in ("rounds", "clients"))
    clock = read_json(folder / "result.json")["clock"]
    del clock["measured_seconds"]
    lines = [(one["work"], one["simulated_seconds"]) for one in clients]
    return json.dumps([clock, lines, [one["simulated"] for one in rounds]])


def test_a_run_tells_work_and_simulated_seconds_of_each_client_and_round(clocked_run):
    _, folder = clocked_run
    rounds, clients = read_lines(folder / "rounds.jsonl"), read_lines(folder / "clients.jsonl")
    for work in (one["work"] for one in clients):
        assert work["train"]["flops"] > 0
        # As many bytes come as go, and FedAvg keeps none.
        assert work["load"]["host_bytes"] == work["save"]["host_bytes"] > 0
        assert not work["load"].get("disk_bytes")
    by_round = [[one for one in clients if one["round"] == number] for number in (1, 2)]
    for record, turns in zip(rounds, by_round, strict=True):
        slowest = max(turns, key=lambda one: one["simulated_seconds"]["total"])
        assert record["simulated"]["slowest"] == slowest["client"]
        assert record["simulated"]["seconds"]["turns"] == pytest.approx(slowest["simulated_seconds"]["total"])
    clock = read_json(folder / "result.json")["clock"]
    assert clock["simulated"] is True
    assert clock["seconds"] == rounds[-1]["simulated"]["end"] > 0
    assert clock["round_of_target"] == 1
    assert clock["seconds_to_target"] == rounds[0]["simulated"]["end"]
    assert clock["bytes_to_target"] == rounds[0]["upload_bytes"] + rounds[0]["download_bytes"]
    assert list(clock["devices"].values()) == ["l20", "phone", "l20"]


def test_check_predicts_the_seconds_of_the_first_round(clocked_run, make_config):
    _, folder = clocked_run
    told = [one["simulated_seconds"] for one in read_lines(folder / "clients.jsonl") if one["round"] == 1]
    real = sum(one["total"] - one["wait"] for one in told)
    config = make_config("fedavg", *RUN, "clock.available_hours=24", "clock.available_spread=0")
    report = check_experiment(config)
    predicted = sum(report.clock.seconds_by_client.values())
    # Transfers are exact; steps are of the batches' mean shape, and the turn's copies are left out.
    assert predicted == pytest.approx(real, rel=0.1)
    assert report.as_json()["clock"]["slowest"] == "client-001"
    assert any(row[0] == "simulated time of a round" for row in report.clock.rows())
    assert report.clock.warnings() == []


THREE = ("clock.device=['l20', 'phone', 'l20']", "training.batch_size=1")


@pytest.fixture(scope="module")
def foretold(make_config, tmp_path_factory):
    """Predict the clock of an experiment whose second client is slow, with further settings."""
    with open_workbench(make_config("fedavg", *THREE), Stopwatch()) as bench:
        runtime = bench.scorer(PersonalStore(tmp_path_factory.mktemp("kept"))).runtime
        sizes = dict.fromkeys(bench.data.client_ids, PredictedBytes(upload=9000, download=9000))

        def predict(*given):
            asked = replace(bench, config=make_config("fedavg", *THREE, *given))
            return predict_clock(asked, runtime, bench.parts.lora_names, sizes, 0)

        yield predict


def test_check_waits_for_the_first_or_until_the_deadline_as_the_round_does(foretold):
    plain = foretold()
    fast, slow, _ = plain.seconds_by_client.values()
    limit = (fast + slow) / 2
    first = foretold("cohort.size=2", "cohort.over_select=1")
    late = foretold(f"transport.round_seconds={limit}")
    over_flower = foretold("transport.name=flower", f"transport.round_seconds={limit}")
    rounds = [one.round_seconds for one in (plain, first, late, over_flower)]
    # Adding up takes less than a thousandth of a turn; over Flower real seconds are waited for.
    assert rounds == pytest.approx([slow, fast, limit, slow], rel=1e-3)
    assert [one.slowest for one in (plain, first)] == ["client-001", "client-000"]
    assert [one.late for one in (plain, first, late, over_flower)] == [(), (), ("client-001",), ()]
    assert len(plain.warnings()) == len(late.warnings()) - 1
    assert "and no upload comes in time" in replace(plain, slowest=None).rows()[0][1]


def test_simulated_time_survives_a_crash_bit_for_bit(clocked_run, tmp_path, quiet, monkeypatch):
    config, folder = clocked_run
    save = experiment.save_checkpoint

    def crash(directory, reached, **rest):
        if reached.state.round_number == 2:
            raise KeyboardInterrupt
        save(directory, reached, **rest)

    with monkeypatch.context() as patched:
        patched.setattr(experiment, "save_checkpoint", crash)
        with pytest.raises(KeyboardInterrupt):
            run_experiment(config, tmp_path / "run", progress=quiet)
    run_experiment(config, tmp_path / "run", progress=quiet, resume=True)
    assert simulated(tmp_path / "run") == simulated(folder)


def test_a_clock_over_flower_is_the_one_in_process(clocked_run, tmp_path):
    """The deadline is of real seconds there, and the round takes more in simulated ones alone."""
    config, folder = clocked_run
    config = replace(config, transport=TransportSettings(name="flower", round_seconds=300.0))
    assert max(line["simulated_seconds"]["total"] for line in read_lines(folder / "clients.jsonl")) > 300
    (tmp_path / "run").mkdir()
    run_config = {
        "experiment": resolved_toml(config),
        "run-token": "token",
        "personal-folder": str(tmp_path / "run" / "clients"),
    }
    nodes = {90 - n: app_node(flower_client.app, run_config, {"partition-id": n}) for n in (0, 1, 2)}
    serve(InMemoryGrid(nodes), config, RunDirectory(tmp_path / "run"))
    assert simulated(tmp_path / "run") == simulated(folder)


def test_without_a_clock_nothing_of_it_is_written_and_results_are_the_same(
    clocked_run, make_config, tmp_path, quiet
):
    _, folder = clocked_run
    plain = make_config("fedavg", *(one for one in RUN if not one.startswith("clock.")))
    result = run_experiment(plain, tmp_path / "run", progress=quiet)
    assert "clock" not in (tmp_path / "run" / "config.toml").read_text()
    assert "clock" not in result
    for name, added in (("rounds", {"simulated"}), ("clients", {"work", "simulated_seconds"})):
        mine, theirs = (read_lines(one / f"{name}.jsonl") for one in (tmp_path / "run", folder))
        assert set(theirs[0]) - set(mine[0]) == added
        assert list(mine[0]) == [key for key in theirs[0] if key not in added]
    assert result["server_state_sha256"] == read_json(folder / "result.json")["server_state_sha256"]
    assert result["bytes"] == read_json(folder / "result.json")["bytes"]
