"""Vectors of sizes that are computed, made from fewer nodes: shared, or read off one tensor by one Shape."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.facts import Fact
from graphopt.analysis.symbolic_expr import Expr, Size
from graphopt.base import Change, Context
from graphopt.edit import Edit, label, make_node
from graphopt.ops import is_standard

_WALK = 24
"""Nodes behind a vector that are counted to see what one Shape in their place saves."""

_PLACES = 8
"""Tensors that are looked at for one that has the sizes of a vector on neighbouring axes."""


class Rebuilder:
    """Looks through one graph for vectors of sizes.

    Args:
        graph: where to look.
        ctx: the pass's context.
        edit: collects the edits.
    """

    def __init__(self, graph: gs.Graph, ctx: Context, edit: Edit) -> None:
        self.graph = graph
        self.ctx = ctx
        self.edit = edit
        self.of = ctx.shapes.symbolic.of
        self.first: dict[Hashable, gs.Tensor] = {}
        self.places: dict[str, list[tuple[gs.Tensor, int]]] = {}
        self.vectors = any(is_standard(n, "Shape") for n in graph.nodes)

    def run(self) -> Iterator[Change]:
        """Propose one change per vector."""
        if not self.vectors:
            return
        for tensor in self.graph.inputs:
            self._note(tensor)
        for node in list(self.graph.nodes):
            tensor = node.outputs[0] if len(node.outputs) == 1 else None
            fact = None if tensor is None else self.of(tensor)
            if tensor is not None and fact is not None and _is_followed(fact):
                yield from self._vector(node, tensor, fact)
            for made in node.outputs if not self.edit.removed(node) else ():
                self._note(made)

    def _note(self, tensor: gs.Tensor) -> None:
        """Take down on which axes a tensor has which open sizes."""
        for axis, size in enumerate(self.of(tensor).shape or ()):
            if isinstance(size, Expr):
                held = self.places.setdefault(size.text, [])
                if len(held) < _PLACES:
                    held.append((tensor, axis))

    def _vector(self, node: gs.Node, tensor: gs.Tensor, fact: Fact) -> Iterator[Change]:
        assert fact.values is not None
        key = fact.dtype, fact.values.shape, tuple(fact.values.flat)
        same = self.first.setdefault(key, tensor)
        if same is not tensor and self.edit.why_not_bypass(tensor, same) is None:

            def share(node: gs.Node = node) -> None:
                self.edit.bypass(tensor, same)
                self.edit.remove(node)
                if self.edit.is_output(tensor):
                    self.first[key] = tensor  # which the node of `same` makes now

            yield Change(label(node), f"{node.op} -> '{same.name}'", "it gives the same sizes", share)
            return
        found = self._one_shape(fact)
        if found is None or is_standard(node, "Shape") or self._saves(node) < 1:
            return
        source, start, end = found

        def apply(node: gs.Node = node) -> None:
            rank = len(self.of(source).shape or ())
            attrs = {name: value for name, value in (("start", start), ("end", end)) if value not in (0, rank)}
            name = self.ctx.fresh_name(node.name) if node.name else ""
            made = make_node("Shape", [source], [gs.Variable.empty()], attrs, name=name, like=[node])
            self.edit.hand_over(made, made.outputs[0], tensor)
            self.edit.replace(node, [made])

        yield Change(label(node), f"{node.op} -> Shape of '{source.name}'", f"axes {start} to {end - 1}", apply)

    def _one_shape(self, fact: Fact) -> tuple[gs.Tensor, int, int] | None:
        """Return a tensor and its axes that have the sizes of a vector."""
        assert fact.values is not None
        wanted: list[Size] = list(fact.values.flat)
        if int(self.graph.opset) < 15 or fact.values.ndim != 1 or fact.dtype != np.int64:
            return None
        open_at = next(i for i, size in enumerate(wanted) if isinstance(size, Expr))
        for tensor, axis in self.places.get(str(wanted[open_at]), ()):
            start = axis - open_at
            shape = self.of(tensor).shape or ()
            if start >= 0 and list(shape[start : start + len(wanted)]) == wanted:
                return tensor, start, start + len(wanted)
        return None

    def _saves(self, node: gs.Node) -> int:
        """Return how many nodes besides `node` only serve it."""
        gone, waiting, saved = {id(node)}, [node], 0
        while waiting and saved < _WALK:
            for tensor in waiting.pop().inputs:
                maker = tensor.inputs[0] if len(tensor.inputs) == 1 else None
                if maker is None or id(maker) in gone or not self.edit.is_local(maker):
                    continue
                used = self.edit.is_output(tensor) or len(maker.outputs) != 1 or len(tensor.outputs) > _WALK
                if not used and all(id(n) in gone for n in self.edit.consumers(tensor)):
                    gone.add(id(maker))
                    waiting.append(maker)
                    saved += 1
        return saved


def _is_followed(fact: Fact) -> bool:
    """Tell whether all elements of a tensor are known and some of them are open sizes."""
    if fact.values is None or fact.dtype is None or fact.dtype.kind != "i" or not fact.values.size:
        return False
    elements = list(fact.values.flat)
    return None not in elements and any(isinstance(e, Expr) for e in elements)
