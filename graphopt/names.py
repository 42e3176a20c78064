"""Names that options choose by: globs to take, globs to leave."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable


def matches(name: str, only: Iterable[str], skip: Iterable[str] = ()) -> bool:
    """Tell whether a name is meant: by one of `only` (all, where that is empty), and by none of `skip`.

    Case counts.  `[` opens a set of characters as in a shell; `glob.escape` makes a name stand for itself.
    """
    globs = tuple(only)
    wanted = not globs or any(fnmatch.fnmatchcase(name, glob) for glob in globs)
    return wanted and not any(fnmatch.fnmatchcase(name, glob) for glob in skip)
