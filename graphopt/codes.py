"""Number codes: how a float array becomes small integers and back.

Affine codes are ONNX's QuantizeLinear and DequantizeLinear (opset 21): one scale and zero point per tensor, per channel
or per block along an axis.  A scale is always a normal positive float32, and zero is always exactly representable.
Codebooks number a few levels that need not be evenly spaced: powers of two, NormalFloat, k-means.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from graphopt.errors import DataError, SpecError

Array: TypeAlias = npt.NDArray[Any]
Floats: TypeAlias = npt.NDArray[np.float32]
WeightMethod = Literal["absmax", "mse"]

TINY = float(np.finfo(np.float32).tiny)
"""Smallest normal float32: kernels flush what is below to zero and would divide by it."""
LARGEST = float(np.finfo(np.float32).max)

SHRINKS: tuple[float, ...] = tuple(np.linspace(1.0, 0.3, 15).tolist())
"""What `mse` tries to cut a weight's range to; then it tries less, by hundredths, on both sides of the best."""
FINER: tuple[float, ...] = (-0.04, -0.03, -0.02, -0.01, 0.01, 0.02, 0.03, 0.04)

_iinfo: Any = ml_dtypes.iinfo  # has no types

_ROWS = 1 << 22


def code_range(dtype: npt.DTypeLike) -> tuple[int, int]:
    """Return the smallest and largest code of an integer storage type.

    Raises:
        SpecError: not an integer type.
    """
    kind = np.dtype(dtype)
    try:
        info = _iinfo(kind)
    except ValueError as error:
        raise SpecError(
            f"{kind.name} holds no integer codes", hint="int4, uint4, int8, uint8, int16, uint16"
        ) from error
    return int(info.min), int(info.max)


@dataclass(frozen=True)
class Affine:
    """The code ``round(x / scale) + zero_point``, saturated.

    Attributes:
        scale: float32; a scalar, one per channel (1-D), or one per block (the values' rank, `axis` divided by `block`).
        zero_point: codes, shaped as `scale`; its dtype is the storage type.
        axis: of the channels, or the one that blocks lie along; None for one scale.
        block: values per block along `axis`; the last block may be shorter.  0 for none.
        limits: codes used, where these are fewer than the storage holds (7 bits in an int8, -127 to 127).
    """

    scale: Floats
    zero_point: Array
    axis: int | None = None
    block: int = 0
    limits: tuple[int, int] | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        """The storage type."""
        return self.zero_point.dtype

    @property
    def codes(self) -> tuple[int, int]:
        """Smallest and largest code."""
        return self.limits or code_range(self.dtype)

    @property
    def low(self) -> Array:
        """The smallest value that is not saturated (float64, shaped as `scale`)."""
        return np.asarray((self.codes[0] - self.zero_point.astype(np.float64)) * self.scale)

    @property
    def high(self) -> Array:
        """The largest value that is not saturated."""
        return np.asarray((self.codes[1] - self.zero_point.astype(np.float64)) * self.scale)

    def quantize(self, values: Array) -> Array:
        """Return the codes of float32 values as ONNX Runtime's QuantizeLinear makes them: half to even, saturated.

        Infinities saturate.  NaN has no code; it becomes the smallest one.
        """
        values = np.asarray(values, np.float32)
        smallest, largest = self.codes
        zero = self._spread(self.zero_point.astype(np.float32), values.shape)
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = values / self._spread(self.scale, values.shape)
        rounded = np.rint(np.clip(scaled, smallest - zero, largest - zero)) + zero
        return np.asarray(np.nan_to_num(rounded, nan=smallest).astype(np.int32).astype(self.dtype))

    def dequantize(self, codes: Array) -> Floats:
        """Return float32 values as DequantizeLinear makes them."""
        zero = self._spread(self.zero_point.astype(np.int32), codes.shape)
        found = (codes.astype(np.int32) - zero).astype(np.float32) * self._spread(self.scale, codes.shape)
        return np.asarray(found, np.float32)

    def approximate(self, values: Array) -> Floats:
        """Return the values that come back from their codes."""
        return self.dequantize(self.quantize(values))

    def _spread(self, parameter: Array, shape: tuple[int, ...]) -> Array:
        return spread(parameter, shape, self.axis, self.block)


def spread(parameter: Array, shape: tuple[int, ...], axis: int | None, block: int) -> Array:
    """Return scales or zero points in a shape that broadcasts with values of `shape`."""
    if parameter.ndim == 0 or axis is None:
        return parameter
    axis %= len(shape)
    if block:
        return np.repeat(parameter, block, axis=axis).take(np.arange(shape[axis]), axis=axis)
    return parameter.reshape([-1 if i == axis else 1 for i in range(len(shape))])


