"""Nodes whose inputs are all constant, replaced by what they compute.

    Transpose(w)                                 ->  w'
    Shape(x), Size(x), Gather(Shape(x), i) …     ->  constant      where the dimensions are known
    a chain of such nodes                        ->  what the rest of the graph reads of it

All foldable nodes of a graph are run at once, in ORT with its rewriting off.  Nothing is run before its size is
known: a few bytes can ask for terabytes.  The file grows by `max_growth` at most; where a group of nodes would
take more, those that make the most of the least (Expand, ConstantOfShape, Tile …) stay, and their inputs fold.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis import foldable
from graphopt.analysis.constants import Unknown, array_of, parameter, refers
from graphopt.analysis.foldable import Group, Refused
from graphopt.analysis.region import Region, extract
from graphopt.base import Change, Context, Pass
from graphopt.edit import Edit, become_constant, drop_declared, label
from graphopt.errors import GraphoptError
from graphopt.ops import is_standard
from graphopt.registry import register

Array = np.ndarray[Any, Any]
Dims = Sequence[int | str | None]

_LARGEST = 256 << 20
"""Bytes that one output may have while folding (or the size of the model, when that is more)."""

_BATCH = 256 << 20
"""Bytes of weights and results that are held at once."""


@register
@dataclass(frozen=True)
class FoldConstants(Pass):
    """Compute at once what depends on constants alone, and put the results in its place.

    Exact, keeps the signature.  Refuses random operators, other domains, control flow, dequantized weights,
    results of unknown size, and whatever would make the file grow by more than `max_growth` of the original.
    """

    name: ClassVar[str] = "fold-constants"
    scope: ClassVar[Literal["graph", "model"]] = "model"
    max_growth: float = 0.1

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose one change per tensor that becomes constant."""
        folder = _Folder(ctx, self.max_growth)
        again = True
        while again:  # what is folded may tell shapes, and those what can be folded
            again = False
            folder.start()
            for current in list(ctx.model.graphs()):
                if current is not graph and ctx.model.ir_version < 4 and not isinstance(current, gs.Function):
                    continue  # subgraphs have no initializers there
                again |= yield from _known_shapes(current, ctx)
                again |= yield from folder.fold(current)
            if again:
                ctx.forget()
        for node, reason in folder.refused:
            yield Change(label(node), f"fold {node.op}", reason)
        folder.drop_unused()


class _Folder:
    """Folds one graph after the other; what the file may still grow by is shared."""

    def __init__(self, ctx: Context, max_growth: float) -> None:
        self.ctx = ctx
        self.max_growth = max_growth
        self.largest = max(_LARGEST, ctx.original_bytes)
        self.sources: dict[int, gs.Constant] = {}
        self.refused: list[Refused] = []
        self.ends = {id(t) for g in ctx.model.graphs() for t in g.outputs}
        self._size: int | None = None
        self._pending = 0

    def start(self) -> None:
        """Begin a round over all graphs."""
        self.refused.clear()
        self._size, self._pending = None, 0

    def room(self) -> float:
        """Return how many bytes the file may still grow by; its size is taken when this is first asked."""
        if self._size is None:
            self._size = self.ctx.model.emitted_bytes()
        return (self.ctx.original_bytes or self._size) * (1 + self.max_growth) - self._size - self._pending

    def fold(self, graph: gs.Graph) -> Generator[Change, None, bool]:
        """Fold until nothing more can be: sizes that depend on values are known once those are folded.

        Returns whether anything was folded; what was refused in the end is in `refused`.
        """
        failed: dict[int, Refused] = {}
        folded, again = False, True
        left: list[Refused] = []
        while again:
            nodes = foldable.find(graph, failed)
            if all(n.op == "Constant" for n in nodes):
                left = []
                break
            sizes = foldable.measure(nodes, extract(nodes, int(graph.opset)).types, self.largest)
            groups, too_much = self._choose(sizes)
            failures, again = len(failed), False
            for batch in foldable.batches(groups, _BATCH):
                again |= yield from self._fold_batch(graph, batch, failed)
            folded |= again
            again |= len(failed) > failures
            left = [*sizes.refused, *too_much]
        self.refused += [*failed.values(), *left]
        return folded

    def _choose(self, sizes: foldable.Sizes) -> tuple[list[Group], list[Refused]]:
        """Return the groups to fold, those that shrink the file first, and the nodes that would grow it too much."""
        groups = [foldable.group(nodes, sizes.bytes, self.ends) for nodes in foldable.connected(sizes.nodes)]
        chosen: list[Group] = []
        refused: list[Refused] = []
        for candidate in sorted(groups, key=lambda g: g.growth):
            group: Group | None = candidate
            if candidate.results and candidate.growth > 0 and candidate.growth > self.room():
                group, left_out = foldable.shrink(candidate, self.room(), sizes.bytes, self.ends)
                refused += left_out
            if group is not None and group.results:
                chosen.append(group)
                self._pending += group.growth
        return chosen, refused

    def _fold_batch(
        self, graph: gs.Graph, batch: Sequence[Group], failed: dict[int, Refused]
    ) -> Generator[Change, None, bool]:
        """Run groups at once and propose their results; return whether any was taken."""
        nodes = [n for g in batch for n in g.nodes]
        results = [t for g in batch for t in g.results]
        region = extract(nodes, int(graph.opset))
        try:
            values = region.evaluate(results, self.ctx.evaluate)
        except GraphoptError:
            if len(batch) == 1:
                node, reason = self._culprit(batch[0], int(graph.opset))
                failed[id(node)] = node, reason
                return False
            middle = len(batch) // 2
            first = yield from self._fold_batch(graph, batch[:middle], failed)
            second = yield from self._fold_batch(graph, batch[middle:], failed)
            return first or second
        with Edit(graph) as edit:
            for group in batch:
                for tensor in group.results:
                    yield from _folded(graph, group, tensor, values[tensor.name], region, failed)
            self._sweep(edit, nodes)
        return any(isinstance(t, gs.Constant) for t in results)

    def _sweep(self, edit: Edit, nodes: Sequence[gs.Node]) -> None:
        for node in nodes:
            self.sources.update((id(t), t) for t in node.inputs if isinstance(t, gs.Constant))
        for node in reversed(nodes):
            if not any(edit.is_used(t) for t in node.outputs if t.name):
                edit.remove(node)

    def _culprit(self, group: Group, opset: int) -> Refused:
        """Return the first node of a group that ORT does not run, by binary search."""
        low, high = 0, len(group.nodes)
        reason = self._error(group.nodes, opset) or "ONNX Runtime fails on it"
        while high - low > 1:
            middle = (low + high) // 2
            error = self._error(group.nodes[:middle], opset)
            if error is None:
                low = middle
            else:
                high, reason = middle, error
        return group.nodes[high - 1], reason

    def _error(self, nodes: Sequence[gs.Node], opset: int) -> str | None:
        try:
            extract(nodes, opset).evaluate([t for n in nodes for t in n.outputs if t.name], self.ctx.evaluate)
        except GraphoptError as error:
            return error.what
        return None

    def drop_unused(self) -> None:
        """Take constants that only folded nodes read off their graphs."""
        graphs = list(self.ctx.model.graphs())
        ends = {id(t) for g in graphs for t in g.outputs}
        gone = {key for key, c in self.sources.items() if not c.outputs and key not in ends}
        for graph in graphs:
            drop_declared(graph, gone)


