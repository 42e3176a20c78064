"""``python -m graphopt.models list`` and ``python -m graphopt.models fetch [NAME or GROUP ...]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graphopt.errors import GraphoptError

from . import zoo


def rows(group: str | None = None) -> list[dict[str, Any]]:
    """Return what is known about each model of the zoo (or of a group), as plain values for a table or JSON."""
    return [
        {
            "name": entry.name,
            "group": entry.group,
            "from": f"{entry.package}=={entry.version}",
            "licence": entry.licence,
            "inputs": {key: list(spec.shape) for key, spec in entry.inputs.items()},
        }
        for entry in map(zoo.get, zoo.names(group))
    ]


def expand(wanted: Sequence[str]) -> list[str]:
    """Return the models that names and groups stand for; none given stands for all models."""
    if not wanted:
        return zoo.names()
    groups = {zoo.get(name).group for name in [*zoo.names(), *zoo.names(zoo.ASSETS)]}
    expanded: list[str] = []
    for word in wanted:
        expanded += zoo.names(word) if word in groups and word not in zoo.names() else [zoo.get(word).name]
    return expanded


def fetch(wanted: Sequence[str]) -> dict[str, Path | GraphoptError]:
    """Fetch models by name or group; one that cannot be had gives its error and does not stop the others."""
    found: dict[str, Path | GraphoptError] = {}
    for name in expand(wanted):
        try:
            found[name] = zoo.fetch(name)
        except GraphoptError as error:
            found[name] = error
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0, or 2 when something could not be fetched or is not known."""
    parser = argparse.ArgumentParser(prog="python -m graphopt.models", description="the zoo of models")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="names, packages, licences, shapes")
    commands.add_parser("fetch", help="bring models into the cache").add_argument("names", nargs="*")
    options = parser.parse_args(arguments)
    try:
        return _list() if options.command == "list" else _fetch(options.names)
    except GraphoptError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def _list() -> int:
    for row in rows():
        shapes = " ".join(f"{key}{shape}" for key, shape in row["inputs"].items())
        print(f"{row['name']:32}{row['group']:8}{row['from']:40}{row['licence']:24}{shapes}")
    return 0


def _fetch(wanted: Sequence[str]) -> int:
    found = fetch(wanted)
    for name, path in found.items():
        print(f"{name:32}{path}")
    return 2 if any(isinstance(path, GraphoptError) for path in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
