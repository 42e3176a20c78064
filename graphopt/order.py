"""Topological order of a graph's nodes: iterative, stable, near linear."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import onnx_graphsurgeon as gs

from graphopt.errors import ModelError


def used_tensors(node: gs.Node) -> Iterator[gs.Tensor]:
    """Yield what a node reads: its inputs, and what its subgraphs read from outside or inside them."""
    stack = [node]
    while stack:
        current = stack.pop()
        yield from current.inputs
        for attribute in current.attrs.values():
            if isinstance(attribute, gs.Graph):
                stack.extend(attribute.nodes)
                yield from attribute.outputs


def sort_nodes(graph: gs.Graph) -> bool:
    """Put every node after those it reads from, keeping file order where there is a choice.

    Kahn's algorithm with a heap over file positions.  Returns whether anything moved.

    Raises:
        ModelError: the graph has a cycle.
    """
    producer = {id(t): i for i, node in enumerate(graph.nodes) for t in node.outputs if t.name}
    needs: list[set[int]] = [{producer[id(t)] for t in used_tensors(node) if id(t) in producer} for node in graph.nodes]
    if all(not n or max(n) < i for i, n in enumerate(needs)):
        return False
    feeds: list[list[int]] = [[] for _ in graph.nodes]
    for i, needed in enumerate(needs):
        for j in needed:
            feeds[j].append(i)
    missing = [len(n) for n in needs]
    ready = [i for i, count in enumerate(missing) if count == 0]
    heapq.heapify(ready)
    order: list[int] = []
    while ready:
        i = heapq.heappop(ready)
        order.append(i)
        for j in feeds[i]:
            missing[j] -= 1
            if missing[j] == 0:
                heapq.heappush(ready, j)
    if len(order) < len(graph.nodes):
        stuck = [graph.nodes[i].name or graph.nodes[i].op for i, count in enumerate(missing) if count > 0]
        raise ModelError("the graph has a cycle", at=f"among nodes {', '.join(stuck[:5])}", hint="the model is damaged")
    graph.nodes[:] = [graph.nodes[i] for i in order]
    return True
