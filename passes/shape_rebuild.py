"""Vectors of sizes that are computed, made from fewer nodes: shared, or read off one tensor by one Shape."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.facts import Fact
from graphopt.analysis.symbolic_expr import Expr, Size
from graphopt.base import Change, Context
from graphopt.edit import Edit, label, make_node
from graphopt.ops import is_standard

_WALK = 24
"""Nodes behind a vector that are counted to see what one Shape in their place saves."""

_LONGEST = 16
"""Elements of a vector that is put together anew."""

_PLACES = 8
"""Tensors that are looked at for one that has the sizes of a vector on neighbouring axes."""


@dataclass(frozen=True)
class Piece:
    """A part of a vector: numbers, a tensor that holds it, or the axes of one from `start` on.

    `cost` is how many nodes it takes to make it.
    """

    length: int
    sizes: tuple[Size, ...]
    source: gs.Tensor | None = None
    start: int = 0
    cost: int = 0
    scalar: bool = False

    def __str__(self) -> str:
        if self.source is None:
            return str(list(self.sizes))
        if self.cost == 0 or self.scalar:
            return f"'{self.source.name}'"
        return f"axes {self.start} to {self.start + self.length - 1} of '{self.source.name}'"


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
        self.changed = False
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
                self.changed = True
                if self.edit.is_output(tensor):
                    self.first[key] = tensor  # which the node of `same` makes now

            yield Change(label(node), f"{node.op} -> '{same.name}'", "it gives the same sizes", share)
            return
        pieces = self._pieces(fact, tensor) if not is_standard(node, "Shape") else None
        if pieces is None or (len(pieces) == 1 and (pieces[0].cost == 0 or same is not tensor)):
            return
        cost = sum(piece.cost for piece in pieces) + (len(pieces) > 1)
        kept = {id(piece.source) for piece in pieces if piece.source is not None}
        if cost > self._saves(node, kept):
            return

        def apply(node: gs.Node = node) -> None:
            self._build(node, tensor, pieces)

        what = f"{node.op} -> {' and '.join(str(piece) for piece in pieces)}"
        yield Change(label(node), what, f"{cost} nodes do", apply)

    def _pieces(self, fact: Fact, tensor: gs.Tensor) -> list[Piece] | None:
        """Return what a vector can be put together from: constants, axes of tensors, vectors that are there."""
        assert fact.values is not None
        wanted: list[Size] = list(fact.values.flat)
        if fact.values.ndim != 1 or fact.dtype != np.int64 or len(wanted) > _LONGEST:
            return None
        whole = self._axes(wanted)
        if whole is not None and whole.length == len(wanted):
            return [whole]
        found: list[Piece] = []
        while wanted:
            piece = self._next(wanted, tensor)
            if piece is None:
                return None
            found.append(piece)
            wanted = wanted[piece.length :]
        return found

    def _next(self, wanted: list[Size], tensor: gs.Tensor) -> Piece | None:
        """Return the piece for the first elements of a vector, other than the tensor that holds it now."""
        numbers = list(itertools.takewhile(lambda size: isinstance(size, int), wanted))
        if numbers:
            return Piece(len(numbers), tuple(numbers))
        axes = self._axes(wanted)
        if axes is not None and axes.length > 1:
            return axes
        for shape, cost in (((1,), 0), ((), 1)):
            held = self.first.get((np.dtype(np.int64), shape, (wanted[0],)))
            if held is not None and held is not tensor:
                return Piece(1, (wanted[0],), held, cost=cost, scalar=not shape)
        return axes

    def _axes(self, wanted: list[Size]) -> Piece | None:
        """Return the longest beginning of a vector that a tensor has on neighbouring axes."""
        if int(self.graph.opset) < 15:
            return None
        at = next(i for i, size in enumerate(wanted) if isinstance(size, Expr))
        best: Piece | None = None
        for tensor, axis in self.places.get(str(wanted[at]), ()):
            start, shape = axis - at, self.of(tensor).shape or ()
            pairs = zip(wanted, shape[start:], strict=False) if start >= 0 else ()
            length = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
            while length and isinstance(wanted[length - 1], int) and length < len(wanted):
                length -= 1  # numbers at the end go with those that follow
            if length > at and (best is None or length > best.length):
                best = Piece(length, tuple(wanted[:length]), tensor, start, cost=1)
        return best

    def _build(self, node: gs.Node, tensor: gs.Tensor, pieces: list[Piece]) -> None:
        """Make a vector of pieces in the place of the node that makes it now."""
        made: list[gs.Node] = []
        vectors = [self._vector_of(piece, tensor, node, made) for piece in pieces]
        if len(vectors) > 1:
            made.append(make_node("Concat", vectors, [gs.Variable.empty()], {"axis": 0}, like=[node]))
        made[-1].name = node.name
        self.edit.hand_over(made[-1], made[-1].outputs[0], tensor)
        for new in made[:-1]:
            self.ctx.shapes.symbolic.follow(new, int(self.graph.opset))
        self.edit.replace(node, made)
        self.changed = True

    def _vector_of(self, piece: Piece, whole: gs.Tensor, node: gs.Node, made: list[gs.Node]) -> gs.Tensor:
        base = f"{label(node)}/sizes"
        if piece.source is None:
            return self.ctx.constant(base, np.array(piece.sizes, np.int64))
        if piece.cost == 0:
            return piece.source
        dtype = np.dtype(np.int64)
        held = self.first.get((dtype, (piece.length,), piece.sizes))
        if held is not None and held is not whole:
            return held
        result = gs.Variable(self.ctx.fresh_name(base), dtype, [piece.length])
        self.first.setdefault((dtype, (piece.length,), piece.sizes), result)
        name = self.ctx.fresh_name(f"{base}/node")
        if piece.scalar:
            axes = self.ctx.constant(f"{base}/axes", np.array([0], np.int64))
            made.append(make_node("Unsqueeze", [piece.source, axes], [result], name=name, like=[node]))
            return result
        rank, end = len(self.of(piece.source).shape or ()), piece.start + piece.length
        attrs = {key: value for key, value in (("start", piece.start), ("end", end)) if value not in (0, rank)}
        made.append(make_node("Shape", [piece.source], [result], attrs, name=name, like=[node]))
        return result

    def _saves(self, node: gs.Node, kept: set[int]) -> int:
        """Return how many nodes besides `node` only serve it, but for those behind the tensors in `kept`."""
        gone, waiting, saved = {id(node)}, [node], 0
        while waiting and saved < _WALK:
            for tensor in waiting.pop().inputs:
                maker = tensor.inputs[0] if len(tensor.inputs) == 1 else None
                if maker is None or id(maker) in gone or id(tensor) in kept or not self.edit.is_local(maker):
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
