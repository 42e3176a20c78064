"""From ties to units: which atoms go together, which of them must stay and why; where an axis merges, over which part.

    axes that are the same       -> classes (components over axes): atoms are those of a class
    ties between indices         -> components over atoms: a unit each
    a merge                      -> the fine axis is tied to one coarse axis, the others freeze

Merges that share a coarse axis decide together: the heads that queries, keys and values are cut into are the same.  The
outermost axis is taken (whole heads), unless that freezes or leaves fewer than `FEWEST` units; then the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from graphopt.analysis.channel_ties import Merge, Ties

Array: TypeAlias = np.ndarray[Any, Any]

FEWEST = 4
"""Units of a merged axis below which another part of it is tried."""

MOST_ROUNDS = 6
"""Times that merges are decided, at most."""

_NONE = np.iinfo(np.int64).max


def components(size: int, pairs: Sequence[tuple[Array, Array]]) -> Array:
    """Return for each of `size` vertices the number of its component.

    Args:
        size: number of vertices.
        pairs: edges, as arrays of their ends.
    """
    from scipy.sparse import coo_array  # noqa: PLC0415  (heavy imports only when needed)
    from scipy.sparse.csgraph import connected_components  # noqa: PLC0415

    if not pairs:
        return np.arange(size)
    heads, tails = (np.concatenate(side) for side in zip(*pairs, strict=True))
    edges = coo_array((np.ones(len(heads), np.int8), (heads, tails)), shape=(size, size))
    return np.asarray(connected_components(edges, directed=False)[1], np.int64)


@dataclass
class Units:
    """Atoms and what became of them.

    Attributes:
        of_axis: axis -> its class.
        offset: class -> its first atom; one more entry holds the number of atoms.
        unit: atom -> number of its component.
        reason: component -> index into `why`, -1 where it may go.
        why: reasons.
    """

    of_axis: Array
    offset: Array
    unit: Array
    reason: Array
    why: list[str]

    def atoms(self, kind: int) -> slice:
        """Return the atoms of a class."""
        return slice(int(self.offset[kind]), int(self.offset[kind + 1]))

    def alive(self, kind: int) -> int:
        """Return how many units that may go a class has."""
        found = np.unique(self.unit[self.atoms(kind)])
        return int((self.reason[found] < 0).sum())


@dataclass
class _Family:
    """Merges that decide together.

    Attributes:
        merges: in the graph's order.
        options: for each merge the index of the coarse axis that it takes; the preferred option first.
        scores: units that each option tried so far left.
        chosen: number of the option.
    """

    merges: list[Merge]
    options: list[list[int]] = field(default_factory=list)
    scores: list[int] = field(default_factory=list)
    chosen: int = 0


class Solver:
    """Finds the units of collected ties."""

    def __init__(self, ties: Ties) -> None:
        self.ties = ties
        pairs = np.array(ties.same, np.int64).reshape(-1, 2)
        self.of_axis = components(len(ties.axes), [(pairs[:, 0], pairs[:, 1])] if len(pairs) else [])
        sizes = np.zeros(int(self.of_axis.max(initial=-1)) + 1, np.int64)
        sizes[self.of_axis] = [axis.size for axis in ties.axes]
        self.offset = np.concatenate([[0], np.cumsum(sizes)])
        self.edges = [(self._start(a) + i, self._start(b) + j) for a, i, b, j in ties.mapped]
        self.why = [why for _, _, why in ties.frozen]
        self.reasons = np.full(int(self.offset[-1]), _NONE, np.int64)
        for number in reversed(range(len(ties.frozen))):  # the first reason stays
            axis, at, _ = ties.frozen[number]
            start = self._start(axis)
            self.reasons[slice(start, start + ties.axes[axis].size) if at is None else start + at] = number

    def _start(self, axis: int) -> int:
        return int(self.offset[self.of_axis[axis]])

    def solve(self) -> Units:
        """Return the units, all merges decided."""
        families = self._families()
        found = self._decided(families)
        for _ in range(MOST_ROUNDS):
            if not _revise(families, found, self.of_axis):
                break
            found = self._decided(families)
        return found

    def _units(self, edges: Sequence[tuple[Array, Array]] = (), rejected: Mapping[int, str] | None = None) -> Units:
        """Return the units with some more ties, and with classes left out for a reason."""
        unit = components(len(self.reasons), [*self.edges, *edges])
        atoms, why = self.reasons, self.why
        if rejected:
            atoms, why = atoms.copy(), [*self.why, *rejected.values()]
            for number, kind in enumerate(rejected, len(self.why)):
                part = atoms[self.offset[kind] : self.offset[kind + 1]]
                np.minimum(part, number, out=part)
        reason = np.full(int(unit.max(initial=-1)) + 1, _NONE, np.int64)
        stays = atoms < _NONE
        np.minimum.at(reason, unit[stays], atoms[stays])
        reason[reason == _NONE] = -1
        return Units(self.of_axis, self.offset, unit, reason, why)

    def _families(self) -> list[_Family]:
        """Return the merges that share coarse classes together, with their options."""
        merges = self.ties.merges
        if not merges:
            return []
        before = self._units()
        owners = [(number, int(self.of_axis[axis])) for number, m in enumerate(merges) for axis, _ in m.coarse]
        ends = np.array(owners, np.int64)
        kinds = len(self.offset) - 1
        linked = components(len(merges) + kinds, [(ends[:, 0], ends[:, 1] + len(merges))])[: len(merges)]
        found: dict[int, _Family] = {}
        for number, merge in zip(linked, merges, strict=True):
            found.setdefault(int(number), _Family([])).merges.append(merge)
        for family in found.values():
            self._options(family, before)
        return list(found.values())

    def _options(self, family: _Family, before: Units) -> None:
        """Find consistent choices: one for each class that may lead, the outermost first."""
        kinds = [[int(self.of_axis[axis]) for axis, _ in m.coarse] for m in family.merges]
        depth: dict[int, int] = {}
        for places in kinds:
            for at, kind in enumerate(places):
                depth[kind] = min(depth.get(kind, at), at)
        alive = {kind: before.alive(kind) for kind in depth}
        leads = sorted(depth, key=lambda kind: (alive[kind] < FEWEST, alive[kind] == 0, depth[kind]))
        for lead in leads:
            option = _follow(lead, kinds, alive)
            if option not in family.options:
                family.options.append(option)

    def _decided(self, families: Sequence[_Family]) -> Units:
        """Return the units, each family's merges made as it chose."""
        edges: list[tuple[Array, Array]] = []
        rejected: dict[int, str] = {}
        for family in families:
            for merge, chosen in zip(family.merges, family.options[family.chosen], strict=True):
                for number, (axis, at) in enumerate(merge.coarse):
                    if number != chosen:
                        rejected.setdefault(int(self.of_axis[axis]), merge.why)
                        continue
                    held = np.flatnonzero(at >= 0)
                    edges.append((self._start(merge.fine) + held, self._start(axis) + at[held]))
        return self._units(edges, rejected)


