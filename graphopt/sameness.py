"""Are two nodes of two models the same computation, and if not, how do they differ, in words?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.edit import label
from graphopt.model import Model

SHOWN = 60


class Sameness:
    """Compares nodes of a second model with those of a first.

    Args:
        first: the reference.
        second: the model whose nodes are judged.
    """

    def __init__(self, first: Model, second: Model) -> None:
        self._functions_a = {(f.domain or "", f.name): f for f in first.functions}
        self._functions_b = {(f.domain or "", f.name): f for f in second.functions}
        self._twins: dict[int, gs.Node | None] = {}
        self._pairs: Mapping[str, str] = {}
        self._constants: dict[tuple[int, int], bool] = {}
        by_output = {t.name: n for n in first.graph.nodes for t in n.outputs if t.name}
        by_name = {n.name: n for n in first.graph.nodes if n.name}
        for node in second.graph.nodes:
            twin = next((by_output[t.name] for t in node.outputs if t.name in by_output), by_name.get(node.name))
            self._twins[id(node)] = twin

    def nodes(self, a: gs.Node, b: gs.Node, pairs: Mapping[str, str]) -> bool:
        """Tell whether `b` computes what `a` does; `pairs` maps tensor names of the second model to the first's."""
        self._pairs = pairs
        return next(self._differences(a, b), None) is None

    def describe(self, node: gs.Node) -> str:
        """Return in words how a node of the second model differs from its counterpart."""
        twin = self._twins.get(id(node))
        if twin is None:
            return "not in the original"
        return "; ".join(self._differences(twin, node))

    def is_changed(self, node: gs.Node) -> bool:
        """Tell whether a node does something else, beyond reading tensors of other names, or is new."""
        twin = self._twins.get(id(node))
        if twin is None or (twin.op, twin.domain or "") != (node.op, node.domain or ""):
            return True
        constants = zip(map(constant_behind, twin.inputs), map(constant_behind, node.inputs), strict=False)
        changed = any(
            isinstance(x, gs.Constant) != isinstance(y, gs.Constant)
            or (isinstance(x, gs.Constant) and not self._equal(x, y))
            for x, y in constants
        )
        return changed or len(twin.inputs) != len(node.inputs) or any(self._attribute_differences(twin, node))

    @contextmanager
    def mended(self, node: gs.Node) -> Iterator[bool]:
        """Make a node do what its counterpart does, for a while, on the tensors it reads; False where it has none."""
        twin = self._twins.get(id(node))
        if twin is None or any(isinstance(a, gs.Graph) for a in (*node.attrs.values(), *twin.attrs.values())):
            yield False
            return
        op, domain, attrs, inputs = node.op, node.domain, dict(node.attrs), list(node.inputs)
        theirs = [constant_behind(t) for t in twin.inputs]
        try:
            node.op, node.domain = twin.op, twin.domain
            node.attrs.clear()
            node.attrs.update(twin.attrs)
            kept = [t for t in inputs if not isinstance(constant_behind(t), gs.Constant)]
            node.inputs.clear()
            for tensor in theirs:
                own = (
                    gs.Constant(f"{tensor.name}/mended", np.asarray(tensor.values))
                    if isinstance(tensor, gs.Constant)
                    else None
                )
                node.inputs.append(own or (kept.pop(0) if kept else gs.Variable.empty()))
            yield True
        finally:
            node.op, node.domain = op, domain
            node.attrs.clear()
            node.attrs.update(attrs)
            node.inputs.clear()
            node.inputs.extend(inputs)

    def inner_difference(self, node: gs.Node) -> tuple[gs.Node, tuple[str, ...]] | None:
        """Return the first differing node inside a node's subgraphs or function body, and the way to it."""
        twin = self._twins.get(id(node))
        if twin is None:
            return None
        way = [label(node)]
        while True:
            step = self._inner_step(twin, node)
            if step is None:
                return None if len(way) == 1 else (node, tuple(way[:-1]))
            twin, node = step
            self._twins[id(node)] = twin
            way.append(label(node))

    def _inner_step(self, a: gs.Node, b: gs.Node) -> tuple[gs.Node, gs.Node] | None:
        for left, right in self._inner_graphs(a, b):
            by_output = {t.name: n for n in left.nodes for t in n.outputs if t.name}
            by_name = {n.name: n for n in left.nodes if n.name}
            for node in right.nodes:
                twin = next((by_output[t.name] for t in node.outputs if t.name in by_output), by_name.get(node.name))
                if twin is not None and next(self._differences(twin, node), None) is not None:
                    return twin, node
        return None

    def _inner_graphs(self, a: gs.Node, b: gs.Node) -> Iterator[tuple[gs.Graph, gs.Graph]]:
        for key, graph in b.attrs.items():
            if isinstance(graph, gs.Graph) and isinstance(a.attrs.get(key), gs.Graph):
                yield a.attrs[key], graph
        key = (b.domain or "", b.op)
        if key in self._functions_a and key in self._functions_b:
            yield self._functions_a[key], self._functions_b[key]

    def _differences(self, a: gs.Node, b: gs.Node) -> Iterator[str]:
        if (a.op, a.domain or "") != (b.op, b.domain or ""):
            yield f"operator {b.op} instead of {a.op}"
        yield from self._attribute_differences(a, b)
        if len(a.inputs) != len(b.inputs):
            yield f"{len(b.inputs)} inputs instead of {len(a.inputs)}"
        for i, (x, y) in enumerate(zip(a.inputs, b.inputs, strict=False)):
            yield from self._input_differences(i, x, y)
        key = (b.domain or "", b.op)
        if key in self._functions_b and key in self._functions_a:
            other = self._graph_difference(self._functions_a[key], self._functions_b[key])
            if other:
                yield f"function body: {other}"

    def _attribute_differences(self, a: gs.Node, b: gs.Node) -> Iterator[str]:
        for key in dict.fromkeys([*a.attrs, *b.attrs]):
            x, y = a.attrs.get(key), b.attrs.get(key)
            if isinstance(x, gs.Graph) and isinstance(y, gs.Graph):
                other = self._graph_difference(x, y)
                if other:
                    yield f"{key}: {other}"
            elif isinstance(x, gs.Constant) and isinstance(y, gs.Constant):
                if not self._equal(x, y):
                    yield f"{key}: {_value_difference(x, y)}"
            elif not _equal_values(x, y):
                yield f"{key} {_shown(y)} instead of {_shown(x)}"

    def _input_differences(self, i: int, a: gs.Tensor, b: gs.Tensor) -> Iterator[str]:
        x, y = constant_behind(a), constant_behind(b)
        if isinstance(x, gs.Constant) and isinstance(y, gs.Constant):
            if not self._equal(x, y):
                yield f"input {i} ('{b.name}'): {_value_difference(x, y)}"
        elif isinstance(x, gs.Constant) != isinstance(y, gs.Constant):
            yield f"input {i} is {'a constant' if isinstance(y, gs.Constant) else 'computed'} now"
        elif self._pairs.get(b.name, b.name) != a.name:
            yield f"input {i} is '{b.name}' instead of '{a.name}'"

    def _graph_difference(self, a: gs.Graph, b: gs.Graph) -> str:
        """Return the first difference between two inner graphs in words; '' if there is none."""
        if len(a.nodes) != len(b.nodes):
            return f"{len(b.nodes)} nodes instead of {len(a.nodes)}"
        for x, y in zip(a.nodes, b.nodes, strict=True):
            found = next(self._differences(x, y), None)
            if found:
                return f"node '{label(y)}': {found}"
        for x, y in zip(a.outputs, b.outputs, strict=False):
            if isinstance(x, gs.Constant) and isinstance(y, gs.Constant) and not self._equal(x, y):
                return f"output '{y.name}': {_value_difference(x, y)}"
            if x.name != y.name:
                return f"output '{y.name}' instead of '{x.name}'"
        return ""

    def _equal(self, a: gs.Constant, b: gs.Constant) -> bool:
        key = (id(a), id(b))
        if key not in self._constants:
            self._constants[key] = _equal_arrays(a, b)
        return self._constants[key]


