"""Transport over Flower's Grid: order, time-outs, failures, and what is held at one time."""

import sys
from dataclasses import replace

import pytest
import torch
from flower_grid import Clock, InMemoryGrid
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.app.error import Error

from fedexperts.errors import UserError
from fedexperts.federation import edge
from fedexperts.federation.flower_nodes import Sites
from fedexperts.federation.flower_post import IDENTIFY
from fedexperts.federation.flower_sent import Patience
from fedexperts.federation.flower_transport import MOST_UNANSWERED, FlowerTransport
from fedexperts.federation.spool import Spool
from fedexperts.federation.wire import pack, unpack
from fedexperts.messages import (
    Download,
    Sent,
    Upload,
    decode_download,
    decode_upload,
    encode_download,
    encode_upload,
)

HASH = "0123"


def identity(position, num_clients, wrong=()):
    report = {
        "client_id": f"client-{position:03d}",
        "position": position,
        "num_clients": num_clients,
        "num_train": 7,
        "memory_bytes": 10 * position,
        **dict(wrong),
    }
    return pack(encode_upload(Upload(report=report)))


def node(position, num_clients=3, answer=None):
    """A node that knows who it is, and answers anything else with its position unless told otherwise."""

    def answered(message):
        download = decode_download(unpack(message.content))
        if download.task == IDENTIFY:
            return identity(position, num_clients)
        if answer is not None:
            return answer(download)
        return pack(encode_upload(Upload(metrics={"position": float(position)})))

    return answered


def transport(grid, timeout_seconds=60.0, asks_again=lambda client_id: None, **patience):
    return FlowerTransport(
        grid,
        config_sha256=HASH,
        patience=Patience(answer_seconds=timeout_seconds, **patience),
        clock=grid.clock,
        pause=grid.clock.pause,
        asks_again=asks_again,
    )


def train(client_ids):
    return [(name, Download(round_number=1, task="train", config_sha256=HASH)) for name in client_ids]


def ids(carried):
    return tuple(facts.client_id for facts in carried.clients)


def test_a_message_travels_as_its_own_bytes():
    tensors = {"weight": torch.arange(6, dtype=torch.float32).reshape(2, 3).to(torch.bfloat16)}
    message = encode_download(Download(round_number=1, task="train", sent=Sent(tensors=tensors)))
    assert unpack(pack(message)) == message


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"fedexperts": ConfigRecord({"message": "text"})}),
        RecordDict({"fedexperts": ArrayRecord()}),
        RecordDict({"fedexperts": ArrayRecord({"message": Array("uint8", (1,), "numpy.ndarray", b"x")})}),
        RecordDict({**pack(b"x"), "more": ConfigRecord()}),
    ],
)
def test_any_other_record_is_refused(content):
    with pytest.raises(UserError, match="does not carry one FedExperts message"):
        unpack(content)


def test_clients_are_in_the_order_of_the_data_whatever_their_nodes_are_called():
    grid = InMemoryGrid({77: node(2), 5: node(0), 901: node(1)})
    carried = transport(grid)
    assert ids(carried) == ("client-000", "client-001", "client-002")
    assert [facts.memory_bytes for facts in carried.clients] == [0, 10, 20]


def test_the_federation_waits_until_every_client_has_a_node():
    grid = InMemoryGrid({5: node(0)})

    class Joining(Clock):
        def pause(self, seconds):
            super().pause(seconds)
            if self.now > 3:
                grid.nodes.update({6: node(1), 7: node(2)})

    grid.clock = Joining()
    assert len(transport(grid).clients) == 3
    assert 3 < grid.clock.now < 4


def test_a_federation_that_stays_incomplete_is_refused():
    with pytest.raises(UserError, match=r"only 2 of 3 clients joined within transport.timeout_seconds = 60"):
        assert transport(InMemoryGrid({5: node(0), 6: node(2)})).clients
    with pytest.raises(UserError, match="no client joined"):
        assert transport(InMemoryGrid({})).clients


def test_two_nodes_that_are_the_same_client_are_refused():
    with pytest.raises(UserError, match="nodes 5 and 6 are both client-000"):
        assert transport(InMemoryGrid({5: node(0), 6: node(0)})).clients


