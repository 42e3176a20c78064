"""Which values of a model may differ from those of another one under the same names: what an edit reaches."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.edit import nested_graphs
from graphopt.exporter import untouched


def differing(graph: gs.Graph, reference: gs.Graph) -> set[str]:
    """Return the names of the tensors of `graph` that are not proved to be what `reference` computes under that name.

    A node computes the same where one of the reference makes the same outputs with the same operator, attributes,
    constants, and inputs of which none differs.

    Args:
        graph: sorted.
        reference: what it is compared with.
    """
    makers = {t.name: node for node in reference.nodes for t in node.outputs if t.name}
    inputs = {t.name for t in reference.inputs}
    found = {t.name for t in graph.inputs if t.name not in inputs}
    for node in graph.nodes:
        twin = next((makers[t.name] for t in node.outputs if t.name in makers), None)
        if twin is None or not _same(node, twin, found):
            found.update(t.name for t in node.outputs if t.name)
    return found


def _same(node: gs.Node, twin: gs.Node, differ: set[str]) -> bool:
    """Tell whether two nodes compute the same, given what differs before them."""
    if (node.op, node.domain or "") != (twin.op, twin.domain or "") or len(node.inputs) != len(twin.inputs):
        return False
    if [t.name for t in node.outputs] != [t.name for t in twin.outputs] or any(nested_graphs([node])):
        return False
    if not _same_attributes(node.attrs, twin.attrs):
        return False
    return all(_same_input(a, b, differ) for a, b in zip(node.inputs, twin.inputs, strict=True))


def _same_input(tensor: gs.Tensor, twin: gs.Tensor, differ: set[str]) -> bool:
    if isinstance(tensor, gs.Constant) and isinstance(twin, gs.Constant):
        return same_constant(tensor, twin)
    if isinstance(tensor, gs.Constant) or isinstance(twin, gs.Constant):
        return False
    return tensor.name == twin.name and tensor.name not in differ


def _same_attributes(attrs: Mapping[str, object], others: Mapping[str, object]) -> bool:
    if attrs.keys() != others.keys():
        return False
    for name, value in attrs.items():
        other = others[name]
        if isinstance(value, gs.Constant) and isinstance(other, gs.Constant):
            if not same_constant(value, other):
                return False
        elif isinstance(value, np.ndarray) or isinstance(other, np.ndarray):
            if not np.array_equal(np.asarray(value), np.asarray(other)):
                return False
        elif value != other:
            return False
    return True


def same_constant(constant: gs.Constant, other: gs.Constant) -> bool:
    """Tell whether two constants hold the same; values of the same origin are not read."""
    mine, its = untouched(constant), untouched(other)
    if mine is its:
        return True
    if tuple(constant.shape) != tuple(other.shape) or constant.dtype != other.dtype:
        return False
    left, right = (v if isinstance(v, np.ndarray) else v.load() for v in (mine, its))
    return bool(np.array_equal(left, right))
