"""A histogram of a tensor's values -> the range that its codes should cover."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from graphopt.codes import TINY, Affine, activation_code
from graphopt.errors import DataError, SpecError, did_you_mean
from graphopt.histogram import SMOOTHINGS, Bins, Histogram

Array: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True)
class Range:
    """Values from `low` to `high`; codes saturate outside."""

    low: float
    high: float


def find_range(histogram: Histogram, method: str = "min-max", **options: Any) -> Range:
    """Return the range that a method of `METHODS` picks.

    Raises:
        DataError: the histogram is empty.
        SpecError: no such method or option.
    """
    if method not in METHODS:
        raise SpecError(
            f"no calibration method '{method}'", hint=did_you_mean(method, METHODS) or f"known: {', '.join(METHODS)}"
        )
    if not histogram.count:
        raise DataError("no finite values to take a range from")
    try:
        return METHODS[method](histogram, **options)
    except TypeError as error:
        raise SpecError(f"method '{method}': {error}") from error


def min_max(histogram: Histogram) -> Range:
    """Return the smallest and the largest value."""
    return Range(histogram.low, histogram.high)


def abs_max(histogram: Histogram) -> Range:
    """Return the largest magnitude on both sides of zero."""
    largest = max(-histogram.low, histogram.high)
    return Range(-largest, largest)


def percentile(histogram: Histogram, percent: float = 99.99) -> Range:
    """Return what leaves out (100 - `percent`) % of the values, half of them on either side.

    Values are taken as evenly spread in their bin, so that either end is within one bin (2^-10 of itself) of what
    `numpy.percentile` gives of the values themselves.

    Raises:
        SpecError: not between 50 and 100.
    """
    if not 50.0 <= percent <= 100.0:
        raise SpecError(f"a percentile is from 50 to 100, not {percent}")
    bins = histogram.bins()
    tail = (100.0 - percent) / 200.0
    return Range(quantile(bins, tail), quantile(bins, 1.0 - tail))


def quantile(bins: Bins, fraction: float) -> float:
    """Return the value below which this fraction of the values lies."""
    ends = np.cumsum(bins.counts, dtype=np.float64)
    wanted = fraction * ends[-1]
    index = min(int(np.searchsorted(ends, wanted)), len(ends) - 1)
    inside = (wanted - (ends[index] - bins.counts[index])) / bins.counts[index]
    return float(bins.low[index] + inside * (bins.high[index] - bins.low[index]))


def moving_average(histogram: Histogram, smoothing: float = 0.01) -> Range:
    """Return the running average of the samples' extremes (Jacob et al. 2018), see `histogram.Average`.

    Raises:
        SpecError: a smoothing that is not kept.
    """
    for average in histogram.averages:
        if average.smoothing == smoothing:
            return Range(*average.extremes())
    raise SpecError(f"no average with smoothing {smoothing} is kept", hint=f"kept: {', '.join(map(str, SMOOTHINGS))}")


def entropy(histogram: Histogram, bins: int = 2048, levels: int | None = None) -> Range:
    """Return the range whose codes lose least information: the method of TensorRT (Migacz, GTC 2017).

    The magnitudes, cut into `bins` even bins, are compared with what `levels` codes make of those below a threshold, by
    Kullback-Leibler divergence; the threshold of least divergence limits both sides.  Four things are ours.  Exact
    zeros, which every code has, do not count.  Values of one sign get 256 levels, since their codes all lie there.
    Clipped values beyond a gap do not make the divergence infinite: the empty bins of the last level count as one
    value.  An outlier does not use up the bins: they begin at 16 times the 99.999th percentile, and when the least
    threshold is the best, the search goes on below it with as many.

    Raises:
        SpecError: fewer bins than levels.
    """
    levels = levels or (128 if histogram.low < 0 < histogram.high else 256)
    if not 1 < levels <= bins:
        raise SpecError(f"entropy needs at least as many bins as levels, not {bins} and {levels}")
    held = histogram.bins()
    total = held.counts[(held.low != 0) | (held.high != 0)].sum()
    top = min(max(-histogram.low, histogram.high), 16 * _magnitude_quantile(held, 0.99999))
    while top >= TINY:
        counts = magnitudes(held, top, bins)
        best = least_divergence(counts, max(total - counts.sum(), 0.0), levels)
        top *= best / bins
        if best > levels or levels == bins:
            break
    return Range(max(histogram.low, -top), min(histogram.high, top))


def _magnitude_quantile(held: Bins, fraction: float) -> float:
    """Return the magnitude that this fraction of the values other than zero does not exceed, rounded up to a bin."""
    ends = np.maximum(np.abs(held.low), np.abs(held.high))
    order = np.argsort(ends)
    reached = np.cumsum(np.where(ends > 0, held.counts, 0)[order])
    return float(ends[order][np.searchsorted(reached, fraction * reached[-1])])


def magnitudes(held: Bins, top: float, bins: int) -> Array:
    """Return how many values have a magnitude in each of `bins` even bins up to `top`, zeros left out (float64)."""
    edges = np.linspace(0.0, top, bins + 1)
    above = np.zeros(bins + 1)
    for low, high, sign in ((held.low, held.high, 1.0), (-held.high[::-1], -held.low[::-1], -1.0)):
        mine = high > 0
        counts = (held.counts if sign > 0 else held.counts[::-1])[mine].astype(np.float64)
        if counts.size:
            total = np.cumsum(counts)
            ends = np.stack([low[mine], high[mine]], axis=1).reshape(-1)
            above += np.interp(edges, ends, np.stack([total - counts, total], axis=1).reshape(-1))
    found = np.diff(above)
    return np.where(found > 1e-12 * above[-1], found, 0.0)  # differences of sums: the rest is rounding


def least_divergence(counts: Array, beyond: float, levels: int) -> int:
    """Return how many of the bins the best threshold keeps: `levels` of them to all (the most among equals).

    Args:
        counts: values in each bin.
        beyond: values above the last bin.
        levels: codes; bins of one code are as many as evenness allows, and share its count evenly where not empty.
    """
    kept = np.arange(levels, len(counts) + 1)
    edges = np.arange(levels + 1) * kept[:, None] // levels
    mass = np.diff(_cumulated(counts)[edges], axis=1)
    filled = np.diff(_cumulated(counts > 0)[edges], axis=1)
    inside = mass.sum(axis=1)
    total = counts.sum() + beyond
    clipped = np.maximum(total - inside, 0.0)
    clipped[clipped < 1e-9 * total] = 0.0  # rounding
    last = counts[kept - 1]
    filled[:, -1] += (last == 0) & (clipped > 0)
    mass[:, -1] = np.where((mass[:, -1] == 0) & (clipped > 0), 1.0, mass[:, -1])
    with np.errstate(divide="ignore", invalid="ignore"):
        share = mass / filled
        spread = _cumulated(_x_log_x(counts))[kept] - np.nansum(np.where(mass > 0, mass * np.log(share), 0.0), axis=1)
        ends = last + clipped
        spread += _x_log_x(ends) - _x_log_x(last) - np.where(clipped > 0, clipped * np.log(share[:, -1]), 0.0)
        divergence = (spread + total * np.log(inside / total)) / total
    divergence[~np.isfinite(divergence)] = np.inf
    divergence[inside == 0] = np.inf
    return int(kept[len(kept) - 1 - np.argmin(divergence[::-1])])


def _cumulated(values: Array) -> Array:
    return np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])


def _x_log_x(values: Array) -> Array:
    return np.where(values > 0, values * np.log(np.maximum(values, 1e-300)), 0.0)


def least_error(histogram: Histogram, dtype: npt.DTypeLike = np.uint8, symmetric: bool = False) -> Range:
    """Return the range of least squared error under the code that `activation_code` makes of it.

    Both ends are cut together first, then each alone, in ever finer steps; cutting nothing is among what is tried.
    """
    held = histogram.bins()
    values, weights = (held.low + held.high) / 2, held.counts.astype(np.float64)

    def cost(low: float, high: float) -> float:
        return squared_error(values, weights, activation_code(low, high, dtype, symmetric))

    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    top = _cut(max(-low, high), lambda end: cost(max(low, -end), min(high, end)))
    low, high = max(low, -top), min(high, top)
    if symmetric or low == 0 or high == 0:
        return Range(max(low, histogram.low), min(high, histogram.high))
    for _ in range(2):
        high = _cut(high, lambda end, low=low: cost(low, end))  # type: ignore[misc]
        low = -_cut(-low, lambda end, high=high: cost(-end, high))  # type: ignore[misc]
    return Range(low, high)


def squared_error(values: Array, weights: Array, code: Affine) -> float:
    """Return the mean square of what a scalar code changes values by (float64, with weights)."""
    scale = float(code.scale)
    back = np.rint(np.clip(values / scale, float(code.low) / scale, float(code.high) / scale)) * scale
    return float((np.square(values - back) * weights).sum() / weights.sum())


def _cut(end: float, cost: Callable[[float], float]) -> float:
    """Return the multiple of `end`, at most 1, that costs least: factors of 2^(1/4), then of less around the best."""
    best, least = end, cost(end)

    def attempt(candidates: Iterable[float]) -> bool:
        nonlocal best, least
        last = best
        for last in candidates:
            if TINY <= last <= end and (found := cost(last)) < least:
                best, least = last, found
        return best == last

    while best >= TINY and attempt([best * 2.0 ** (-i / 4) for i in range(1, 41)]):
        pass  # the least that was tried is the best: it goes on from there
    for step in (1 / 16, 1 / 64):
        attempt([best * 2.0 ** (i * step) for i in (-3, -2, -1, 1, 2, 3)])
    return best


METHODS: Mapping[str, Callable[..., Range]] = {
    "min-max": min_max,
    "moving-average": moving_average,
    "percentile": percentile,
    "entropy": entropy,
    "mse": least_error,
    "abs-max": abs_max,
}
"""Name -> function of a histogram (and options)."""
