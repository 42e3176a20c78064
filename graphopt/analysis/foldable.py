"""Which nodes depend on constants alone, in groups, and what folding each group does to the file's size."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from graphopt.analysis.constants import is_deterministic, node_values, refers
from graphopt.analysis.shapes import TensorType
from graphopt.exporter import untouched
from graphopt.importer import origin
from graphopt.ops import DECODES, KEEP_UNFOLDED, NOT_LARGER, is_standard
from graphopt.tensors import LazySparse

_OVERHEAD = 24
"""Bytes that an initializer takes in the file beside its name and values, about."""

_STRING = 64
"""Bytes that are assumed for a string not yet computed."""

MOST_GROUPS = 2048
"""Groups that are computed in one session at most."""

Refused = tuple[gs.Node, str]


def find(graph: gs.Graph, skip: Container[int]) -> list[gs.Node]:
    """Return the nodes of a graph that depend on constants alone, in order; none whose id is in `skip`."""
    found: list[gs.Node] = []
    made: set[int] = set()
    for node in graph.nodes:
        if id(node) in skip or not _may_fold(node, int(graph.opset)):
            continue
        if all(t.is_empty() or id(t) in made or _is_dense(t) for t in node.inputs):
            found.append(node)
            made.update(id(t) for t in node.outputs if t.name)
    return found


def _may_fold(node: gs.Node, opset: int) -> bool:
    if is_standard(node, "Constant"):
        values = node_values(node)
        return values is not None and not isinstance(values, LazySparse)
    if not is_deterministic(node, opset) or node.op in KEEP_UNFOLDED or refers(node):
        return False
    held = origin(node)
    if held is not None and DECODES in held.metadata:
        return False
    return bool(node.inputs) and not any(isinstance(a, gs.Graph) for a in node.attrs.values())


def _is_dense(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) and not isinstance(untouched(tensor), LazySparse)


@dataclass(frozen=True)
class Sizes:
    """Bytes of what nodes make, where that is known before they run.

    Attributes:
        bytes: tensor id -> bytes (an upper bound for results whose size depends on values).
        nodes: the nodes of which everything is known, in order.
        refused: those of which it is not, or too much, with the reason.
    """

    bytes: dict[int, int]
    nodes: list[gs.Node]
    refused: list[Refused]


def measure(nodes: Iterable[gs.Node], types: Mapping[str, TensorType], largest: int) -> Sizes:
    """Find the sizes of what `nodes` make; those that depend on a refused one are left out."""
    found = Sizes({}, [], [])
    made = {id(t) for n in nodes for t in n.outputs if t.name}
    for node in nodes:
        if any(id(t) in made and id(t) not in found.bytes for t in node.inputs):
            continue
        sizes = {id(t): _size(node, t, types) for t in node.outputs if t.name}
        known = {key: size for key, size in sizes.items() if size is not None}
        if len(known) < len(sizes):
            found.refused.append((node, "the size of its output is not known before it runs"))
        elif max(known.values(), default=0) > largest:
            found.refused.append((node, f"its output would take {max(known.values())} bytes"))
        else:
            found.bytes.update(known)
            found.nodes.append(node)
    return found


def _size(node: gs.Node, tensor: gs.Tensor, types: Mapping[str, TensorType]) -> int | None:
    own = types.get(tensor.name, TensorType(None, None))
    if own.dtype is None:
        return None
    item = _STRING if own.dtype.kind in "OSU" else own.dtype.itemsize
    if own.static is not None:
        return math.prod(own.static) * item
    if node.op not in NOT_LARGER:
        return None
    shapes = [_static(t, types) for t in node.inputs if t.name]
    if any(s is None for s in shapes):
        return None
    return sum(math.prod(s) * max(len(s), 1) * max(item, 8) for s in shapes if s is not None)


def _static(tensor: gs.Tensor, types: Mapping[str, TensorType]) -> tuple[int, ...] | None:
    if isinstance(tensor, gs.Constant):
        return tuple(tensor.shape)
    return types.get(tensor.name, TensorType(None, None)).static


@dataclass(frozen=True)
class Group:
    """Nodes that fold together.

    Attributes:
        nodes: in order.
        results: the tensors that become constant: outputs that others read, or that the graph returns.
        growth: bytes that the file grows by (negative: shrinks).
        work: bytes of constants read and results made on the way.
    """

    nodes: list[gs.Node]
    results: list[gs.Tensor]
    growth: int
    work: int


def group(nodes: Sequence[gs.Node], sizes: Mapping[int, int], ends: Container[int]) -> Group:
    """Return nodes as one group; `ends` holds the ids of tensors that some graph returns."""
    inside = {id(n) for n in nodes}
    results, stays = [], set()
    for node in nodes:
        for tensor in node.outputs:
            if tensor.name and (id(tensor) in ends or any(id(c) not in inside for c in tensor.outputs)):
                if is_standard(node, "Constant"):
                    stays.add(id(node))
                else:
                    results.append(tensor)
    sources = {id(t): t for n in nodes for t in n.inputs if isinstance(t, gs.Constant)}
    freed = [t for t in sources.values() if id(t) not in ends and all(id(c) in inside for c in t.outputs)]
    growth = sum(sizes[id(t)] + _OVERHEAD + len(t.name) for t in results)
    growth -= sum(int(t._values.nbytes) + len(t.name) for t in freed)
    growth -= sum(_node_bytes(n) for n in nodes if id(n) not in stays)
    work = sum(sizes.get(id(t), 0) for n in nodes for t in n.outputs)
    return Group(list(nodes), results, growth, work + sum(int(t._values.nbytes) for t in sources.values()))


def _node_bytes(node: gs.Node) -> int:
    """Return about how many bytes a node takes in the file, rather too few."""
    names = [node.op, node.name, *(t.name for t in node.inputs), *(t.name for t in node.outputs)]
    held = node_values(node) if is_standard(node, "Constant") else None
    return sum(len(name) + 2 for name in names) + (int(held.nbytes) if held is not None else 0)


def connected(nodes: Sequence[gs.Node]) -> list[list[gs.Node]]:
    """Split nodes into those connected through what they make, each part in order."""
    index = {id(n): i for i, n in enumerate(nodes)}
    parent = list(range(len(nodes)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, node in enumerate(nodes):
        for tensor in node.inputs:
            for producer in tensor.inputs:
                if id(producer) in index:
                    parent[root(i)] = root(index[id(producer)])
    parts: dict[int, list[gs.Node]] = {}
    for i, node in enumerate(nodes):
        parts.setdefault(root(i), []).append(node)
    return list(parts.values())


def shrink(
    whole: Group, room: float, sizes: Mapping[int, int], ends: Container[int]
) -> tuple[Group | None, list[Refused]]:
    """Leave out of a group that grows too much the nodes that make the most of the least, until it fits."""
    left = whole
    refused: list[Refused] = []
    while left.results and left.growth > max(room, 0):
        gains = {id(n): _gain(n, sizes) for n in left.nodes}
        most = max(gains.values())
        if most <= 0:
            return None, [*refused, (left.nodes[-1], _too_much(whole.growth, room))]
        dropped = {i for i, gain in gains.items() if gain > most / 2}
        refused += [(n, _too_much(gains[id(n)], room)) for n in left.nodes if id(n) in dropped]
        left = group(_without(left.nodes, dropped), sizes, ends)
    return (left if left.results else None), refused


def _too_much(growth: float, room: float) -> str:
    return f"the file would grow by {int(growth)} bytes, {int(max(room, 0))} are left of what it may"


def _gain(node: gs.Node, sizes: Mapping[int, int]) -> int:
    """Return how many more bytes a node makes than it reads."""
    read = {id(t): t for t in node.inputs}.values()
    taken = sum(int(t._values.nbytes) if isinstance(t, gs.Constant) else sizes.get(id(t), 0) for t in read)
    return sum(sizes.get(id(t), 0) for t in node.outputs) - taken


def _without(nodes: Sequence[gs.Node], dropped: Container[int]) -> list[gs.Node]:
    """Return the nodes that are neither dropped nor read from one that is."""
    kept: list[gs.Node] = []
    lost: set[int] = set()
    for node in nodes:
        if id(node) in dropped or any(id(t) in lost for t in node.inputs):
            lost.update(id(t) for t in node.outputs if t.name)
        else:
            kept.append(node)
    return kept


def batches(groups: Iterable[Group], limit: int) -> list[list[Group]]:
    """Split groups, in order, into lists of at most `limit` bytes of work (one larger group stands alone).

    A list has at most `MOST_GROUPS`: the time that ORT takes to make a session grows with the square of its outputs.
    """
    found: list[list[Group]] = []
    held = limit
    for item in groups:
        if not found or held + item.work > limit or len(found[-1]) == MOST_GROUPS:
            found.append([])
            held = 0
        found[-1].append(item)
        held += item.work
    return found
