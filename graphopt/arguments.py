"""What is given on the command line -> the values that the library takes."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from graphopt import registry
from graphopt.errors import SpecError


def load_plugins(paths: list[Path] | None) -> list[list[str]]:
    """Register the passes of `--plugin` files and folders; return the names of each one's.

    Raises:
        SpecError: one does not exist, or is no plugin.
    """
    return [registry.load_plugin(path) for path in paths or []]


def unnamed_passes(plugins: list[list[str]], named: Collection[str]) -> list[str]:
    """Return the passes of plugins of which a pipeline names none."""
    return [name for names in plugins if not set(names) & set(named) for name in names]


def unnamed_line(names: list[str], pipeline: str | None) -> str:
    """Return what to do about passes that `pipeline`, as given on the command line, does not name."""
    wanted = ", ".join([pipeline if pipeline and not pipeline.endswith(".toml") else "default", *names])
    listed = ", ".join(f"'{name}'" for name in names)
    are = f"pass {listed} is" if len(names) == 1 else f"passes {listed} are"
    them = "it" if len(names) == 1 else "them"
    return f'! {are} loaded, but the pipeline does not name {them}: -p "{wanted}"'


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


def thread_counts(given: list[str] | None) -> list[int] | None:
    """Return `--threads 1,2 --threads 4` as numbers.

    Raises:
        SpecError: not numbers.
    """
    if not given:
        return None
    try:
        return [int(count) for item in given for count in item.split(",")]
    except ValueError as error:
        raise SpecError(f"--threads {','.join(given)} is not understood", hint="--threads 1,4") from error
