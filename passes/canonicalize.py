"""One spelling for what exporters write in many, so that one pattern finds them all.

    Constant node                ->  initializer (function bodies and IR 3 subgraphs keep their nodes)
    x - c                        ->  x + (-c)
    x / c                        ->  x * (1/c)           floats; see `_reciprocal` for when
    c + x, c * x, max(c, x) …    ->  x + c, x * c, max(x, c) …
    Sum(x, y)                    ->  x + y
    CastLike(x, y)               ->  Cast(x)             type of y known
    Squeeze(x), negative axes    ->  explicit axes in order
    Reshape(x, [0, -1]), Squeeze(x, [2, 3]) …  ->  Flatten(x, axis=1)    where they are the same
    Transpose(x)                 ->  Transpose(x, perm)

`x * (1/c)` differs from `x / c` by one rounding.  Where a step follows (Floor, a Cast to integers, a comparison),
such a difference may become a whole step: there only reciprocals that are exact (powers of two) are taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import (
    Unknown,
    array_of,
    is_constant,
    node_values,
    parameter,
    refers,
)
from graphopt.analysis.steps import step_behind
from graphopt.base import Change, Context, Pass
from graphopt.edit import Edit, become_constant, label, turn_into
from graphopt.ops import COMMUTATIVE, MOVED_TO_INPUT, SPARSE, is_standard
from graphopt.registry import register
from graphopt.tensors import LazySparse, is_float, onnx_dtype

Array = np.ndarray[Any, Any]

_LARGE = 1024
"""Bytes above which a shared constant is not copied."""


@register
@dataclass(frozen=True)
class Canonicalize(Pass):
    """Write constants, subtractions, divisions, reshapes and more in one spelling.

    Exact: only `x / c` changes roundings, by one.  Keeps the signature.  Refuses divisions whose reciprocal is
    not a normal number, or not exact before a step function, and copies of large constants that others use.
    """

    name: ClassVar[str] = "canonicalize"

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose one change per node and rule."""
        with Edit(graph) as edit:
            site = _Site(graph, ctx, edit)
            for node in list(graph.nodes):
                if not is_standard(node) or edit.removed(node):
                    continue
                for rule in _RULES.get(node.op, ()):
                    yield from rule(site, node)


@dataclass
class _Site:
    """What the rules share within one graph."""

    graph: gs.Graph
    ctx: Context
    edit: Edit
    derived: dict[tuple[str, int], tuple[gs.Tensor, gs.Constant]] = field(default_factory=dict)

    @property
    def opset(self) -> int:
        return int(self.graph.opset)

    def shape(self, tensor: gs.Tensor) -> tuple[int | str | None, ...] | None:
        return self.ctx.shapes.proved(tensor).shape

    def derive(self, kind: str, source: gs.Tensor, values: Array) -> gs.Constant:
        """Return the constant made of another by `kind`, the same one for all that ask."""
        known = self.derived.get((kind, id(source)))
        if known is None:
            known = source, self.ctx.constant(f"{source.name}/{kind}", values)
            self.derived[kind, id(source)] = known
        return known[1]


Rule = Callable[[_Site, gs.Node], Iterator[Change]]


def _constant_node(site: _Site, node: gs.Node) -> Iterator[Change]:
    values = node_values(node)
    tensor = node.outputs[0]
    if values is None or not site.ctx.holds_initializers(site.graph):
        return
    if isinstance(values, LazySparse):
        if not all(SPARSE in site.ctx.model.metadata(user) for user in tensor.outputs):
            return  # saving makes only those weights sparse again whose layers say so
        values = values.load()

    def apply() -> None:
        become_constant(site.graph, tensor, values)
        site.edit.remove(node)

    yield Change(label(node), "Constant node -> initializer", "one spelling for constants", apply)


def _constants_right(site: _Site, node: gs.Node) -> Iterator[Change]:
    if len(node.inputs) != 2 or site.opset < 7:
        return
    left, right = node.inputs
    if not is_constant(left) or is_constant(right):
        return

    def apply() -> None:
        list.__setitem__(node.inputs, 0, right)
        list.__setitem__(node.inputs, 1, left)

    yield Change(label(node), f"{node.op}(constant, x) -> {node.op}(x, constant)", "constants on the right", apply)


