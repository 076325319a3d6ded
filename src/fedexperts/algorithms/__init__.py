"""Algorithms by name."""

from fedexperts.algorithms.api import Algorithm
from fedexperts.algorithms.fedavg import FedAvg
from fedexperts.algorithms.fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi
from fedexperts.algorithms.flex import Flex
from fedexperts.algorithms.local_only import LocalOnly
from fedexperts.algorithms.presets import preset

ALGORITHMS: dict[str, type[Algorithm]] = {
    "fedadagrad": FedAdagrad,
    "fedadam": FedAdam,
    "fedavg": FedAvg,
    "fedavg_experts": preset(FedAvg, "FedAvg with all routed experts", experts=True),
    "fedavgm": FedAvgM,
    "fedyogi": FedYogi,
    "flex": Flex,
    "local_only": LocalOnly,
}
"""Name in ``[algorithm]`` to class."""