def test_a_node_that_cannot_take_part_is_named_with_its_reason():
    grid = InMemoryGrid({5: lambda message: pack(encode_upload(Upload(failure="has no data")))})
    with pytest.raises(UserError, match="node 5: has no data"):
        assert transport(grid).clients


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"client_id": 3}, ": its client_id is 3"),
        ({"position": True}, ": its position is True"),
        ({"num_clients": "3"}, ": its num_clients is '3'"),
        ({"num_train": None}, ": its num_train is None"),
        ({"memory_bytes": 1.0}, r": its memory_bytes is 1\.0"),
        ({"position": 3}, " says it is 3 of 3"),
        ({"position": -1}, " says it is -1 of 3"),
        ({"num_train": -1}, " says it is 0 of 3"),
        ({"memory_bytes": -1}, " says it is 0 of 3"),
        ({"client_id": "../a"}, ": its client_id is no name of a client"),
    ],
)
def test_a_node_that_describes_itself_wrongly_is_named(wrong, reason):
    grid = InMemoryGrid({5: lambda message: identity(0, 3, wrong)})
    with pytest.raises(UserError, match=f"^Flower node 5{reason}$"):
        assert transport(grid).clients


def test_a_node_may_have_neither_examples_nor_a_limit_of_memory():
    grid = InMemoryGrid({5: lambda message: identity(0, 1, {"num_train": 0, "memory_bytes": 0})})
    (facts,) = transport(grid).clients
    assert (facts.num_train, facts.memory_bytes) == (0, 0)


def test_time_on_the_way_is_what_the_client_was_not_busy():
    """Tolerance: the server asks for an answer ten times a second."""
    answer = pack(encode_upload(Upload(seconds={"train": 11.0, "save": 1.0})))
    grid = InMemoryGrid({5: node(0, 1, answer=lambda download: answer)})
    carried = transport(grid)
    assert carried.clients
    for delay, expected in ((30.0, 18.0), (5.0, 0.0)):
        grid.delays = {5: delay}
        (delivery,) = carried.exchange(train(["client-000"]))
        assert delivery.seconds == {"transport": pytest.approx(expected, abs=0.2)}


def test_a_download_that_flower_does_not_take_is_a_failure():
    class Refusing(InMemoryGrid):
        def push_messages(self, messages):
            ids = super().push_messages(messages)
            return [] if self.clock() else ids

    grid = Refusing({5: node(0, 1)})
    carried = transport(grid)
    assert carried.clients
    grid.clock.now = 1.0
    (delivery,) = carried.exchange(train(["client-000"]))
    assert delivery.upload.failure == "Flower did not take its download"
    assert grid.clock.now == 1.0, "nothing is waited for"


def test_deliveries_keep_the_order_of_the_downloads_whoever_answers_first():
    grid = InMemoryGrid({5: node(0), 6: node(1), 7: node(2)})
    carried = transport(grid)
    assert carried.clients
    grid.delays = {5: 30.0, 6: 20.0, 7: 10.0}
    order = ["client-001", "client-000", "client-002"]
    deliveries = list(carried.exchange(train(order)))
    assert [delivery.client_id for delivery in deliveries] == order
    assert [delivery.upload.metrics["position"] for delivery in deliveries] == [1.0, 0.0, 2.0]
    assert {len(ids) for ids in grid.pulls} == {1}
    assert grid.clock.now == pytest.approx(30.0, abs=0.2), "they were waited for together"


def test_bytes_are_those_of_the_message():
    grid = InMemoryGrid({5: node(0, 1)})
    (item,) = train(["client-000"])
    (delivery,) = transport(grid).exchange([item])
    assert delivery.download_bytes == len(encode_download(item[1]))
    assert delivery.upload_bytes == len(encode_upload(Upload(metrics={"position": 0.0})))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (
            lambda download: Error(code=8, reason="ClientApp crashed\n  at line 3"),
            "error 8: ClientApp crashed at",
        ),
        (lambda download: None, "no answer within transport.timeout_seconds = 60"),
        (lambda download: RecordDict(), "does not carry one FedExperts message"),
        (lambda download: pack(b""), "message of 0 bytes cannot be read"),
        (lambda download: pack(b"\x80\x04garbage" * 1000), "cannot be read"),
        (lambda download: pack(encode_upload(Upload())[:-1]), "cannot be read"),
        (lambda download: pack(encode_download(download)), "message has a JSON NoneType"),
        (
            lambda download: pack(encode_upload(Upload(seconds={"train": "x"}))),
            "'train' is not a finite number",
        ),
        (lambda download: pack(encode_upload(Upload(failure="loss is nan"))), "loss is nan"),
    ],
)
def test_a_bad_answer_is_that_clients_failure_and_nobody_elses(answer, reason):
    grid = InMemoryGrid({5: node(0), 6: node(1, answer=answer), 7: node(2)})
    carried = transport(grid)
    deliveries = list(carried.exchange(train(ids(carried))))
    assert reason in deliveries[1].upload.failure
    assert [deliveries[place].upload.failure for place in (0, 2)] == ["", ""]


