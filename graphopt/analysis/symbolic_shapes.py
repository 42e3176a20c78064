"""Shape rules: what an operator makes of the sizes of its inputs, where ONNX's own inference forgets symbols.

A rule returns the facts of the outputs that it knows, in order, or None to leave the node to ONNX's inference.
Rules must hold for every input for which ORT runs the node at all; what ORT refuses needs no answer.

A Reshape copies an input axis where its target says 0.  A computed target says so by accident where an axis is
empty, and gives an empty tensor of another shape than was meant.  That is left out of account where the target has
as many elements as the input by its symbols: `[n*t, 4] -> [n, t, 4]` is what comes out, whatever `t` is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import onnx

from graphopt.analysis.constants import Unknown
from graphopt.analysis.facts import Fact, Shape, Site
from graphopt.analysis.symbolic_expr import (
    Expr,
    Size,
    add,
    at_most,
    broadcast,
    ceil_divide,
    maximum,
    minimum,
    multiply,
    product,
    quotient,
    subtract,
)
from graphopt.analysis.symbolic_layers import BOOL, INT64, LAYERS, Facts, Rule, broadcast_shapes, first_like
from graphopt.tensors import numpy_dtype

_END = (1 << 31) - 1
"""From here on, a Slice goes to the end of an axis."""

_MEMORY = 1 << 47
"""Bytes that a process can address."""


def _same(site: Site) -> Facts:
    return first_like(site, site.shape())


def _only_first(site: Site) -> Facts:
    """The first output is as the first input; further ones are not known here."""
    return _same(site) if sum(not t.is_empty() for t in site.node.outputs) == 1 else None


def _tells(site: Site) -> Facts:
    return first_like(site, site.shape(), BOOL)


def _elementwise(site: Site) -> Facts:
    if site.opset < 8:  # until then with an attribute, or without broadcasting
        return None
    return first_like(site, broadcast_shapes([f.shape for f in site.inputs]))


def _comparison(site: Site) -> Facts:
    found = _elementwise(site)
    return found and [Fact(BOOL, found[0].shape)]


def _where(site: Site) -> Facts:
    return first_like(site, broadcast_shapes([f.shape for f in site.inputs]), site.fact(1).dtype)


def _cast(site: Site) -> Facts:
    target = site.attr("to", None)
    if isinstance(target, str):
        target = onnx.TensorProto.DataType.Value(target)
    return first_like(site, site.shape(), numpy_dtype(target)) if isinstance(target, int) else None


def _cast_like(site: Site) -> Facts:
    dtype = site.fact(1).dtype
    return None if dtype is None else first_like(site, site.shape(), dtype)


def _shape(site: Site) -> Facts:
    shape = site.shape()
    if shape is None:
        return [Fact(INT64, (site.fresh(),))]
    return [Fact(INT64, (len(shape[slice(*shape_range(site, len(shape)))]),))]


def shape_range(site: Site, rank: int) -> tuple[int, int]:
    """Return the first axis and the one behind the last that a Shape node gives."""
    start, end = int(site.attr("start", 0)), site.attr("end", None)
    start, end = (slice(start, end if end is None else int(end)).indices(rank))[:2]
    return start, end


def _size(_: Site) -> Facts:
    return [Fact(INT64, ())]


def _transpose(site: Site) -> Facts:
    shape = site.shape()
    if shape is None:
        perm = site.attr("perm", None)
        return first_like(site, None if perm is None else site.unknown_shape(len(perm)))
    perm = site.attr("perm", range(len(shape) - 1, -1, -1))
    return first_like(site, tuple(shape[p] for p in perm))


def _axis(site: Site, default: int, rank: int) -> int:
    return int(site.attr("axis", default)) % max(rank, 1)


def _concat(site: Site) -> Facts:
    shapes = [f.shape for f in site.inputs]
    first = next((s for s in shapes if s is not None), None)
    if first is None or "axis" not in site.node.attrs:
        return None
    axis = _axis(site, 1, len(first))
    known = [s for s in shapes if s is not None and len(s) == len(first)]
    sizes = [_agree([s[i] for s in known]) for i in range(len(first))]
    if len(known) < len(shapes):
        sizes[axis] = site.fresh()
    else:
        total: Size = 0
        for shape in known:
            total = add(total, shape[axis])
        sizes[axis] = total
    return first_like(site, tuple(sizes))


def _agree(sizes: Sequence[Size]) -> Size:
    """Return the size of axes that must be equal: a number if one is."""
    return next((s for s in sizes if isinstance(s, int)), sizes[0])


def _split(site: Site) -> Facts:
    shape, dtype = site.shape(), site.fact().dtype
    if shape is None:
        return None
    axis, count = _axis(site, 0, len(shape)), len(site.node.outputs)
    sizes = site.ints("split")
    parts: Sequence[Size]
    if isinstance(sizes, list) and len(sizes) == count:
        parts = sizes
    elif sizes is None:
        each = quotient(shape[axis], count)  # where it does not fit, the last part is smaller
        parts = [each] * count if each is not None else site.unknown_shape(count)
    else:
        parts = site.unknown_shape(count)
    return [Fact(dtype, (*shape[:axis], part, *shape[axis + 1 :])) for part in parts]


def _reshape(site: Site) -> Facts:
    target, source = site.values("shape"), site.shape()
    if isinstance(target, Unknown) or target is None:
        return first_like(site, _of_rank(site, site.shape(1)))
    return first_like(site, reshaped(site, source, list(target.flat)))


def _of_rank(site: Site, target: Shape) -> Shape:
    """Return a shape of which only the rank is known: the length of a vector of sizes."""
    if target is None or len(target) != 1 or not isinstance(target[0], int):
        return None
    return site.unknown_shape(target[0])


def reshaped(site: Site, source: Shape, target: Sequence[Size | None]) -> Shape:
    """Return the shape that Reshape gives for a target (None: an element of which nothing is known)."""
    copies = not site.attr("allowzero", 0)
    total = None if source is None else product(source)
    sizes: list[Size | None] = []
    for axis, wanted in enumerate(target):
        own = source[axis] if source is not None and axis < len(source) else None
        if wanted == 0 and copies:
            sizes.append(own)
        elif isinstance(wanted, int):
            sizes.append(wanted if wanted >= 0 else None)
        else:
            sizes.append(wanted if _means_itself(wanted, own, target, total) or not copies else None)
    missing = [i for i, size in enumerate(sizes) if size is None]
    if len(missing) == 1 and total is not None:
        rest = product(s for s in sizes if s is not None)
        if target[missing[0]] == -1 or at_most(1, rest):  # else the others may be 0, and it anything
            sizes[missing[0]] = quotient(total, rest)
    return tuple(site.fresh() if size is None else size for size in sizes)


def _means_itself(wanted: Size | None, own: Size | None, target: Sequence[Size | None], total: Size | None) -> bool:
    """Tell whether an element of a target surely is the size that comes out: not -1, and not a 0 that copies."""
    if wanted is None:
        return False
    if wanted == own or at_most(1, wanted):
        return True
    rest = [size for size in target if size is not None]
    if not at_most(0, wanted) or len(rest) < len(target) or total is None:
        return False
    if -1 in rest:
        return quotient(total, product(size for size in rest if size != -1)) is not None
    return product(rest) == total


def _flatten(site: Site) -> Facts:
    shape = site.shape()
    if shape is None:
        return first_like(site, site.unknown_shape(2))
    axis = int(site.attr("axis", 1))
    axis = axis + len(shape) if axis < 0 else axis
    return first_like(site, (product(shape[:axis]), product(shape[axis:])))


def _squeeze(site: Site) -> Facts:
    shape, axes = site.shape(), site.ints("axes")
    if shape is None or isinstance(axes, Unknown):
        return None
    if axes is None:
        if any(isinstance(d, Expr) for d in shape):
            return first_like(site, None)
        axes = [i for i, d in enumerate(shape) if d == 1]
    gone = {a % len(shape) for a in axes} if shape else set()
    return first_like(site, tuple(d for i, d in enumerate(shape) if i not in gone))


def _unsqueeze(site: Site) -> Facts:
    shape, axes = site.shape(), site.ints("axes")
    if shape is None or axes is None or isinstance(axes, Unknown):
        return None
    rank = len(shape) + len(axes)
    new = {a % rank for a in axes}
    left = iter(shape)
    return first_like(site, tuple(1 if i in new else next(left) for i in range(rank)))


def _gather(site: Site) -> Facts:
    data, indices = site.shape(), site.shape(1)
    if data is None or indices is None or not data:
        return None
    axis = _axis(site, 0, len(data))
    return first_like(site, (*data[:axis], *indices, *data[axis + 1 :]))


def _as_second(site: Site) -> Facts:
    return first_like(site, site.shape(1))


def _slice(site: Site) -> Facts:
    shape = site.shape()
    if shape is None:
        return None
    plan = slice_plan(site, len(shape))
    sizes: list[Size] = list(shape)
    if plan is None:
        return first_like(site, site.unknown_shape(len(shape)))
    for axis, (start, end, step) in plan.items():
        size = None
        if start is not None and end is not None and step is not None:
            far = _far(site, axis)
            size = _sliced(shape[axis], _near(start, far), _near(end, far), step)
        sizes[axis] = site.fresh() if size is None else size
    return first_like(site, tuple(sizes))


Cut: TypeAlias = tuple[Size | None, Size | None, int | None]


def slice_plan(site: Site, rank: int) -> dict[int, Cut] | None:
    """Return per sliced axis (start, end, step), each None where unknown; None where not even the axes are known."""
    starts, ends = site.values("starts"), site.values("ends")
    axes, steps = site.ints("axes"), site.ints("steps")
    if isinstance(axes, Unknown):
        return None
    count = site.shape(1) if site.opset >= 10 else None
    if isinstance(starts, np.ndarray):
        number = starts.size
    elif axes is not None:
        number = len(axes)
    elif count is not None and len(count) == 1 and isinstance(count[0], int):
        number = count[0]
    else:
        return None
    axes = list(range(number)) if axes is None else axes
    return {
        axis % rank: (
            starts.flat[i] if isinstance(starts, np.ndarray) else None,
            ends.flat[i] if isinstance(ends, np.ndarray) else None,
            1 if steps is None else steps[i] if isinstance(steps, list) else None,
        )
        for i, axis in enumerate(axes)
    }


def _far(site: Site, axis: int) -> int:
    """Return a place that no axis reaches: END, or less where so many elements would not fit into any memory."""
    fact = site.fact()
    others = [d for i, d in enumerate(fact.shape or ()) if i != axis]
    if fact.dtype is None or not all(isinstance(d, int) and d > 0 for d in others):
        return _END
    return min(_END, _MEMORY // (math.prod(d for d in others if isinstance(d, int)) * fact.dtype.itemsize) + 1)


def _near(place: Size, far: int) -> Size:
    return _END if isinstance(place, int) and place >= far else place


def _sliced(size: Size, start: Size, end: Size, step: int) -> Size | None:
    if step < 0:
        if isinstance(size, int) and isinstance(start, int) and isinstance(end, int):
            return len(range(size)[start:end:step]) if end >= -size else len(range(size)[start::step])
        return size if step == -1 and start == -1 and isinstance(end, int) and end < -(1 << 31) else None
    first, last = _place(size, start), _place(size, end)
    if first is None or last is None or step == 0:
        return None
    length = subtract(last, first)
    length = maximum(length, 0)
    return length if step == 1 else ceil_divide(length, step)


def _place(size: Size, place: Size) -> Size | None:
    """Return where a Slice begins or ends, counted from the left and within the axis."""
    if at_most(0, place):
        return size if isinstance(place, int) and place >= _END else minimum(place, size)
    if isinstance(place, int):
        return 0 if place < -(1 << 31) + 1 else maximum(add(size, place), 0)
    if at_most(add(place, 1), 0):
        return maximum(add(size, place), 0)
    return None


def _expand(site: Site) -> Facts:
    target, source = site.values("shape"), site.shape()
    if target is None or isinstance(target, Unknown) or source is None:
        return None
    wanted = list(target.flat)
    rank = max(len(source), len(wanted))
    result: list[Size] = []
    for axis in range(-rank, 0):
        own = source[axis] if -axis <= len(source) else 1
        asked = wanted[axis] if -axis <= len(wanted) else 1
        size = None if asked is None or (isinstance(asked, int) and asked < 0) else broadcast(own, asked)
        result.append(site.fresh() if size is None else size)
    return first_like(site, tuple(result))


def _tile(site: Site) -> Facts:
    repeats, shape = site.values("repeats"), site.shape()
    if shape is None or not isinstance(repeats, np.ndarray) or repeats.size != len(shape):
        return first_like(site, None if shape is None else site.unknown_shape(len(shape)))
    pairs = zip(shape, repeats.flat, strict=True)
    return first_like(site, tuple(site.fresh() if r is None else multiply(d, r) for d, r in pairs))


def _pad(site: Site) -> Facts:
    shape, pads, axes = site.shape(), site.values("pads"), site.ints("axes")
    if shape is None:
        return None
    if not isinstance(pads, np.ndarray) or isinstance(axes, Unknown):
        return first_like(site, site.unknown_shape(len(shape)))
    chosen = list(range(len(shape))) if axes is None else [a % len(shape) for a in axes]
    if pads.size != 2 * len(chosen):
        return None
    sizes = list(shape)
    amounts = list(pads.flat)
    for i, axis in enumerate(chosen):
        before, after = amounts[i], amounts[i + len(chosen)]
        unknown = before is None or after is None
        sizes[axis] = site.fresh() if unknown else add(shape[axis], add(before, after))
    return first_like(site, tuple(sizes))


def _resize(site: Site) -> Facts:
    shape = site.shape()
    if shape is None or site.opset < 11:
        return None
    axes = resized_axes(site, len(shape))
    sizes = list(shape)
    wanted = site.fact(3).values if site.has(3) else None
    scales = site.fact(2).known_values if not site.has(3) else None
    if site.attr("keep_aspect_ratio_policy", "stretch") != "stretch" or crops(site):
        return first_like(site, site.unknown_shape(len(shape)))
    if wanted is not None and wanted.size == len(axes):
        for axis, size in zip(axes, wanted.flat, strict=True):
            sizes[axis] = site.fresh() if size is None else size
        return first_like(site, tuple(sizes))
    if scales is None or scales.size != len(axes):
        return first_like(site, site.unknown_shape(len(shape)))
    for axis, scale in zip(axes, scales.flat, strict=True):
        whole = float(scale).is_integer() and scale > 0
        if isinstance(shape[axis], int) and not whole:
            return None
        sizes[axis] = multiply(shape[axis], int(scale)) if whole else site.fresh()
    return first_like(site, tuple(sizes))


def resized_axes(site: Site, rank: int) -> list[int]:
    """Return the axes that a Resize's sizes or scales are of."""
    chosen = site.attr("axes", None)
    return list(range(rank)) if chosen is None else [int(a) % rank for a in chosen]


