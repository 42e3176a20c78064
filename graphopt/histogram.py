"""Counts of float values in bins that are the same for every tensor, so that histograms add up exactly.

A bin is a piece of an octave [2^e, 2^(e+1)): its number is the upper bits of the float32 itself.  The highest `FINE`
octaves that hold anything, on each side of zero, are cut into 1,024 bins each, the others into 32; what is below the
normal float32 values counts as 32 bins of one octave.  Which octaves hold anything depends on nothing but the values,
and an octave only ever gets coarser as others are added: adding histograms in any order, or all values to one, gives
the same counts.  An outlier (a mask of -3.4e38) takes one octave and leaves the others fine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
Counts: TypeAlias = npt.NDArray[np.int64]

OCTAVES = 255
"""Exponents of finite float32 values; 0 is that of zero and the denormals."""
FINE = 8
FINE_BITS, COARSE_BITS = 10, 5
_FINE_SHIFT, _COARSE_SHIFT = 23 - FINE_BITS, 23 - COARSE_BITS
_MAGNITUDE = np.int32(0x7FFFFFFF)
CHUNK = 1 << 16
"""Values counted at a time, so that what is computed of them stays in the processor's cache."""
WAITING = 1 << 15
"""Values that are kept until they are worth counting."""
SMOOTHINGS = (0.0, 0.01)
"""Of the running averages that are kept: all samples alike, and what Jacob et al. (2018) call close to one."""


@dataclass
class Side:
    """Counts of the values of one sign, by magnitude."""

    coarse: Counts = field(default_factory=lambda: np.zeros(0, np.int64))
    fine: dict[int, Counts] = field(default_factory=dict)

    def occupied(self) -> set[int]:
        """Return the octaves that hold anything, without that of zero, which is never fine."""
        return (set(self.fine) | set((np.flatnonzero(self.coarse) >> COARSE_BITS).tolist())) - {0}

    def add(self, counts: Counts, floor: int) -> None:
        """Add counts of coarse bins below octave `floor`, and of fine ones from there on."""
        split = floor << COARSE_BITS
        self._add_coarse(0, counts[:split])
        rows = counts[split:].reshape(-1, 1 << FINE_BITS)
        for row in np.flatnonzero(rows.any(axis=1)).tolist():
            self._add_octave(floor + row, rows[row])
        self._settle()

    def merge(self, other: Side) -> None:
        """Add another side's counts."""
        self._add_coarse(0, other.coarse)
        for octave, counts in other.fine.items():
            self._add_octave(octave, counts)
        self._settle()

    def _add_coarse(self, start: int, counts: Counts) -> None:
        used = np.flatnonzero(counts)
        if not len(used):
            return
        end = start + int(used[-1]) + 1
        if end > len(self.coarse):
            self.coarse = np.concatenate([self.coarse, np.zeros(end - len(self.coarse), np.int64)])
        self.coarse[start:end] += counts[: end - start]

    def _add_octave(self, octave: int, counts: Counts) -> None:
        if octave in self.fine:
            self.fine[octave] += counts
        else:
            self.fine[octave] = counts.copy()

    def _settle(self) -> None:
        """Make coarse all but the highest octaves."""
        kept = sorted(self.occupied(), reverse=True)[:FINE]
        for octave in [o for o in self.fine if o not in kept]:
            counts = self.fine.pop(octave).reshape(1 << COARSE_BITS, -1).sum(axis=1)
            self._add_coarse(octave << COARSE_BITS, counts)

    def to_arrays(self) -> dict[str, Array]:
        """Return the state as arrays."""
        octaves = sorted(self.fine)
        rows = [self.fine[o] for o in octaves]
        fine = np.stack(rows) if rows else np.zeros((0, 1 << FINE_BITS), np.int64)
        return {"octaves": np.array(octaves, np.int64), "fine": fine, "coarse": self.coarse}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> Side:
        """Return what `to_arrays` made the arrays of."""
        rows = zip(arrays["octaves"].tolist(), arrays["fine"], strict=True)
        return cls(arrays["coarse"].copy(), {octave: row.copy() for octave, row in rows})

    def bins(self) -> tuple[Array, Array, Counts]:
        """Return lower and upper edge of each bin that holds something (float64), rising, and its count."""
        used = np.flatnonzero(self.coarse)
        starts, widths, counts = [used << _COARSE_SHIFT], [np.full(len(used), 1 << _COARSE_SHIFT)], [self.coarse[used]]
        for octave, held in self.fine.items():
            inside = np.flatnonzero(held)
            starts.append((octave << 23) + (inside << _FINE_SHIFT))
            widths.append(np.full(len(inside), 1 << _FINE_SHIFT))
            counts.append(held[inside])
        start = np.concatenate(starts)
        order = np.argsort(start)
        start, end = start[order], (start + np.concatenate(widths))[order]
        return _value(start), _value(end), np.concatenate(counts)[order]