def test_answers_behind_a_client_that_never_answers_are_not_lost():
    """They are taken in while the server waits, for Flower drops them when their time is over."""
    grid = InMemoryGrid({5: node(0, answer=lambda download: None), 6: node(1), 7: node(2)})
    carried = transport(grid)
    deliveries = list(carried.exchange(train(ids(carried))))
    assert [bool(delivery.upload.failure) for delivery in deliveries] == [True, False, False]
    assert grid.clock.now == pytest.approx(60.0, abs=0.2)


def test_a_message_dies_soon_after_nobody_waits_for_its_answer():
    grid = InMemoryGrid({5: node(0, 1)})
    list(transport(grid, timeout_seconds=7.0).exchange(train(["client-000"])))
    assert {message.metadata.ttl for message in grid.pushed} == {17.0}


def test_a_large_cohort_is_sent_a_few_ahead_and_downloads_are_made_when_they_are_sent():
    num_clients = 2 * MOST_UNANSWERED
    grid = InMemoryGrid({100 + position: node(position, num_clients) for position in range(num_clients)})
    carried = transport(grid)
    made = []

    def downloads():
        for item in train(ids(carried)):
            made.append(item[0])
            yield item

    for done, _ in enumerate(carried.exchange(downloads())):
        assert len(made) <= done + MOST_UNANSWERED
    assert tuple(made) == ids(carried)


# Waiting


def three(delays, **patience):
    """Three clients, whose answers take so long, and the transport to them."""
    grid = InMemoryGrid({5 + place: node(place) for place in range(len(delays))})
    carried = transport(grid, **patience)
    assert carried.clients
    grid.delays = {5 + place: delay for place, delay in enumerate(delays)}
    return grid, carried


def test_an_upload_after_the_rounds_deadline_is_late_and_flower_drops_it():
    grid, carried = three([5.0, 30.0, 8.0], round_seconds=10.0)
    deliveries = list(carried.exchange(train(ids(carried))))
    assert [delivery.fenced for delivery in deliveries] == ["", "late", ""]
    assert deliveries[1].upload.failure == "no answer within transport.round_seconds = 10"
    assert grid.clock.now == pytest.approx(10.0, abs=0.2), "nobody waits for longer than the deadline"
    assert {message.metadata.ttl for message in grid.pushed[3:]} == {20.0}


def test_answers_that_come_before_their_turn_wait_on_disk(monkeypatch):
    _, carried = three([5.0, 0.0, 0.0])
    kept, keep = [], Spool.keep
    monkeypatch.setattr(Spool, "keep", lambda spool, message: [kept.append(message), keep(spool, message)][1])
    delivered = list(carried.exchange(train(ids(carried))))
    assert [decode_upload(message).metrics for message in kept] == [
        delivery.upload.metrics for delivery in delivered[1:]
    ]


def test_an_evaluation_has_no_deadline_of_a_round():
    _, carried = three([30.0, 30.0, 30.0], round_seconds=10.0)
    asked = [(name, Download(round_number=1, task="evaluate", config_sha256=HASH)) for name in ids(carried)]
    assert [delivery.fenced for delivery in carried.exchange(asked)] == ["", "", ""]


def test_the_first_uploads_that_arrive_are_taken_in_the_order_of_the_cohort():
    grid, carried = three([20.0, 50.0, 5.0], wanted=2)
    deliveries = list(carried.exchange(train(ids(carried))))
    assert [delivery.client_id for delivery in deliveries] == list(ids(carried))
    assert [delivery.fenced for delivery in deliveries] == ["", "surplus", ""]
    assert deliveries[1].upload.failure == "upload refused: the first 2 had come"
    assert grid.clock.now == pytest.approx(20.0, abs=0.2), "the third is not waited for"


def test_a_failure_takes_nobodys_place_among_the_first():
    failed = pack(encode_upload(Upload(failure="loss is nan")))
    grid = InMemoryGrid({5: node(0, answer=lambda download: failed), 6: node(1), 7: node(2)})
    carried = transport(grid, wanted=2)
    assert carried.clients
    grid.delays = {5: 1.0, 6: 20.0, 7: 30.0}
    deliveries = list(carried.exchange(train(ids(carried))))
    assert [delivery.upload.failure for delivery in deliveries] == ["loss is nan", "", ""]


def test_a_node_that_is_not_connected_is_named_at_once():
    grid, carried = three([0.0, 0.0, 0.0])
    started = grid.clock.now
    del grid.nodes[6]
    deliveries = list(carried.exchange(train(ids(carried))))
    reasons = [delivery.upload.failure for delivery in deliveries]
    assert reasons == ["", "its node is not connected", ""]
    assert grid.clock.now == started


