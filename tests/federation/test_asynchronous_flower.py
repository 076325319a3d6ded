"""Asynchronous rounds over Flower: uploads count as they come, and their recorded order gives the run."""

import gc
from dataclasses import dataclass, field, replace

import pytest
import torch
from deployment import SERVER_APP, SITES, Point, committed, deployed
from flower_grid import InMemoryGrid
from flwr.app.error import Error
from replayed import hashes_of_states, replayed
from test_flower_apps import run_over_grid
from test_flower_transport import HASH, ids, node, three, train, transport

from fedexperts.config.load import resolved_toml
from fedexperts.doctor import examine
from fedexperts.errors import UserError
from fedexperts.federation.asynchronous_settings import AsynchronousSettings
from fedexperts.federation.spool import Spool
from fedexperts.federation.transport import ArrivingTransport
from fedexperts.federation.wire import unpack
from fedexperts.messages import Download, Sent, encode_download
from fedexperts.report.grouping import methods_of
from fedexperts.report.reading import read_suite
from fedexperts.report.staleness import staleness_figures, staleness_table
from fedexperts.run_directory import read_json, read_lines
from fedexperts.running.checking import check_experiment
from fedexperts.running.experiment import run_experiment

SMALL = (
    "transport.name=flower",
    "training.num_local_steps=1",
    'evaluation.metrics=["loss"]',
    "evaluation.exam.source=none",
    "evaluation.retention.neutral=none",
    "evaluation.max_test_examples=1",
)
FLEX = (*SMALL, "algorithm.selection=random")

# The transport


def arrivals(carried, number):
    """The next clients whose turns end, with the failures and fences of all their answers."""
    for _ in range(number):
        client_id, answers = carried.next_arrival()
        yield client_id, [(one.upload.failure, one.fenced) for one in answers]


GOOD = ("", "")


def test_answers_come_as_they_come_and_a_client_may_be_asked_again_meanwhile():
    """Tolerance: with three clients at work the server asks for their answers every 0.3 s."""
    grid, carried = three([30.0, 10.0, 20.0])
    assert isinstance(carried, ArrivingTransport)
    carried.begin(train(ids(carried)))
    assert list(arrivals(carried, 1)) == [("client-001", [GOOD])]
    assert grid.clock.now == pytest.approx(10.0, abs=0.3)
    carried.begin(train(["client-001"]))
    assert [name for name, _ in arrivals(carried, 3)] == ["client-002", "client-001", "client-000"]
    assert grid.clock.now == pytest.approx(30.0, abs=0.3)


def test_an_upload_that_comes_during_an_evaluation_is_taken_in_and_waits_on_disk(monkeypatch):
    """Flower drops it when its time is over, which an evaluation may last for."""
    grid, carried = three([5.0, 0.0, 90.0])
    carried.begin(train(["client-000"]))
    kept, keep = [], Spool.keep
    monkeypatch.setattr(Spool, "keep", lambda spool, message: [kept.append(message), keep(spool, message)][1])
    asked = [("client-002", Download(round_number=1, task="evaluate", config_sha256=HASH))]
    list(carried.exchange(asked))
    assert len(kept) == 1
    grid.nodes, now = {}, grid.clock.now
    assert list(arrivals(carried, 1)) == [("client-000", [GOOD])]
    assert grid.clock.now == now


def test_a_client_that_never_answers_or_is_not_there_is_named_and_others_go_on():
    grid = InMemoryGrid({5: node(0), 6: node(1, answer=lambda download: None), 7: node(2)})
    carried = transport(grid)
    assert carried.clients
    del grid.nodes[5]
    carried.begin(train(ids(carried)))
    assert list(arrivals(carried, 3)) == [
        ("client-000", [("its node is not connected", "")]),
        ("client-002", [GOOD]),
        ("client-001", [("no answer within transport.timeout_seconds = 60", "late")]),
    ]


def test_a_client_that_is_killed_in_its_turn_is_asked_again_with_the_same_message():
    grid = InMemoryGrid({5: node(0), 6: node(1), 7: node(2)})
    carried = transport(grid, needs_all=True)
    assert carried.clients
    whole, blobs = grid.nodes[6], []

    def dies_once(message):
        blobs.append(unpack(message.content))
        return Error(code=5, reason="gone") if len(blobs) == 1 else whole(message)

    grid.nodes[6] = dies_once
    ((name, download),) = train(["client-001"])
    download = replace(download, sent=Sent(tensors={"w": torch.ones(3)}))
    carried.begin([(name, download)])
    assert list(arrivals(carried, 1)) == [(name, [GOOD])]
    assert blobs == [encode_download(download)] * 2


