"""Layers that read one tensor, as one layer.

    Concat(f(x·V), f(x·W))             ->  f(x·[V W])                     f elementwise; Conv, MatMul, Gemm; with bias
    g(x·V), h(x·W)                     ->  a, b = Split(x·[V W]); g(a), h(b)
    (sums of such layers are for fuse-convs and fuse-linear)

The first form only ever saves: neighbours in a Concat along the output channels become one layer, and the Concat goes
where nothing else is in it.  The second pays for a copy.  ORT computes outputs in blocks of 16 columns or channels;
measured (ORT 1.31, AVX-512, one thread), merging pays where it saves such blocks (three heads of 12 channels 0.83, of
2 channels 0.64; three products of 24 columns 0.93, of 1 column 0.59), or lets a kernel larger than 1x1 use its input
for more outputs at once (three of 16 channels 0.81); with whole blocks it does not (products of 32 columns 1.03,
64 channels 1.03, queries, keys and values of MiniLM 1.09), nor for few rows (one row: 1.02 to 1.09).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import array_of, parameter, refers
from graphopt.base import Change, Context, Pass
from graphopt.edit import Edit, label, make_node, replace_output
from graphopt.ops import MOVED_TO_INPUT, UNARY, is_standard
from graphopt.registry import register
from graphopt.tensors import is_float

Array = np.ndarray[Any, Any]

BLOCK = 16
"""Outputs that ORT computes together."""

LEAST_ROWS = 32
"""Rows of a product from which its blocks matter more than the copy behind it."""

LEAST_DEPTH = 32
"""The same for the inputs of one output of a convolution."""

LARGE = 1024
"""Bytes from which a weight is not kept twice."""

_TAIL = 4
"""Elementwise operators that are followed behind a layer."""


@dataclass
class _Branch:
    """One layer, and what follows it elementwise.

    Attributes:
        node: the layer.
        bias: the Add of its bias, for a MatMul.
        tail: elementwise operators, each the only reader of the one before.
    """

    node: gs.Node
    bias: gs.Node | None = None
    tail: list[gs.Node] = field(default_factory=list)

    @property
    def weight(self) -> gs.Constant:
        """Its weight."""
        found = self.node.inputs[1]
        assert isinstance(found, gs.Constant)
        return found

    @property
    def axis(self) -> int:
        """The axis of the weight along which outputs lie."""
        if self.node.op == "Conv" or self.node.attrs.get("transB", 0):
            return 0
        return 1

    @property
    def width(self) -> int:
        """Number of outputs."""
        return int(self.weight.shape[self.axis])

    @property
    def end(self) -> gs.Tensor:
        """What comes out of it all."""
        return ([self.node] + ([self.bias] if self.bias else []) + self.tail)[-1].outputs[0]

    @property
    def offsets(self) -> gs.Constant | None:
        """Its bias, None where it has none."""
        inputs = self.node.inputs
        found = inputs[2] if len(inputs) > 2 and inputs[2].name else self.bias.inputs[1] if self.bias else None
        return found if isinstance(found, gs.Constant) else None

    def nodes(self) -> list[gs.Node]:
        """Return all its nodes."""
        return [self.node, *([self.bias] if self.bias else []), *self.tail]


@register
@dataclass(frozen=True)
class MergeParallel(Pass):
    """Make one Conv, MatMul or Gemm of those that read one tensor.

    Exact, keeps the signature.  Refuses groups whose merging does not pay, and copies of large weights that others
    read, too.  Weights must be initializers.
    """

    name: ClassVar[str] = "merge-parallel"
    optional: ClassVar[bool] = True

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose one change per run of neighbours in a Concat, then one per group that needs a Split."""
        with Edit(graph) as edit:
            site = _Site(edit, ctx)
            for group in site.groups():
                yield from site.into_concat(group)
        with Edit(graph) as edit:
            site = _Site(edit, ctx)
            for group in site.groups():
                yield from site.before_split(group)


