"""Errors as the host shows them best.

The host puts the full name of an error class in front of its message, and a class of this pack has the pack's
folder in its name: in a toast the path would be all there is to read.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from ..sfpp_core.errors import SFPPError

P = ParamSpec("P")
T = TypeVar("T")


def plain_errors(function: Callable[P, T]) -> Callable[P, T]:
    """Return ``function``, raising a plain ``ValueError`` of the same message in place of our own errors."""

    @wraps(function)
    def plain(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except SFPPError as error:
            raise ValueError(str(error)) from error

    return plain