def _value(bits: Array) -> Array:
    with np.errstate(invalid="ignore"):
        found = bits.astype(np.uint32).view(np.float32).astype(np.float64)
    return np.where(bits >= OCTAVES << 23, 2.0**128, found)


@dataclass(frozen=True)
class Bins:
    """A histogram as its methods read it: rising bins that hold something; zero is one of width 0.

    Attributes:
        low: lower edges, float64.
        high: upper edges.
        counts: how many values.
    """

    low: Array
    high: Array
    counts: Counts


@dataclass
class Average:
    """A running average of the smallest and largest value of each sample, the last samples weighing most.

    With smoothing `c` sample i of n weighs (1 - c)^(n - 1 - i); the weights are made to sum to 1, as Adam corrects its
    averages (Kingma and Ba 2015), so that the first sample counts no more than others.  Smoothing 0 weighs all alike.
    Averages of consecutive runs of samples merge in that order.
    """

    smoothing: float
    samples: int = 0
    weight: float = 0.0
    low_sum: float = 0.0
    high_sum: float = 0.0

    def add(self, low: float, high: float) -> None:
        """Add a sample's extremes."""
        self.merge(Average(self.smoothing, 1, 1.0, low, high))

    def merge(self, later: Average) -> None:
        """Add the samples of another average, which came after."""
        kept = (1.0 - self.smoothing) ** later.samples
        self.weight = kept * self.weight + later.weight
        self.low_sum = kept * self.low_sum + later.low_sum
        self.high_sum = kept * self.high_sum + later.high_sum
        self.samples += later.samples

    def extremes(self) -> tuple[float, float]:
        """Return the average smallest and largest value (at least one sample)."""
        return self.low_sum / self.weight, self.high_sum / self.weight


@dataclass(frozen=True)
class Layout:
    """Bins of an array that values are counted in: coarse up to `floor`, fine from there to `top` (octaves).

    Attributes:
        signed: negative values have as many bins, before those of the others and in reverse.
        lasting: it serves later values too.
    """

    floor: int
    top: int
    signed: bool
    lasting: bool

    @property
    def size(self) -> int:
        """Bins on each side."""
        return (self.floor << COARSE_BITS) + ((self.top - self.floor) << FINE_BITS)