def _folded(
    graph: gs.Graph, group: Group, tensor: gs.Tensor, values: Any, region: Region, failed: dict[int, Refused]
) -> Iterator[Change]:
    """Propose to make a tensor constant, unless ORT gave it back as something else than it is."""
    node = tensor.inputs[0]
    expected = region.types[tensor.name]
    array = np.asarray(values)
    text = expected.dtype is not None and expected.dtype.kind in "OSU" and array.dtype.kind in "OSU"
    if (array.dtype != expected.dtype and not text) or expected.static not in (None, array.shape):
        failed[id(node)] = node, f"ONNX Runtime gives {array.dtype}{list(array.shape)} for it"
        return
    what = f"{node.op} -> constant {array.dtype}{list(array.shape)}"
    others = f", with {len(group.nodes) - 1} more nodes" if len(group.nodes) > 1 else ""
    yield Change(
        label(node), what, f"all its inputs are constant{others}", lambda: become_constant(graph, tensor, array)
    )


def _known_shapes(graph: gs.Graph, ctx: Context) -> Generator[Change, None, bool]:
    """Propose to fold what is asked of shapes whose dimensions are known; return whether any was taken."""
    folded = False
    with Edit(graph) as edit:
        for node in list(graph.nodes):
            values = _shape_values(node, int(graph.opset), ctx)
            tensor = node.outputs[0] if node.outputs else gs.Variable.empty()
            if values is None or tensor.is_empty():
                continue

            def apply(node: gs.Node = node, tensor: gs.Tensor = tensor, values: Array = values) -> None:
                become_constant(graph, tensor, values)
                edit.remove(node)

            yield Change(label(node), f"{node.op} -> {values.tolist()}", "the dimensions are known", apply)
            folded |= isinstance(tensor, gs.Constant)
    return folded


def _shape_values(node: gs.Node, opset: int, ctx: Context) -> Array | None:
    """Return what Shape or Size, or Gather or Slice of a Shape, gives, if the shapes of inputs tell."""
    if is_standard(node, "Shape"):
        return _numbers(_dims(node, ctx))
    if is_standard(node, "Size"):
        static = ctx.shapes.proved(node.inputs[0]).static
        return None if static is None else np.array(math.prod(static), np.int64)
    if not is_standard(node, "Gather", "Slice") or len(node.inputs[0].inputs) != 1:
        return None
    source = node.inputs[0].inputs[0]
    dims = _dims(source, ctx) if is_standard(source, "Shape") else None
    if dims is None:
        return None
    return _gathered(node, dims) if node.op == "Gather" else _sliced(node, opset, dims)


def _dims(node: gs.Node, ctx: Context) -> Dims | None:
    """Return the dimensions that a Shape node gives."""
    shape = ctx.shapes.proved(node.inputs[0]).shape
    start, end = node.attrs.get("start", 0), node.attrs.get("end")
    if shape is None or refers(node):
        return None
    return shape[start : end if end is not None else len(shape)]


def _numbers(dims: Sequence[int | str | None] | None) -> Array | None:
    if dims is None or not all(isinstance(d, int) for d in dims):
        return None
    return np.array(dims, np.int64)


def _gathered(node: gs.Node, dims: Dims) -> Array | None:
    indices = array_of(node.inputs[1], limit=64)
    if indices is None or not all(-len(dims) <= i < len(dims) for i in indices.reshape(-1).tolist()):
        return None
    found = _numbers([dims[i] for i in indices.reshape(-1).tolist()])
    return None if found is None else found.reshape(indices.shape)


def _sliced(node: gs.Node, opset: int, dims: Dims) -> Array | None:
    starts, ends, steps = (parameter(node, name, opset) for name in ("starts", "ends", "steps"))
    if not isinstance(starts, np.ndarray) or not isinstance(ends, np.ndarray) or isinstance(steps, Unknown):
        return None
    if starts.size != 1 or ends.size != 1 or (steps is not None and (steps != 1).any()):
        return None
    return _numbers(dims[int(starts.reshape(-1)[0]) : int(ends.reshape(-1)[0])])