class _Site:
    """One graph under edit."""

    def __init__(self, edit: Edit, ctx: Context) -> None:
        self.edit, self.ctx = edit, ctx
        self.opset = int(edit.graph.opset)
        self._places: dict[int, dict[int, list[int]]] = {}

    def groups(self) -> list[list[_Branch]]:
        """Return layers that read one tensor and could be one, in the graph's order."""
        found: dict[tuple[Any, ...], list[gs.Node]] = {}
        for node in self.edit.graph.nodes:
            key = _key(node) if is_standard(node, "Conv", "MatMul", "Gemm") else None
            if key is not None:
                found.setdefault(key, []).append(node)
        return [[self._branch(node) for node in group] for group in found.values() if len(group) > 1]

    def _branch(self, node: gs.Node) -> _Branch:
        branch = _Branch(node)
        following = self.edit.sole_consumer(node.outputs[0])
        if node.op == "MatMul" and following is not None and self.edit.is_local(following):
            branch.bias = following if _adds_row(following, branch.end, branch.width) else None
        while len(branch.tail) < _TAIL:
            following = self.edit.sole_consumer(branch.end)
            if following is None or not self.edit.is_local(following) or _signature(following, self.opset) is None:
                break
            branch.tail.append(following)
        return branch

    def into_concat(self, group: Sequence[_Branch]) -> Iterator[Change]:
        """Propose to merge the neighbours of each Concat."""
        places: dict[int, list[tuple[int, _Branch]]] = {}
        for branch in group:
            concat = self._concat(branch)
            if concat is not None:
                at = self._at(concat, branch.end)[0]
                places.setdefault(id(concat), []).append((at, branch))
        for placed in places.values():
            for run in _runs(sorted(placed, key=lambda p: p[0]), self.opset):
                yield self._concatenated(run)

    def _at(self, concat: gs.Node, tensor: gs.Tensor) -> list[int]:
        """Return where a tensor stands among the inputs of a Concat, as they were in the beginning."""
        if id(concat) not in self._places:
            found: dict[int, list[int]] = {}
            for i, given in enumerate(concat.inputs):
                found.setdefault(id(given), []).append(i)
            self._places[id(concat)] = found
        return self._places[id(concat)].get(id(tensor), [])

    def _concat(self, branch: _Branch) -> gs.Node | None:
        """Return the Concat that is all that reads a branch, once, along its outputs."""
        concat = self.edit.sole_consumer(branch.end)
        if concat is None or not is_standard(concat, "Concat") or not self.edit.is_local(concat) or refers(concat):
            return None
        if len(self._at(concat, branch.end)) != 1:
            return None
        axis = int(concat.attrs.get("axis", 1))
        rank = self.ctx.shapes.proved(branch.node.inputs[0]).rank
        wanted = 1 if branch.node.op == "Conv" else -1
        fits = axis == wanted or (rank is not None and axis % rank == wanted % rank)
        return concat if fits else None

    def _concatenated(self, run: Sequence[_Branch]) -> Change:
        concat = self.edit.sole_consumer(run[0].end)
        assert concat is not None
        what = f"{len(run)} {run[0].node.op} -> one, {run[0].width} + … = {sum(b.width for b in run)} outputs"
        reason = self._shared(run)
        if reason is not None:
            return Change(label(run[0].node), what, reason)

        def apply() -> None:
            count = len(run[0].tail)
            alone = len(run) == len(concat.inputs)
            nodes = self._merged(run, count)
            made = nodes[-1].outputs[0]
            self.edit.insert_after(run[-1].node, nodes)
            if alone:
                self.edit.hand_over(nodes[-1], made, concat.outputs[0])
                self.edit.remove(concat)
            else:
                first = next(i for i, t in enumerate(concat.inputs) if t is run[0].end)
                kept = [*concat.inputs[:first], made, *concat.inputs[first + len(run) :]]
                for i, tensor in enumerate(kept):
                    self.edit.set_input(concat, i, tensor)
                self.edit.trim_inputs(concat, len(kept))
            for node in (n for b in run for n in b.nodes()):
                self.edit.remove(node)

        return Change(label(run[0].node), what, f"they are neighbours in '{label(concat)}'", apply)

    def before_split(self, group: Sequence[_Branch]) -> Iterator[Change]:
        """Propose to merge a group and split what comes out."""
        apart = [b for b in group if self._concat(b) is None]
        if len(apart) < 2:
            return
        what = f"{len(apart)} {apart[0].node.op} -> one and a Split, {sum(b.width for b in apart)} outputs"
        reason = self._why_not_split(apart) or self._shared(apart)
        if reason is not None:
            yield Change(label(apart[0].node), what, reason)
            return
        common = _common(apart, self.opset)

        def apply() -> None:
            ends = [(b.nodes()[: len(b.nodes()) - len(b.tail) + common])[-1].outputs[0] for b in apart]
            nodes = self._merged(apart, common)
            for end in ends:
                replace_output(end.inputs[0], end, gs.Variable.empty())
            split = self._split(nodes[-1].outputs[0], apart, ends)
            self.edit.insert_after(apart[0].node, [*nodes, split])
            for branch in apart:
                for node in branch.nodes()[: len(branch.nodes()) - len(branch.tail) + common]:
                    self.edit.remove(node)

        yield Change(label(apart[0].node), what, "fewer blocks of outputs", apply)

    def _split(self, tensor: gs.Tensor, branches: Sequence[_Branch], outputs: Sequence[gs.Tensor]) -> gs.Node:
        sizes = np.array([b.width for b in branches], np.int64)
        rank = self.ctx.shapes.proved(branches[0].node.inputs[0]).rank
        axis = 1 if branches[0].node.op == "Conv" else -1 if rank is None else rank - 1
        name = self.ctx.fresh_name(f"{tensor.name}/Split")
        if self.opset < MOVED_TO_INPUT["Split", "split"][0]:
            return make_node("Split", [tensor], outputs, {"axis": axis, "split": sizes.tolist()}, name=name)
        return make_node(
            "Split", [tensor, self.ctx.constant(f"{name}/sizes", sizes)], outputs, {"axis": axis}, name=name
        )

    def _merged(self, branches: Sequence[_Branch], count: int) -> list[gs.Node]:
        """Return the nodes of one layer for all, with the first `count` elementwise operators behind it."""
        first, like = branches[0], [n for b in branches for n in b.nodes()]
        weight = np.concatenate([np.asarray(b.weight.values) for b in branches], axis=first.axis)
        inputs = [first.node.inputs[0], self.ctx.constant(f"{first.weight.name}/merged", weight)]
        offsets, nodes = _offsets(branches, weight.dtype), []
        if offsets is not None and first.node.op != "MatMul":
            inputs.append(self.ctx.constant(f"{first.node.outputs[0].name}/bias", offsets))
        copies: list[tuple[str, list[gs.Tensor], dict[str, Any]]] = [(first.node.op, inputs, dict(first.node.attrs))]
        if offsets is not None and first.node.op == "MatMul":
            copies.append(("Add", [self.ctx.constant(f"{first.node.outputs[0].name}/bias", offsets)], {}))
        copies += [(n.op, list(n.inputs[1:]), dict(n.attrs)) for n in first.tail[:count]]
        made: gs.Tensor | None = None
        for op, given, attrs in copies:
            inputs = given if made is None else [made, *given]
            made = gs.Variable(self.ctx.fresh_name(f"{first.node.outputs[0].name}/merged"), weight.dtype)
            name = self.ctx.fresh_name(f"{label(first.node)}/merged")
            nodes.append(make_node(op, inputs, [made], attrs, name=name, like=like))
        return nodes

    def _shared(self, branches: Sequence[_Branch]) -> str | None:
        """Return which large weight others read, too."""
        inside = {id(b.node) for b in branches}
        for branch in branches:
            size = math.prod(branch.weight.shape) * branch.weight.dtype.itemsize
            others = (n for n in branch.weight.outputs if id(n) not in inside and not self.edit.removed(n))
            if size > LARGE and next(others, None) is not None:
                return f"constant '{branch.weight.name}' is used elsewhere, too"
        return None

    def _why_not_split(self, branches: Sequence[_Branch]) -> str | None:
        """Return why merging does not pay where a Split has to follow (see the module's docstring)."""
        widths = [b.width for b in branches]
        saved = sum(-(-w // BLOCK) for w in widths) - -(-sum(widths) // BLOCK)
        shape = branches[0].weight.shape
        if branches[0].node.op == "Conv":
            taps = math.prod(shape[2:])
            if shape[1] * taps < LEAST_DEPTH:
                return "too few inputs for each output to pay for the copy"
            return None if saved or (taps > 1 and max(widths) < 2 * BLOCK) else "no block of output channels is saved"
        if self.opset < 11 and self.ctx.shapes.proved(branches[0].node.inputs[0]).rank is None:
            return "the rank is unknown"
        rows = self._least_rows(branches[0].node)
        if rows < LEAST_ROWS:
            return f"only {rows} rows are certain"
        return None if saved or max(widths) <= BLOCK else "no block of columns is saved"

    def _least_rows(self, node: gs.Node) -> int:
        """Return how many rows a product has at least."""
        shape = self.ctx.shapes.proved(node.inputs[0]).shape or ()
        axis = 0 if node.attrs.get("transA", 0) else len(shape) - 1
        return math.prod(d for i, d in enumerate(shape) if i != axis and isinstance(d, int))


def _key(node: gs.Node) -> tuple[Any, ...] | None:
    """Return what layers that can be merged have in common, None for one that cannot."""
    if len(node.inputs) < 2 or not isinstance(node.inputs[1], gs.Constant) or refers(node):
        return None
    source, weight = node.inputs[0], node.inputs[1]
    if not is_float(weight.dtype) or isinstance(source, gs.Constant):
        return None
    shape = list(weight.shape)
    if node.op == "Conv":
        fits = len(shape) > 2 and int(node.attrs.get("group", 1)) == 1
        inner: tuple[int, ...] = tuple(shape[1:])
    else:
        fits = len(shape) == 2
        inner = tuple(shape[1:]) if node.attrs.get("transB", 0) else tuple(shape[:1])
    third = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    if third is not None:
        width = shape[0] if node.op == "Conv" or node.attrs.get("transB", 0) else shape[-1]
        fits = fits and isinstance(third, gs.Constant) and _is_row(third, width)
    if not fits:
        return None
    attrs = tuple(sorted((k, repr(v)) for k, v in node.attrs.items()))
    return id(source), node.op, inner, str(weight.dtype), attrs


def _is_row(constant: gs.Tensor, width: int) -> bool:
    """Tell whether a bias is one number per output, or one for all."""
    shape = list(constant.shape)
    return math.prod(shape) in (1, width) and all(s == 1 for s in shape[:-1]) and len(shape) <= 2


def _adds_row(node: gs.Node, tensor: gs.Tensor, width: int) -> bool:
    """Tell whether a node adds a bias to a product (constants are on the right in canonical graphs)."""
    if not is_standard(node, "Add") or len(node.inputs) != 2 or node.inputs[0] is not tensor:
        return False
    added = node.inputs[1]
    return isinstance(added, gs.Constant) and len(added.shape) < 2 and _is_row(added, width)


def _signature(node: gs.Node, opset: int) -> tuple[Any, ...] | None:
    """Return what elementwise operators that do the same have in common, None for any other."""
    if not is_standard(node) or node.op not in UNARY or refers(node) or len(node.outputs) != 1 or node.op == "Cast":
        return None
    names = [name for (op, name), (since, _) in MOVED_TO_INPUT.items() if op == node.op and opset >= since]
    if len(node.inputs) > 1 and not names:
        return None
    held: list[Any] = []
    for name in names:
        values = parameter(node, name, opset)
        if values is not None and not isinstance(values, np.ndarray):
            return None
        held.append(None if values is None else (values.shape, values.tobytes()))
    return node.op, tuple(sorted((k, repr(v)) for k, v in node.attrs.items())), tuple(held)


def _same_tail(a: _Branch, b: _Branch, opset: int) -> bool:
    return [_signature(n, opset) for n in a.tail] == [_signature(n, opset) for n in b.tail]


def _common(branches: Sequence[_Branch], opset: int) -> int:
    """Return how many elementwise operators all branches begin with."""
    tails = [[_signature(n, opset) for n in b.tail] for b in branches]
    count = 0
    for level in zip(*tails, strict=False):
        if any(s != level[0] for s in level):
            break
        count += 1
    return count


def _runs(placed: Sequence[tuple[int, _Branch]], opset: int) -> Iterator[list[_Branch]]:
    """Yield runs of at least two neighbours with the same elementwise operators."""
    run: list[tuple[int, _Branch]] = []
    for place, branch in placed:
        if run and (place != run[-1][0] + 1 or not _same_tail(run[-1][1], branch, opset)):
            if len(run) > 1:
                yield [b for _, b in run]
            run = []
        run.append((place, branch))
    if len(run) > 1:
        yield [b for _, b in run]


def _offsets(branches: Sequence[_Branch], dtype: Any) -> Array | None:
    """Return the biases of all, in a row; None where nobody has one."""
    found = [None if b.offsets is None else array_of(b.offsets) for b in branches]
    if all(f is None for f in found):
        return None
    rows = [
        np.zeros(b.width, dtype) if f is None else np.broadcast_to(f.reshape(-1), (b.width,))
        for b, f in zip(branches, found, strict=True)
    ]
    return np.concatenate(rows).astype(dtype)
