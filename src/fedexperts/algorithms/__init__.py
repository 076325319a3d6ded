"""Algorithms by name."""

from fedexperts.algorithms.api import Algorithm
from fedexperts.algorithms.esft import Esft
from fedexperts.algorithms.fedavg import FedAvg
from fedexperts.algorithms.fedmoe import FedMoE
from fedexperts.algorithms.flex import Flex
from fedexperts.algorithms.local_only import LocalOnly
from fedexperts.algorithms.presets import preset

ALGORITHMS: dict[str, type[Algorithm]] = {
    "esft": Esft,
    "fedavg": FedAvg,
    "fedavg_experts": preset(FedAvg, "FedAvg with all routed experts", experts=True),
    "fedmoe": FedMoE,
    "flex": Flex,
    "local_only": LocalOnly,
}
"""Name in ``[algorithm]`` to class."""
