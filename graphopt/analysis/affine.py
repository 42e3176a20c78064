"""Affine maps of tensors, y = x * scale + shift, with constants: their algebra, and how a change of shape carries them.

A scale or shift is a float64 array: 0-d where it is one number, else of the tensor's rank with 1 along every axis
on which it does not vary.  So a 0-d one fits tensors of any rank, also where that is not known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Shape = Sequence[int | str | None]

MAX_ELEMENTS = 1 << 16
"""Elements of a constant above which it is not taken for a scale or shift."""

EXTREME = 1e18
"""Scales beyond this, or below its reciprocal, are not moved: what lies between could leave the range of float32."""


@dataclass(frozen=True)
class Affine:
    """The map x -> x * scale + shift.

    Attributes:
        scale: float64, 0-d or as described above.
        shift: the same.
    """

    scale: Array
    shift: Array

    @classmethod
    def of(cls, scale: Any = 1.0, shift: Any = 0.0) -> Affine:
        """Return the map with these constants, written as plainly as possible."""
        return cls(_plain(scale), _plain(shift))

    def then(self, after: Affine) -> Affine:
        """Return the map that does this one first and `after` next."""
        return Affine.of(self.scale * after.scale, self.shift * after.scale + after.shift)

    @property
    def scales(self) -> bool:
        """Whether the scale is not one everywhere."""
        return bool((self.scale != 1).any())

    @property
    def shifts(self) -> bool:
        """Whether the shift is not zero everywhere."""
        return bool((self.shift != 0).any())

    @property
    def identity(self) -> bool:
        """Whether it changes nothing."""
        return not self.scales and not self.shifts

    @property
    def positive(self) -> bool:
        """Whether no scale is negative."""
        return bool((self.scale >= 0).all())

    @property
    def uniform(self) -> bool:
        """Whether it is the same for all elements."""
        return self.scale.ndim == 0 and self.shift.ndim == 0

    @property
    def scale_part(self) -> Affine:
        """The map that only scales."""
        return Affine(self.scale, _plain(0.0))

    @property
    def shift_part(self) -> Affine:
        """The map that only shifts."""
        return Affine(_plain(1.0), self.shift)

    @property
    def elements(self) -> int:
        """Numbers that it takes to write down."""
        return max(self.scale.size, self.shift.size)

    def axes(self) -> set[int]:
        """Return the axes along which it varies."""
        return {axis for a in (self.scale, self.shift) for axis, size in enumerate(a.shape) if size != 1}

    def varies_beside(self, *axes: int) -> bool:
        """Tell whether it varies along an axis that is none of these."""
        return bool(self.axes() - set(axes))

    def vectors(self, axis: int, size: int) -> tuple[Array, Array] | None:
        """Return scale and shift as vectors [size] along an axis, None where they vary along others, too."""
        if self.varies_beside(axis) or any(a.size not in (1, size) for a in (self.scale, self.shift)):
            return None
        return np.broadcast_to(self.scale.reshape(-1), (size,)), np.broadcast_to(self.shift.reshape(-1), (size,))

    def moved(self, move: Callable[[Array], Array]) -> Affine:
        """Return the map with `move` done to both arrays that have axes."""
        return Affine.of(*(move(a) if a.ndim else a for a in (self.scale, self.shift)))

    def scale_inverse(self) -> Affine | None:
        """Return the map that divides by the scale, None where that is not safe."""
        if not self.tame:
            return None
        return Affine.of(1.0 / self.scale)

    @property
    def tame(self) -> bool:
        """Whether all scales are finite, not zero and not extreme."""
        size = np.abs(self.scale)
        return bool((size < EXTREME).all() and (size > 1 / EXTREME).all())

    @property
    def finite(self) -> bool:
        """Whether all its numbers are finite."""
        return bool(np.isfinite(self.scale).all() and np.isfinite(self.shift).all())


def _plain(values: Any) -> Array:
    """Return values as float64, as one number where all are equal."""
    array = np.asarray(values, np.float64)
    if array.ndim and array.size and (array == array.flat[0]).all():
        return np.asarray(array.flat[0])
    return array


def along(values: Array, axis: int, rank: int) -> Array:
    """Return a vector as an array of `rank` that varies along `axis`."""
    return values.reshape([-1 if i == axis else 1 for i in range(rank)])


def same(a: int | str | None, b: int | str | None) -> bool:
    """Tell whether two dimensions are known to be equal."""
    return a is not None and a == b


def fits(constant: Shape, shape: Shape | None, limit: int = MAX_ELEMENTS) -> bool:
    """Tell whether a constant of a shape can be broadcast to `shape` (None: unknown) without enlarging it."""
    if int(np.prod([int(d or 0) for d in constant], dtype=np.int64)) > limit:
        return False
    if len(constant) == 0:
        return True
    if shape is None or len(constant) > len(shape):
        return False
    return all(c in (1, d) for c, d in zip(reversed(constant), reversed(shape), strict=False))


Group = tuple[range, range]
"""Axes before and axes after a reshape that hold the same elements."""


def reshape_groups(before: Shape, after: Shape) -> list[Group]:
    """Return which axes of two shapes with equally many elements correspond, in order."""
    head = 0
    while head < min(len(before), len(after)) and same(before[head], after[head]):
        head += 1
    tail = 0
    while tail < min(len(before), len(after)) - head and same(before[-1 - tail], after[-1 - tail]):
        tail += 1
    i, j = len(before) - tail, len(after) - tail
    ends: list[Group] = [(range(k, k + 1), range(k, k + 1)) for k in range(head)]
    middle = _middle(before[head:i], after[head:j], head)
    return [*ends, *middle, *((range(i + k, i + k + 1), range(j + k, j + k + 1)) for k in range(tail))]


def _middle(before: Shape, after: Shape, start: int) -> list[Group]:
    """Return the smallest groups of two runs of axes: one, where a size is not known."""
    whole = [(range(start, start + len(before)), range(start, start + len(after)))]
    sizes = [[d for d in shape if isinstance(d, int) and d > 0] for shape in (before, after)]
    if len(sizes[0]) != len(before) or len(sizes[1]) != len(after) or not before or not after:
        return whole if before or after else []
    ends = [list(np.cumprod(s, dtype=np.int64)) for s in sizes]
    if ends[0][-1] != ends[1][-1]:
        return whole
    groups: list[Group] = []
    i = j = 0
    for product in sorted(set(ends[0]) & set(ends[1])):
        last = product == ends[0][-1]
        p = len(before) if last else ends[0].index(product) + 1
        q = len(after) if last else ends[1].index(product) + 1
        groups.append((range(start + i, start + p), range(start + j, start + q)))
        i, j = p, q
    return groups


def reshaped(given: Affine, before: Shape, after: Shape) -> Affine | None:
    """Return what a map of a tensor becomes behind a reshape of it, None where that is not known.

    Args:
        given: a map of a tensor of shape `before`.
        before: its dimensions.
        after: dimensions of the same elements afterwards.
    """
    groups = reshape_groups(before, after)
    found = [_carry(a, groups, before, after) for a in (given.scale, given.shift)]
    if found[0] is None or found[1] is None:
        return None
    return Affine.of(*found)


def _carry(array: Array, groups: Sequence[Group], before: Shape, after: Shape) -> Array | None:
    if array.ndim == 0:
        return array
    wide, out = [1] * len(before), [1] * len(after)
    for left, right in groups:
        if all(array.shape[i] == 1 for i in left):
            continue
        sizes = [before[i] for i in left], [after[j] for j in right]
        if not all(isinstance(d, int) for part in sizes for d in part):
            return None
        for axes, shape, known in ((left, wide, before), (right, out, after)):
            for axis in axes:
                size = known[axis]
                assert isinstance(size, int)
                shape[axis] = size
    if np.prod(wide, dtype=np.int64) > MAX_ELEMENTS:
        return None
    return _thin(np.broadcast_to(array, wide).reshape(out))


def _thin(array: Array) -> Array:
    """Return an array with 1 along each axis on which it does not vary."""
    for axis in range(array.ndim):
        first = array.take([0], axis)
        if (array == first).all():
            array = first
    return array