def constant_behind(tensor: gs.Tensor) -> gs.Tensor:
    """Return the constant that a Constant node holds, else the tensor itself."""
    if isinstance(tensor, gs.Variable) and tensor.inputs and tensor.inputs[0].op == "Constant":
        for key, value in tensor.inputs[0].attrs.items():
            if isinstance(value, gs.Constant):
                return value
            if key.startswith("value_"):
                return gs.Constant(tensor.name, np.asarray(value))
    return tensor


def _equal_arrays(a: gs.Constant, b: gs.Constant) -> bool:
    if tuple(a.shape) != tuple(b.shape) or a.dtype != b.dtype:
        return False
    x, y = np.asarray(a.values), np.asarray(b.values)
    if x is y:
        return True
    if x.dtype.kind == "O":
        return bool((x == y).all())
    return x.tobytes() == y.tobytes()


def _equal_values(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return list(a) == list(b)
    return bool(type(a) is type(b) and a == b)


def _value_difference(a: gs.Constant, b: gs.Constant) -> str:
    if tuple(a.shape) != tuple(b.shape):
        return f"shape {list(b.shape)} instead of {list(a.shape)}"
    if a.dtype != b.dtype:
        return f"type {b.dtype} instead of {a.dtype}"
    x, y = np.asarray(a.values), np.asarray(b.values)
    if x.size == 1:
        return f"{_shown(y.reshape(-1)[0].item())} instead of {_shown(x.reshape(-1)[0].item())}"
    return f"{int(np.count_nonzero(x != y))} of {x.size} values differ"


def _shown(value: Any) -> str:
    if isinstance(value, gs.Graph):
        return "a graph"
    text = f"{value:.6g}" if isinstance(value, float) else "left out" if value is None else str(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"