def test_a_node_that_is_lost_on_the_way_is_told_in_words():
    lost = Error(code=5, reason="Node unavailable")
    grid = InMemoryGrid({5: node(0, 1, answer=lambda download: lost)})
    (delivery,) = transport(grid).exchange(train(["client-000"]))
    assert delivery.upload.failure == "its node is no longer connected: Flower error 5: Node unavailable"


def test_an_answer_that_is_too_large_is_not_decoded(monkeypatch):
    grid = InMemoryGrid({5: node(0, 1, answer=lambda download: pack(b"x" * 5001))})
    carried = transport(grid)
    assert carried.clients
    (item,) = train(["client-000"])
    monkeypatch.setattr(edge, "decode_upload", lambda message: pytest.fail("it was decoded"))
    (delivery,) = carried.exchange([(item[0], replace(item[1], largest_answer=5000))])
    assert delivery.upload.failure == "upload refused: it has 5,001 bytes, where at most 5,000 are due"


def test_a_second_answer_to_one_message_is_delivered_behind_the_first():
    class Twice(InMemoryGrid):
        def pull_messages(self, message_ids):
            return [reply for reply in super().pull_messages(message_ids) for _ in range(2)]

    grid = Twice({5: node(0), 6: node(1), 7: node(2)})
    carried = transport(grid)
    given = [delivery.client_id for delivery in carried.exchange(train(ids(carried)))]
    assert given == [name for name in ids(carried) for _ in range(2)]


def silent(message):
    return None


def site_named(name):
    return lambda message: identity(0, 1, {"client_id": name})


def of_sites(nodes, names, **delays):
    """A transport that waits for all sites of ``names``, whose nodes have the ids from 5 on."""
    keys = dict(enumerate(names, start=5))
    grid = InMemoryGrid(nodes, delays={node_id: delays.get(name, 0.0) for node_id, name in keys.items()})
    return grid, FlowerTransport(
        grid,
        config_sha256=HASH,
        patience=Patience(answer_seconds=60.0),
        clock=grid.clock,
        pause=grid.clock.pause,
        sites=Sites(number=len(names), keys=keys),
    )


def test_sites_that_do_not_come_are_named_after_seconds(caplog):
    _, carried = of_sites({5: site_named("north")}, ("north", "west"))
    with pytest.raises(UserError, match=r"\(joined: north; not connected: west\)"):
        assert carried.clients
    assert caplog.messages == ["waiting for sites (not connected: west)"] * 2


def test_a_silent_site_hides_neither_those_that_are_away_nor_those_that_answer(caplog):
    nodes = {5: silent, 6: site_named("south")}
    grid, carried = of_sites(nodes, ("north", "south", "west"))
    told = "not connected: west; connected, but without an answer: north"
    with pytest.raises(UserError, match=rf"^1 of 3 sites joined .* \(joined: south; {told}\)$"):
        assert carried.clients
    assert caplog.messages[0] == f"waiting for sites ({told})"
    assert grid.clock.now == pytest.approx(60.0, abs=0.3), "the end comes when the time to join is over"


def test_a_site_that_was_asked_in_time_may_answer_after_the_time_to_join():
    """Its first answer may wait for a model that has to be loaded."""
    grid, carried = of_sites({5: site_named("north")}, ("north", "south"), south=30.0)

    class Joining(Clock):
        def pause(self, seconds):
            super().pause(seconds)
            if self.now > 50:
                grid.nodes[6] = site_named("south")

    carried._clock = grid.clock = joining = Joining()
    carried._pause = joining.pause
    assert ids(carried) == ("north", "south")
    assert joining.now == pytest.approx(80.0, abs=0.5)


def test_sites_that_stay_silent_end_the_waiting_by_name():
    grid, carried = of_sites({5: site_named("north"), 6: silent}, ("north", "south"))
    with pytest.raises(UserError, match=r"^1 of 2 sites joined within transport.timeout_seconds = 60 "):
        assert carried.clients
    assert grid.clock.now == pytest.approx(60.0, abs=0.3)


def test_messages_on_disk_come_back_as_they_were(tmp_path):
    spool = Spool(tmp_path)
    reads = [spool.keep(message) for message in (b"first", b"", b"third" * 1000)]
    assert [read() for read in reversed(reads)] == [b"third" * 1000, b"", b"first"]
    assert list(tmp_path.iterdir()) == [], "nothing is left of it whatever happens"


def test_messages_on_disk_are_not_in_memory(tmp_path):
    message = b"x" * 1000
    held = sys.getrefcount(message)
    read = Spool(tmp_path).keep(message)
    assert sys.getrefcount(message) == held
    assert read() == message, "the file is there as long as somebody can read"


def test_the_disk_is_given_back_with_the_last_message(tmp_path):
    read = Spool(tmp_path).keep(b"x")
    file = read.func.__self__._file
    assert not file.closed
    del read
    assert file.closed
