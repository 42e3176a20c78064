"""Names that options choose by: globs to take, globs to leave."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable


def left_out(name: str, only: Iterable[str], skip: Iterable[str] = ()) -> str:
    """Return why a name is not meant, '' where it is: by one of `only` (all, where that is empty), by none of `skip`.

    Case counts.  `[` opens a set of characters as in a shell; `glob.escape` makes a name stand for itself.
    """
    globs = tuple(only)
    if globs and not fits(name, globs):
        return "not among those asked for"
    return "to be skipped" if fits(name, skip) else ""


def matches(name: str, only: Iterable[str], skip: Iterable[str] = ()) -> bool:
    """Tell whether a name is meant, as in `left_out`."""
    return not left_out(name, only, skip)


def fits(name: str, globs: Iterable[str]) -> bool:
    """Tell whether one of the globs is of a name."""
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)
