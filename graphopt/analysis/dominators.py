"""Which tensors of a graph all ways to another tensor lead through, and which tensors serve one place alone.

    x dominates t            every way from the graph's inputs and constants of unknown value to t leads through x
    t serves a place alone   every way from t to the graph's outputs leads through that place (an input of a node)

Both are dominator trees (forwards and backwards) of the graph whose vertices are computed tensors; a node with
subgraphs reads what they read.  Source: K. Cooper, T. Harvey, K. Kennedy, "A Simple, Fast Dominance Algorithm" (2001),
as networkx has it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TypeAlias

import networkx as nx
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import is_constant
from graphopt.edit import nested_graphs

Place: TypeAlias = tuple[int, int]
"""(id of a node, index of one of its inputs)."""

_ROOT = "root"


def dynamic_inputs(node: gs.Node) -> list[gs.Tensor]:
    """Return the tensors that a node reads and that are no constants, those read in its subgraphs from outside too."""
    inner = list(nested_graphs([node]))
    made = {id(t) for g in inner for n in g.nodes for t in n.outputs} | {id(t) for g in inner for t in g.inputs}
    read = [
        *node.inputs,
        *(t for g in inner for n in g.nodes for t in n.inputs),
        *(t for g in inner for t in g.outputs),
    ]
    found = {id(t): t for t in read if t.name and not is_constant(t) and id(t) not in made}
    return list(found.values())


class Dominators:
    """Dominance among the tensors of one graph.

    Args:
        graph: the graph, its nodes in an order that they can run in.
        places: inputs of nodes that `serving` will be asked about; no other input of these nodes reads the same tensor.
    """

    def __init__(self, graph: gs.Graph, places: Iterable[tuple[gs.Node, int]]) -> None:
        self.reads = {id(node): dynamic_inputs(node) for node in graph.nodes}
        self._nodes = list(graph.nodes)
        self._makers: dict[Hashable, int] = {id(t): k for k, n in enumerate(self._nodes) for t in n.outputs if t.name}
        forward = nx.DiGraph()
        forward.add_node(_ROOT)
        for node in graph.nodes:
            sources: list[Hashable] = [id(t) for t in self.reads[id(node)]] or [_ROOT]
            forward.add_edges_from((source, id(t)) for t in node.outputs if t.name for source in sources)
        forward.add_edges_from([(_ROOT, v) for v in list(forward) if v != _ROOT and not forward.in_degree(v)])
        self._before = _Tree(forward)
        self._after = _Tree(self._backward(graph, {(id(n), i): id(n.inputs[i]) for n, i in places}))

    def _backward(self, graph: gs.Graph, places: dict[Place, int]) -> nx.DiGraph:
        """Return the graph from the outputs to what they are made of; each place is a vertex between."""
        found = nx.DiGraph()
        found.add_edges_from((_ROOT, id(t)) for t in graph.outputs)
        own = {(node, tensor): (node, index) for (node, index), tensor in places.items()}
        for node in graph.nodes:
            for made in (id(t) for t in node.outputs if t.name):
                for read in self.reads[id(node)]:
                    place = own.get((id(node), id(read)))
                    if place is None:
                        found.add_edge(made, id(read))
                    else:
                        found.add_edges_from([(made, place), (place, id(read))])
        return found

    def dominates(self, first: gs.Tensor, second: gs.Tensor) -> bool:
        """Tell whether every way to `second` leads through `first` (or both are the same)."""
        return self._before.is_above(id(first), id(second))

    def serving(self, node: gs.Node, index: int) -> list[gs.Node]:
        """Return the nodes that serve an input of a node alone, in graph order: without it, they are dead."""
        alone = self._after.below((id(node), index))
        served = [self._nodes[k] for k in sorted({self._makers[t] for t in alone if t in self._makers})]
        return [n for n in served if all(id(t) in alone or not self._after.knows(id(t)) for t in n.outputs)]


class _Tree:
    """A dominator tree, with the span of each vertex in a walk through it."""

    def __init__(self, graph: nx.DiGraph) -> None:
        above = nx.immediate_dominators(graph, _ROOT)
        children: dict[Hashable, list[Hashable]] = {}
        for vertex, parent in above.items():
            if vertex != _ROOT and parent is not None:
                children.setdefault(parent, []).append(vertex)
        self._order: list[Hashable] = []
        self._begin: dict[Hashable, int] = {}
        self._end: dict[Hashable, int] = {}
        stack: list[tuple[Hashable, bool]] = [(_ROOT, False)]
        while stack:
            vertex, left = stack.pop()
            if left:
                self._end[vertex] = len(self._order)
                continue
            self._begin[vertex] = len(self._order)
            self._order.append(vertex)
            stack.append((vertex, True))
            stack.extend((child, False) for child in children.get(vertex, ()))

    def knows(self, vertex: Hashable) -> bool:
        """Tell whether a vertex can be reached from the root at all."""
        return vertex in self._begin

    def is_above(self, upper: Hashable, lower: Hashable) -> bool:
        """Tell whether `upper` dominates `lower`."""
        if upper not in self._begin or lower not in self._begin:
            return upper == lower
        return self._begin[upper] <= self._begin[lower] < self._end[upper]

    def below(self, vertex: Hashable) -> set[Hashable]:
        """Return what a vertex dominates, without itself."""
        if vertex not in self._begin:
            return set()
        return set(self._order[self._begin[vertex] + 1 : self._end[vertex]])
