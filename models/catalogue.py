"""What `graphopt zoo` lists and fetches."""

from __future__ import annotations

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
