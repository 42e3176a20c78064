"""Casts that meet after data movement, cancelled.

    Cast(move(Cast(x, wide)), narrow)  ->  move(x)              x narrow already
    Cast(move(Cast(x, wide)), other)   ->  Cast(move(x), other)

Moving elements commutes with converting them.  Only conversions that lose nothing are undone: a float16 export
goes float16 -> float32 -> Transpose -> float16 around each operator that was kept in float32; the values between
stay what they are.  Concat moves several; constants among them must be of the narrow type exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import array_of, is_constant, refers
from graphopt.analysis.shapes import TensorType
from graphopt.base import Change, Context, Pass
from graphopt.edit import Edit, label, replace_output, turn_into
from graphopt.ops import is_standard
from graphopt.registry import register
from graphopt.tensors import onnx_dtype

from .fuse_casts import converts_differently
from .new_nodes import Maker

_MOVED: dict[str, int | None] = {
    "Identity": 1, "Transpose": 1, "Reshape": 1, "Flatten": 1, "Squeeze": 1, "Unsqueeze": 1, "Slice": 1, "Gather": 1,
    "Expand": 1, "Tile": 1, "Concat": None,
}  # fmt: skip
"""Operators that move elements of any type -> how many of their inputs do (None: all)."""

_NAMED = 16
"""Operators that are looked at, once something is known to stand against it, for Casts to report."""

_LARGE = 4096
"""Elements of constants that are converted, too."""


@register
@dataclass(frozen=True)
class EliminateCasts(Pass):
    """Cancel a Cast against those that it meets behind data movement.

    Exact: only conversions are undone that lose nothing.  Refuses where something else reads the wide values.
    """

    name: ClassVar[str] = "eliminate-casts"

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose one change per Cast that others undo."""
        with Edit(graph) as edit:
            for node in list(graph.nodes):
                if is_standard(node, "Cast") and not refers(node) and not edit.removed(node):
                    yield from _cancelled(edit, ctx, node)


@dataclass
class _Tree:
    """Data movement above a Cast.

    Attributes:
        nodes: the operators, the last one first.
        casts: Casts whose results they move.
        constants: constants that they move.
        why: what stands against it.
    """

    nodes: list[gs.Node] = field(default_factory=list)
    casts: list[gs.Node] = field(default_factory=list)
    constants: list[gs.Tensor] = field(default_factory=list)
    why: str = ""


def _tree(edit: Edit, root: gs.Tensor) -> _Tree:
    """Return what moves the elements of `root`, up to Casts and constants."""
    found, waiting, seen = _Tree(), [root], set[int]()
    while waiting and not (found.why and len(found.nodes) >= _NAMED):
        tensor = waiting.pop()
        if is_constant(tensor):
            found.constants.append(tensor)
            continue
        node = tensor.inputs[0] if len(tensor.inputs) == 1 else None
        if node is None or not is_standard(node) or not edit.is_local(node) or refers(node):
            found.why = found.why or f"'{tensor.name}' is not moved from anywhere"
        elif node.op == "Cast":
            found.casts.append(node)
        elif node.op not in _MOVED:
            found.why = found.why or f"{node.op} '{label(node)}' computes"
        elif id(node) not in seen:
            seen.add(id(node))
            if edit.sole_consumer(tensor) is None:
                found.why = found.why or f"'{tensor.name}' is used elsewhere, too"
            found.nodes.append(node)
            waiting += node.inputs[: _MOVED[node.op]]
    return found


def _cancelled(edit: Edit, ctx: Context, node: gs.Node) -> Iterator[Change]:
    tree = _tree(edit, node.inputs[0])
    if not tree.nodes or not (tree.casts or tree.why):
        return
    narrow = None if tree.why else _narrow(ctx, tree, node)
    if narrow is None or isinstance(narrow, str):
        if tree.casts:
            yield Change(label(node), "cancel Cast", tree.why or narrow or "")
        return

    def apply() -> None:
        _convert(edit, ctx, tree, narrow)
        old, new = node.outputs[0], node.inputs[0]
        if onnx_dtype(narrow) != node.attrs["to"]:
            return
        if edit.bypass(old, new):
            edit.remove(node)
        else:
            turn_into(node, "Identity")

    yield Change(label(node), "cancel Cast", f"{len(tree.casts)} Casts from {narrow} before data movement", apply)


def _narrow(ctx: Context, tree: _Tree, node: gs.Node) -> np.dtype[Any] | str:
    """Return the type that everything has below the Casts, or why there is none."""
    known = {ctx.shapes.proved(c.inputs[0]).dtype for c in tree.casts}
    narrow = known.pop() if len(known) == 1 else None
    wide = ctx.shapes.proved(node.inputs[0]).dtype
    if narrow is None or wide is None or narrow.kind in "OSU":
        return "the types before the Casts differ, or are not known"
    last = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(node.attrs["to"]))
    reason = converts_differently(narrow, wide, last)
    if reason is not None:
        return reason
    if last == wide:
        return "it converts nothing"
    for constant in tree.constants:
        values = array_of(constant, limit=_LARGE)
        if values is None or not np.array_equal(values.astype(narrow).astype(values.dtype), values):
            return f"constant '{constant.name}' is large, or not exactly of type {narrow}"
    return narrow


def _convert(edit: Edit, ctx: Context, tree: _Tree, narrow: np.dtype[Any]) -> None:
    """Let the tree move elements of the narrow type."""
    maker = Maker(edit, ctx)
    casts, constants = {id(c) for c in tree.casts}, {id(c) for c in tree.constants}
    for node in tree.nodes:
        for i, tensor in enumerate(list(node.inputs[: _MOVED[node.op]])):
            if id(tensor) in constants:
                values = array_of(tensor)
                assert values is not None
                edit.set_input(node, i, maker.constant(f"{tensor.name}/{narrow}", values.astype(narrow)))
            elif tensor.inputs and id(tensor.inputs[0]) in casts:
                edit.set_input(node, i, tensor.inputs[0].inputs[0])
        old = node.outputs[0]
        new = maker.tensor(f"{old.name}/{narrow}", TensorType(narrow, ctx.shapes.proved(old).shape))
        (reader,) = edit.consumers(old)
        for i, tensor in enumerate(list(reader.inputs)):
            if tensor is old:
                edit.set_input(reader, i, new)
        replace_output(node, old, new)