class Histogram:
    """Counts of all values added, with the exact smallest and largest, and averages of the samples' extremes."""

    def __init__(self) -> None:
        self.negative = Side()
        self.positive = Side()
        self.low = np.inf
        self.high = -np.inf
        self.count = 0
        self.averages = [Average(c) for c in SMOOTHINGS]
        self._waiting: list[npt.NDArray[np.float32]] = []
        self._counting: tuple[Layout, Counts] | None = None

    def add(
        self, values: npt.NDArray[np.float32], low: float, high: float, *, limit: int | None = None, phase: int = 0
    ) -> None:
        """Add a sample's values.

        Args:
            values: finite float32, 1-D, contiguous.
            low: the least of them.
            high: the largest.
            limit: about how many are looked at where there are more: every n-th, which then counts n times.  n has no
                factor in common with the number of values, so that no row or channel is passed over.
            phase: moves the first that is looked at.
        """
        if not values.size:
            return
        for average in self.averages:
            average.add(low, high)
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.count += values.size
        step = 1 if limit is None else stride(values.size, limit)
        if step > 1 or values.size >= WAITING:
            self._count(np.ascontiguousarray(values[phase % step :: step]), step)
            return
        self._waiting.append(values.copy())
        if sum(v.size for v in self._waiting) >= WAITING:
            self._count_waiting()

    def _count_waiting(self) -> None:
        if self._waiting:
            waiting, self._waiting = np.concatenate(self._waiting), []
            self._count(waiting)

    def flush(self) -> None:
        """Bring both sides up to date."""
        self._count_waiting()
        self._close()

    def _count(self, values: npt.NDArray[np.float32], weight: int = 1) -> None:
        layout, counts = self._open(values)
        for start in range(0, values.size, CHUNK):
            bits = values[start : start + CHUNK].view(np.int32)
            keys = _keys(bits, layout.floor)
            if layout.signed:
                keys ^= bits >> 31  # turns key k of a negative value into -1 - k
                keys += np.int32(layout.size)
            found = np.bincount(keys, minlength=len(counts))
            if weight > 1:
                found *= weight
            counts += found
        if not layout.lasting:
            self._close()

    def _open(self, values: npt.NDArray[np.float32]) -> tuple[Layout, Counts]:
        """Return where these values can be counted: where the last ones were, if they fit there."""
        top = int(np.float32(max(abs(self.low), abs(self.high))).view(np.int32)) >> 23
        signed = self.low < 0
        if self._counting is not None and top < self._counting[0].top and signed == self._counting[0].signed:
            return self._counting
        self._close()
        floor, final = self._floor(values)
        top = max(top + 1, floor)
        layout = Layout(floor, top, signed, final and top - floor <= 2 * FINE)
        self._counting = layout, np.zeros(2 * layout.size if signed else layout.size, np.int64)
        return self._counting

    def _close(self) -> None:
        """Give what was counted to its sides."""
        if self._counting is None:
            return
        (layout, counts), self._counting = self._counting, None
        if layout.signed:
            self.negative.add(counts[: layout.size][::-1], layout.floor)
            counts = counts[layout.size :]
        self.positive.add(counts, layout.floor)

    def _floor(self, values: npt.NDArray[np.float32]) -> tuple[int, bool]:
        """Return the octave from which on these values must be counted finely, and whether later ones need no lower."""
        sides = [self.positive, self.negative] if self.low < 0 else [self.positive]
        known = [side.occupied() for side in sides]
        final = all(len(octaves) >= FINE for octaves in known)
        if not final:
            bits = values.view(np.int32)
            for side, octaves in zip(sides, known, strict=True):
                mine = bits[bits >= 0] if side is self.positive else bits[bits < 0] & _MAGNITUDE
                octaves.update(np.flatnonzero(np.bincount(mine >> 23)).tolist())
        lowest = [sorted(octaves - {0}, reverse=True)[:FINE][-1] for octaves in known if octaves - {0}]
        return min(lowest, default=1), final

    def merge(self, other: Histogram) -> None:
        """Add another histogram's values; its samples come after this one's, which matters for averages only."""
        for average, later in zip(self.averages, other.averages, strict=True):
            average.merge(later)
        self.flush()
        other.flush()
        self.negative.merge(other.negative)
        self.positive.merge(other.positive)
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.count += other.count

    def to_arrays(self) -> dict[str, Array]:
        """Return the state as arrays."""
        self.flush()
        averages = [[a.smoothing, a.samples, a.weight, a.low_sum, a.high_sum] for a in self.averages]
        out = {"ends": np.array([self.low, self.high]), "count": np.array(self.count), "averages": np.array(averages)}
        for name, side in (("negative", self.negative), ("positive", self.positive)):
            out.update({f"{name}.{key}": array for key, array in side.to_arrays().items()})
        return out

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> Histogram:
        """Return what `to_arrays` made the arrays of."""
        out = cls()
        out.low, out.high = arrays["ends"].tolist()
        out.count = int(arrays["count"])
        out.averages = [Average(row[0], int(row[1]), *row[2:]) for row in arrays["averages"].tolist()]
        out.negative = Side.from_arrays(within(arrays, "negative"))
        out.positive = Side.from_arrays(within(arrays, "positive"))
        return out

    def bins(self) -> Bins:
        """Return the bins; the first and last are cut to the exact smallest and largest value."""
        self.flush()
        below, above = self.negative.bins(), self.positive.bins()
        zeros = 0
        if len(above[0]) and above[0][0] == 0.0:
            zeros, above = int(above[2][0]), (above[0][1:], above[1][1:], above[2][1:])
        if len(below[0]) and below[0][0] == 0.0:
            zeros, below = zeros + int(below[2][0]), (below[0][1:], below[1][1:], below[2][1:])
        zero = np.zeros(1 if zeros else 0)
        low = np.concatenate([-below[1][::-1], zero, above[0]])
        high = np.concatenate([-below[0][::-1], zero, above[1]])
        counts = np.concatenate([below[2][::-1], np.asarray([zeros] if zeros else [], np.int64), above[2]])
        return Bins(np.clip(low, self.low, self.high), np.clip(high, self.low, self.high), counts)


def within(arrays: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    """Return the arrays whose key begins with `prefix` and a dot, without these."""
    return {key[len(prefix) + 1 :]: array for key, array in arrays.items() if key.startswith(prefix + ".")}


def stride(size: int, limit: int) -> int:
    """Return the least step that leaves at most `limit` of so many values and has no factor in common with them."""
    step = -(-size // limit)
    while math.gcd(step, size) > 1:
        step += 1
    return step


def _keys(bits: npt.NDArray[np.int32], floor: int) -> npt.NDArray[np.int32]:
    """Return the number of each value's bin: coarse ones below octave `floor`, then fine ones; the sign is ignored."""
    split = np.int32(floor << 23)
    magnitude = bits & _MAGNITUDE
    keys = np.maximum(magnitude, split)
    keys >>= _FINE_SHIFT
    keys -= np.int32(floor << FINE_BITS)
    np.minimum(magnitude, split, out=magnitude)
    magnitude >>= _COARSE_SHIFT
    keys += magnitude
    return np.asarray(keys)