def _subtraction(site: _Site, node: gs.Node) -> Iterator[Change]:
    x, c = node.inputs
    values = _constant_operand(site, x, c)
    if values is None or not (is_float(values.dtype) or values.dtype in (np.int32, np.int64)):
        return
    yield from _with_constant(site, node, "Add", "negated", values, np.negative)


def _division(site: _Site, node: gs.Node) -> Iterator[Change]:
    x, c = node.inputs
    values = _constant_operand(site, x, c)
    if values is None or not is_float(values.dtype):
        return
    inverse, exact, reason = _reciprocal(values)
    if inverse is not None and not exact:
        step = step_behind(node.outputs[0])
        if step is not None:
            reason = f"the reciprocal is rounded and {step.op} '{label(step)}' may make a step of that"
    if inverse is None or reason:
        yield Change(label(node), "Div by a constant -> Mul", reason)
        return
    yield from _with_constant(site, node, "Mul", "inverse", values, lambda _: inverse)


def _constant_operand(site: _Site, x: gs.Tensor, c: gs.Tensor) -> Array | None:
    """Return the constant right operand of a binary node, unless the left one is constant too."""
    if site.opset < 7 or is_constant(x) or not is_constant(c):
        return None
    return array_of(c)


def _with_constant(
    site: _Site, node: gs.Node, op: str, kind: str, values: Array, derive: Callable[[Array], Array]
) -> Iterator[Change]:
    """Propose `op` with a constant derived from the right operand in place of the node's own operator."""
    c = node.inputs[1]
    what = f"{node.op} by a constant -> {op}"
    if values.nbytes > _LARGE and site.edit.sole_consumer(c) is None:
        yield Change(label(node), what, f"constant '{c.name}' ({values.nbytes} bytes) is used elsewhere too")
        return

    def apply() -> None:
        new = site.derive(kind, c, np.asarray(derive(values), values.dtype).reshape(values.shape))
        turn_into(node, op)
        site.edit.set_input(node, 1, new)

    yield Change(label(node), what, "one spelling for affine maps", apply)


def _reciprocal(values: Array) -> tuple[Array | None, bool, str]:
    """Return (1/values, whether it is exact, why it must not be used).

    It must be a normal number (neither infinite, zero nor denormal); below 32 bits it must be exact, too, since
    one rounding there is more than the exactness of a pass allows.
    """
    wide = values.astype(np.float64)
    if not np.isfinite(wide).all() or (wide == 0).any():
        return None, False, "the divisor has a zero, infinite or NaN element"
    limits = _float_info(values.dtype)
    inverse = 1.0 / wide
    if (np.abs(inverse) < limits[0]).any() or (np.abs(inverse) > limits[1]).any():
        return None, False, "the reciprocal is too small or too large for the type"
    exact = bool((np.abs(np.frexp(wide)[0]) == 0.5).all())
    if not exact and values.dtype.itemsize < 4:
        return None, False, f"the reciprocal is not exact in {values.dtype}"
    return inverse.astype(values.dtype), exact, ""


def _float_info(dtype: np.dtype[Any]) -> tuple[float, float]:
    """Return the smallest normal and the largest number of a float type."""
    info = ml_dtypes.finfo(dtype)
    return float(info.smallest_normal), float(info.max)


def _sum_of_two(site: _Site, node: gs.Node) -> Iterator[Change]:
    if len(node.inputs) == 2 and site.opset >= 8:
        yield Change(label(node), "Sum of two -> Add", "one spelling", lambda: turn_into(node, "Add"))


def _cast_like(site: _Site, node: gs.Node) -> Iterator[Change]:
    dtype = site.ctx.shapes.proved(node.inputs[1]).dtype
    if dtype is None or refers(node):
        return

    def apply() -> None:
        turn_into(node, "Cast", {**node.attrs, "to": onnx_dtype(dtype)})
        site.edit.trim_inputs(node, 1)

    yield Change(label(node), "CastLike -> Cast", f"the type is known: {dtype}", apply)


def _squeeze(site: _Site, node: gs.Node) -> Iterator[Change]:
    axes = parameter(node, "axes", site.opset)
    shape = site.shape(node.inputs[0])
    if shape is None or isinstance(axes, Unknown):
        return
    if axes is None:
        if not all(isinstance(d, int) for d in shape):
            return
        wanted = [i for i, d in enumerate(shape) if d == 1]
    else:
        wanted = sorted(int(a) % len(shape) for a in axes.reshape(-1)) if shape else []
    if wanted == [2, 3] and len(shape) == 4 and _flatten_takes(site, node):
        yield _to_flatten(site, node)
    elif axes is None or list(axes.reshape(-1)) != wanted:
        yield _set_axes(site, node, wanted)


