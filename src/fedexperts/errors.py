"""Errors that a user can mend, as opposed to faults of the program."""

import errno
import functools
import inspect
import re
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, ParamSpec, TypeVar, Union, cast, get_args, get_origin, get_type_hints

P = ParamSpec("P")
R = TypeVar("R")


class UserError(ValueError):
    """A mistake in a file, a setting, a checkpoint or a message, told in one sentence.

    The sentence names the value, what is allowed, and the setting's full name. The command line prints it
    without a traceback and exits with code 2. Every other exception is a fault of the program.
    """


def needs_extra(user: str, package: str, extra: str) -> UserError:
    """Return the error of ``user``, a setting or a class, where the ``package`` of an extra is absent."""
    return UserError(
        f"{user} needs the package {package}: run pip install -e '.[{extra}]' in the clone of FedExperts"
    )


def is_disk_full(error: BaseException) -> bool:
    """Whether a device has no space left, or the user's quota is spent."""
    return _errno_of(error) in (errno.ENOSPC, errno.EDQUOT)


_OF_THE_DISK = (
    errno.EACCES,
    errno.EEXIST,
    errno.EFBIG,
    errno.EIO,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,  # also what /proc says of a new file
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)


def is_of_the_disk(error: BaseException) -> bool:
    """Whether a disk, a path or its rights do not allow what was asked, which is no fault of the program."""
    return _errno_of(error) in _OF_THE_DISK


def _errno_of(error: BaseException) -> int | None:
    """Return the number of a system's error; safetensors says it in words only."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    said = re.search(r"\(os error (\d+)\)", str(error))
    return int(said[1]) if said else None


def refuse_unknown(settings: Any) -> None:
    """Raise UserError if a field of a settings class holds a value that its Literal does not name.

    A settings file is checked when it is read; this is for those who make the object in Python.
    """
    for name, allowed in _options(cast(Any, type(settings))).items():
        refuse_other(name, getattr(settings, name), allowed)


def known_options(function: Callable[P, R]) -> Callable[P, R]:
    """Let ``function`` first raise UserError for an argument that its Literal does not name."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        given = signature.bind(*args, **kwargs).arguments
        for name, allowed in _options(function).items():
            if name in given:
                refuse_other(name, given[name], allowed)
        return function(*args, **kwargs)

    return checked


@functools.cache
def _options(owner: Any) -> Mapping[str, tuple[Any, ...]]:
    """Return the values of each field or argument that is a Literal, or a Literal or None."""
    found = {}
    for name, hint in get_type_hints(owner).items():
        members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        if all(get_origin(one) is Literal or one is type(None) for one in members):
            found[name] = tuple(
                value for one in members for value in (get_args(one) if one is not type(None) else (None,))
            )
    return {name: allowed for name, allowed in found.items() if allowed != (None,)}


def refuse_other(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise UserError unless ``value`` is one of ``allowed``, of the same type."""
    allowed = tuple(allowed)
    if any(type(one) is type(value) and one == value for one in allowed):
        return
    shown = f'"{value}"' if isinstance(value, str) else repr(value)
    raise UserError(f"{name} is {shown}; it must be one of {', '.join(map(str, allowed))}")
