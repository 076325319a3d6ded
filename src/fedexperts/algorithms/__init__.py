"""Algorithms by name."""

from fedexperts.algorithms.api import Algorithm
from fedexperts.algorithms.fedavg import FedAvg, FedAvgExperts
from fedexperts.algorithms.flex import Flex
from fedexperts.algorithms.local_only import LocalOnly

ALGORITHMS: dict[str, type[Algorithm]] = {
    "fedavg": FedAvg,
    "fedavg_experts": FedAvgExperts,
    "flex": Flex,
    "local_only": LocalOnly,
}
"""Name in ``[algorithm]`` to class."""
