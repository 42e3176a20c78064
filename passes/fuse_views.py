"""Rules for views: what changes a tensor's shape, and not the order of its elements.

    view(view(x))                      ->  one view, or x           Reshape, Flatten, Squeeze, Unsqueeze
    Transpose(Transpose(x, p), q)      ->  Transpose(x, p[q])
    Transpose(x, p)                    ->  view(x)                  p moves only axes of size 1
    Unsqueeze(Reduce(x, keepdims=0))   ->  Reduce(x, keepdims=1)    over the same axes
    Squeeze(Reduce(x, keepdims=1))     ->  Reduce(x, keepdims=0)
    Shape(Transpose(x, p))             ->  Gather(Shape(x), p)

Sizes are monomials c·x₁·x₂… of a tensor's dynamic axes: -1 is a quotient of them, and whether a dynamic axis comes
out again at its own place (0), or is the only one that does not (-1), is plain to see.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from graphopt.matcher import NodeView
from graphopt.ops import REDUCTIONS
from graphopt.pattern import Op, Value
from graphopt.rewrite import Match, RefusedError, Rule

Size = tuple[int, tuple[int, ...]]
"""A size: factor, and the dynamic axes of the source whose product it is multiplied with (sorted, repeatable)."""

VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")

ONE: Size = (1, ())


def sizes_of(value: Value) -> list[Size] | None:
    """Return a tensor's sizes in terms of its own axes; None where the rank is unknown or an axis is empty."""
    shape = value.shape
    if shape is None or 0 in shape:
        return None
    return [(d, ()) if isinstance(d, int) else (1, (i,)) for i, d in enumerate(shape)]


def product(sizes: Sequence[Size]) -> Size:
    """Return the product of sizes."""
    return math.prod(s[0] for s in sizes), tuple(sorted(axis for s in sizes for axis in s[1]))


