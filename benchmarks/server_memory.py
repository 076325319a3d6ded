"""Server memory against the number of clients, with Flower's stock FedAvg as the rival.

Both take a round's uploads from the same Grid, which makes each reply when it is pulled, as Flower's makes it
from what the SuperLink has sent. The first client of the cohort answers last: all others are there before it.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

from benchmarks.tables import Table
from fedexperts.federation.flower_post import IDENTIFY
from fedexperts.federation.flower_sent import Patience
from fedexperts.federation.flower_transport import FlowerTransport
from fedexperts.federation.wire import pack
from fedexperts.messages import Download, Sent, Upload, encode_upload
from fedexperts.process_memory import return_freed_blocks
from fedexperts.tensors import WeightedMean

RIVALS = {"fedexperts": "FedExperts", "flower": "Flower's FedAvg"}
NUM_TENSORS = 16
LAST_SECONDS = 10.0
"""Seconds until the first client of the cohort answers; all others have answered by then."""


def update(megabytes: float) -> dict[str, torch.Tensor]:
    """Return tensors of that size together."""
    number = int(megabytes * 1e6 / 4 / NUM_TENSORS)
    return {f"layer-{place:02d}": torch.randn(number) for place in range(NUM_TENSORS)}


class LazyGrid(Grid):
    """Nodes that answer at once but for one; a reply exists from when it is pulled."""

    def __init__(self, num_clients: int, megabytes: float) -> None:
        """Hold no message's content."""
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self._num_clients, self._megabytes = num_clients, megabytes
        self._asked: dict[str, Message] = {}
        self._num_pushed = 0
        self.now = 0.0

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return list(range(1, self._num_clients + 1))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Take messages and forget what they carry, as a Grid that has sent them on."""
        names = []
        for message in messages:
            node, name = message.metadata.dst_node_id, f"message {self._num_pushed}"
            self._num_pushed += 1
            bare = Message(RecordDict(), node, "train", group_id=message.metadata.group_id)
            bare.metadata.__dict__["_message_id"] = name
            self._asked[name] = bare
            names.append(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [reply for name in message_ids for reply in self._reply(name)]

    def _reply(self, name: str) -> list[Message]:
        message = self._asked[name]
        node, task = message.metadata.dst_node_id, message.metadata.group_id.split()[0]
        if task != IDENTIFY and node == 1 and self.now < LAST_SECONDS:
            return []
        if task == IDENTIFY:
            upload = Upload(report=_report(node, self._num_clients))
        else:
            tensors = update(self._megabytes)
            upload = Upload(tensors=tensors, weights=dict.fromkeys(tensors, 1.0))
        del self._asked[name]
        return [Message(pack(encode_upload(upload)), reply_to=message)]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Return all replies together, as Flower's Grid does."""
        asked = [self._asked.pop(name) for name in self.push_messages(messages)]
        return [Message(self._flower_reply(), reply_to=message) for message in asked]

    def _flower_reply(self) -> RecordDict:
        metrics = MetricRecord({"num-examples": 1, "loss": 1.0})
        return RecordDict({"arrays": ArrayRecord(update(self._megabytes)), "metrics": metrics})

    def pause(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


def _report(node: int, num_clients: int) -> dict[str, Any]:
    own = {"client_id": f"client-{node:03d}", "position": node - 1, "num_clients": num_clients}
    return {**own, "num_train": 1, "memory_bytes": 0}


def _round_of_fedexperts(grid: LazyGrid, tensors: Mapping[str, torch.Tensor], folder: str) -> None:
    transport = FlowerTransport(
        grid,
        config_sha256="",
        patience=Patience(answer_seconds=3600.0),
        clock=lambda: grid.now,
        pause=grid.pause,
        spool_folder=Path(folder),
    )
    sent = Sent(tensors=dict(tensors))
    downloads = (
        (facts.client_id, Download(round_number=1, task="train", sent=sent, largest_answer=10**9))
        for facts in transport.clients
    )
    mean, number = WeightedMean(), 0
    for delivery in transport.exchange(downloads):
        mean.add(delivery.upload.tensors, delivery.upload.weights)
        number += len(delivery.upload.tensors) == NUM_TENSORS
    mean.mean(like=tensors)
    assert number == len(transport.clients), "every upload has been added"


def _round_of_flower(grid: LazyGrid, tensors: Mapping[str, torch.Tensor]) -> None:
    FedAvg(fraction_evaluate=0.0).start(grid, ArrayRecord(dict(tensors)), num_rounds=1)


def peak_megabytes(rival: str, num_clients: int, megabytes: float) -> float:
    """Memory of one round, above what the process took before, to the page: the system keeps the peak."""
    grid, tensors = LazyGrid(num_clients, megabytes), update(megabytes)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _peak_megabytes()
        if rival == "flower":
            _round_of_flower(grid, tensors)
        else:
            return_freed_blocks()  # as the server app does
            _round_of_fedexperts(grid, tensors, folder)
    return _peak_megabytes() - before


def _peak_megabytes() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM:"))


def measure(
    model: str,  # noqa: ARG001
    *,
    numbers: Sequence[int] = (4, 16, 32),
    sizes: Sequence[float] = (20.0, 256.0),
    repeats: int = 1,
) -> dict[str, Any]:
    """Megabytes by size of an upload, rival and number of clients; each in a process without a model."""
    peaks = {
        f"{size:g}": {
            rival: {
                str(number): [_measured(rival, number, size) for _ in range(repeats)] for number in numbers
            }
            for rival in RIVALS
        }
        for size in sizes
    }
    return {"repeats": repeats, "peaks": peaks}


def _measured(rival: str, number: int, megabytes: float) -> float:
    command = [sys.executable, "-m", "benchmarks.server_memory", rival, str(number), str(megabytes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """Return the tables of the document, one for each size of an upload."""
    return [_table(size, by_rival, figures["repeats"]) for size, by_rival in figures["peaks"].items()]


def _table(size: str, by_rival: Mapping[str, Mapping[str, Sequence[float]]], repeats: int) -> Table:
    numbers = list(next(iter(by_rival.values())))
    rows = tuple(
        (RIVALS[rival], *(", ".join(f"{peak:,.0f}" for peak in found[number]) for number in numbers))
        for rival, found in by_rival.items()
    )
    title = (
        f"Peak memory of the server's process in a round of uploads of {size} MB each, above what "
        f"it took before, MB, by run ({repeats})"
    )
    return Table(title=title, columns=("", *(f"{number} clients" for number in numbers)), rows=rows)


if __name__ == "__main__":
    print(json.dumps(peak_megabytes(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))))
