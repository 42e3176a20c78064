"""Data movement without rules: the operator runs on a tensor of indices, and the map of every axis is read off.

    out = op(arange)          each output element says which input element it was: (in axes) of (out axes)
    in axis = g(out axis)     and the other way round: the two are one axis
    in axis = g(out axis)     only: the output's axis is finer (a merge, a repetition, channels into space)
    out axis = h(in axis)     only: the input's axis is finer (a split into heads)
    an output axis on which no input axis depends is a repetition; an index taken by itself, or an input put under one
    index, stays; an axis without any of these stays too

Axes that an operator leaves alone get a small stand-in size; so do unknown sizes.  All nodes are tried in one run.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.channel_place import Place, apply_rule
from graphopt.analysis.channel_ties import ONE
from graphopt.analysis.region import Evaluate, extract
from graphopt.errors import GraphoptError

Array: TypeAlias = np.ndarray[Any, Any]

LARGEST = 1 << 22
"""Elements of an index tensor beyond which nothing is tried (float32 counts exactly up to 4 times as many)."""

_BATCH = 1 << 25
"""Elements that are tried in one run."""

_OPSET = 17


@dataclass(frozen=True)
class Trial:
    """One run of an operator on index tensors.

    Attributes:
        op: operator, as of opset 17.
        attrs: its attributes.
        shapes: of the index tensors.
        parameters: constant inputs behind them.
        outputs: how many there are.
    """

    op: str
    shapes: tuple[tuple[int, ...], ...]
    attrs: tuple[tuple[str, Any], ...] = ()
    parameters: tuple[tuple[int, ...] | int, ...] = ()
    outputs: int = 1

    @property
    def size(self) -> int:
        """Elements of all index tensors."""
        return sum(math.prod(shape) for shape in self.shapes)


@dataclass(frozen=True)
class Relation:
    """How an axis of an input and one of an output hang together.

    Attributes:
        read, at: input and its axis.
        made, to: output and its axis.
        back: for each index of the output's axis that of the input's, -1 where none; None where not a function.
        forth: for each index of the input's axis that of the output's.
    """

    read: int
    at: int
    made: int
    to: int
    back: Array | None
    forth: Array | None

    def is_same(self) -> bool:
        """Tell whether equal indices go together."""
        return (
            self.back is not None and self.forth is not None and np.array_equal(self.back, np.arange(len(self.forth)))
        )


@dataclass
class Map:
    """What is read off one trial.

    Attributes:
        relations: of axes.
        taken: (input, axis, index): taken out by itself.
        stacked: (output, axis, index): holds a whole input.
        repeated: (output, axis): depends on nothing.
    """

    relations: list[Relation] = field(default_factory=list)
    taken: list[tuple[int, int, int]] = field(default_factory=list)
    stacked: list[tuple[int, int, int]] = field(default_factory=list)
    repeated: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Part:
    """A trial and the axes of the node that it stands for.

    Attributes:
        trial: what is run.
        reads: for each index tensor the node's axes, -1 for none.
        makes: for each output the same.
        exact: whether sizes are the node's own; else only axes that stay the same can be told.
    """

    trial: Trial
    reads: list[list[int]]
    makes: list[list[int]]
    exact_reads: frozenset[int] | None = None
    exact_makes: frozenset[int] | None = None
    found: Map = field(default_factory=Map)


@dataclass
class Move:
    """What is known of a node that moves data.

    Attributes:
        same: (input, axis, output, axis) that are one axis.
        parts: what had to be tried.
        ports: inputs that hold data; None: all.
        why: reason for what is left.
    """

    same: list[tuple[int, int, int, int]] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    ports: int | None = 1
    why: str = "moves it in a way that cuts cannot follow"

    def apply(self, place: Place) -> None:
        """Say it in terms of ties."""
        apply_rule(place, self._rule, self.why)

    def _rule(self, place: Place) -> None:
        ports = len(place.node.inputs) if self.ports is None else self.ports
        reads = [place.into(port) or [] for port in range(ports)]
        makes = [place.out(port) or [] for port in range(len(place.node.outputs))]
        for read, at, made, to in self.same:
            place.ties.tie(reads[read][at], makes[made][to], f"{place.name} has two sizes along it", part=True)
        for part in self.parts:
            _tie_part(place, part, reads, makes)
        for port in range(ports, len(place.node.inputs)):
            for axis in (place.into(port) or ()) if place.has(port) else ():
                place.ties.touched.add(axis)


def _tie_part(place: Place, part: Part, reads: Sequence[Sequence[int]], makes: Sequence[Sequence[int]]) -> None:
    """Tie the axes that a trial stands for."""
    ties = place.ties

    def read(i: int, at: int) -> int:
        axis = part.reads[i][at]
        return ONE if axis < 0 else reads[i][axis]

    def made(o: int, to: int) -> int:
        axis = part.makes[o][to]
        return ONE if axis < 0 else makes[o][axis]

    for o, to in part.found.repeated:
        ties.touched.add(made(o, to))
    for i, at, index in part.found.taken:
        ties.freeze(read(i, at), f"{place.name} takes an index of it by itself", np.array([index]))
    for o, to, index in part.found.stacked:
        ties.freeze(made(o, to), f"{place.name} puts a whole tensor under one index", np.array([index]))
    for fine, coarse in _merged(part.found.relations):
        first = fine[0]
        exact = all(_exact(part, r) for r in fine)
        if len(fine) == 1 and first.is_same() and (exact or not _exact_any(part, first)):
            why, view = f"{place.name} has two sizes along it", part.exact_reads is None
            ties.tie(read(first.read, first.at), made(first.made, first.to), why, part=view)
        elif not exact:
            continue
        elif coarse == "out":
            pairs = [(made(r.made, r.to), _defined(r.forth)) for r in fine]
            ties.merge(read(first.read, first.at), pairs, f"{place.name} splits it")
        else:
            pairs = [(read(r.read, r.at), _defined(r.back)) for r in fine]
            ties.merge(made(first.made, first.to), pairs, f"{place.name} merges it")


def _defined(found: Array | None) -> Array:
    assert found is not None  # by how it was chosen
    return found


def _exact(part: Part, r: Relation) -> bool:
    read = part.exact_reads is None or part.reads[r.read][r.at] in part.exact_reads
    return read and (part.exact_makes is None or part.makes[r.made][r.to] in part.exact_makes)


def _exact_any(part: Part, r: Relation) -> bool:
    read = part.exact_reads is None or part.reads[r.read][r.at] in part.exact_reads
    return read or part.exact_makes is None or part.makes[r.made][r.to] in part.exact_makes


def _merged(relations: Iterable[Relation]) -> list[tuple[list[Relation], str]]:
    """Return relations by their finer axis, with the side of the coarse ones; what is coarse twice is left out."""
    fine: dict[tuple[str, int, int, int], list[Relation]] = {}
    uses: Counter[tuple[str, int, int, int]] = Counter()
    for r in relations:
        ends = [("in", r.read, r.at, r.made), ("out", r.made, r.to, r.read)]
        key, other = ends if r.forth is not None else ends[::-1]
        fine.setdefault(key, []).append(r)
        uses[other] += 1
    found = []
    for key, rows in fine.items():
        if key[0] == "in":
            others = [("out", r.made, r.to, r.read) for r in rows]
        else:
            others = [("in", r.read, r.at, r.made) for r in rows]
        if not uses[key] and all(uses[other] == 1 and other not in fine for other in others):
            found.append((rows, "out" if key[0] == "in" else "in"))
    return found


def run(trials: set[Trial], evaluate: Evaluate) -> dict[Trial, Map]:
    """Run trials, many at once."""
    found: dict[Trial, Map] = {}
    waiting: list[Trial] = []
    ordered = sorted(trials, key=lambda t: (t.size, str(t)))
    for trial in ordered:
        if waiting and sum(t.size for t in waiting) + trial.size > _BATCH:
            found.update(_run_batch(waiting, evaluate))
            waiting = []
        waiting.append(trial)
    if waiting:
        found.update(_run_batch(waiting, evaluate))
    return found


def _run_batch(trials: Sequence[Trial], evaluate: Evaluate) -> dict[Trial, Map]:
    """Run trials; where they fail together, each half by itself."""
    nodes = [_node(number, trial) for number, trial in enumerate(trials)]
    tensors = [t for node in nodes for t in node.outputs]
    try:
        values = extract(nodes, _OPSET).evaluate(tensors, evaluate)
    except GraphoptError:
        if len(trials) == 1:
            return {}
        middle = len(trials) // 2
        return {**_run_batch(trials[:middle], evaluate), **_run_batch(trials[middle:], evaluate)}
    return {
        trial: read_map(trial.shapes, [np.asarray(values[t.name]) for t in node.outputs])
        for trial, node in zip(trials, nodes, strict=True)
    }


def _node(number: int, trial: Trial) -> gs.Node:
    """Return the node of a trial: element i of all index tensors holds i + 1, so that 0 is what it adds by itself."""
    inputs: list[gs.Tensor] = []
    first = 1
    for i, shape in enumerate(trial.shapes):
        values = np.arange(first, first + math.prod(shape), dtype=np.float32).reshape(shape)
        first += values.size
        inputs.append(gs.Constant(f"t{number}.{i}", values))
    for i, parameter_values in enumerate(trial.parameters):
        inputs.append(gs.Constant(f"t{number}.p{i}", np.array(parameter_values, np.int64)))
    outputs = [gs.Variable(f"t{number}.y{i}") for i in range(trial.outputs)]
    return gs.Node(trial.op, f"t{number}", dict(trial.attrs), inputs, outputs)


def read_map(shapes: Sequence[tuple[int, ...]], outputs: Sequence[Array]) -> Map:
    """Return how axes hang together.

    Args:
        shapes: of the index tensors, which count on from one to the next, from 1.
        outputs: what the operator made of them; 0 where an element came from nowhere.
    """
    found = Map()
    for made, values in enumerate(outputs):
        index = values.astype(np.int64).reshape(values.shape) - 1
        varies: set[int] = set()
        first = 0
        for read, shape in enumerate(shapes):
            size = math.prod(shape)
            mine = (index >= first) & (index < first + size)
            if mine.any():
                places = np.nonzero(mine) if mine.ndim else ()
                sources = np.unravel_index(index[mine] - first, shape)
                varies |= _read_pair(found, read, made, shape, values.shape, sources, places)
            first += size
        whole = bool((index >= 0).all())
        found.repeated += [(made, to) for to, n in enumerate(values.shape) if n > 1 and to not in varies and whole]
    return found


def _read_pair(
    found: Map, read: int, made: int, shape: tuple[int, ...], out: tuple[int, ...], sources: Sequence[Array],
    places: Sequence[Array],
) -> set[int]:  # fmt: skip
    """Add what ties one input to one output; return the output axes on which anything depends."""
    varies: set[int] = set()
    constant = {to for to, n in enumerate(out) if n > 1 and _alone(places[to])}
    for to in constant:
        found.stacked.append((made, to, int(places[to][0])))
        varies.add(to)
    for to, n in enumerate(out):
        if n > 1 and to not in constant and _matters(sources, places, to, out):
            varies.add(to)
    for at, n in enumerate(shape):
        if n == 1:
            continue
        if _alone(sources[at]):
            found.taken.append((read, at, int(sources[at][0])))
            continue
        for to, m in enumerate(out):
            if m > 1 and to not in constant:
                back, forth = _function(places[to], sources[at], m), _function(sources[at], places[to], n)
                if back is not None or forth is not None:
                    found.relations.append(Relation(read, at, made, to, back, forth))
    return varies


def _alone(values: Array) -> bool:
    """Tell whether all values are one."""
    return bool((values == values[0]).all())


def _matters(sources: Sequence[Array], places: Sequence[Array], to: int, out: tuple[int, ...]) -> bool:
    """Tell whether the source depends on one axis of the output."""
    rest = np.ravel_multi_index([p for i, p in enumerate(places) if i != to] or [np.zeros_like(places[to])],
                                [n for i, n in enumerate(out) if i != to] or [1])  # fmt: skip
    return any(_function(rest, source, int(rest.max()) + 1) is None for source in sources)


def _function(x: Array, y: Array, size: int) -> Array | None:
    """Return y for each x in range(size), -1 where there is none; None where it is no function."""
    low, high = np.full(size, np.iinfo(np.int64).max), np.full(size, -1, np.int64)
    np.minimum.at(low, x, y)
    np.maximum.at(high, x, y)
    return high if bool(((low == high) | (high < 0)).all()) else None
