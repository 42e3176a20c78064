"""What is computed or stored twice, kept once.

    a = op(x), b = op(x)                        ->  a, a         same operator, attributes and inputs
    initializers of equal type, shape, bytes    ->  one of them

A subgraph may use what its outer graphs computed before it.  Random operators, operators of other domains and
control flow are never merged.
"""

from __future__ import annotations

import functools
import hashlib
from collections import ChainMap, Counter
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import is_deterministic
from graphopt.base import Change, Context, Pass
from graphopt.edit import (
    Edit,
    drop_declared,
    label,
    names_defined,
    nested_graphs,
    replace_uses,
    subgraphs,
    turn_into,
)
from graphopt.exporter import constants_of, untouched
from graphopt.importer import decode_attribute
from graphopt.ops import COMMUTATIVE
from graphopt.registry import register
from graphopt.tensors import LazySparse, LazyTensor

_SAMPLE = 4096
"""Bytes at either end of an initializer that are compared before all of it is read."""

_INLINE = 1 << 20
"""Bytes of a tensor attribute up to which it is compared by value."""


@register
@dataclass(frozen=True)
class EliminateCommon(Pass):
    """Merge nodes that compute the same, and initializers that hold the same bytes.

    Exact, keeps the signature.  Weights are read only where another has the same type, shape and ends.
    """

    name: ClassVar[str] = "eliminate-common"
    scope: ClassVar[Literal["graph", "model"]] = "model"

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose one change per initializer and node that goes."""
        for root in (graph, *ctx.model.functions):
            run = _Run(_contents([root, *nested_graphs(root.nodes)]), _InnerNames(), _Numbers())
            yield from _equal_constants(run, root, ChainMap(), set())
            yield from _equal_nodes(run, root, ChainMap())


def _contents(graphs: Iterable[gs.Graph]) -> dict[int, Hashable]:
    """Return a key of the content of each initializer that may have an equal one."""
    own = {id(c): c for g in graphs for c in constants_of(g, set())}
    keys: dict[int, Hashable] = {i: (str(c.dtype), tuple(c.shape)) for i, c in own.items() if _has_bytes(c)}
    for read in (_ends, _digest):
        count = Counter(keys.values())
        keys = {i: (key, read(own[i])) for i, key in keys.items() if count[key] > 1}
    return keys


def _has_bytes(constant: gs.Constant) -> bool:
    return not isinstance(untouched(constant), LazySparse) and constant.dtype.kind not in "OSU"


def _ends(constant: gs.Constant) -> bytes:
    data = _bytes(constant)
    return bytes(data[:_SAMPLE]) + bytes(data[-_SAMPLE:])


def _digest(constant: gs.Constant) -> bytes:
    return hashlib.blake2b(_bytes(constant), digest_size=16).digest()


def _bytes(constant: gs.Constant) -> bytes | memoryview:
    values = untouched(constant)
    if isinstance(values, LazyTensor):
        return values.raw()
    assert isinstance(values, np.ndarray)
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


def _equal_constants(run: _Run, graph: gs.Graph, seen: ChainMap[Hashable, _Held], outer: set[int]) -> Iterator[Change]:
    """Propose to merge the initializers of a graph among each other and into those of outer graphs."""
    own = [c for c in constants_of(graph, outer) if id(c) in run.contents]
    ends = {id(t) for t in graph.outputs}
    gone: set[int] = set()
    for constant in sorted(own, key=lambda c: id(c) not in ends):
        held = seen.get(run.contents[id(constant)])
        if held is None:
            seen[run.contents[id(constant)]] = _Held(constant, graph)
        elif id(constant) not in ends and not run.names.hide(held.constant.name, held.graph):

            def apply(old: gs.Constant = constant, new: gs.Constant = held.constant) -> None:
                replace_uses(old, new)
                gone.add(id(old))

            what = f"merge initializer with '{held.constant.name}'"
            yield Change(constant.name, what, f"equal {constant.dtype}{list(constant.shape)}", apply)
    drop_declared(graph, gone)
    inside = outer | {id(c) for c in own}
    for inner in (g for n in graph.nodes for g in subgraphs(n)):
        yield from _equal_constants(run, inner, seen.new_child(), inside)


@dataclass(frozen=True)
class _Held:
    """An initializer and the graph that has it."""

    constant: gs.Constant
    graph: gs.Graph


class _InnerNames:
    """Names that the graphs inside a graph take for tensors of their own, found once per graph."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[gs.Graph, set[str]]] = {}

    def hide(self, name: str, graph: gs.Graph) -> bool:
        """Tell whether a tensor of `graph` is not surely visible inside by its name."""
        if id(graph) not in self._of:
            self._of[id(graph)] = graph, names_defined(nested_graphs(graph.nodes))
        return name in self._of[id(graph)][1]


