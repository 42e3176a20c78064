"""Two sets of outputs -> how far apart they are, accumulated over samples; nothing is kept but sums and extremes.

Errors of a float output, all against the reference's own magnitudes so that no element divides by zero:

    relative   max |a - b| / max |a|              per sample, the worst sample counts; the gate (sigmoids: a maximum
               below 1e-3 counts as 1e-3)
    slices     the same inside each slice of each axis: a small channel next to a large one
    log        max |ln a - ln b| / max(1, max |ln a|)   for probabilities: shows what softmax and sigmoid flatten;
               for sigmoids also of 1 - a and 1 - b

Everything else (integers, booleans, strings) must be equal; `mismatch` is the fraction that is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np

from graphopt.tensors import is_float

Array: TypeAlias = np.ndarray[Any, Any]

TINY = 1e-30
"""Magnitudes below this count as zero: they are beside float32's denormals."""

ZERO_ATOL = 1e-6
"""Largest error accepted where the whole reference output is zero and no relative error exists."""

SLICE_FLOOR = 1e-3
"""Slices whose largest value is below this part of the whole output's are left out: cancellation is noise there."""

SLICE_ELEMENTS = 16
"""Slices of fewer elements are left out: they say no more than the error of single elements does."""

LOG_FLOOR = {"softmax": 1e-20, "sigmoid": 1e-3}
"""Probabilities below this count as this: ORT's sigmoids are exact in absolute terms only."""


@dataclass(frozen=True)
class Tolerance:
    """What is accepted; None gates nothing.  Fractions are of elements."""

    relative: float | None
    slices: float | None = None
    log: float | None = None
    atol: float = 0.0
    zero_atol: float = ZERO_ATOL
    mismatch: float = 0.0
    nonfinite: float = 0.0


