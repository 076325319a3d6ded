"""Algorithms under a second name, with other defaults."""

from dataclasses import dataclass, field, fields
from typing import Any

from fedexperts.algorithms.api import Algorithm


def preset(cls: type[Algorithm], summary: str, **defaults: Any) -> type[Algorithm]:
    """Return a subclass of ``cls`` whose settings have other defaults; ``summary`` is its docstring."""
    hints = {item.name: item.type for item in fields(cls) if item.name in defaults}  # type: ignore[arg-type]
    assert hints.keys() == defaults.keys(), f"{cls.__name__} has no {defaults.keys() - hints.keys()}"
    body: dict[str, Any] = {name: field(default=value) for name, value in defaults.items()}
    body["__module__"] = cls.__module__  # where its source is read from, for docs/configuration.md
    made = type(cls.__name__, (cls,), {**body, "__annotations__": hints, "__doc__": summary})
    return dataclass(frozen=True, kw_only=True)(made)
