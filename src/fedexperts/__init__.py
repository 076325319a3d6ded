"""Federated fine-tuning of Mixture-of-Experts language models."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fedexperts.running.export import load_personalised as load_personalised

__all__ = ["__version__", "load_personalised"]


def __getattr__(name: str) -> Any:
    """Import what needs torch only when it is asked for, so that ``fedexperts --help`` stays fast."""
    if name == "load_personalised":
        from fedexperts.running.export import load_personalised

        return load_personalised
    raise AttributeError(f"module 'fedexperts' has no attribute {name!r}")