@dataclass
class OutputComparison:
    """Running comparison of one output (one leaf of it, for sequences)."""

    name: str
    probability: str = ""
    dtype: str = ""
    shape: tuple[int, ...] = ()
    floating: bool = False
    samples: int = 0
    elements: int = 0
    compared: int = 0
    max_abs: float = 0.0
    relative: float = 0.0
    slices: float = 0.0
    log: float = 0.0
    zero_abs: float = 0.0
    max_elementwise: float = 0.0
    mismatched: int = 0
    nonfinite: int = 0
    top1_agree: int = 0
    top1_total: int = 0
    worst_sample: int | None = None
    worst_index: tuple[int, ...] | None = None
    worst_values: tuple[Any, Any] | None = None
    structure: list[str] = field(default_factory=list)
    _dot: float = 0.0
    _power_a: float = 0.0
    _power_b: float = 0.0
    _noise: float = 0.0
    _worst: float = -1.0

    def add(self, sample: int, reference: Array, candidate: Array) -> None:
        """Take in one pair of arrays."""
        if not self.samples:
            self.dtype, self.shape = str(reference.dtype), reference.shape
        self.samples += 1
        if reference.dtype != candidate.dtype and {reference.dtype.kind, candidate.dtype.kind} - set("OSU"):
            self.mark(f"sample {sample}: type {candidate.dtype} instead of {reference.dtype}")
            return
        if reference.shape != candidate.shape:
            self.mark(f"sample {sample}: shape {list(candidate.shape)} instead of {list(reference.shape)}")
            return
        self.elements += reference.size
        if reference.size == 0:
            return
        if is_float(reference.dtype) or reference.dtype.kind == "c":
            self.floating = True
            self._add_float(sample, _wide(reference), _wide(candidate))
        else:
            self._add_exact(sample, reference, candidate)

    def mark(self, what: str) -> None:
        """Note a difference of type, shape or structure; a few of them are kept."""
        if len(self.structure) < 5:
            self.structure.append(what)

    def _add_exact(self, sample: int, a: Array, b: Array) -> None:
        different = np.asarray(a != b)
        count = int(np.count_nonzero(different))
        self.compared += a.size
        self.mismatched += count
        if a.dtype.kind in "iu":
            gap = np.abs(a.astype(np.float64) - b.astype(np.float64))
            self.max_abs = max(self.max_abs, float(gap.max()))
        if count:
            self._note_worst(sample, count / a.size, int(np.argmax(different)), a, b)

    def _add_float(self, sample: int, a: Array, b: Array) -> None:
        finite_a, finite_b = np.isfinite(a), np.isfinite(b)
        both = finite_a & finite_b
        wrong = ~both & ~((a == b) | (np.isnan(a) & np.isnan(b)))
        if wrong.any():
            self.nonfinite += int(np.count_nonzero(wrong))
            self._note_worst(sample, math.inf, int(np.argmax(wrong)), a, b)
        self.compared += int(np.count_nonzero(both))
        if not both.any():
            return
        if not both.all():
            a, b = np.where(both, a, 0.0), np.where(both, b, 0.0)
        self._errors(sample, a, b)
        self._sums(a, b)
        self._top1(a, b)

    def _errors(self, sample: int, a: Array, b: Array) -> None:
        gap, size = np.abs(a - b), np.abs(a)
        worst, scale = float(gap.max()), float(size.max())
        if self.probability == "sigmoid":
            scale = max(scale, LOG_FLOOR["sigmoid"])
        self.max_abs = max(self.max_abs, worst)
        if scale < TINY:
            self.zero_abs = max(self.zero_abs, worst)
            relative = worst
        else:
            relative = worst / scale
            self.relative = max(self.relative, relative)
            self.slices = max(self.slices, slice_error(gap, size, scale))
            with np.errstate(divide="ignore", invalid="ignore"):
                each = np.where(size > TINY, gap / size, 0.0)
            self.max_elementwise = max(self.max_elementwise, float(each.max()))
        if self.probability:
            self.log = max(self.log, log_error(a, b, LOG_FLOOR[self.probability]))
        if self.probability == "sigmoid":
            self.log = max(self.log, log_error(1 - a, 1 - b, LOG_FLOOR[self.probability]))
        self._note_worst(sample, relative, int(np.argmax(gap)), a, b)

    def _note_worst(self, sample: int, badness: float, flat: int, a: Array, b: Array) -> None:
        if badness <= self._worst:
            return
        self._worst, self.worst_sample = badness, sample
        self.worst_index = tuple(int(i) for i in np.unravel_index(flat, a.shape))
        self.worst_values = (_scalar(a.reshape(-1)[flat]), _scalar(b.reshape(-1)[flat]))

    def _sums(self, a: Array, b: Array) -> None:
        x, y = a.reshape(-1), b.reshape(-1)
        self._dot += float(np.real(np.vdot(x, y)))
        self._power_a += float(np.real(np.vdot(x, x)))
        self._power_b += float(np.real(np.vdot(y, y)))
        gap = x - y
        self._noise += float(np.real(np.vdot(gap, gap)))

    def _top1(self, a: Array, b: Array) -> None:
        if not looks_like_logits(a):
            return
        agree = top1(a, b)
        self.top1_total += agree.size
        self.top1_agree += int(np.count_nonzero(agree))

    @property
    def cosine(self) -> float | None:
        """Cosine of all samples taken as one vector; None where either is zero."""
        norm = math.sqrt(self._power_a) * math.sqrt(self._power_b)
        return min(1.0, self._dot / norm) if self.floating and norm > 0 and math.isfinite(norm) else None

    @property
    def sqnr_db(self) -> float | None:
        """Signal to noise in decibels; None where there is no noise or no signal."""
        if not self.floating or self._noise <= 0 or self._power_a <= 0 or not math.isfinite(self._noise):
            return None
        return 10 * math.log10(self._power_a / self._noise)

    @property
    def mismatch(self) -> float:
        """Fraction of elements of an exact type that differ."""
        return self.mismatched / self.compared if self.compared and not self.floating else 0.0

    @property
    def nonfinite_fraction(self) -> float:
        """Fraction of elements that are NaN or infinite on one side only."""
        return self.nonfinite / self.elements if self.elements else 0.0

    def failures(self, tolerance: Tolerance) -> list[str]:
        """Return in words where the errors pass the tolerance."""
        found = list(self.structure)
        where = f"worst in sample {self.worst_sample} at {list(self.worst_index or ())}"
        if self.nonfinite_fraction > tolerance.nonfinite:
            found.append(f"{self.nonfinite} of {self.elements} values are NaN or infinite on one side only, {where}")
        if not self.floating:
            if self.mismatch > tolerance.mismatch:
                allowed = f"{tolerance.mismatch:.2%} allowed" if tolerance.mismatch else "none allowed"
                found.append(f"{self.mismatched} of {self.compared} values differ, {allowed}, {where}")
            return found
        if tolerance.relative is None or (tolerance.atol > 0 and self.max_abs <= tolerance.atol):
            return found
        if self.relative > tolerance.relative:
            found.append(f"error {self.relative:.2e} of the largest value, {tolerance.relative:.2e} allowed, {where}")
        elif tolerance.slices is not None and self.slices > tolerance.slices:
            found.append(
                f"error {self.slices:.2e} of the largest value in a slice, {tolerance.slices:.2e} allowed, {where}"
            )
        elif tolerance.log is not None and self.log > tolerance.log:
            found.append(
                f"error {self.log:.2e} in the logarithm of probabilities, {tolerance.log:.2e} allowed, {where}"
            )
        if self.zero_abs > tolerance.zero_atol:
            found.append(
                f"values up to {self.zero_abs:.2e} where the reference is zero, {tolerance.zero_atol:.0e} allowed"
            )
        return found

    def row(self, tolerance: Tolerance) -> dict[str, Any]:
        """Return everything as one JSON-able row: the error reached beside the tolerance asked."""
        failures = self.failures(tolerance)
        return {
            "output": self.name,
            "type": self.dtype,
            "shape": list(self.shape),
            "samples": self.samples,
            "max_abs": self.max_abs,
            "relative": self.relative if self.floating else None,
            "tolerance": tolerance.relative if self.floating else None,
            "slices": self.slices if self.floating else None,
            "slices_tolerance": tolerance.slices if self.floating else None,
            "log": self.log if self.probability and self.floating else None,
            "log_tolerance": tolerance.log if self.probability and self.floating else None,
            "max_rel": self.max_elementwise if self.floating else None,
            "cosine": self.cosine,
            "sqnr_db": self.sqnr_db,
            "top1": self.top1_agree / self.top1_total if self.top1_total else None,
            "mismatch": None if self.floating else self.mismatch,
            "mismatch_tolerance": None if self.floating else tolerance.mismatch,
            "nonfinite": self.nonfinite,
            "elements": self.elements,
            "compared": self.compared,
            "worst_sample": self.worst_sample,
            "worst_index": None if self.worst_index is None else list(self.worst_index),
            "worst_reference": None if self.worst_values is None else self.worst_values[0],
            "worst_candidate": None if self.worst_values is None else self.worst_values[1],
            "failures": failures,
            "ok": not failures,
        }


