"""Clients whose node is lost: waited for where all are needed, asked again, and taken back under a new id."""

import threading

import pytest
from flower_grid import Clock, InMemoryGrid
from flwr.app.error import Error
from test_flower_transport import HASH, ids, node, train, transport

from fedexperts.federation import flower_sent
from fedexperts.federation.flower_nodes import Sites
from fedexperts.federation.flower_post import FORGOTTEN, IDENTIFY, MOST_LOSSES
from fedexperts.federation.flower_sent import GONE_SENDING, Patience
from fedexperts.federation.flower_transport import FlowerTransport
from fedexperts.federation.wire import pack, unpack
from fedexperts.messages import Upload, decode_download, encode_upload


class Changing(Clock):
    """At some second the nodes of a grid become others."""

    def at(self, seconds, grid, nodes):
        self.due, self.grid, self.nodes = self.now + seconds, grid, nodes

    def pause(self, seconds):
        super().pause(seconds)
        if self.now >= self.due:
            self.grid.nodes = self.nodes


def killed(code=5):
    """A node that is killed with every download that it gets; Flower answers for it."""
    return lambda download: Error(code=code, reason="gone")


def three(code=5, **options):
    """The second of three clients loses its turn; transport that needs them all."""
    clock = Changing()
    clock.due = float("inf")
    grid = InMemoryGrid({5: node(0), 6: node(1, answer=killed(code)), 7: node(2)}, clock=clock)
    carried = transport(grid, needs_all=True, **options)
    assert carried.clients
    return grid, carried


def positions(deliveries):
    return [delivery.upload.metrics.get("position", delivery.upload.failure) for delivery in deliveries]


@pytest.mark.parametrize("code", [3, 4, 5, 8])
def test_a_client_that_was_killed_in_its_turn_is_asked_again(code, caplog):
    again = []
    grid, carried = three(code, asks_again=again.append)
    killed_once = grid.nodes[6]

    def revived(message):
        grid.nodes[6] = node(1)
        return killed_once(message)

    grid.nodes[6] = revived
    assert positions(carried.exchange(train(ids(carried)))) == [0.0, 1.0, 2.0]
    assert [text for text in caplog.messages if text.startswith("waiting for client client-001: ")]
    assert again == ["client-001"], "told, since it may have noised an upload before"


def test_a_client_that_is_away_when_it_is_asked_is_waited_for():
    again = []
    grid, carried = three(asks_again=again.append)
    del grid.nodes[6]
    grid.clock.at(20.0, grid, {5: node(0), 6: node(1), 7: node(2)})
    assert positions(carried.exchange(train(ids(carried)))) == [0.0, 1.0, 2.0]
    assert again == [], "nothing was asked before"
    assert grid.clock.now == pytest.approx(20.0, abs=0.2), "asked again as soon as it is there"


def test_clients_that_come_back_under_new_ids_are_taken_back_in(caplog):
    grid, carried = three()
    grid.nodes = {5: node(0)}
    grid.clock.at(20.0, grid, {5: node(0), 96: node(2), 97: node(1), 98: node(0)})
    assert positions(carried.exchange(train(ids(carried)))) == [0.0, 1.0, 2.0]
    refused = [text for text in caplog.messages if "refused" in text]
    assert refused == ["Flower node 98 is refused: it says that it is client-000, which is node 5"]
    pushed = len(grid.pushed)
    assert positions(carried.exchange(train(ids(carried)))) == [0.0, 1.0, 2.0]
    assert [message.metadata.dst_node_id for message in grid.pushed[pushed:]] == [5, 97, 96]


def without_data(message):
    return pack(encode_upload(Upload(failure="has no data")))


def test_a_new_node_that_is_no_client_takes_nobodys_place(caplog):
    grid, carried = three()
    grid.nodes = {5: node(0), 7: node(2), 96: without_data, 97: node(3, 4)}
    grid.clock.at(20.0, grid, {**grid.nodes, 98: node(1)})
    assert positions(carried.exchange(train(ids(carried)))) == [0.0, 1.0, 2.0]
    assert "Flower node 96: has no data" in caplog.messages
    assert "Flower node 97 is refused: it is no client" in caplog.messages


def test_a_new_node_that_does_not_say_who_it_is_holds_nobody_up():
    grid, carried = three()
    grid.nodes = {5: node(0), 7: node(2), 96: lambda message: None}
    grid.clock.at(20.0, grid, {**grid.nodes, 98: node(1)})
    assert positions(carried.exchange(train(ids(carried)))) == [0.0, 1.0, 2.0]
    assert grid.clock.now == pytest.approx(20.0, abs=0.2), "the one behind it was asked as soon as it came"


