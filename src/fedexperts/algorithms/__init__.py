"""Algorithms by name."""

from fedexperts.algorithms.api import Algorithm
from fedexperts.algorithms.fedavg import FedAvg
from fedexperts.algorithms.flex import Flex
from fedexperts.algorithms.local_graft import LocalGraft
from fedexperts.algorithms.local_only import LocalOnly
from fedexperts.algorithms.presets import preset

ALGORITHMS: dict[str, type[Algorithm]] = {
    "fedavg": FedAvg,
    "fedavg_experts": preset(FedAvg, "FedAvg with all routed experts", experts=True),
    "flex": Flex,
    "local_graft": LocalGraft,
    "local_only": LocalOnly,
    "moe_fedavg": preset(FedAvg, "FedAvg with one random expert per MoE layer", one_expert="averaged"),
}
"""Name in ``[algorithm]`` to class."""
