"""Algorithms by name."""

from fedexperts.algorithms.api import Algorithm
from fedexperts.algorithms.ditto import Ditto
from fedexperts.algorithms.fdlora import FDLoRA
from fedexperts.algorithms.fedavg import FedAvg
from fedexperts.algorithms.fedavg_finetune import FedAvgFinetune
from fedexperts.algorithms.feddpa import FedDPA
from fedexperts.algorithms.fedper import FedPer
from fedexperts.algorithms.fedrep import FedRep
from fedexperts.algorithms.flex import Flex
from fedexperts.algorithms.local_only import LocalOnly
from fedexperts.algorithms.presets import preset

ALGORITHMS: dict[str, type[Algorithm]] = {
    "ditto": Ditto,
    "fdlora": FDLoRA,
    "fedavg": FedAvg,
    "fedavg_experts": preset(FedAvg, "FedAvg with all routed experts", experts=True),
    "fedavg_finetune": FedAvgFinetune,
    "feddpa": FedDPA,
    "fedper": FedPer,
    "fedrep": FedRep,
    "flex": Flex,
    "local_only": LocalOnly,
}
"""Name in ``[algorithm]`` to class."""
