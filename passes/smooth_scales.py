"""Factors that even out the channels of a product's input, found from their statistics alone.

    x @ W = (x / s) @ (s W)          s: one positive factor per channel (row of W)

Quantized in N = 255 steps over its range, x / s has an error of variance d^2 / 12 in every channel, with
d = (max - min) / N.  Row by row the weight has D_n^2 / 12 in column n, with D_n = max_k |s_k W_kn| / 127.  Errors of
different elements taken as independent, the variance in the results, summed over columns, is

    E(s) = d(s)^2 / 12 * sum_kn s_k^2 W_kn^2  +  sum_n D_n(s)^2 / 12 * sum_k E[x_k^2] / s_k^2

and needs the least, the greatest and the mean square value of each channel only.  The first term alone is least where
every channel of x / s fills the range, the second where the weights do; the search looks between.

Source: Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", ICML
2023, whose s = max|x|^a / max|W|^(1 - a) is one of the families tried; the measure and the other families are ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

STEPS, LARGEST = 255, 127
"""Steps of an activation's range; the largest code of a weight."""

QUIET = 0.1
"""Channels are taken to reach this part of the usual channel's size at least, whatever the samples show."""

ELEMENTS = 1 << 20
"""Elements of the weights that the search looks at; of larger ones, some columns stand for all."""

ALPHAS = tuple(np.linspace(0.1, 1.0, 10).tolist())
LEVELS = tuple(np.linspace(0.1, 1.0, 17)[:-1].tolist())


@dataclass(frozen=True)
class ChannelStatistics:
    """Least, greatest and mean square value of each channel (1-D)."""

    low: Array
    high: Array
    square: Array

    @property
    def size(self) -> Array:
        """The largest value of each channel, quiet ones raised: later data may be louder there."""
        found = np.maximum(np.maximum(self.high, -self.low), 0.0)
        usual = float(np.median(found)) or float(found.max(initial=0.0)) or 1.0
        return np.asarray(np.maximum(found, QUIET * usual))


@dataclass(frozen=True)
class Factors:
    """Factors of the channels, and what they bring.

    Attributes:
        values: s, float64, their geometric mean 1.
        before: variance of the error over that of the results, before; `after` with the factors.
    """

    values: Array
    before: float
    after: float

    @property
    def ratio(self) -> float:
        """How much of the error's variance stays."""
        return self.after / self.before if self.before > 0 else 1.0


class _Measure:
    """The error of one input's products (see the module's text)."""

    def __init__(self, channels: ChannelStatistics, weights: Sequence[Array]) -> None:
        self.channels = channels
        every = max(1, math.ceil(sum(w.size for w in weights) / ELEMENTS))
        self.weight = np.concatenate([np.abs(w[:, ::every].astype(np.float64)) for w in weights], axis=1)
        self.rows = np.square(self.weight).sum(axis=1)
        self.largest = np.maximum(self.weight.max(axis=1, initial=0.0), 1e-12)
        self.signal = max(float((channels.square * self.rows).sum()), 1e-300)

    def __call__(self, s: Array) -> float:
        low, high = (self.channels.low / s).min(initial=0.0), (self.channels.high / s).max(initial=0.0)
        step = (high - low) / STEPS
        steps = (self.weight * s[:, None]).max(axis=0, initial=0.0) / LARGEST
        of_input = step**2 / 12 * float((self.rows * s**2).sum())
        of_weight = float(np.square(steps).sum()) / 12 * float((self.channels.square / s**2).sum())
        return float(of_input + of_weight) / self.signal


def find_factors(channels: ChannelStatistics, weights: Sequence[Array], alpha: float = 0.0) -> Factors:
    """Return the factors for an input.

    Args:
        channels: of the input.
        weights: of the products that read it (channels by outputs).
        alpha: how far towards the weights the sizes go, 0 to 1; 0 searches for the least error.
    """
    measure = _Measure(channels, weights)
    best, before = np.ones(len(channels.low)), measure(np.ones(len(channels.low)))
    if alpha:
        best = _shared(channels.size, measure.largest, alpha)
        return Factors(best, before, measure(best))
    least = before
    for candidate in _candidates(channels.size, measure.largest):
        found = measure(candidate)
        if found < least:
            best, least = candidate, found
    return Factors(best, before, least)


def _candidates(sizes: Array, weights: Array) -> Iterator[Array]:
    for alpha in ALPHAS:
        yield _shared(sizes, weights, alpha)
        yield _centred(sizes**alpha)
    for level in LEVELS:
        yield _centred(np.maximum(sizes, np.quantile(sizes, level)))


def _shared(sizes: Array, weights: Array, alpha: float) -> Array:
    floor = QUIET * float(np.median(weights))
    return _centred(sizes**alpha / np.maximum(weights, max(floor, 1e-12)) ** (1 - alpha))


def _centred(s: Array) -> Array:
    return np.asarray(s / np.exp(np.log(s).mean()))
