"""Where a command writes: what cannot be written, or would overwrite what is read, is refused before the work."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path

from graphopt.errors import SpecError
from graphopt.external import check_writable
from graphopt.model import check_output

IN_PLACE = {"MODEL", "--output"}
"""What may be the same file."""


def check(files: Mapping[str, Path | str | None], *written: Path | None) -> None:
    """Make sure that a command's files are different ones, and that those it writes can be written.

    Args:
        files: all that it reads and writes, under their names on the command line; None: not given.
        written: those that it writes.

    Raises:
        SpecError: two are the same file, by whatever path.
        ModelError: no file can be written there.
    """
    given = [(name, _file(path)) for name, path in files.items() if path is not None]
    for (name, path), (other, second) in itertools.combinations(given, 2):
        if {name, other} != IN_PLACE and _same(path, second):
            raise SpecError(f"{name} and {other} are the same file", at=str(second), hint=f"give {other} another one")
    for target in written:
        if target is not None:
            check_output(target)
            check_writable(target.resolve() if target.is_symlink() else target)


def _file(given: Path | str) -> Path:
    """Return the file of a path, or of `file.py:function`."""
    text = str(given)
    head, colon, _ = text.rpartition(".py:")
    return Path(f"{head}.py" if colon else text)


def _same(first: Path, second: Path) -> bool:
    try:
        return first.samefile(second)
    except OSError:  # one does not exist yet
        return os.path.realpath(first) == os.path.realpath(second)
