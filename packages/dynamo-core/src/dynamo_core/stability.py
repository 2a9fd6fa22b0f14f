"""Stability markers: what may change when.

Stable names have no marker. ``experimental`` may change without notice, ``beta`` with one release's notice, and
``deprecated`` names its replacement and the release that removes it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def experimental(target: Callable[P, R]) -> Callable[P, R]:
    """Mark a callable that may change or vanish in any release; its first use warns with ``FutureWarning``.

    A class stays a class: making the first instance of it, or of a subclass, warns.
    """
    message = f"{_name_of(target)} is experimental and may change in any release"
    warned = False

    def warn() -> None:
        nonlocal warned
        if not warned:
            warned = True
            warnings.warn(message, FutureWarning, stacklevel=3)

    return _mark(_warning(target, warn), "experimental")


def beta(target: Callable[P, R]) -> Callable[P, R]:
    """Mark a callable that may change with one minor release's notice. It does not warn."""
    return _mark(target, "beta")


def deprecated(*, since: str, removed_in: str, use: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Mark a callable on its way out; each call warns with ``DeprecationWarning``. A class stays a class.

    Args:
        since: Release of this package that deprecated it.
        removed_in: Release that removes it.
        use: What to use instead.
    """

    def decorate(target: Callable[P, R]) -> Callable[P, R]:
        name = _name_of(target)
        message = f"{name} is deprecated since {since} and goes in {removed_in}; use {use}"

        def warn() -> None:
            warnings.warn(message, DeprecationWarning, stacklevel=3)

        return _mark(_warning(target, warn), "deprecated")

    return decorate


def stability_of(target: object) -> str:
    """Return ``experimental``, ``beta``, ``deprecated`` or ``stable``."""
    return getattr(target, "__stability__", "stable")


def _warning(target: Callable[P, R], warn: Callable[[], None]) -> Callable[P, R]:
    if isinstance(target, type):
        # Wrapping the class itself would break isinstance and subclassing.
        made: Any = target
        made.__init__ = _warning(made.__init__, warn)
        return target

    @functools.wraps(target)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        warn()
        return target(*args, **kwargs)

    return wrapper


def _mark(target: Callable[P, R], level: str) -> Callable[P, R]:
    marked: Any = target
    marked.__stability__ = level
    return target


def _name_of(target: Callable[..., object]) -> str:
    return f"{target.__module__}.{getattr(target, '__qualname__', repr(target))}"