def activation_code(low: float, high: float, dtype: npt.DTypeLike = np.uint8, symmetric: bool = False) -> Affine:
    """Return the scalar code of a range, which is widened to hold zero and cut to half of what float32 holds.

    Args:
        low: smallest value; what is below saturates.
        high: largest value.
        dtype: storage.
        symmetric: put zero in the middle: code 0 of signed types, 2^(bits-1) of unsigned ones.

    Raises:
        DataError: NaN, or `low` above `high`.
    """
    if not low <= high:
        raise DataError(f"no range: from {low} to {high}")
    low, high = max(min(low, 0.0), -LARGEST / 2), min(max(high, 0.0), LARGEST / 2)  # so that no code's value overflows
    smallest, largest = code_range(dtype)
    if symmetric:
        middle = (smallest + largest + 1) // 2
        scale = normal(max(-low, high) / (largest - middle))
        return Affine(scale, np.asarray(middle).astype(dtype))
    scale = normal((high - low) / (largest - smallest))
    zero = min(max(round(smallest - low / float(scale)), smallest), largest)
    return Affine(scale, np.asarray(zero).astype(dtype))


def normal(scale: npt.ArrayLike) -> Floats:
    """Return scales as float32, zeros as 1, others raised to the smallest normal float and cut to the largest."""
    found = np.asarray(scale, np.float64)
    found = np.where(found == 0, 1.0, np.clip(found, TINY, LARGEST))
    return np.asarray(found, np.float32)


def storage(bits: int, signed: bool) -> np.dtype[Any]:
    """Return the smallest storage type of so many bits.

    Raises:
        SpecError: not 1 to 16 bits.
    """
    if not 1 < bits <= 16:
        raise SpecError(f"codes have 2 to 16 bits, not {bits}")
    names = ("int4", "int8", "int16") if signed else ("uint4", "uint8", "uint16")
    name = names[0 if bits <= 4 else 1 if bits <= 8 else 2]
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def weight_code(
    values: Array, axis: int | None, bits: int = 8, symmetric: bool = True, block: int = 0,
    method: WeightMethod = "absmax", narrow: bool = False,
) -> Affine:  # fmt: skip
    """Return the code of a constant.

    Args:
        values: float weights.
        axis: one scale per index of this axis; with `block`, the axis that blocks lie along and every other index has
            scales of its own; None for one scale.
        bits: per code, 2 to 16, in the smallest type that holds them (7 bits go in an int8).
        symmetric: signed codes and zero point 0; else unsigned ones.
        block: values per block along `axis`.
        method: `absmax` maps the largest value to the largest code; `mse` cuts the range to where the squared error is
            least.
        narrow: leave out the smallest signed code, so that the range is as long on both sides.

    Raises:
        DataError: NaN or infinite weights.
        SpecError: impossible options.
    """
    values, axis, groups, shape = _in_groups(values, axis, block)
    dtype = storage(bits, symmetric)
    smallest, largest = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if symmetric else (0, (1 << bits) - 1)
    limits = (smallest + narrow, largest) if symmetric else (smallest, largest)
    low, high = (np.minimum(groups.min(axis=1, initial=0), 0), np.maximum(groups.max(axis=1, initial=0), 0))
    scale, zero = _scale(low, high, symmetric, limits)
    if method == "mse":
        scale, zero = _least_error(groups, low, high, symmetric, limits)
    return Affine(
        scale.reshape(shape), zero.reshape(shape).astype(dtype), axis, block,
        None if limits == code_range(dtype) else limits,
    )  # fmt: skip


