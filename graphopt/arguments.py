"""What is given on the command line -> the values that the library takes."""

from __future__ import annotations

from pathlib import Path

from graphopt import registry
from graphopt.errors import SpecError


def load_plugins(paths: list[Path] | None) -> None:
    """Register the passes of `--plugin` files and folders.

    Raises:
        SpecError: one does not exist, or is no plugin.
    """
    for path in paths or []:
        registry.load_plugin(path)


def shapes(given: list[str] | None) -> dict[str, tuple[int, ...]] | None:
    """Return `NAME=1,3,224,224` options as a mapping.

    Raises:
        SpecError: not of that form.
    """
    if not given:
        return None
    found: dict[str, tuple[int, ...]] = {}
    for item in given:
        name, _, dims = item.rpartition("=")
        try:
            found[name] = tuple(int(d) for d in dims.split(",")) if dims else ()
        except ValueError:
            name = ""
        if not name or any(d < 0 for d in found.get(name, ())):
            raise SpecError(f"--shape {item!r} is not understood", hint="--shape NAME=1,3,224,224")
    return found
