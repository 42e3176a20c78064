"""Pictures that were drawn once: drawing takes as long as running a small network, and every evaluation asks anew.

They stay in memory of the process up to `LARGEST` bytes for all tasks together; beyond, each is drawn again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

LARGEST = 3 << 29
"""Bytes: all test pictures of one task, and a little more."""

_taken = 0


def kept(size: Callable[[T], int]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Return a decorator: what a function returned for the same positional arguments is returned again.

    Args:
        size: bytes that a result takes.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        known: dict[tuple[object, ...], T] = {}

        @functools.wraps(function)
        def remembered(*args: P.args, **kwargs: P.kwargs) -> T:
            global _taken  # noqa: PLW0603 (the budget is one for all functions)
            if args not in known:
                made = function(*args, **kwargs)
                if _taken + size(made) > LARGEST:
                    return made
                _taken += size(made)
                known[args] = made
            return known[args]

        return remembered

    return decorate
