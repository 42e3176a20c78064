"""Where Transposes are best put: operators that can compute on permuted tensors, and the cheapest cut between them.

Each operator of a region works on tensors as they are (0) or permuted (1).  A tensor that is made in one way and
read in the other costs a Transpose.  Transposes that are there already make the other way free: the output of one
is its input, permuted back.  What cannot move works as it is.  The cheapest assignment is a minimum cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_graphsurgeon as gs

from graphopt.analysis.constants import is_constant
from graphopt.analysis.min_cut import Network, sink_side
from graphopt.base import Context
from graphopt.edit import Edit
from graphopt.ops import is_standard

from .transpose_flow import Flow, Perm, Port, Site, flow, inverse, is_identity

_CALL = 16
"""What running any Transpose costs, in units of 64 bytes moved."""

_DYNAMIC = 32
"""Size that a dynamic axis is taken to have."""

_MOST = 1 << 22
"""Largest cost of one tensor."""


def perm_of(node: gs.Node) -> Perm | None:
    """Return the stated permutation of a Transpose."""
    found = node.attrs.get("perm")
    return tuple(int(a) for a in found) if isinstance(found, list | tuple) else None


@dataclass
class Region:
    """Tensors that may be permuted, and the operators between them.

    Attributes:
        perms: permutation of each tensor, by id.
        tensors: the tensors, by id.
        flows: how each operator computes when its tensors are permuted, by id.
        nodes: those operators, by id.
        sources, sinks: Transposes that undo, or do, the permutation of a tensor, by id.
        stuck: an operator that cannot move, for the report.
    """

    perms: dict[int, Perm] = field(default_factory=dict)
    tensors: dict[int, gs.Tensor] = field(default_factory=dict)
    flows: dict[int, Flow] = field(default_factory=dict)
    nodes: dict[int, gs.Node] = field(default_factory=dict)
    sources: dict[int, gs.Node] = field(default_factory=dict)
    sinks: dict[int, gs.Node] = field(default_factory=dict)
    stuck: gs.Node | None = None

    @property
    def transposes(self) -> list[gs.Node]:
        """The Transposes at its borders."""
        return [*self.sources.values(), *self.sinks.values()]


def grow(edit: Edit, ctx: Context, seed: gs.Tensor, perm: Perm, touched: set[int]) -> Region | None:
    """Return the region of all that can be permuted together with a tensor.

    None where it meets operators (by id) that were touched already: regions that changed grow, and are looked at
    again when all others have been.
    """
    region, waiting, fixed = Region(), [seed], set[int]()
    region.perms[id(seed)], region.tensors[id(seed)] = perm, seed
    while waiting:
        tensor = waiting.pop()
        held = region.perms[id(tensor)]
        if is_identity(held):
            continue
        for node, port in _ports(edit, tensor):
            if id(node) in touched:
                return None
            if id(node) in fixed or id(node) in region.nodes or _is_border(region, node, port, held):
                continue
            made = _absorbed(node, port, held) or flow(Site(node, edit, ctx), port, held)
            if made is None or not _fits(region, node, made, ctx):
                fixed.add(id(node))
                region.stuck = region.stuck or node
                continue
            region.nodes[id(node)], region.flows[id(node)] = node, made
            for other, wanted in _tensors(node, made):
                if id(other) not in region.perms:
                    region.perms[id(other)], region.tensors[id(other)] = wanted, other
                    waiting.append(other)
    return region


def _ports(edit: Edit, tensor: gs.Tensor) -> Iterator[tuple[gs.Node, Port]]:
    """Yield the operators of this graph that make or read a tensor, and where."""
    for node in (*tensor.inputs, *edit.consumers(tensor)):
        if edit.is_local(node) and not edit.removed(node):
            yield from ((node, ("out", i)) for i, t in enumerate(node.outputs) if t is tensor)
            yield from ((node, ("in", i)) for i, t in enumerate(node.inputs) if t is tensor)


def _is_border(region: Region, node: gs.Node, port: Port, perm: Perm) -> bool:
    """Take down a Transpose that does or undoes the permutation: one that swaps two tensors of the region, once."""
    found = perm_of(node) if is_standard(node, "Transpose") else None
    if found is None:
        return False
    if id(node) in region.sources or id(node) in region.sinks:
        return True
    if port[0] == "in" and found == perm:
        region.sinks[id(node)] = node
    elif port[0] == "out" and found == inverse(perm):
        region.sources[id(node)] = node
    else:
        return False
    return True


def _absorbed(node: gs.Node, port: Port, perm: Perm) -> Flow | None:
    """Return how a Transpose of another permutation takes one on at one end, whatever is at the other."""
    found = perm_of(node) if is_standard(node, "Transpose") else None
    if found is None:
        return None
    if port[0] == "in":
        return Flow({0: perm}, {}, {"perm": [perm.index(a) for a in found]})
    return Flow({}, {0: perm}, {"perm": [found[a] for a in perm]})


def _tensors(node: gs.Node, made: Flow) -> Iterator[tuple[gs.Tensor, Perm]]:
    for i, perm in made.inputs.items():
        yield node.inputs[i], perm
    for i, perm in made.outputs.items():
        if node.outputs[i].name:
            yield node.outputs[i], perm


def _fits(region: Region, node: gs.Node, made: Flow, ctx: Context) -> bool:
    """Tell whether a flow agrees with what is known of its tensors."""
    for tensor, perm in _tensors(node, made):
        if region.perms.get(id(tensor), perm) != perm or is_constant(tensor):
            return False
        if ctx.shapes.proved(tensor).rank != len(perm):
            return False
    return True


@dataclass
class Cut:
    """The assignment of a region.

    Attributes:
        moved: operators that work on permuted tensors, by id.
        before: what the Transposes cost now, in units of 64 bytes moved.
        after: what they cost then.
        count_before, count_after: how many there are.
    """

    moved: set[int]
    before: int
    after: int
    count_before: int
    count_after: int

    @property
    def pays(self) -> bool:
        """Whether it costs less; more Transposes than before must move half as much, or less."""
        fewer = self.count_after <= self.count_before
        return self.after < self.before and (fewer or 2 * self.after <= self.before)


def cost(region: Region, tensor: gs.Tensor, ctx: Context) -> int:
    """Return what transposing a tensor of the region costs."""
    perm, known = region.perms[id(tensor)], ctx.shapes.proved(tensor)
    if is_identity(perm):
        return 0
    shape = known.shape or (None,) * len(perm)
    moving = [a for a in perm if shape[a] != 1]
    if moving == sorted(moving):
        return 1  # a Reshape
    elements = math.prod(d if isinstance(d, int) else _DYNAMIC for d in shape)
    return _CALL + min(elements * (known.dtype.itemsize if known.dtype is not None else 4) // 64, _MOST)


def ends(edit: Edit, region: Region, tensor: gs.Tensor) -> tuple[int | None, list[int | None], bool]:
    """Return who makes a tensor and who reads it: ids of operators of the region, None for what cannot move.

    The last value tells whether a Transpose wants it permuted.
    """
    producer = tensor.inputs[0] if tensor.inputs else None
    maker = id(producer) if producer is not None and _makes_moved(region, producer, tensor) else None
    readers: list[int | None] = [None] if edit.is_output(tensor) else []
    wanted = False
    for node in edit.consumers(tensor):
        if id(node) in region.sinks:
            wanted = True
            continue
        moving = region.flows[id(node)].inputs if id(node) in region.nodes else {}
        readers += {id(node) if i in moving else None for i, t in enumerate(node.inputs) if t is tensor} or {None}
    return maker, readers, wanted


def _makes_moved(region: Region, node: gs.Node, tensor: gs.Tensor) -> bool:
    made = region.flows.get(id(node))
    return made is not None and any(node.outputs[i] is tensor for i in made.outputs)


def is_source(region: Region, tensor: gs.Tensor) -> bool:
    """Tell whether a tensor comes of a Transpose that undoes its permutation."""
    return bool(tensor.inputs) and id(tensor.inputs[0]) in region.sources


def cheapest(edit: Edit, ctx: Context, region: Region) -> Cut:
    """Return the assignment of least cost; of several the one that moves least."""
    moved = _minimum_cut(edit, ctx, region)
    before, count_before = _evaluate(edit, ctx, region, set())
    after, count_after = _evaluate(edit, ctx, region, moved)
    return Cut(moved, before, after, count_before, count_after)


def crosses(edit: Edit, region: Region, tensor: gs.Tensor, moved: set[int]) -> bool:
    """Tell whether a tensor is made in one way and read in the other."""
    maker, readers, wanted = ends(edit, region, tensor)
    made = maker in moved or is_source(region, tensor)
    return (wanted and not made) or any((r in moved) != made for r in readers)


def _evaluate(edit: Edit, ctx: Context, region: Region, moved: set[int]) -> tuple[int, int]:
    costs = [cost(region, t, ctx) for t in region.tensors.values() if crosses(edit, region, t, moved)]
    return sum(costs), sum(c > 0 for c in costs)


def _minimum_cut(edit: Edit, ctx: Context, region: Region) -> set[int]:
    """Return the operators on the permuted side of a minimum cut.

    Node 0 is the side of tensors as they are, node 1 the permuted one.  A tensor made by u and read by several
    has a node of its own for each direction, so that it is paid for once.
    """
    index = {key: i for i, key in enumerate(region.nodes, 2)}
    network = Network(len(index) + 2)
    for tensor in region.tensors.values():
        price = cost(region, tensor, ctx)
        if not price:
            continue
        maker, readers, wanted = ends(edit, region, tensor)
        made = 1 if is_source(region, tensor) else 0 if maker is None else index[maker]
        read = {0 if r is None else index[r] for r in readers} | ({1} if wanted else set())
        network.tensor(made, read, price)
    reached = sink_side(network.edges, 0, 1)
    return {key for key, i in index.items() if i in reached}