def crops(site: Site) -> bool:
    """Tell whether a Resize takes a part of its input only."""
    return bool(site.attr("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize")


def _constant_of_shape(site: Site) -> Facts:
    value = site.node.attrs.get("value")
    dtype = np.dtype(np.float32) if value is None else getattr(value, "dtype", None)
    target = site.fact().values
    if target is None:
        return [Fact(dtype, _of_rank(site, site.shape()))]
    return [Fact(dtype, tuple(site.fresh() if size is None else size for size in target.flat))]


def _range(site: Site) -> Facts:
    bounds = [f.values for f in site.inputs]
    dtype = site.fact().dtype
    if any(b is None for b in bounds) or dtype is None or dtype.kind not in "iu":
        return [Fact(dtype, (site.fresh(),))]
    start, limit, delta = (b.reshape(-1)[0] for b in bounds if b is not None)
    if start is None or limit is None or not isinstance(delta, int) or delta == 0:
        return [Fact(dtype, (site.fresh(),))]
    length = subtract(limit, start) if delta > 0 else subtract(start, limit)
    return [Fact(dtype, (maximum(ceil_divide(length, abs(delta)), 0),))]


def _reduce(site: Site) -> Facts:
    axes, shape = site.ints("axes"), site.shape()
    keep = bool(site.attr("keepdims", 1))
    if shape is None:
        return None
    if isinstance(axes, Unknown):
        return first_like(site, site.unknown_shape(len(shape)) if keep else None)
    if not axes:
        if site.attr("noop_with_empty_axes", 0):
            return _same(site)
        axes = list(range(len(shape)))
    return first_like(site, _reduced(shape, axes, keep=keep))


def _reduced(shape: tuple[Size, ...], axes: Sequence[int], *, keep: bool) -> Shape:
    gone = {a % len(shape) for a in axes} if shape else set()
    return tuple(1 if i in gone else d for i, d in enumerate(shape) if keep or i not in gone)


def _arg(site: Site) -> Facts:
    shape = site.shape()
    if shape is None:
        return first_like(site, None, INT64)
    found = _reduced(shape, [int(site.attr("axis", 0))], keep=bool(site.attr("keepdims", 1)))
    return first_like(site, found, INT64)


def _dropout(site: Site) -> Facts:
    return [Fact(site.fact().dtype, site.shape()), Fact(BOOL if site.opset >= 10 else None, site.shape())][
        : len(site.node.outputs)
    ]


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(
        (
            "Identity", "Relu", "LeakyRelu", "Elu", "Selu", "Celu", "ThresholdedRelu", "Sigmoid", "HardSigmoid",
            "HardSwish", "Tanh", "Softplus", "Softsign", "Gelu", "Mish", "Swish", "Erf", "Exp", "Log", "Sqrt", "Abs",
            "Neg", "Reciprocal", "Floor", "Ceil", "Round", "Sign", "Sin", "Cos", "Tan", "Asin", "Acos", "Atan",
            "Sinh", "Cosh", "Asinh", "Acosh", "Atanh", "Not", "BitwiseNot", "Softmax", "LogSoftmax", "Hardmax",
            "CumSum", "Trilu", "LpNormalization", "LRN", "InstanceNormalization", "GroupNormalization",
            "MeanVarianceNormalization", "PRelu", "Clip", "ScatterND", "ScatterElements", "Shrink",
        ),
        _same,
    ),
    **dict.fromkeys(("BatchNormalization", "LayerNormalization", "RMSNormalization"), _only_first),
    **dict.fromkeys(("IsNaN", "IsInf"), _tells),
    **dict.fromkeys(
        (
            "Add", "Sub", "Mul", "Div", "Mod", "Max", "Min", "Sum", "Mean", "And", "Or", "Xor", "BitShift",
            "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Pow",
        ),
        _elementwise,
    ),
    **dict.fromkeys(("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"), _comparison),
    **dict.fromkeys(
        (
            "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2",
            "ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare",
        ),
        _reduce,
    ),
    **dict.fromkeys(("ArgMax", "ArgMin"), _arg),
    "CastLike": _cast_like,
    "Where": _where, "Cast": _cast, "Shape": _shape, "Size": _size, "Transpose": _transpose, "Concat": _concat,
    "Split": _split, "Reshape": _reshape, "Flatten": _flatten, "Squeeze": _squeeze, "Unsqueeze": _unsqueeze,
    "Gather": _gather, "GatherElements": _as_second, "Slice": _slice, "Expand": _expand, "Tile": _tile, "Pad": _pad,
    "Resize": _resize, "ConstantOfShape": _constant_of_shape, "Range": _range,
    "Dropout": _dropout, **LAYERS,
}  # fmt: skip
"""Operator -> its rule."""
