"""Federated fine-tuning of Mixture-of-Experts language models."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fedexperts import toolbox as toolbox
    from fedexperts.algorithms.registering import register_algorithm as register_algorithm
    from fedexperts.api import Comparison as Comparison
    from fedexperts.api import Plot as Plot
    from fedexperts.api import Result as Result
    from fedexperts.api import check as check
    from fedexperts.api import compare as compare
    from fedexperts.api import load_config as load_config
    from fedexperts.api import load_data as load_data
    from fedexperts.api import load_model as load_model
    from fedexperts.api import open_run as open_run
    from fedexperts.api import resume as resume
    from fedexperts.api import run as run
    from fedexperts.errors import UserError as UserError
    from fedexperts.evaluation.own_metrics import register_metric as register_metric
    from fedexperts.running.callbacks import Callback as Callback
    from fedexperts.running.export import load_personalised as load_personalised
    from fedexperts.running.tensorboard import TensorBoard as TensorBoard

_HOMES = {
    "Callback": "running.callbacks",
    "Comparison": "api",
    "Plot": "api",
    "Result": "api",
    "TensorBoard": "running.tensorboard",
    "UserError": "errors",
    "check": "api",
    "compare": "api",
    "load_config": "api",
    "load_data": "api",
    "load_model": "api",
    "load_personalised": "running.export",
    "open_run": "api",
    "register_algorithm": "algorithms.registering",
    "register_metric": "evaluation.own_metrics",
    "resume": "api",
    "run": "api",
}
"""Module of each public name; a module is imported when one of its names is asked for."""

__all__ = [
    "__version__",
    "toolbox",
    *_HOMES,
]


def __getattr__(name: str) -> Any:
    """Import what needs torch only when it is asked for, so that ``fedexperts --help`` stays fast."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"fedexperts.{_HOMES[name]}"), name)
    if name == "toolbox":
        return importlib.import_module("fedexperts.toolbox")
    raise AttributeError(f"module 'fedexperts' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names, also those that have not been imported yet."""
    return sorted({*globals(), *__all__})
