"""Describe Flower's nodes: which client each is, and which sites a run waits for."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedexperts.data.settings import CLIENT_NAME
from fedexperts.errors import UserError
from fedexperts.messages import plain_text


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node's description of itself."""

    node_id: int
    client_id: str
    position: int
    """Of the client in the data's order."""
    num_clients: int
    num_train: int
    memory_bytes: int
    tells_counts: bool = True


ONE_OF_ONE = {"position": 0, "num_clients": 1}
"""Place of a site's client in the site's data."""


def known_node(client_id: str, nodes: Mapping[str, Node]) -> Node:
    """Return the node of a client; raise UserError if it has not joined."""
    if client_id not in nodes:
        raise UserError(f"client {client_id} took part before, but only {', '.join(nodes)} have joined")
    return nodes[client_id]


def refuse_mixed_counts(sites: Mapping[str, Node]) -> None:
    """Raise UserError if some sites weigh by their number of examples and others do not."""
    telling = [name for name, node in sites.items() if node.tells_counts]
    if 0 < len(telling) < len(sites):
        others = ", ".join(sorted(sites.keys() - set(telling)))
        raise UserError(
            f"sites {', '.join(sorted(telling))} tell their number of training examples and {others} do not: "
            'their weights cannot be compared: start all sites with "counts" in tell, or none'
        )


def node_of(node_id: int, report: Mapping[str, Any]) -> Node:
    """Read a node's description of itself.

    Raises:
        UserError: a part of it is missing or of another type.
    """
    kinds = {"client_id": str, "position": int, "num_clients": int, "num_train": int, "memory_bytes": int}
    for name, kind in kinds.items():
        if type(report.get(name)) is not kind:
            raise UserError(f"Flower node {node_id}: its {name} is {plain_text(repr(report.get(name)))[:60]}")
    if (
        not 0 <= report["position"] < report["num_clients"]
        or min(report["num_train"], report["memory_bytes"]) < 0
    ):
        raise UserError(f"Flower node {node_id} says it is {report['position']} of {report['num_clients']}")
    if not CLIENT_NAME.fullmatch(report["client_id"]):
        raise UserError(f"Flower node {node_id}: its client_id is no name of a client")
    tells_counts = report.get("tells_counts", True) is True
    return Node(node_id=node_id, tells_counts=tells_counts, **{name: report[name] for name in kinds})


def count_of(nodes: Collection[Node]) -> str:
    """Return in words how many clients have joined."""
    total = max((node.num_clients for node in nodes), default=0)
    return f"only {len(nodes)} of {total} clients" if nodes else "no client"


@dataclass(frozen=True, kw_only=True)
class Sites:
    """Sites with data of their own that a run waits for."""

    number: int
    keys: Mapping[int, str] = field(default_factory=dict)
    """Name of each site by the node id that Flower gave its key; empty where no key was registered."""

    def may_ask(self, node_id: int) -> bool:
        """Return whether a node may take part: where keys are registered, those alone."""
        return not self.keys or node_id in self.keys

    def missing(self, found: Collection[str], asked: Collection[int]) -> str:
        """Return which sites are not connected, and which of the nodes that were ``asked`` are still silent.

        Sites whose names are not known are counted.
        """
        away = sorted(set(self.keys.values()) - set(found) - {self.keys.get(one, "") for one in asked})
        number = self.number - len(found) - len(asked)
        told = ", ".join(away) or (f"{number} more" if number > 0 else "")
        silent = ", ".join(sorted(self.keys.get(one, f"Flower node {one}") for one in asked))
        parts = {"not connected": told, "connected, but without an answer": silent}
        return "; ".join(f"{state}: {names}" for state, names in parts.items() if names)

    def refusal(self, node_id: int, name: str, found: Mapping[str, Node]) -> str:
        """Return why a node may not be the site ``name``, or nothing."""
        if self.keys and self.keys[node_id] != name:
            return f"it says that it is {name}, but its key is that of {self.keys[node_id]}"
        return f"it says that it is {name}, which is node {found[name].node_id}" if name in found else ""
