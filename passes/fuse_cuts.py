"""Rules for Slice and Gather: what is cut out of a tensor.

Slice(Slice(x))                        ->  Slice(x)                  over all axes of both
Slice(Concat(x, y, …))                 ->  Slice(y), y               the part that it lies in
Slice(Pad(x))                          ->  Slice(x)                  where it takes nothing of the border
Gather(Gather(x, i), j)                ->  Gather(x, i[j])
Gather(Slice(x), i)                    ->  Gather(x, start + i * step)
Gather(x, [a, a + 1, …])               ->  Slice(x, a)
Squeeze(Slice(x, a, a + 1))            ->  Gather(x, a)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from graphopt.pattern import Constant, Many, Op, Value
from graphopt.rewrite import Match, RefusedError, Rule

from .fuse_pads import pads_of
from .fuse_views import numbers

OPEN = 1 << 62
"""An end from which on the size does not matter."""

_FAR = (1 << 31) - 1
"""Slice ends from here on mean "to the end" whatever the size."""

Cut = tuple[int, int, int]
"""Start, end, step."""


def cuts_of(m: Match, name: str, rank: int | None) -> dict[int, Cut] | None:
    """Return what a Slice takes of each axis that it names; None where that is computed, or axes cannot be told."""
    node = m[name]
    starts, ends = numbers(node.param("starts")), numbers(node.param("ends"))
    axes, steps = node.param("axes"), node.param("steps")
    if starts is None or ends is None:
        return None
    given = list(range(len(starts))) if axes is None else numbers(axes)
    strides = [1] * len(starts) if steps is None else numbers(steps)
    if given is None or strides is None or (rank is None and min(given, default=0) < 0):
        return None
    places = [a + rank if a < 0 and rank is not None else a for a in given]
    return {a: (s, OPEN if e >= _FAR else e, t) for a, s, e, t in zip(places, starts, ends, strides, strict=True)}


def as_range(cut: Cut, size: int) -> range:
    """Return the indices that a cut takes of an axis of known size."""
    start, end, step = cut
    if step > 0:
        return range(size)[slice(start, end, step)]
    return range(size)[slice(start, None if end < -size else end, step)]


def as_cut(indices: range) -> Cut | None:
    """Return the cut that takes these indices, None for no index at all."""
    if not len(indices):
        return None
    last, step = indices[-1], indices.step
    if step > 0:
        return indices[0], last + 1, step
    return indices[0], last - 1 if last > 0 else -OPEN, step


def composed(inner: Cut, outer: Cut, size: int | str | None) -> Cut | None:
    """Return one cut for one after the other, None where that depends on what is not known."""
    if inner == outer == (0, OPEN, 1):
        return inner
    if isinstance(size, int):
        taken = as_range(inner, size)
        return as_cut(taken[_slice(outer, len(taken))])
    (a, b, s), (c, d, t) = inner, outer
    if s < 1 or t < 1 or a < 0 or c < 0 or d < 0:
        return None
    if d == OPEN:
        return a + c * s, b, s * t
    if b < 0:
        return None
    return a + c * s, min(b, a + d * s), s * t


def _slice(cut: Cut, size: int) -> slice:
    start, end, step = cut
    return slice(start, None if step < 0 and end < -size else end, step)


def slice_of(op: Op, x: Value, cuts: dict[int, Cut]) -> Value:
    """Return a Slice of several axes."""
    axes = sorted(cuts)
    starts, ends, steps = (np.asarray([cuts[a][i] for a in axes], np.int64) for i in range(3))
    return op.Slice(x, starts, ends, np.asarray(axes, np.int64), None if (steps == 1).all() else steps)


class SliceOfSlice(Rule):
    """Slice(Slice(x)) -> Slice(x)    over all axes of both"""

    types = None
    min_opset = 10
    shared = True

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        return op.Slice(op.Slice(x, name="inner"), name="outer")

    @staticmethod
    def rewrite(op: Op, x: Value, m: Match) -> Value:
        inner, outer = cuts_of(m, "inner", x.rank), cuts_of(m, "outer", x.rank)
        if inner is None or outer is None:
            raise RefusedError("what is cut is computed")
        made = dict(inner)
        for axis, cut in outer.items():
            found: Cut | None = cut
            if axis in inner:
                found = composed(inner[axis], cut, None if x.shape is None else x.shape[axis])
            if found is None:
                raise RefusedError(f"the size of axis {axis} is not known, or nothing is left of it")
            made[axis] = found
        return slice_of(op, x, made)


class SliceOfConcat(Rule):
    """Slice(Concat(x, y, …), of y alone) -> Slice(y), or y"""

    types = None
    min_opset = 10
    shared = True

    @staticmethod
    def pattern(op: Op, parts: Many) -> Value:
        return op.Slice(op.Concat(parts, name="concat"), name="slice")

    @staticmethod
    def rewrite(op: Op, parts: Sequence[Value], m: Match) -> Value:
        rank = parts[0].rank
        cuts = cuts_of(m, "slice", rank)
        if cuts is None or rank is None:
            raise RefusedError("what is cut is computed, or the rank unknown")
        axis = int(m["concat"].param("axis")) % rank
        if axis not in cuts:
            raise RefusedError("it does not cut along the concatenated axis")
        sizes = [p.shape[axis] if p.shape is not None else None for p in parts]
        chosen, start = _part(cuts[axis], sizes)
        (low, high, step) = cuts[axis]
        rest = dict(cuts)
        size = sizes[chosen]
        rest[axis] = (low - start, high if high == OPEN else high - start, step)
        if rest[axis][0] == 0 and step == 1 and (rest[axis][1] == OPEN or rest[axis][1] == size):
            del rest[axis]
        return slice_of(op, parts[chosen], rest) if rest else op.Identity(parts[chosen])


def _part(cut: Cut, sizes: Sequence[int | str | None]) -> tuple[int, int]:
    """Return which part a cut lies in, and where that part begins.

    Raises:
        RefusedError: it lies in several, or the sizes up to it are not known.
    """
    low, high, step = cut
    if low < 0 or high < 0 or step < 1:
        raise RefusedError("the cut counts from the end, or backwards")
    start = 0
    for i, size in enumerate(sizes):
        last = i == len(sizes) - 1
        if last and low >= start:
            return i, start
        if not isinstance(size, int):
            break
        if start <= low < start + size:
            if high <= start + size:
                return i, start
            break
        start += size
    raise RefusedError("it takes of several parts, or a size is not known")


class SliceOfPad(Rule):
    """Slice(Pad(x)) -> Slice(x)    where it takes nothing of the border"""

    types = None
    min_opset = 11
    shared = True

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        return op.Slice(op.Pad(x, name="pad"), name="slice")

    @staticmethod
    def rewrite(op: Op, x: Value, m: Match) -> Value:
        pads, cuts, shape = pads_of(m["pad"], x), cuts_of(m, "slice", x.rank), x.shape
        if pads is None or cuts is None or shape is None:
            raise RefusedError("pads or cuts are computed, or the rank is unknown")
        made = dict(cuts)
        for axis, (before, after) in pads.items():
            size = shape[axis]
            if axis not in cuts or not isinstance(size, int):
                raise RefusedError(f"the size of axis {axis} is not known, or it keeps its border")
            taken = as_range(cuts[axis], before + size + after)
            if not len(taken) or min(taken) < before or max(taken) >= before + size:
                raise RefusedError(f"it takes of the border of axis {axis}")
            cut = as_cut(range(taken.start - before, taken.stop - before, taken.step))
            assert cut is not None
            made[axis] = cut
        return slice_of(op, x, made)


class GatherOfGather(Rule):
    """Gather(Gather(x, i), j) -> Gather(x, i[j])    constant indices of one axis"""

    types = None
    shared = True

    @staticmethod
    def pattern(op: Op, x: Value, i: Constant, j: Constant) -> Value:
        return op.Gather(op.Gather(x, i, name="inner"), j, name="outer")

    @staticmethod
    def rewrite(op: Op, x: Value, i: Constant, j: Constant, m: Match) -> Value:
        inner, outer = int(m["inner"].param("axis")), int(m["outer"].param("axis"))
        rank = x.rank
        if i.rank != 1 or (rank is None and min(inner, outer) < 0):
            raise RefusedError("the inner indices are not a list, or the rank is unknown")
        if (inner - outer) % (rank or OPEN):
            raise RefusedError("they take of different axes")
        if not _inside(j.values, i.size):
            raise RefusedError("an index lies outside")
        return op.Gather(x, np.asarray(i.values[j.values], i.values.dtype), axis=inner)


def _inside(indices: np.ndarray, size: int) -> bool:
    return bool(((indices >= -size) & (indices < size)).all())


class GatherOfSlice(Rule):
    """Gather(Slice(x, a), i) -> Gather(x, a + i)    constant indices of the one axis that is cut"""

    types = None
    min_opset = 10
    shared = True

    @staticmethod
    def pattern(op: Op, x: Value, i: Constant) -> Value:
        return op.Gather(op.Slice(x, name="slice"), i, name="gather")

    @staticmethod
    def rewrite(op: Op, x: Value, i: Constant, m: Match) -> Value:
        shape, cuts = x.shape, cuts_of(m, "slice", x.rank)
        axis = int(m["gather"].param("axis"))
        if shape is None or cuts is None or set(cuts) != {axis % max(len(shape), 1)}:
            raise RefusedError("other axes are cut, too, or it is not known what is")
        axis %= len(shape)
        size = shape[axis]
        if not isinstance(size, int):
            raise RefusedError(f"the size of axis {axis} is not known")
        taken = as_range(cuts[axis], size)
        if not _inside(i.values, len(taken)):
            raise RefusedError("an index lies outside")
        return op.Gather(x, np.asarray(np.asarray(taken)[i.values], np.int64), axis=axis)


class GatherOfRange(Rule):
    """Gather(x, [a, a + 1, a + 2, …]) -> Slice(x, a)    also with steps"""

    types = None
    min_opset = 10

    @staticmethod
    def examples(rng: np.random.Generator) -> dict[str, Any]:
        """Return what random draws do not hit."""
        start, step = rng.integers(-9, 3), rng.integers(1, 3)
        return {"x": (2, 9, 3), "i": np.arange(start, start + 3 * step, step), "gather.axis": 1}

    @staticmethod
    def pattern(op: Op, x: Value, i: Constant) -> Value:
        return op.Gather(x, i, name="gather")

    @staticmethod
    def where(i: Constant) -> bool:
        if i.rank != 1 or not 1 < i.size <= 1 << 16:
            return False
        steps = np.unique(np.diff(i.values.astype(np.int64)))
        return bool(steps.size == 1 and steps[0] >= 1) or bool((i.values < 0).any())

    @staticmethod
    def rewrite(op: Op, x: Value, i: Constant, m: Match) -> Value:
        axis = int(m["gather"].param("axis"))
        size = None if x.shape is None else x.shape[axis]
        indices = i.values.astype(np.int64)
        if (indices < 0).any() and isinstance(size, int):
            indices = np.where(indices < 0, indices + size, indices)
        steps = np.unique(np.diff(indices))
        if steps.size != 1 or steps[0] < 1 or indices[0] < 0:
            raise RefusedError("the indices do not go forward in equal steps from a known one")
        if not isinstance(size, int) or indices[-1] >= size:
            raise RefusedError("the size is not known, which decides whether an index is refused")
        cut = int(indices[0]), int(indices[-1]) + 1, int(steps[0])
        return slice_of(op, x, {axis % len(x.shape or ()): cut})


class SqueezeOfSlice(Rule):
    """Squeeze(Slice(x, a, a + 1)) -> Gather(x, a)    of one axis"""

    types = None
    min_opset = 10

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        return op.Squeeze(op.Slice(x, name="slice"), name="squeeze")

    @staticmethod
    def rewrite(op: Op, x: Value, m: Match) -> Value:
        gone, cuts = numbers(m["squeeze"].param("axes")), cuts_of(m, "slice", x.rank)
        if x.shape is None or cuts is None or len(cuts) != 1 or gone is None:
            raise RefusedError("the cut or the axes are not known, or several are cut")
        ((axis, cut),) = cuts.items()
        size = x.shape[axis]
        if [a % len(x.shape) for a in gone] != [axis]:
            raise RefusedError("another axis goes")
        if not isinstance(size, int):
            raise RefusedError("the size is not known")
        taken = as_range(cut, size)
        if len(taken) != 1:
            raise RefusedError("not just one is cut out")
        return op.Gather(x, np.asarray(taken[0], np.int64), axis=axis)


RULES: tuple[type[Rule], ...] = (
    SliceOfSlice,
    SliceOfConcat,
    SliceOfPad,
    GatherOfGather,
    GatherOfSlice,
    GatherOfRange,
    SqueezeOfSlice,
)