def grouped(values: Array, axis: int | None, block: int) -> tuple[Array, tuple[int, ...]]:
    """Return the values that share a scale as rows (short blocks filled with zeros), and the shape of the scales."""
    if axis is None:
        return values.reshape(1, -1), ()
    if not block:
        length = values.shape[axis]
        return np.moveaxis(values, axis, 0).reshape(length, math.prod(values.shape) // max(length, 1)), (length,)
    if block < 0:
        raise SpecError(f"a block has at least one value, not {block}")
    blocks = -(-values.shape[axis] // block)
    padding = [(0, blocks * block - size if i == axis else 0) for i, size in enumerate(values.shape)]
    cut = np.pad(values, padding).reshape(*values.shape[:axis], blocks, block, *values.shape[axis + 1 :])
    rows = np.moveaxis(cut, axis + 1, -1)
    return rows.reshape(-1, block), rows.shape[:-1]


def _in_groups(values: Array, axis: int | None, block: int) -> tuple[Floats, int | None, Array, tuple[int, ...]]:
    """Return float32 values, their axis from the front, and what `grouped` makes of them."""
    values = np.asarray(values, np.float32)
    _check_finite(values)
    if block and axis is None:
        raise SpecError("blocks lie along an axis", hint="give one")
    axis = None if axis is None else axis % values.ndim
    return values, axis, *grouped(values, axis, block)


def _scale(low: Array, high: Array, symmetric: bool, limits: tuple[int, int]) -> tuple[Floats, Array]:
    if symmetric:
        return normal(np.maximum(-low, high).astype(np.float64) / limits[1]), np.zeros(len(low), np.int32)
    scale = normal((high.astype(np.float64) - low) / (limits[1] - limits[0]))
    zero = np.clip(np.rint(limits[0] - low / scale.astype(np.float64)), *limits)
    return scale, zero.astype(np.int32)


def _least_error(
    groups: Array, low: Array, high: Array, symmetric: bool, limits: tuple[int, int]
) -> tuple[Floats, Array]:
    """Return each row's scale and zero point of least squared error among the shrunk ranges."""
    best_scale, best_zero = _scale(low, high, symmetric, limits)
    rows = max(1, _ROWS // max(groups.shape[1], 1))
    for start in range(0, len(groups), rows):
        part = slice(start, start + rows)
        shrinks, least = np.ones(len(groups[part])), np.full(len(groups[part]), np.inf)
        for tried in (SHRINKS, FINER):
            coarse = shrinks.copy()
            for number in tried:
                shrink = np.full_like(coarse, number) if tried is SHRINKS else np.minimum(coarse + number, 1.0)
                scale, zero = _scale(low[part] * shrink, high[part] * shrink, symmetric, limits)
                error = _row_errors(groups[part], scale[:, None], zero[:, None], limits)
                better = error < least
                for held, found in (
                    (shrinks, shrink),
                    (least, error),
                    (best_scale[part], scale),
                    (best_zero[part], zero),
                ):
                    held[better] = found[better]
    return best_scale, best_zero


def _row_errors(rows: Array, scale: Array, zero: Array, limits: tuple[int, int]) -> Array:
    """Return the sum of squared errors of each row (float64)."""
    codes = rows / scale
    np.rint(codes, out=codes)
    smallest, largest = ((limit - zero).astype(np.float32) for limit in limits)
    np.clip(codes, smallest, largest, out=codes)
    codes *= scale
    codes -= rows
    return np.asarray(np.einsum("ij,ij->i", codes, codes, dtype=np.float64, casting="same_kind"))


# --- codes that are not linear


@dataclass(frozen=True)
class Codebook:
    """The code of the nearest of a few levels, times a scale.

    Attributes:
        levels: float32, rising, at most 65,536.
        scale: float32; a scalar, one per channel, or one per block, as in `Affine`.
        axis: of the channels, or the one that blocks lie along; None for one scale.
        block: values per block along `axis`; 0 for none.
    """

    levels: Floats
    scale: Floats
    axis: int | None = None
    block: int = 0

    @property
    def dtype(self) -> np.dtype[Any]:
        """The storage type: of the least unsigned integers that can number the levels."""
        return storage(max(2, (len(self.levels) - 1).bit_length()), signed=False)

    def quantize(self, values: Array) -> Array:
        """Return the number of the level nearest to each float value; of two as near, the lower one."""
        values = np.asarray(values, np.float32)
        borders = (self.levels[1:].astype(np.float64) + self.levels[:-1]) / 2
        scaled = values / spread(self.scale, values.shape, self.axis, self.block)
        return np.searchsorted(borders, scaled).astype(self.dtype)

    def dequantize(self, codes: Array) -> Floats:
        """Return float32 values."""
        found = self.levels[codes.astype(np.int64)]
        return np.asarray(found * spread(self.scale, codes.shape, self.axis, self.block), np.float32)

    def approximate(self, values: Array) -> Floats:
        """Return the values that come back from their codes."""
        return self.dequantize(self.quantize(values))


def normal_float_levels(bits: int = 4) -> Floats:
    """Return the levels of NormalFloat (Dettmers et al. 2023, QLoRA): quantiles of a normal distribution in [-1, 1].

    Zero is one of them; of the others half are positive and one less is negative.
    """
    half = 1 << (bits - 1)
    ends = 1.0 - (1.0 / (4 * half) + 1.0 / (4 * half - 2)) / 2  # the mean of both sides' outermost quantiles
    from scipy.special import ndtri  # noqa: PLC0415  (slow to import, for those who need it)

    positive = ndtri(np.linspace(ends, 0.5, half + 1)[:-1])
    negative = -ndtri(np.linspace(ends, 0.5, half)[:-1])
    levels = np.sort(np.concatenate([positive, [0.0], negative]))
    return np.asarray(levels / levels[-1], np.float32)


def power_of_two_levels(bits: int) -> Floats:
    """Return 0 and the positive and negative powers of two from 1 down that `bits` bits can number."""
    powers = 2.0 ** -np.arange(max((1 << (bits - 1)) - 1, 1), dtype=np.float64)
    return np.asarray(np.sort(np.concatenate([-powers, [0.0], powers])), np.float32)


def normal_float_code(values: Array, axis: int | None, bits: int = 4, block: int = 64) -> Codebook:
    """Return the NormalFloat code of weights: the largest magnitude of each block (or channel) is its scale.

    Raises:
        DataError: NaN or infinite weights.
    """
    return _scaled_codebook(values, normal_float_levels(bits), axis, block, lambda peak: peak)


def power_of_two_code(values: Array, axis: int | None, bits: int = 4, block: int = 0) -> Codebook:
    """Return the code of weights as signed powers of two: multiplying is shifting.

    The largest power is 2^floor(log2(4/3 peak)), the one nearest to the peak (Zhou et al. 2017, INQ).

    Raises:
        DataError: NaN or infinite weights.
    """
    return _scaled_codebook(
        values, power_of_two_levels(bits), axis, block, lambda peak: 2.0 ** np.floor(np.log2(peak * 4 / 3))
    )


def codebook_code(
    values: Array, axis: int | None = None, bits: int = 4, block: int = 0, weights: Array | None = None
) -> Codebook:
    """Return the code of levels that fit the values themselves: one-dimensional k-means (Lloyd 1982).

    Args:
        values: float weights.
        axis: channels (or, with `block`, blocks along it) are first divided by their largest magnitude; None does not.
        bits: 2^bits levels.
        block: values per block.
        weights: how much the squared error of each value counts, in the shape of `values`; None for all alike.

    Raises:
        DataError: NaN or infinite weights.
    """
    plain = Codebook(np.zeros(1, np.float32), np.ones((), np.float32))
    scaling = plain if axis is None else _scaled_codebook(values, plain.levels, axis, block, lambda peak: peak)
    scaled = np.asarray(values, np.float32) / spread(scaling.scale, values.shape, scaling.axis, block)
    _check_finite(scaled)
    importance = None
    if weights is not None or axis is not None:  # errors count in the unscaled values
        importance = np.square(spread(scaling.scale, values.shape, scaling.axis, block).astype(np.float64))
        importance = np.broadcast_to(importance * (1.0 if weights is None else weights), values.shape).reshape(-1)
    return replace(scaling, levels=lloyd(scaled.reshape(-1), 1 << bits, importance))


def lloyd(values: Array, count: int, weights: Array | None = None, rounds: int = 100) -> Floats:
    """Return at most `count` levels, rising, that leave little squared error: k-means on a line.

    On sorted values a cluster is a piece, and its mean a difference of running sums: a round costs a few look-ups,
    where general k-means libraries compare each value with each level.  It starts from equal shares of the cube root of
    the density, which is where the best levels lie as they get many (Panter and Dite 1951).
    """
    order = np.argsort(values, kind="stable")
    x = values[order].astype(np.float64)
    w = np.ones(len(x)) if weights is None else weights[order].astype(np.float64)
    distinct = np.unique(x)
    if len(distinct) <= count:
        return np.asarray(distinct if len(distinct) else [0.0], np.float32)
    mass = np.concatenate([[0.0], np.cumsum(w)])
    moment = np.concatenate([[0.0], np.cumsum(w * x)])
    levels = _companded(x, w, count)
    for _ in range(rounds):
        cuts = np.concatenate([[0], np.searchsorted(x, (levels[1:] + levels[:-1]) / 2), [len(x)]])
        inside = np.diff(mass[cuts])
        means = np.divide(np.diff(moment[cuts]), inside, out=levels.copy(), where=inside > 0)
        if np.array_equal(means, levels):
            break
        levels = means
    return np.asarray(np.unique(levels), np.float32)


def _companded(x: Array, w: Array, count: int) -> Array:
    """Return levels at equal shares of the cube root of the density of sorted values."""
    density, edges = np.histogram(x, bins=8 * count, weights=w)
    shares = np.concatenate([[0.0], np.cumsum(np.cbrt(np.maximum(density, 0.0)))])
    return np.asarray(np.interp((np.arange(count) + 0.5) / count * shares[-1], shares, edges))


def _scaled_codebook(
    values: Array, levels: Floats, axis: int | None, block: int, scale: Callable[[Array], Array]
) -> Codebook:
    values, axis, groups, shape = _in_groups(values, axis, block)
    peaks = normal(np.abs(groups).max(axis=1, initial=0))
    return Codebook(levels, normal(scale(peaks.astype(np.float64))).reshape(shape), axis, block)


def _check_finite(values: Array) -> None:
    if not np.isfinite(values).all():
        raise DataError("weights that are NaN or infinite have no code")
