"""Factors that even out the channels between two layers, found from their weights or from what flows between them.

    f(W₁ x + b₁) -> W₂      =      f(W₁/s x + b₁/s) -> W₂ s         f(c y) = c f(y) for every c > 0

One factor s per channel.  All are powers of two: multiplying floats by them rounds nothing, so that the layers compute
to the bit what they did, as long as nothing leaves the range of float32.

    balanced   s = √(r₁ / r₂): rows of W₁ (or the channels of the activation) and columns of W₂ become equally large
    filled     s = r₁ / max r₁: every channel fills the activation's range.  Where W₂ has one input channel for each
               output (depthwise), and a scale for each output, that costs it nothing

Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]

LARGEST = 12
"""The exponent of a factor at most: beyond it, a channel is rather dead than small."""

SAFE = (1e-30, 1e30)
"""Sizes of weights that a factor may lead to."""


def balanced(first: Array, second: Array) -> Array:
    """Return exponents of the factors that make the ranges of two sides equal: int64, 0 where a side is empty.

    Args:
        first: the largest absolute value of each channel before (rows of W₁, or the activation).
        second: of each channel behind (columns of W₂).
    """
    with np.errstate(invalid="ignore"):
        return _whole(np.rint((_log2(first) - _log2(second)) / 2), (first, second))


def filled(first: Array) -> Array:
    """Return exponents of the factors that bring each channel to half of the largest one or more."""
    largest = float(np.max(first, initial=0.0, where=np.isfinite(first)))
    with np.errstate(invalid="ignore"):
        return _whole(np.ceil(_log2(first) - _log2(np.full(1, largest))), (first,))


def _log2(values: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.log2(np.asarray(values, np.float64)))


def _whole(exponents: Array, sides: tuple[Array, ...]) -> Array:
    """Return exponents as whole numbers within bounds, 0 where a side says nothing."""
    usable = np.isfinite(exponents)
    for side in sides:
        usable &= np.isfinite(side) & (np.asarray(side) > 0)
    return np.where(usable, np.clip(exponents, -LARGEST, LARGEST), 0).astype(np.int64)


def within_reach(values: Array, exponents: Array) -> Array:
    """Tell of each channel whether its values (channel first), times two to the exponent, stay usual float32 numbers.

    Zeros do.
    """
    sizes = np.abs(np.asarray(values, np.float64)).reshape(len(values), -1)
    smallest = np.min(sizes, axis=1, initial=np.inf, where=sizes > 0)
    largest = sizes.max(axis=1, initial=0.0)
    factor = np.exp2(exponents.astype(np.float64))
    return np.asarray((largest * factor <= SAFE[1]) & (smallest * factor >= SAFE[0]))
