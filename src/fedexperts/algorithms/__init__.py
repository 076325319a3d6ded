"""Algorithms by name."""

from fedexperts.algorithms.api import Algorithm
from fedexperts.algorithms.fedavg import FedAvg
from fedexperts.algorithms.fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi
from fedexperts.algorithms.fedprox import FedProx
from fedexperts.algorithms.flex import Flex
from fedexperts.algorithms.local_only import LocalOnly
from fedexperts.algorithms.presets import preset
from fedexperts.algorithms.scaffold import Scaffold

ALGORITHMS: dict[str, type[Algorithm]] = {
    "fedadagrad": FedAdagrad,
    "fedadam": FedAdam,
    "fedavg": FedAvg,
    "fedavg_experts": preset(FedAvg, "FedAvg with all routed experts", experts=True),
    "fedavgm": FedAvgM,
    "fedprox": FedProx,
    "fedyogi": FedYogi,
    "flex": Flex,
    "local_only": LocalOnly,
    "scaffold": Scaffold,
}
"""Name in ``[algorithm]`` to class."""