def _unsqueeze(site: _Site, node: gs.Node) -> Iterator[Change]:
    axes = parameter(node, "axes", site.opset)
    shape = site.shape(node.inputs[0])
    if shape is None or axes is None or isinstance(axes, Unknown):
        return
    rank = len(shape) + axes.size
    wanted = sorted(int(a) % rank for a in axes.reshape(-1))
    if list(axes.reshape(-1)) != wanted:
        yield _set_axes(site, node, wanted)


def _set_axes(site: _Site, node: gs.Node, axes: Sequence[int]) -> Change:
    def apply() -> None:
        if site.opset < MOVED_TO_INPUT[node.op, "axes"][0]:
            node.attrs["axes"] = list(axes)
        else:
            name = f"{node.outputs[0].name}/axes"
            site.edit.set_input(node, 1, site.ctx.constant(name, np.array(axes, np.int64)))

    return Change(label(node), f"{node.op} axes -> {list(axes)}", "explicit, from the left, in order", apply)


def _flatten_takes(site: _Site, node: gs.Node) -> bool:
    """Tell whether Flatten has this node's type: before opset 13 it has fewer, and never the small floats."""
    dtype = site.ctx.shapes.proved(node.inputs[0]).dtype
    return site.opset >= 13 and dtype is not None and dtype.kind != "V"


def _to_flatten(site: _Site, node: gs.Node) -> Change:
    def apply() -> None:
        turn_into(node, "Flatten", {"axis": 1})
        site.edit.trim_inputs(node, 1)

    return Change(label(node), f"{node.op} -> Flatten(axis=1)", "one spelling", apply)


def _flatten(site: _Site, node: gs.Node) -> Iterator[Change]:
    axis, shape = node.attrs.get("axis", 1), site.shape(node.inputs[0])
    if shape is None or not isinstance(axis, int) or axis >= 0:
        return

    def apply() -> None:
        node.attrs["axis"] = axis + len(shape)

    yield Change(label(node), f"Flatten axis {axis} -> {axis + len(shape)}", "axes from the left", apply)


def _reshape(site: _Site, node: gs.Node) -> Iterator[Change]:
    target = parameter(node, "shape", site.opset)
    shape = site.shape(node.inputs[0])
    if not isinstance(target, np.ndarray) or target.shape != (2,) or shape is None or len(shape) < 2:
        return
    if refers(node) or not _flatten_takes(site, node):
        return
    if _flattens(shape, [int(d) for d in target], bool(node.attrs.get("allowzero", 0))):
        yield _to_flatten(site, node)


def _flattens(shape: Sequence[int | str | None], target: Sequence[int], allowzero: bool) -> bool:
    """Tell whether Reshape of `shape` to the pair `target` keeps the first axis and joins the others."""
    first, second = target
    tail = shape[1:]
    sizes = [d for d in tail if isinstance(d, int)]
    width = math.prod(sizes) if len(sizes) == len(tail) else None
    keeps = (first == 0 and not allowzero) or (first > 0 and first == shape[0])
    joins = second > 0 and second == width
    if keeps:  # -1 is refused by Reshape when an axis is empty, by Flatten never
        return second == -1 or joins
    return first == -1 and joins


def _transpose(site: _Site, node: gs.Node) -> Iterator[Change]:
    shape = site.shape(node.inputs[0])
    if "perm" in node.attrs or shape is None:
        return
    perm = list(reversed(range(len(shape))))

    def apply() -> None:
        node.attrs["perm"] = perm

    yield Change(label(node), f"Transpose -> Transpose(perm={perm})", "explicit", apply)


_RULES: Mapping[str, tuple[Rule, ...]] = {
    "Constant": (_constant_node,),
    "Sub": (_subtraction,),
    "Div": (_division,),
    "Sum": (_sum_of_two,),
    "CastLike": (_cast_like,),
    "Squeeze": (_squeeze,),
    "Unsqueeze": (_unsqueeze,),
    "Flatten": (_flatten,),
    "Reshape": (_reshape,),
    "Transpose": (_transpose,),
    **dict.fromkeys(COMMUTATIVE - {"Sum", "Mean"}, (_constants_right,)),
}