def _wide(values: Array) -> Array:
    """Return floats in double precision (complex in complex double)."""
    return values.astype(np.complex128 if values.dtype.kind == "c" else np.float64)


def _scalar(value: Any) -> Any:
    """Return a JSON-able scalar."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, complex):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def slice_error(gap: Array, size: Array, scale: float) -> float:
    """Return the worst of max |error| / max |reference| over all slices along each axis; 0 below rank 2."""
    worst = 0.0
    for axis in range(gap.ndim if gap.ndim > 1 else 0):
        if gap.shape[axis] < 2 or gap.size < SLICE_ELEMENTS * gap.shape[axis]:
            continue
        others = tuple(i for i in range(gap.ndim) if i != axis)
        errors, largest = gap.max(axis=others), size.max(axis=others)
        kept = largest > SLICE_FLOOR * scale
        if kept.any():
            worst = max(worst, float((errors[kept] / largest[kept]).max()))
    return worst


def log_error(a: Array, b: Array, floor: float) -> float:
    """Return the worst difference of logarithms of probabilities, relative to the largest logarithm (at least 1)."""
    x, y = np.log(np.maximum(a, floor)), np.log(np.maximum(b, floor))
    return float(np.abs(x - y).max() / max(1.0, np.abs(x).max()))


def looks_like_logits(values: Array) -> bool:
    """Tell whether an output looks like class scores: (N, classes) or (N, T, classes), trailing 1s aside."""
    shape = values.shape
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return values.dtype.kind == "f" and len(shape) in (2, 3) and shape[-1] >= 2


def top1(a: Array, b: Array) -> Array:
    """Return, per row of class scores, whether the largest of `b` is a largest of `a`: a tie there is no error."""
    classes = [n for n in a.shape if n > 1][-1] if a.shape[-1] == 1 else a.shape[-1]
    x, y = a.reshape(-1, classes), b.reshape(-1, classes)
    chosen = np.take_along_axis(x, np.argmax(y, axis=1)[:, None], axis=1)[:, 0]
    return np.asarray(chosen == x.max(axis=1))


def leaves(name: str, value: Any) -> Iterator[tuple[str, Array | None]]:
    """Yield the arrays that an output consists of, with their paths: sequences by position, maps by key."""
    if value is None:
        yield name, None
    elif isinstance(value, Mapping):
        yield f"{name}.keys", np.asarray(list(value), dtype=object)
        for key, item in value.items():
            yield from leaves(f"{name}[{key!r}]", item)
    elif isinstance(value, list | tuple):
        yield f"{name}.length", np.asarray(len(value))
        for i, item in enumerate(value):
            yield from leaves(f"{name}[{i}]", item)
    else:
        yield name, np.asarray(value)


class Comparison:
    """Outputs of two models compared over samples.

    Args:
        names: output names, in order.
        probabilities: those of them that a `softmax` or `sigmoid` made, with which of the two.
    """

    def __init__(self, names: Sequence[str], probabilities: Mapping[str, str] | None = None) -> None:
        self.names = list(names)
        self.probabilities = dict(probabilities or {})
        self.outputs: dict[str, OutputComparison] = {}

    def add(self, index: int, reference: Mapping[str, Any], candidate: Mapping[str, Any]) -> None:
        """Take in the outputs of sample `index`; both hold every name."""
        for name in self.names:
            found = dict(leaves(name, candidate[name]))
            for path, value in leaves(name, reference[name]):
                self._add(index, name, path, value, found)
            for path in found:
                self._at(name, path).mark(f"sample {index}: the reference has no such item")

    def _add(self, index: int, name: str, path: str, value: Array | None, found: dict[str, Array | None]) -> None:
        target = self._at(name, path)
        if path not in found:
            target.mark(f"sample {index}: missing")
            return
        other = found.pop(path)
        if value is None or other is None:
            if value is not other:
                target.mark(f"sample {index}: None on one side only")
            target.samples += 1
            return
        target.add(index, value, other)

    def _at(self, name: str, path: str) -> OutputComparison:
        if path not in self.outputs:
            self.outputs[path] = OutputComparison(path, self.probabilities.get(name, ""))
        return self.outputs[path]

    def rows(self, tolerance: Tolerance | Mapping[str, Tolerance]) -> list[dict[str, Any]]:
        """Return a row per output; `tolerance` for all, or by output."""
        return [
            item.row(tolerance if isinstance(tolerance, Tolerance) else tolerance[path])
            for path, item in self.outputs.items()
        ]


def widened(floor: Tolerance, own: OutputComparison | None, factor: float = 3.0) -> Tolerance:
    """Return `floor`, or `factor` times the reference's own error `own` where that is larger."""
    if own is None:
        return floor
    return replace(
        floor,
        relative=None if floor.relative is None else max(floor.relative, factor * own.relative),
        slices=None if floor.slices is None else max(floor.slices, factor * own.slices),
        log=None if floor.log is None else max(floor.log, factor * own.log),
        zero_atol=max(floor.zero_atol, factor * own.zero_abs),
        mismatch=max(floor.mismatch, min(1.0, factor * own.mismatch)),
        nonfinite=max(floor.nonfinite, min(1.0, factor * own.nonfinite_fraction)),
    )


def adapted(low: Tolerance, high: Tolerance, own: OutputComparison | None, factor: float = 30.0) -> Tolerance:
    """Return `factor` times the reference's own error `own`, but between `low` and `high`."""

    def between(least: float | None, most: float | None, error: float) -> float | None:
        return most if least is None or most is None else min(most, max(least, factor * error))

    if own is None:
        return high
    return replace(
        high,
        relative=between(low.relative, high.relative, own.relative),
        slices=between(low.slices, high.slices, own.slices),
        log=between(low.log, high.log, own.log),
    )


def floor_tolerance(relative: float, atol: float = 0.0) -> Tolerance:
    """Return the tolerance for a relative error: the same for logarithms (1e-4 at least), 30 times it in slices."""
    return Tolerance(relative, slices=30 * relative, log=max(relative, 1e-4), atol=atol)


def compare_outputs(
    reference: Mapping[str, Any],
    candidate: Mapping[str, Any],
    *,
    rtol: float = 1e-5,
    atol: float = 0.0,
    probabilities: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Compare one sample's outputs; return a row per output with `ok` and `failures`."""
    comparison = Comparison(list(reference), probabilities)
    comparison.add(0, reference, candidate)
    return comparison.rows(floor_tolerance(rtol, atol))