def _follow(lead: int, kinds: Sequence[Sequence[int]], alive: Mapping[int, int]) -> list[int]:
    """Return the choice of each merge when one class leads: classes beside a chosen one are not chosen elsewhere."""
    chosen, barred = {lead}, {k for places in kinds if lead in places for k in places if k != lead}
    option = []
    for places in kinds:
        taken = next((k for k in places if k in chosen), None)
        if taken is None:
            free = [k for k in places if k not in barred]
            if not free:  # all of it stays: tied to what another merge freezes
                option.append(0)
                continue
            taken = next((k for k in free if alive[k] >= FEWEST), max(free, key=lambda k: alive[k]))
            chosen.add(taken)
            barred.update(k for k in places if k != taken)
        option.append(places.index(taken))
    return option


def _revise(families: Sequence[_Family], found: Units, of_axis: Array) -> bool:
    """Note what each family's choice left, and let those that have too little try their next; tell whether any does.

    A family that has tried all goes back to the first that left enough, else to the first that left anything.
    """
    changed = False
    for family in families:
        if family.chosen == len(family.scores):  # not judged yet
            family.scores.append(_score(family, found, of_axis))
        enough = next((least for least in (FEWEST, 2) if max(family.scores) >= least), 0)
        wanted = next(i for i, score in enumerate(family.scores) if score >= enough)
        if enough < FEWEST and len(family.scores) < min(len(family.options), MOST_ROUNDS):
            wanted = len(family.scores)
        changed |= wanted != family.chosen
        family.chosen = wanted
    return changed


def _score(family: _Family, found: Units, of_axis: Array) -> int:
    """Return how many units the merged axes of a family can lose."""
    return max(found.alive(int(of_axis[m.fine])) for m in family.merges)
