"""Flower's Grid without Flower: nodes are functions, and time is a number."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from flwr.app import Context, Message, RecordDict
from flwr.app.error import Error
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

Node = Callable[[Message], RecordDict | Error | None]
"""A node's answer to a message; None for never."""


@dataclass
class Clock:
    """Seconds that pass only while somebody waits."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class InMemoryGrid(Grid):
    """Each node answers at once; the answer can be pulled ``delays[node]`` seconds later."""

    nodes: dict[int, Node]
    clock: Clock = field(default_factory=Clock)
    delays: dict[int, float] = field(default_factory=dict)
    pushed: list[Message] = field(default_factory=list)
    pulls: list[list[str]] = field(default_factory=list)
    _replies: dict[str, tuple[float, Message]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            node_id = message.metadata.dst_node_id
            content = self.nodes[node_id](message)
            if content is not None:
                ready = self.clock() + self.delays.get(node_id, 0.0)
                self._replies[message.metadata.message_id] = (ready, Message(content, reply_to=message))
            self.pushed.append(message)
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self.pulls.append(list(message_ids))
        there = [name for name in self.pulls[-1] if self._is_ready(name)]
        return [self._replies.pop(name)[1] for name in there]

    def _is_ready(self, message_id: str) -> bool:
        return message_id in self._replies and self._replies[message_id][0] <= self.clock()


def app_node(app: Any, run_config: dict[str, Any], node_config: dict[str, Any]) -> Node:
    """A node that answers by a client app."""

    def answer(message: Message) -> RecordDict:
        context = Context(
            run_id=1,
            node_id=message.metadata.dst_node_id,
            node_config=dict(node_config),
            state=RecordDict(),
            run_config=dict(run_config),
        )
        return app(message, context).content

    return answer
