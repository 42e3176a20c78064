"""A histogram of a tensor's values -> the range that its codes should cover."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.errors import DataError, SpecError, did_you_mean
from graphopt.histogram import Bins, Histogram


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


METHODS: Mapping[str, Callable[..., Range]] = {
    "min-max": min_max,
    "percentile": percentile,
    "abs-max": abs_max,
}
"""Name -> function of a histogram (and options)."""
