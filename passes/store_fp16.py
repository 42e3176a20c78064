"""Weights stored as float16 and cast back before they are used: half the bytes on disk, computing as before.

    f(x, W)  ->  f(x, Cast(float16(W), float32))

ONNX Runtime folds the Casts when it loads the model (unless its optimisations are off), so that what runs, and how
fast, is the same but for the rounding of the weights: 2^-11 of each, relative.  `convert-fp16` is the one that
computes in float16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from graphopt.analysis.constants import array_of, refers
from graphopt.analysis.shapes import TensorType
from graphopt.base import Change, Context, Pass
from graphopt.edit import Edit, declare, drop_declared, make_node, replace_output, replace_uses
from graphopt.half import FEW_DIGITS, FLOAT, LARGEST
from graphopt.importer import origin
from graphopt.names import matches
from graphopt.ops import is_standard
from graphopt.registry import register

from .half_islands import half_of, peak_of
from .new_nodes import Maker

_CAST_OPSET = 6
"""Operator set from which Cast names its type by number."""


@register
@dataclass(frozen=True)
class StoreFp16(Pass):
    """Store float32 weights as float16, with a Cast that ONNX Runtime folds at load: half the size, the same speed.

    Lossy, keeps the signature.  Initializers and Constant nodes of at least `least` elements; `only` and `skip` are
    globs of their names.  Refuses weights that float16 does not hold.  The last pass to run: others want weights that
    are constants, and folding constants takes it back.  Source: IEEE 754 binary16.
    """

    name: ClassVar[str] = "store-fp16"
    exactness: ClassVar[Any] = "lossy"
    stage: ClassVar[Any] = "lowering"

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    least: int = 256

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose one change per weight: an initializer, or a Constant node."""
        if int(graph.opset or ctx.model.opset) < _CAST_OPSET:
            return
        held = origin(graph)
        with Edit(graph) as edit:
            for constant in list(held.declared if held is not None and ctx.holds_initializers(graph) else ()):
                if isinstance(constant, gs.Constant) and constant.dtype == FLOAT and self._asked(edit, constant):
                    yield _change(constant, lambda c=constant: _cast_initializer(edit, ctx, c))  # type: ignore[misc]
            for node in [n for n in graph.nodes if is_standard(n, "Constant") and not refers(n)]:
                if ctx.shapes.of(node.outputs[0]).dtype == FLOAT and self._asked(edit, node.outputs[0]):
                    yield _change(node.outputs[0], lambda n=node: _cast_node(edit, ctx, n))  # type: ignore[misc]

    def _asked(self, edit: Edit, constant: gs.Tensor) -> bool:
        """Tell whether a constant is a weight that was asked for."""
        values = array_of(constant)
        if values is None or values.size < max(self.least, 1) or edit.is_output(constant) or not constant.outputs:
            return False
        return matches(constant.name, self.only, self.skip)


def _change(constant: gs.Tensor, apply: Callable[[], None]) -> Change:
    values = array_of(constant)
    assert values is not None  # or it were not asked for
    peak = peak_of(values)
    what = "store as float16"
    if peak > LARGEST:
        return Change(constant.name, what, f"it holds {peak:.3g}, beyond {LARGEST:.0f}")
    if 0 < peak < FEW_DIGITS:
        return Change(constant.name, what, f"it is at most {peak:.3g}, of which float16 keeps few digits")
    return Change(constant.name, what, f"{values.nbytes:,} bytes become {values.nbytes // 2:,}", apply)


def _cast_initializer(edit: Edit, ctx: Context, constant: gs.Constant) -> None:
    narrow = ctx.constant(f"{constant.name}/float16", half_of(np.asarray(constant.values)))
    declare(edit.graph, narrow)
    wide = gs.Variable(constant.name, FLOAT, list(constant.shape))  # under its name: that keeps its meaning
    ctx.shapes.learn(wide, TensorType(FLOAT, tuple(constant.shape)))
    replace_uses(constant, wide)
    drop_declared(edit.graph, {id(constant)})
    edit.insert_after(None, [_cast(ctx, narrow, wide)])


def _cast_node(edit: Edit, ctx: Context, node: gs.Node) -> None:
    wide = node.outputs[0]
    values = half_of(np.asarray(array_of(wide)))
    narrow = Maker(edit, ctx).tensor(f"{wide.name}/float16", TensorType(values.dtype, tuple(values.shape)))
    node.attrs.clear()
    node.attrs["value"] = gs.Constant("", values)
    replace_output(node, wide, narrow)
    edit.insert_after(node, [_cast(ctx, narrow, wide)])


def _cast(ctx: Context, narrow: gs.Tensor, wide: gs.Tensor) -> gs.Node:
    name = ctx.fresh_name(f"{wide.name}/Cast")
    return make_node("Cast", [narrow], [wide], {"to": int(TensorProto.FLOAT)}, name=name)