def test_a_download_whose_answer_is_waited_for_is_not_in_memory():
    _, carried = three([30.0, 30.0, 30.0])
    tensor = torch.ones(3)
    ((name, download),) = train(["client-001"])
    carried.begin([(name, replace(download, sent=Sent(tensors={"w": tensor})))])
    referrers = [one for one in gc.get_referrers(tensor) if "w" in one]
    assert referrers == []


def test_a_second_answer_comes_behind_the_first():
    class Twice(InMemoryGrid):
        def pull_messages(self, message_ids):
            return [reply for reply in super().pull_messages(message_ids) for _ in range(2)]

    carried = transport(Twice({5: node(0, 1)}))
    carried.begin(train(ids(carried)))
    assert list(arrivals(carried, 1)) == [("client-000", [GOOD, GOOD])]


# Whole runs


@dataclass
class InOrder(InMemoryGrid):
    """The uploads of nodes can be pulled in this order alone, named by the clients' positions."""

    order: list = field(default_factory=list)
    _senders: dict = field(default_factory=dict)

    def push_messages(self, messages):
        (message,) = messages
        (message_id,) = ids = super().push_messages([message])
        if message.metadata.group_id.startswith("train"):
            self._senders[message_id] = 900 - message.metadata.dst_node_id
        return ids

    def pull_messages(self, message_ids):
        (message_id,) = message_ids
        position = self._senders.get(message_id)
        if position is not None and self.order[:1] != [position]:
            return []
        replies = super().pull_messages(message_ids)
        if replies and position is not None:
            del self.order[0]
        return replies


def in_order(*positions):
    return lambda nodes: InOrder(nodes, order=list(positions))


class Died(Exception):
    pass


def dies_in_round(number):
    """A grid whose server dies when it begins a round."""

    def wrap(position, own):
        def answer(message):
            if message.metadata.group_id == f"train {number}":
                raise Died
            return own(message)

        return answer

    return wrap


def test_a_buffer_of_all_clients_gives_the_run_that_waits_bit_for_bit(make_config, tmp_path):
    waits = make_config("flex", *FLEX)
    mine = replace(waits, asynchronous=AsynchronousSettings(buffer=3, concurrency=3))
    theirs = run_over_grid(waits, tmp_path / "waits")
    own = run_over_grid(mine, tmp_path / "mine", make_grid=in_order(2, 0, 1, 1, 2, 0))
    for name in ("server_state_sha256", "personal_sha256", "mean", "bytes", "failures", "refused"):
        assert own[name] == theirs[name], name
    for name in ("rounds", "clients"):
        lines = [read_lines(tmp_path / run / f"{name}.jsonl") for run in ("waits", "mine")]
        for waited, came in zip(*lines, strict=True):
            came = {key: value for key, value in came.items() if key in waited and key != "seconds"}
            assert came == {key: value for key, value in waited.items() if key != "seconds"}


def test_a_run_whose_server_was_killed_is_what_its_record_of_arrivals_gives(make_config, tmp_path):
    """The third step refuses an upload of the first state and asks its client again; then the server dies."""
    config = make_config("flex", *FLEX, "rounds=5", "asynchronous.buffer=1", "asynchronous.max_staleness=1")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text(resolved_toml(config))
    with pytest.raises(Died):
        run_over_grid(config, run, make_grid=in_order(0, 0, 2, 2), wrap=dies_in_round(4))
    assert examine(run).problems == ()
    result = run_over_grid(config, run, make_grid=in_order(1, 0))
    assert [(line["client"][-1], line["staleness"]) for line in read_lines(run / "clients.jsonl")] == [
        ("0", 0),
        ("0", 0),
        ("2", 0),
        ("1", 0),
        ("0", 1),
    ]
    assert (result["refused"], result["failures"]) == ({"stale": 1}, [])
    assert replayed(config, run, tmp_path / "replayed") == hashes_of_states(run)
    assert list((run / "under_way").iterdir()) == []
    assert examine(run).problems == ()