def quotient(whole: Size, part: Size) -> Size | None:
    """Return whole / part, None where that is no size of this form."""
    axes = list(whole[1])
    for axis in part[1]:
        if axis not in axes:
            return None
        axes.remove(axis)
    return None if part[0] == 0 or whole[0] % part[0] else (whole[0] // part[0], tuple(axes))


def numbers(found: Any) -> list[int] | None:
    """Return a constant parameter as a list, None where it is left out or computed."""
    if isinstance(found, int):
        return [found]
    if isinstance(found, list | tuple | np.ndarray):
        return [int(v) for v in np.asarray(found).reshape(-1)]
    return None


def viewed(node: NodeView, sizes: Sequence[Size]) -> list[Size] | None:
    """Return the sizes behind a view, None where they cannot be told."""
    op = node.node.op
    if op == "Flatten":
        axis = int(node.param("axis"))
        axis += len(sizes) if axis < 0 else 0
        return [product(sizes[:axis]), product(sizes[axis:])]
    if op == "Reshape":
        target = numbers(node.param("shape"))
        return None if target is None else reshaped(target, sizes, allowzero=bool(node.param("allowzero")))
    axes = numbers(node.param("axes"))
    if axes is None:
        return None
    if op == "Squeeze":
        gone = {a % len(sizes) for a in axes} if sizes else set()
        return [s for i, s in enumerate(sizes) if i not in gone]
    rank = len(sizes) + len(axes)
    new, rest = {a % rank for a in axes}, iter(sizes)
    return [ONE if i in new else next(rest) for i in range(rank)]


def reshaped(target: Sequence[int], sizes: Sequence[Size], *, allowzero: bool) -> list[Size] | None:
    """Return the sizes that Reshape to a target gives."""
    if 0 in target and (allowzero or (len(target) > len(sizes) and 0 in target[len(sizes) :])):
        return None
    known: list[Size] = [sizes[i] if t == 0 else (max(t, 1), ()) for i, t in enumerate(target)]
    if -1 in target:
        rest = quotient(product(sizes), product(known))
        if rest is None:
            return None
        known[target.index(-1)] = rest
    return known


def inserted(short: Sequence[Size], long: Sequence[Size]) -> list[int] | None:
    """Return the axes of size 1 by which `long` exceeds `short`, None where that is not the difference."""
    places, i = [], 0
    for j, size in enumerate(long):
        if i < len(short) and short[i] == size:
            i += 1
        elif size == ONE:
            places.append(j)
        else:
            return None
    return places if i == len(short) else None


def view(op: Op, x: Value, sizes: Sequence[Size], wanted: Sequence[Size], *, open_before: bool) -> Value:
    """Return `x` of `sizes` as one view of the `wanted` sizes.

    Args:
        op: makes the nodes.
        x: the tensor.
        sizes: its sizes.
        wanted: sizes of the result.
        open_before: whether a -1 beside dynamic axes was there before (it is refused when one of those is empty).

    Raises:
        RefusedError: no constant target says it.
    """
    if list(sizes) == list(wanted):
        return op.Identity(x)
    if places := inserted(sizes, wanted):
        return op.Unsqueeze(x, axes=places)
    if places := inserted(wanted, sizes):
        return op.Squeeze(x, axes=places)
    target = [
        size[0] if not size[1] else 0 if i < len(sizes) and size == sizes[i] else -1 for i, size in enumerate(wanted)
    ]
    if target.count(-1) > 1:
        raise RefusedError("more than one dynamic size would have to be computed")
    if -1 in target and 0 in target and not open_before:
        raise RefusedError("-1 beside a dynamic axis is refused where that is empty")
    return op.Reshape(x, np.asarray(target, np.int64))


def _views(op: Op, x: Value, name: str) -> Value:
    return op.any(*(getattr(op, kind)(x, name=name) for kind in VIEWS))


def _has_open(node: NodeView) -> bool:
    return node.node.op == "Reshape" and -1 in (numbers(node.param("shape")) or ())


class ViewOfView(Rule):
    """view(view(x)) -> one view, or x    Reshape, Flatten, Squeeze, Unsqueeze"""

    types = None
    min_opset = 5
    shared = True

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        return _views(op, _views(op, x, "inner"), "outer")

    @staticmethod
    def rewrite(op: Op, x: Value, m: Match) -> Value:
        inner, outer = m["inner"], m["outer"]
        sizes = sizes_of(x)
        between = None if sizes is None else viewed(inner, sizes)
        wanted = None if between is None else viewed(outer, between)
        if sizes is not None and wanted is not None:
            return view(op, x, sizes, wanted, open_before=_has_open(inner) or _has_open(outer))
        target = numbers(outer.param("shape")) if outer.node.op == "Reshape" else None
        if target is None or (0 in target and not outer.param("allowzero")):
            raise RefusedError("the shape behind both is not known well enough")
        again: Value = outer.again(x)
        return again


class TransposeOfTranspose(Rule):
    """Transpose(Transpose(x, p), q) -> Transpose(x, p[q])"""

    types = None
    shared = True

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        return op.Transpose(op.Transpose(x, name="inner"), name="outer")

    @staticmethod
    def rewrite(op: Op, x: Value, m: Match) -> Value:
        first, second = numbers(m["inner"].param("perm")), numbers(m["outer"].param("perm"))
        if first is None or second is None:
            raise RefusedError("a permutation is not stated")
        perm = [first[i] for i in second]
        if perm == list(range(len(perm))):
            return op.Identity(x)
        return op.Transpose(x, perm=perm)


class TransposeOfOnes(Rule):
    """Transpose(x, p) -> view(x)    where p moves only axes of size 1"""

    types = None
    min_opset = 5

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        return op.Transpose(x, name="t")

    @staticmethod
    def check(x: Value, m: Match) -> str | None:
        perm, sizes = numbers(m["t"].param("perm")), sizes_of(x)
        if perm is None or sizes is None:
            return "the shape is not known"
        moved = [a for a in perm if sizes[a] != ONE]
        return None if moved == sorted(moved) else "it moves axes that may be larger than 1"

    @staticmethod
    def where(x: Value, m: Match) -> bool:
        return TransposeOfOnes.check(x, m) is None

    @staticmethod
    def rewrite(op: Op, x: Value, m: Match) -> Value:
        perm, sizes = numbers(m["t"].param("perm")), sizes_of(x)
        assert perm is not None
        assert sizes is not None
        return view(op, x, sizes, [sizes[a] for a in perm], open_before=False)


class ShapeOfTranspose(Rule):
    """Shape(Transpose(x, p)) -> Gather(Shape(x), p)"""

    types = None
    shared = True

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        return op.Shape(op.Transpose(x, name="t"), name="s")

    @staticmethod
    def rewrite(op: Op, x: Value, m: Match) -> Value:
        perm = numbers(m["t"].param("perm"))
        if perm is None or {"start", "end"} & set(m["s"].attrs):
            raise RefusedError("the permutation is not stated, or only a part of the shape is asked for")
        return op.Gather(op.Shape(x), np.asarray(perm, np.int64), axis=0)


def _reductions(op: Op, x: Value, keepdims: int) -> Value:
    return op.any(*(getattr(op, kind)(x, keepdims=keepdims, name="reduce") for kind in sorted(REDUCTIONS)))


def _reduced_axes(m: Match, x: Value) -> list[int]:
    """Return the axes that a reduction runs over.

    Raises:
        RefusedError: they cannot be told.
    """
    axes = numbers(m["reduce"].param("axes"))
    if x.rank is None or not axes:
        raise RefusedError("the rank is unknown, or the reduced axes are not stated")
    return sorted(a % x.rank for a in axes)


def _reduce_again(op: Op, x: Value, m: Match, keepdims: int) -> Value:
    node = m["reduce"]
    attrs = {**node.attrs, "keepdims": keepdims, "axes": _reduced_axes(m, x)}
    again: Value = getattr(op, node.node.op)(x, **attrs)
    return again


class UnsqueezeOfReduce(Rule):
    """Unsqueeze(Reduce(x, axes, keepdims=0), axes) -> Reduce(x, axes, keepdims=1)"""

    types = None

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        return op.Unsqueeze(_reductions(op, x, 0), name="u")

    @staticmethod
    def check(x: Value, m: Match) -> str | None:
        axes, new = numbers(m["reduce"].param("axes")), numbers(m["u"].param("axes"))
        if x.rank is None or axes is None or new is None:
            return None  # rewrite says so
        same = sorted(a % x.rank for a in new) == sorted(a % x.rank for a in axes)
        return None if same else "the new axes are not those reduced"

    @staticmethod
    def rewrite(op: Op, x: Value, m: Match) -> Value:
        return _reduce_again(op, x, m, 1)


class SqueezeOfReduce(Rule):
    """Squeeze(Reduce(x, axes, keepdims=1), as many axes) -> Reduce(x, axes, keepdims=0)

    Axes that go without having been reduced are of size 1, and stand for those that have.
    """

    types = None

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        return op.Squeeze(_reductions(op, x, 1), name="s")

    @staticmethod
    def rewrite(op: Op, x: Value, m: Match) -> Value:
        gone = numbers(m["s"].param("axes"))
        if gone is None or len(gone) != len(_reduced_axes(m, x)):
            raise RefusedError("not as many axes go as are reduced")
        return _reduce_again(op, x, m, 0)


RULES: tuple[type[Rule], ...] = (
    ViewOfView,
    TransposeOfTranspose,
    TransposeOfOnes,
    ShapeOfTranspose,
    UnsqueezeOfReduce,
    SqueezeOfReduce,
)
