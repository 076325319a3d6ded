"""Register the algorithms and metrics of installed packages before a configuration is built."""

from functools import cache

from fedexperts.algorithms.registering import register_algorithm
from fedexperts.evaluation.own_metrics import register_metric
from fedexperts.plugins import ALGORITHM_GROUP, METRIC_GROUP, load_group


@cache
def load_plugins() -> None:
    """Load all entry points once in a process; after an error the next call tries again."""
    load_group(ALGORITHM_GROUP, register_algorithm)
    load_group(METRIC_GROUP, register_metric)
