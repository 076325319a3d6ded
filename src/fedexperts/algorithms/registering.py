"""Register an algorithm that is defined outside this package."""

from typing import Any

from fedexperts.algorithms import ALGORITHMS
from fedexperts.algorithms.api import Algorithm
from fedexperts.errors import UserError
from fedexperts.plugins import is_redefined, refuse_bad_name


def register_algorithm(name: str, cls: type[Algorithm]) -> None:
    """Make ``cls`` available as ``algorithm.name = "<name>"``, its fields as the section's other keys.

    The registration holds for this process. To make the algorithm known to the command line, to the workers
    of ``compare --jobs`` and to Flower's nodes, install it as an entry point in the group
    ``fedexperts.algorithms`` (docs/own_algorithm.md). A class may be registered again after it was defined
    anew, as when a notebook cell is run twice.

    Args:
        name: letters, digits and underscores; not the name of another algorithm.
        cls: a subclass of ``fedexperts.algorithms.api.Algorithm``, itself a frozen dataclass.

    Raises:
        UserError: the name is taken or malformed, or the class is not of that kind.
    """
    refuse_bad_name("algorithm", name)
    _refuse_unfit(name, cls)
    known = ALGORITHMS.get(name)
    if known is not None and not is_redefined(known, cls):
        raise UserError(
            f'algorithm name "{name}" is taken by {known.__module__}.{known.__qualname__}: choose another'
        )
    ALGORITHMS[name] = cls


def _refuse_unfit(name: str, cls: Any) -> None:
    if not (isinstance(cls, type) and issubclass(cls, Algorithm) and cls is not Algorithm):
        raise UserError(
            f'algorithm "{name}" must be a subclass of fedexperts.algorithms.api.Algorithm, not {cls!r}'
        )
    # The decorator's own mark: an inherited one would hide that the new fields are no settings.
    parameters = vars(cls).get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        raise UserError(
            f'algorithm "{name}": {cls.__qualname__} must be a frozen dataclass; '
            "put @dataclass(frozen=True, kw_only=True) above it"
        )
