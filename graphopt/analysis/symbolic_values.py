"""Value rules: what small integer tensors hold, element by element, as numbers and expressions of sizes.

    Shape(x)[2] * 2 + 1  ->  2*h + 1          Concat(Shape(x)[:1], [-1])  ->  [n, -1]

A rule gives an object array of the output's shape, whose elements are numbers, bools, `Expr`, or None for what is
not known.  Sizes are taken to fit int32 (a Cast to it keeps them), and to be exact in float32 where they pass
through floats (below 2**24).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import Unknown
from graphopt.analysis.facts import Array, Fact, Site, objects
from graphopt.analysis.symbolic_expr import (
    Expr,
    Size,
    TooComplexError,
    add,
    at_most,
    equal,
    floor_divide,
    less,
    maximum,
    minimum,
    modulo,
    multiply,
    negative,
    quotient,
    subtract,
)
from graphopt.analysis.symbolic_shapes import shape_range, slice_plan

Element: TypeAlias = Any
"""int, float, bool, `Expr`, or None where not known."""

Rule: TypeAlias = Callable[[Site, Fact], Array | None]


def _array(shape: tuple[int, ...], elements: list[Element]) -> Array:
    found = np.empty(len(elements), object)
    found[:] = elements
    return found.reshape(shape)


def _of_each(function: Callable[..., Element]) -> Rule:
    """Return the rule of an elementwise operator, from what it does to elements (never None)."""

    def apply(*elements: Element) -> Element:
        if any(e is None for e in elements):
            return None
        try:
            return function(*elements)
        except TooComplexError:
            return None

    def rule(site: Site, out: Fact) -> Array | None:
        inputs = [f.values for f in site.inputs]
        if any(v is None for v in inputs) or out.static is None:
            return None
        arrays = np.broadcast_arrays(*[v for v in inputs if v is not None])
        return _array(out.static, [apply(*elements) for elements in zip(*(a.flat for a in arrays), strict=True)])

    return rule


def _folded(function: Callable[[Element, Element], Element]) -> Rule:
    """Return the rule of an operator that takes any number of operands."""

    def of_all(first: Element, *others: Element) -> Element:
        for other in others:
            first = function(first, other)
            if first is None:
                return None
        return first

    return _of_each(of_all)


def _exact(function: Callable[[Any, Any], Size]) -> Callable[[Element, Element], Element]:
    """Return an integer operation that leaves floats alone: rounding is not followed."""

    def apply(a: Element, b: Element) -> Element:
        return function(_whole(a), _whole(b)) if _whole(a) is not None and _whole(b) is not None else None

    return apply


def _whole(value: Element) -> Any:
    """Return a number as an integer or expression, None where it is neither."""
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < 1 << 53 else None
    return value


def _divide(site: Site, out: Fact) -> Array | None:
    floating = out.dtype is not None and out.dtype.kind == "f"

    def divided(a: Element, b: Element) -> Element:
        a, b = _whole(a), _whole(b)
        if a is None or b is None or b == 0:
            return None
        exact = quotient(a, b)
        if exact is not None or floating:
            return exact
        return floor_divide(a, b) if at_most(0, a) and at_most(1, b) else _truncated(a, b)

    return _of_each(divided)(site, out)


def _truncated(a: Element, b: Element) -> Element:
    """Return a / b rounded towards zero, for numbers."""
    if isinstance(a, Expr) or isinstance(b, Expr):
        return None
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _modulo(site: Site, out: Fact) -> Array | None:
    def rest(a: Element, b: Element) -> Element:
        if isinstance(a, float) or isinstance(b, float) or b == 0:
            return None
        return modulo(a, b) if not site.attr("fmod", 0) or (at_most(0, a) and at_most(1, b)) else None

    return _of_each(rest)(site, out)


def _power(a: Element, b: Element) -> Element:
    if not isinstance(b, int) or not 0 <= b <= 4 or isinstance(a, float):
        return None
    total: Size = 1
    for _ in range(b):
        total = multiply(total, a)
    return total


def _compared(function: Callable[[Any, Any], bool | None]) -> Rule:
    def tell(a: Element, b: Element) -> Element:
        if isinstance(a, bool) and isinstance(b, bool):
            return a == b if function is equal else None
        a, b = _whole(a), _whole(b)
        return None if a is None or b is None else function(a, b)

    return _of_each(tell)


def _not_above(a: Size, b: Size) -> bool | None:
    found = less(b, a)
    return None if found is None else not found


def _logical(decides: bool) -> Rule:
    """Return the rule of And (False decides) or Or (True decides): one operand may be enough."""

    def rule(site: Site, out: Fact) -> Array | None:
        if out.static is None:
            return None
        inputs = [np.full(out.static, None, object) if f.values is None else f.values for f in site.inputs]
        pairs = zip(*(np.broadcast_to(v, out.static).flat for v in inputs), strict=True)
        return _array(out.static, [_decided(pair, decides=decides) for pair in pairs])

    return rule


def _decided(pair: tuple[Element, ...], *, decides: bool) -> Element:
    if decides in pair:
        return decides
    return None if None in pair else not decides


def _where(site: Site, out: Fact) -> Array | None:
    condition, x, y = (f.values for f in site.inputs)
    if condition is None or out.static is None:
        return None
    parts = [np.broadcast_to(condition, out.static)]
    parts += [np.broadcast_to(np.full((), None, object) if v is None else v, out.static) for v in (x, y)]

    def choose(c: Element, a: Element, b: Element) -> Element:
        if c is None:
            return a if a is not None and type(a) is type(b) and a == b else None
        return a if c else b

    return _array(out.static, [choose(*e) for e in zip(*(p.flat for p in parts), strict=True)])


def _cast(site: Site, out: Fact) -> Array | None:
    values, dtype = site.fact().values, out.dtype
    if values is None or dtype is None:
        return None

    def cast(value: Element) -> Element:
        if value is None or isinstance(value, Expr):
            return value if dtype.kind != "b" and dtype.itemsize >= 4 else None
        if isinstance(value, float) and dtype.kind in "iu":
            return int(value) if abs(value) < 1 << 31 else None
        try:
            return np.array(value).astype(dtype).item()
        except (OverflowError, ValueError):
            return None

    return _array(values.shape, [cast(v) if dtype.kind in "iubf" else None for v in values.flat])


def _shape(site: Site, out: Fact) -> Array | None:
    shape = site.shape()
    if shape is None:
        return None
    start, end = shape_range(site, len(shape))
    return _array(out.static or (0,), list(shape[start:end]))


def _size(site: Site, _: Fact) -> Array | None:
    shape = site.shape()
    return None if shape is None else _array((), [_product(list(shape))])


def _product(elements: list[Element]) -> Element:
    total: Element = 1
    for element in elements:
        if element is None or isinstance(element, float):
            return None
        total = multiply(total, element)
    return total


def _same_elements(site: Site, out: Fact) -> Array | None:
    """The elements in their order, in another shape."""
    values, shape = site.fact().values, out.static
    return None if values is None or shape is None else values.reshape(shape)


def _transpose(site: Site, _: Fact) -> Array | None:
    values = site.fact().values
    return None if values is None else values.transpose(site.attr("perm", None))


def _gather(site: Site, _: Fact) -> Array | None:
    values, indices = site.fact().values, site.fact(1).known_values
    if values is None or indices is None or values.ndim == 0:
        return None
    axis = int(site.attr("axis", 0)) % values.ndim
    size = values.shape[axis]
    chosen = indices.astype(np.int64)
    if ((chosen < -size) | (chosen >= size)).any():
        return None
    return np.asarray(np.take(values, chosen % max(size, 1), axis=axis), object)


def _slice(site: Site, _: Fact) -> Array | None:
    values = site.fact().values
    plan = slice_plan(site, values.ndim) if values is not None and values.ndim else None
    if values is None or plan is None:
        return None
    cuts = [slice(None)] * values.ndim
    for axis, (start, end, step) in plan.items():
        if not isinstance(start, int) or not isinstance(end, int) or not step:
            return None
        size = values.shape[axis]
        stop = None if step < 0 and end < -size else end
        cuts[axis] = slice(start if step > 0 or start >= -size else -size - 1, stop, step)
    return values[tuple(cuts)]


def _concat(site: Site, out: Fact) -> Array | None:
    shape = out.static
    axis = int(site.attr("axis", 0))
    if shape is None:
        return None
    parts = [f.values if f.values is not None else _nothing(f) for f in site.inputs]
    if any(p is None for p in parts):
        return None
    return np.concatenate([p for p in parts if p is not None], axis=axis)


def _nothing(fact: Fact) -> Array | None:
    return None if fact.static is None else np.full(fact.static, None, object)


def _expand(site: Site, out: Fact) -> Array | None:
    values, shape = site.fact().values, out.static
    return None if values is None or shape is None else np.broadcast_to(values, shape)


def _tile(site: Site, _: Fact) -> Array | None:
    values, repeats = site.fact().values, site.fact(1).known_values
    return None if values is None or repeats is None else np.tile(values, [int(r) for r in repeats.flat])


def _constant_of_shape(site: Site, out: Fact) -> Array | None:
    value = site.node.attrs.get("value")
    if out.static is None:
        return None
    if value is None:
        return np.full(out.static, 0.0, object)
    if not isinstance(value, gs.Constant):
        return None
    return _array(out.static, [objects(np.asarray(value.values)).reshape(-1)[0]] * int(np.prod(out.static)))


def _range(site: Site, out: Fact) -> Array | None:
    if out.static is None or any(f.values is None for f in site.inputs):
        return None
    start, _, delta = (f.values.reshape(-1)[0] for f in site.inputs if f.values is not None)
    if start is None or not isinstance(delta, int) or isinstance(start, float):
        return None
    return _array(out.static, [add(start, i * delta) for i in range(out.static[0])])


def _reduced(function: Callable[[list[Element]], Element]) -> Rule:
    def rule(site: Site, out: Fact) -> Array | None:
        values, axes = site.fact().values, site.ints("axes")
        whole = axes is None or (isinstance(axes, list) and (not axes or (values is not None and values.ndim == 1)))
        if values is None or isinstance(axes, Unknown) or out.static is None or not whole or not values.size:
            return None
        if not axes and site.attr("noop_with_empty_axes", 0):
            return values
        return _array(out.static, [function(list(values.flat))])

    return rule


def _total(function: Callable[[Any, Any], Size]) -> Callable[[list[Element]], Element]:
    def over(elements: list[Element]) -> Element:
        if any(e is None or isinstance(e, float) for e in elements):
            return None
        total = elements[0]
        for element in elements[1:]:
            total = function(total, element)
        return total

    return over


def _rounded(function: Callable[[float], float]) -> Rule:
    return _of_each(lambda a: function(a) if isinstance(a, float) else a)


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("Identity", "Squeeze", "Unsqueeze", "Reshape", "Flatten"), _same_elements),
    "Add": _of_each(_exact(add)), "Sub": _of_each(_exact(subtract)), "Mul": _of_each(_exact(multiply)),
    "Div": _divide, "Mod": _modulo, "Pow": _of_each(_power), "Sum": _folded(_exact(add)),
    "Min": _folded(_exact(minimum)), "Max": _folded(_exact(maximum)),
    "Neg": _of_each(lambda a: -a if isinstance(a, float) else negative(a)),
    "Abs": _of_each(lambda a: abs(a) if not isinstance(a, Expr) else a if at_most(0, a) else None),
    "Floor": _rounded(np.floor), "Ceil": _rounded(np.ceil), "Round": _rounded(np.rint),
    "Equal": _compared(equal), "Less": _compared(less), "Greater": _compared(lambda a, b: less(b, a)),
    "LessOrEqual": _compared(_not_above), "GreaterOrEqual": _compared(lambda a, b: _not_above(b, a)),
    "And": _logical(decides=False), "Or": _logical(decides=True), "Not": _of_each(operator.not_),
    "CastLike": _cast,
    "Where": _where, "Cast": _cast, "Shape": _shape, "Size": _size, "Transpose": _transpose, "Gather": _gather,
    "Slice": _slice, "Concat": _concat, "Expand": _expand, "Tile": _tile, "ConstantOfShape": _constant_of_shape,
    "Range": _range, "ReduceProd": _reduced(_product), "ReduceSum": _reduced(_total(add)),
    "ReduceMax": _reduced(_total(maximum)), "ReduceMin": _reduced(_total(minimum)),
}  # fmt: skip
"""Operator -> its rule."""

SOURCES = frozenset({"Shape", "Size", "ConstantOfShape"})
"""Operators that tell values although no input's are followed."""


def within(values: Array, dtype: np.dtype[Any]) -> Array:
    """Forget numbers that the type cannot hold exactly: there the operator wraps around or rounds."""
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        least, most = int(limits.min), int(limits.max)
    elif dtype.kind == "f":
        most = 1 << np.finfo(dtype).nmant
        least = -most
    else:
        return values
    kept = [None if isinstance(v, int) and not least <= v <= most else v for v in values.flat]
    return _array(values.shape, kept)