def test_a_site_that_never_answers_is_named_and_the_run_goes_on_with_the_others(make_config, tmp_path):
    """Answers of this grid are there at once, so no other is late, however short the time to answer is.

    In the first round of this method nothing travels to clients: a late upload is judged by what its client
    received.
    """
    patient = ("cohort.on_failure=continue", "transport.timeout_seconds=0.01", "asynchronous.buffer=1")
    config = make_config("fedavg_experts", *SMALL, *patient, "rounds=3")

    def silent(position, own):
        def answer(message):
            is_turn = message.metadata.group_id.startswith("train")
            return None if is_turn and position == 2 else own(message)

        return answer

    result = run_over_grid(config, tmp_path / "run", wrap=silent)
    rounds, lines = (read_lines(tmp_path / "run" / f"{name}.jsonl") for name in ("rounds", "clients"))
    assert [(line["client"], line["staleness"]) for line in lines] == [
        ("client-000", 0),
        ("client-001", 1),
        ("client-000", 1),
    ]
    assert [line["download_bytes"] for line in lines] == [line["download_predicted"] for line in lines]
    assert [line["asynchronous"]["num_at_work"] for line in rounds] == [2, 2, 2]
    reason = "no answer within transport.timeout_seconds = 0.01"
    assert result["failures"] == [{"round": 3, "client": "client-002", "reason": reason}]
    assert result["refused"] == {"late": 1}
    methods = methods_of(read_suite(tmp_path / "run").runs)
    assert len(staleness_table(methods)) == len(staleness_figures(methods)) == 1


@pytest.mark.slow
def test_check_predicts_bytes_and_says_that_it_does_not_predict_age(make_config):
    report = check_experiment(make_config("fedavg", *SMALL, "asynchronous.buffer=2"))
    (sizes, *_) = report.bytes
    assert report._both_row() == [
        "both, 4 uploads, 2 rounds",
        f"{4 * (sizes.upload + sizes.download):,} bytes",
    ]
    assert report.as_json()["uploads_by_arrival"] == 2
    assert report.as_json()["under_way_bytes"] > 2 * sizes.upload + 3 * sizes.download


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("clock.device=phone",), 'clock is set, but with [asynchronous] and transport.name = "flower"'),
        (("cohort.size=2",), "cohort.size is 2, but must be 0 with [asynchronous]"),
        (("transport.round_seconds=5",), "transport.round_seconds is 5.0, but must be 0"),
    ],
)
def test_what_has_no_meaning_over_flower_is_refused_in_one_sentence(make_config, overrides, sentence):
    with pytest.raises(UserError) as refused:
        make_config("fedavg", *SMALL, "asynchronous.buffer=2", *overrides)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


# Real Flower


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_in_flower_s_simulation_the_record_of_arrivals_gives_the_run(make_config, tmp_path, quiet):
    config = make_config("flex", *FLEX, "rounds=4", "asynchronous.buffer=1")
    run_experiment(config, tmp_path / "run", progress=quiet)
    ages = [line["staleness"] for line in read_lines(tmp_path / "run" / "clients.jsonl")]
    print(f"ages: {ages}")
    assert max(ages) > 0
    assert replayed(config, tmp_path / "run", tmp_path / "replayed") == hashes_of_states(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sites_over_machines_and_a_server_that_dies_are_what_the_record_gives(make_config, tmp_path):
    """The server app dies in the third of six steps; a site's files give the same in a trial on them here."""
    over = ("transport.connection=sites", "rounds=6", "asynchronous.buffer=1", "keep_states=6")
    data = {"source": "site", "max_tokens": 192, "partition": {"kind": "site", "num_clients": 2}}
    config, folder = make_config("flex", *FLEX, *over, data=data), tmp_path / "federation"
    with deployed(config, folder) as federation:
        dies = Point("open", "run/clients.jsonl", at=SERVER_APP, after=committed(2))
        federation.go_on({"server": [(dies, [SERVER_APP])]}, 600)
    lines, result = read_lines(folder / "run" / "clients.jsonl"), read_json(folder / "run" / "result.json")
    print(f"arrivals: {[(line['round'], line['client'], line['staleness']) for line in lines]}")
    assert [line["round"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert (result["failures"], result["refused"]) == ([], {})
    assert examine(folder / "run").problems == ()
    files = [str(folder / f"{site}.jsonl") for site in SITES]
    trial = {"source": files, "max_tokens": 192, "partition": {"kind": "file"}}
    here = make_config("flex", *FLEX, "rounds=6", "asynchronous.buffer=1", data=trial)
    assert replayed(here, folder / "run", tmp_path / "replayed") == hashes_of_states(folder / "run")
