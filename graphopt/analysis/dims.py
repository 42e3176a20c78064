"""A model's dynamic dimensions, and candidate sizes for them in the order in which they are worth trying.

A dimension that has a symbol is one unknown wherever the symbol stands; one without is an unknown of its own.
What kind of axis it is (batch, space, channel, length) decides what is tried.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from graphopt.analysis.inputs import InputUse, InputUses
from graphopt.model import Model, ValueSpec
from graphopt.tensors import is_float

Sizes: TypeAlias = tuple[tuple[str, int], ...]
"""Size of each dynamic dimension, by name, sorted."""

CANDIDATES: Mapping[str, tuple[int, ...]] = {
    "batch": (1, 2, 4, 8, 3),
    "channel": (3, 1, 4, 16, 32, 64, 2, 8, 128, 256),
    "space": (224, 64, 48, 32, 96, 128, 256, 320, 16, 28, 30, 299, 384, 512, 640, 8, 4, 3, 2, 1),
    "audio": (512, 576, 1024, 288, 1600, 4000, 16000, 256, 128, 64, 32, 16, 8, 4, 3, 2, 1, 5, 7, 10),
    "length": (32, 64, 128, 16, 100, 80, 8, 10, 4, 3, 2, 1, 5, 6, 7, 256, 512, 77),
    "past": (8, 4, 1, 16, 0),
    "any": (2, 3, 1, 4, 5, 8, 16),
}

UNKNOWN_RANK = ((1, 3, 224, 224), (2, 3, 4), (2, 8), (4,), (), (1,), (2, 3, 4, 5), (2, 2, 3, 4, 5))
"""Shapes tried for inputs of which not even the rank is known."""


@dataclass
class Dims:
    """The dynamic dimensions.

    Attributes:
        inputs: per tensor input its dimensions: a size, or the name of an unknown.
        roles: per unknown, a key of `CANDIDATES`.
        fixed: unknowns whose size a weight or the user fixes.
        sums: unknowns that are sums of others and numbers (`past + 1`).
        unranked: inputs without a known rank.
    """

    inputs: dict[str, tuple[int | str, ...]] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    fixed: dict[str, int] = field(default_factory=dict)
    sums: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unranked: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """The unknowns to choose sizes for."""
        return [name for name in self.roles if name not in self.fixed and name not in self.sums]

    @classmethod
    def of(cls, model: Model, uses: InputUses, given: Mapping[str, tuple[int, ...]]) -> Dims:
        """Return the dimensions of a model's inputs; `given` fixes whole shapes."""
        dims = cls()
        for spec in model.inputs:
            if spec.kind == "tensor":
                dims._add(spec, uses.by_name[spec.name], given.get(spec.name))
        for name in list(dims.roles):
            terms = tuple(re.split(r"\s*\+\s*", name))
            if len(terms) > 1 and all(term in dims.roles or term.isdigit() for term in terms):
                dims.sums[name] = terms
        return dims

    def _add(self, spec: ValueSpec, use: InputUse, given: tuple[int, ...] | None) -> None:
        if spec.shape is None:
            self.inputs[spec.name] = given or ()
            if given is None:
                self.unranked.append(spec.name)
            return
        found: list[int | str] = []
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, int):
                found.append(dim)
                continue
            name = dim if isinstance(dim, str) else f"{spec.name}.{axis}"
            found.append(name)
            role = role_of(spec, use, axis, dim)
            if name not in self.roles or self.roles[name] == "any":
                self.roles[name] = role
            if given is not None:
                self.fixed[name] = given[axis]
            elif axis in use.pins and name not in self.fixed:
                self.fixed[name] = use.pins[axis]
        self.inputs[spec.name] = tuple(found)
        if given is not None:
            self.inputs[spec.name] = given

    def complete(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Return sizes of all unknowns."""
        found = {**sizes, **self.fixed}
        for name, terms in self.sums.items():
            found.setdefault(name, sum(int(t) if t.isdigit() else found.get(t, 1) for t in terms))
        return found

    def shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor input."""
        by_name = self.complete({name: size for name, size in sizes if not name.startswith("rank of ")})
        ranked = {name.removeprefix("rank of "): UNKNOWN_RANK[i] for name, i in sizes if name.startswith("rank of ")}
        return {
            name: ranked.get(name, tuple(d if isinstance(d, int) else by_name[d] for d in dims))
            for name, dims in self.inputs.items()
        }


def role_of(spec: ValueSpec, use: InputUse, axis: int, dim: str | None) -> str:
    """Return what kind of axis a dynamic dimension is, from its name, its place and the input's type."""
    symbol = (dim or "").lower()
    assert spec.shape is not None
    shape, rank = spec.shape, len(spec.shape)
    if "past" in symbol or "cache" in symbol:
        return "past"
    if "batch" in symbol or symbol in ("n", "b"):
        return "batch"
    if any(part in symbol for part in ("seq", "len", "time", "frame", "token", "step")):
        return "audio" if rank == 2 and is_float(spec.dtype) and axis == 1 else "length"
    if rank == 3 and axis == 1 and isinstance(shape[0], int) and isinstance(shape[2], int):
        return "batch"  # a recurrent state: (layers, batch, hidden)
    if axis == 0 and rank > 1:
        return "batch"
    if rank in (4, 5) and is_float(spec.dtype):
        return _image_role(shape, use, axis)
    if rank == 2 and is_float(spec.dtype):
        return "audio"
    return "length"


def _image_role(shape: tuple[int | str | None, ...], use: InputUse, axis: int) -> str:
    def channels(place: int) -> bool:
        size = use.pins.get(place, shape[place])
        return isinstance(size, int) and size <= 4

    last = len(shape) - 1
    if channels(last) and not channels(1):
        return "space"
    return "channel" if axis == 1 else "space"


def _sizes(found: Mapping[str, int]) -> Sizes:
    return tuple(sorted(found.items()))


def plans(dims: Dims) -> Iterator[Sizes]:
    """Yield sizes worth trying, the most likely first; those without dynamic dimensions have one plan."""
    base = {name: CANDIDATES[dims.roles[name]][0] for name in dims.names}
    base.update({f"rank of {name}": 0 for name in dims.unranked})
    seen: set[Sizes] = set()
    for found in _plans(dims, base):
        sizes = _sizes(found)
        if sizes not in seen:
            seen.add(sizes)
            yield sizes


def _plans(dims: Dims, base: dict[str, int]) -> Iterator[dict[str, int]]:
    yield base
    roles = sorted({dims.roles[name] for name in dims.names if dims.roles[name] != "batch"})
    for role in roles:
        for size in CANDIDATES[role]:
            yield {**base, **{name: size for name in dims.names if dims.roles[name] == role}}
    free = [name for name in dims.names if dims.roles[name] != "batch"]
    for name in free:
        for size in CANDIDATES[dims.roles[name]]:
            yield {**base, name: size}
    for first, second in itertools.permutations(free, 2):
        for other in (64, 320):
            for size in CANDIDATES[dims.roles[first]]:
                yield {**base, first: size, second: other}
    for role in roles:
        for size in CANDIDATES["any"]:
            yield {**base, **{name: size for name in dims.names if dims.roles[name] in (role, "batch")}}
    for size in CANDIDATES["any"]:
        yield {**base, **dict.fromkeys(dims.names, size)}
    if dims.unranked:
        for ranks in itertools.product(range(len(UNKNOWN_RANK)), repeat=min(2, len(dims.unranked))):
            padded = [*ranks, *[ranks[-1]] * (len(dims.unranked) - len(ranks))]
            yield {**base, **{f"rank of {n}": i for n, i in zip(dims.unranked, padded, strict=True)}}


def variations(dims: Dims, sizes: Sizes) -> Iterator[Sizes]:
    """Yield other sizes near those that ran: first all dimensions changed, then all but one, then one."""
    base = dict(sizes)
    names = dims.names
    if not names:
        return
    for step in range(3):
        changed = {name: _other(dims.roles[name], base[name], step + place) for place, name in enumerate(names)}
        yield _sizes({**base, **changed})
        if len(names) > 1:
            for kept in reversed(names):
                yield _sizes({**base, **changed, kept: base[kept]})
    for step, name in itertools.product(range(4), names):
        yield _sizes({**base, name: _other(dims.roles[name], base[name], step)})


def _other(role: str, size: int, step: int) -> int:
    """Return a size near `size`, of the same power-of-two divisibility where it is large."""
    if role == "batch":
        return size + 1 + step % 2
    if size >= 128 and size % 32 == 0:
        return size - 32 * (1 + step % 3)
    if size >= 32 and size % 32 == 0:
        return size + 32 * (1 + step % 3)
    if size >= 8:
        return (size + size // 2, size * 2, size + 1, size - 1)[step % 4]
    return size + 1 + step % 3