class _Numbers:
    """Numbers of values: tensors known to be equal have the same, whichever of them stays."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[int, gs.Tensor]] = {}

    def of(self, tensor: gs.Tensor) -> int:
        """Return the number of a tensor's value."""
        return self._of.setdefault(id(tensor), (len(self._of), tensor))[0]

    def equate(self, tensor: gs.Tensor, other: gs.Tensor) -> None:
        """Give a tensor the number of another."""
        self._of[id(tensor)] = (self.of(other), tensor)


@dataclass(frozen=True)
class _Run:
    """What one run over a graph and all inside it shares.

    `contents` maps ids of initializers to a key of what they hold.
    """

    contents: dict[int, Hashable]
    names: _InnerNames
    numbers: _Numbers


def _equal_nodes(run: _Run, graph: gs.Graph, seen: ChainMap[Hashable, tuple[gs.Node, gs.Graph]]) -> Iterator[Change]:
    """Propose to merge nodes; `seen` has those whose results this graph can use, outer graphs' too."""
    with Edit(graph) as edit:
        for node in list(graph.nodes):
            for inner in subgraphs(node):
                yield from _equal_nodes(run, inner, seen.new_child())
            key = _key(node, int(graph.opset), run.numbers)
            if key is None:
                continue
            first, home = seen.get(key) or (node, graph)
            if first is node:
                seen[key] = node, graph
                continue
            named = [t for t in first.outputs if t.name]
            if home is graph or not any(run.names.hide(t.name, home) for t in named):
                yield from _merged(edit, node, first)
            for mine, theirs in zip(node.outputs, first.outputs, strict=True):
                run.numbers.equate(mine, theirs)


def _merged(edit: Edit, node: gs.Node, first: gs.Node) -> Iterator[Change]:
    """Propose to use the outputs of `first` for those of `node`."""
    pairs = [(a, b) for a, b in zip(node.outputs, first.outputs, strict=True) if a.name]
    if all(edit.why_not_bypass(a, b) is None for a, b in pairs):

        def apply() -> None:
            for a, b in pairs:
                edit.bypass(a, b)
            edit.remove(node)

        yield Change(label(node), f"merge {node.op} with '{label(first)}'", "it computes the same", apply)
    elif len(pairs) == 1 and len(node.outputs) == 1 and node.op not in ("Identity", "Constant"):

        def copy() -> None:
            turn_into(node, "Identity")
            edit.set_input(node, 0, pairs[0][1])
            edit.trim_inputs(node, 1)

        yield Change(label(node), f"{node.op} -> Identity of '{label(first)}'", "it computes the same", copy)


def _key(node: gs.Node, opset: int, numbers: _Numbers) -> Hashable | None:
    """Return what two nodes that compute the same share; None for those that are never merged."""
    if not is_deterministic(node, opset) or subgraphs(node) or not node.outputs:
        return None
    inputs = [numbers.of(t) if t.name else -1 for t in node.inputs]
    if node.op in COMMUTATIVE and len(inputs) == 2:
        inputs.sort()
    defaults = _defaults(node.op, opset)
    attrs = {name: _attribute_key(value) for name, value in node.attrs.items()}
    said = frozenset((name, key) for name, key in attrs.items() if defaults.get(name) != key)
    return node.op, said, tuple(inputs), tuple(bool(t.name) for t in node.outputs)


@functools.cache
def _defaults(op: str, opset: int) -> dict[str, Hashable]:
    """Return the default values of an operator's attributes, as keys."""
    try:
        schema = onnx.defs.get_schema(op, opset, "")
    except onnx.defs.SchemaError:
        return {}
    given = {name: a.default_value for name, a in schema.attributes.items() if a.default_value.type}
    return {name: _attribute_key(decode_attribute(value)) for name, value in given.items()}


def _attribute_key(value: Any) -> Hashable:
    if isinstance(value, int | float | str):  # most are
        return type(value).__name__, repr(value)
    if isinstance(value, gs.Constant):
        if value._values.nbytes > _INLINE or not _has_bytes(value):
            return "tensor", id(value)
        return "tensor", str(value.dtype), tuple(value.shape), _digest(value)
    if isinstance(value, onnx.AttributeProto):
        return "proto", value.SerializeToString(deterministic=True)
    if isinstance(value, gs.Node.AttributeRef):
        return "reference", value.name
    if isinstance(value, list | tuple):
        return tuple(_attribute_key(v) for v in value)
    return type(value).__name__, repr(value)