def test_a_client_that_never_comes_back_has_failed_after_the_time_to_answer():
    grid, carried = three()
    del grid.nodes[6]
    assert positions(carried.exchange(train(ids(carried)))) == [0.0, "its node is not connected", 2.0]
    assert grid.clock.now == pytest.approx(60.0, abs=0.2)


def test_a_turn_that_kills_its_node_every_time_is_not_asked_for_for_ever():
    grid, carried = three()
    deliveries = list(carried.exchange(train(ids(carried))))
    assert deliveries[1].upload.failure.startswith("its node is no longer connected")
    assert [message.metadata.dst_node_id for message in grid.pushed[3:]].count(6) == MOST_LOSSES


def test_a_message_that_is_sent_again_lives_no_longer_than_the_first():
    grid, carried = three()
    del grid.nodes[6]
    grid.clock.at(20.0, grid, {5: node(0), 6: node(1), 7: node(2)})
    list(carried.exchange(train(ids(carried))))
    assert grid.pushed[-1].metadata.ttl == pytest.approx(50.0, abs=0.2), (
        "60 s for the answer, and 10 of grace"
    )


def test_a_client_that_is_killed_while_it_says_who_it_is_is_asked_again():
    clock, asked = Clock(), []

    def dies_once(message):
        asked.append(decode_download(unpack(message.content)).task)
        return Error(code=5, reason="gone") if asked == [IDENTIFY] else node(0, 1)(message)

    carried = transport(InMemoryGrid({5: dies_once}, clock=clock), needs_all=True)
    assert ids(carried) == ("client-000",)
    assert asked == [IDENTIFY, IDENTIFY]


def test_a_client_that_goes_while_it_sends_its_answer_holds_nobody_up(monkeypatch):
    """Flower waits for the rest of the answer, and answers nothing else until it has given up."""
    monkeypatch.setattr(flower_sent, "LOOK_SECONDS", 0.01)
    given_up = threading.Event()

    class Waiting(InMemoryGrid):
        def pull_messages(self, message_ids):
            if message_ids == ["half"]:
                self.nodes = {5: node(0), 7: node(2)}
                given_up.wait(20.0)
            return super().pull_messages(message_ids)

        def push_messages(self, messages):
            ids = super().push_messages(messages)
            return ["half"] if messages[0].metadata.dst_node_id == 6 and len(self.pushed) > 3 else ids

    grid = Waiting({5: node(0), 6: node(1), 7: node(2)})
    carried = transport(grid, needs_all=True, timeout_seconds=5.0)
    deliveries = list(carried.exchange(train(ids(carried))))
    assert positions(deliveries) == [0.0, GONE_SENDING, 2.0]
    given_up.set()


@pytest.mark.parametrize("needs_all", [True, False])
def test_a_node_that_came_back_before_anybody_missed_it_has_forgotten_its_turn(needs_all):
    """It answers what it is asked later; its own answer, however late, comes before."""
    forgets, slow = [True], InMemoryGrid({5: node(0), 6: node(1), 7: node(2)})

    def forgetful(message):
        is_turn = decode_download(unpack(message.content)).task == "train"
        return None if is_turn and forgets and forgets.pop() else node(1)(message)

    grid = InMemoryGrid({5: node(0), 6: forgetful, 7: node(2)})
    for one, second in ((grid, 1.0 if needs_all else FORGOTTEN), (slow, 1.0)):
        carried = transport(one, needs_all=needs_all, timeout_seconds=900.0, probe_seconds=120.0)
        assert carried.clients
        one.delays = {6: 500.0} if one is slow else {}
        assert positions(carried.exchange(train(ids(carried)))) == [0.0, second, 2.0]
    assert grid.clock.now == pytest.approx(120.0, abs=0.5)
    assert slow.clock.now == pytest.approx(500.0, abs=0.5)


def test_only_the_key_of_a_site_gives_its_place_back():
    clock = Changing()
    clock.due = float("inf")
    grid = InMemoryGrid({5: node(0, 1), 6: node(1, 1 + 1)}, clock=clock)
    carried = FlowerTransport(
        grid,
        config_sha256=HASH,
        patience=Patience(answer_seconds=60.0, needs_all=True),
        clock=clock,
        pause=clock.pause,
        sites=Sites(number=2, keys={5: "client-000", 6: "client-001"}),
    )
    assert len(carried.clients) == 2
    grid.nodes = {5: node(0, 1), 99: node(1, 2)}
    (_, delivery) = carried.exchange(train(ids(carried)))
    assert delivery.upload.failure == "its node is not connected"
    assert 99 not in [message.metadata.dst_node_id for message in grid.pushed]
