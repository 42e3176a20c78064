"""A layer's weight and bias of least squared error at its output, from second moments alone: `solve(split, W, b)`.

With rows X of what the layer now reads and Y of what it is to give, the change D of its weight W minimises

    |Y - X (W + D) - b|² + ridge |D|²          D = (C + ridge)⁻¹ (Cxy - C W),  b = mean y - (W + D) mean x

where C and Cxy are the covariances of X, and of X with Y.  The ridge holds the weight near the one that is there, in
the directions that the samples say little of; how strong it is, held-out rows decide.  They decide as well whether
anything is changed at all: of {nothing, the bias alone, weight and bias} what errs least on them is taken.

Sources: He, Zhang, Sun: Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017 (least squares behind
each cut, on inputs that are compressed already); Luo, Wu, Lin: ThiNet, ICCV 2017; Nagel et al., 2019 (bias correction).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from graphopt.moments import Moments, Split

Array: TypeAlias = np.ndarray[Any, Any]
Method = Literal["nothing", "bias", "least-squares"]

RIDGES: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""On trial, as parts of the mean variance of the inputs."""

CAUTION = 0.03
"""The strongest ridge whose error is within so much of the least is taken: rows that are held out come from samples
like those that were fitted, and what they do not show is better left as it is."""

FIRST = 3
"""Of `RIDGES`, the one that is tried first; from there on downhill."""

EXACT = 1e-6
"""Part of the target's variance up to which an error is rounding, in sums of float32 products: such a layer is left."""

LEVEL = 1e-6
"""Of the largest mean variance of a group's inputs: the ridge is measured by no less, where a group's are dead."""

BATCHED = 64
"""Width of a group up to which all groups are solved at once."""


@dataclass(frozen=True)
class Solution:
    """What a layer is to be.

    Attributes:
        method: what was taken.
        weight: W, float64 (group, width, outputs of a group).
        bias: b, float64 (group, outputs of a group).
        error: squared error on the held-out rows, as part of the variance of the target there, with the moments that
            were to be fitted on: of what is taken.
        before: the same of the layer as it was.
        ridge: that was taken, 0 where the weight is as it was.
    """

    method: Method
    weight: Array
    bias: Array
    error: float
    before: float
    ridge: float = 0.0


@dataclass(frozen=True)
class _Residual:
    """Moments of what a layer leaves to be explained, about the means or (`centred` false) about zero.

    Attributes:
        xx: of the inputs, (group, width, width), a mean over rows.
        xr: of the inputs with the residual, (group, width, outputs).
        rr: mean square of the residual, (group, outputs).
        x_mean: (group, width); zeros about zero.
        r_mean: (group, outputs); zeros about zero.
        variance: of the target, summed over outputs.
    """

    xx: Array
    xr: Array
    rr: Array
    x_mean: Array
    r_mean: Array
    variance: float

    def error(self, change: Array | float, shift: Array | float) -> float:
        """Return the mean squared error, summed over outputs, when the weight and bias move by so much."""
        shifted = self.r_mean - shift
        inner = self.rr.sum()
        if isinstance(change, np.ndarray):
            inner += np.sum(change * (self.xx @ change - 2 * self.xr))
            shifted = shifted - np.einsum("gw,gwo->go", self.x_mean, change)
        return float(max(inner, 0.0) + np.square(shifted).sum())


def solve(
    split: Split, weight: Array, bias: Array | None, *, method: Method = "least-squares", ridges: tuple[float, ...] = ()
) -> Solution:
    """Return what of a layer is to change, and into what.

    Args:
        split: moments of its rows against its target.
        weight: as it is, (group, width, outputs of a group).
        bias: as it is, (group, outputs of a group); None where there is none and none can be.
        method: at most this much is changed.
        ridges: on trial, ascending (none: `RIDGES`).

    Returns:
        The solution, its method `nothing` where there are no rows.
    """
    centred = bias is not None
    start = np.zeros(weight.shape[::2]) if bias is None else bias
    if not split.train.count:
        return Solution("nothing", weight, start, 0.0, 0.0)
    train = _residual(split.train, weight, start, centred=centred)
    judge = _residual(split.held_out, weight, start, centred=centred) if split.held_out.count else train
    scale = judge.variance or 1.0
    before = judge.error(0.0, 0.0)
    best = Solution("nothing", weight, start, before / scale, before / scale)
    if best.before < EXACT:
        return best
    whole = _residual(split.whole, weight, start, centred=centred)
    if centred:
        error = judge.error(0.0, train.r_mean) / scale
        if error < best.error:
            best = Solution("bias", weight, start + whole.r_mean, error, best.before)
    if method != "least-squares":
        return best
    ridge, error = _best_ridge(train, judge, ridges or RIDGES)
    if error / scale < best.error:
        change = _change(whole, ridge)
        shift = whole.r_mean - np.einsum("gw,gwo->go", whole.x_mean, change)
        best = Solution("least-squares", weight + change, start + shift, error / scale, best.before, ridge)
    return best


def _residual(moments: Moments, weight: Array, bias: Array, *, centred: bool) -> _Residual:
    """Return what a layer leaves unexplained of some rows."""
    n = max(moments.count, 1)
    x_off, y_off = moments.x_sum / n, moments.y_sum / n
    xx, xy, yy = moments.xx / n, moments.xy / n, moments.yy / n
    xx = xx - x_off[:, :, None] * x_off[:, None]
    xy = xy - x_off[:, :, None] * y_off[:, None]
    yy = yy - y_off**2
    variance = float(np.maximum(yy, 0).sum())
    x_mean, y_mean = moments.x_mean, moments.y_mean
    if not centred:
        xx = xx + x_mean[:, :, None] * x_mean[:, None]
        xy = xy + x_mean[:, :, None] * y_mean[:, None]
        yy = yy + y_mean**2
    product = xx @ weight
    rr = yy + np.sum(weight * (product - 2 * xy), axis=1)
    if not centred:
        return _Residual(xx, xy - product, rr, np.zeros_like(x_mean), np.zeros_like(y_mean), variance)
    r_mean = y_mean - np.einsum("gw,gwo->go", x_mean, weight) - bias
    return _Residual(xx, xy - product, rr, x_mean, r_mean, variance)


def _best_ridge(train: _Residual, judge: _Residual, ridges: tuple[float, ...]) -> tuple[float, float]:
    """Return the strongest ridge of about the least error on the rows that judge, and its error."""
    found: dict[int, float] = {}

    def error(i: int) -> float:
        if i not in found:
            change = _change(train, ridges[i])
            found[i] = judge.error(change, train.r_mean - np.einsum("gw,gwo->go", train.x_mean, change))
        return found[i]

    at = min(FIRST, len(ridges) - 1)
    while True:
        near = [i for i in (at - 1, at + 1) if 0 <= i < len(ridges)]
        best = min([at, *near], key=error)
        if best == at:
            break
        at = best
    while at + 1 < len(ridges) and error(at + 1) <= (1.0 + CAUTION) * found[best]:
        at += 1
    return ridges[at], error(at)


def _change(residual: _Residual, ridge: float) -> Array:
    """Return the change of the weight of least squared error plus ridge: (group, width, outputs)."""
    import scipy.linalg  # noqa: PLC0415  (slow to import, for those who need it)

    group, width, _ = residual.xr.shape
    diagonal = np.einsum("gww->gw", residual.xx)
    level = diagonal.mean(axis=1)
    level = np.maximum(level, LEVEL * level.max(initial=0.0) or 1.0)
    damped = residual.xx + np.eye(width) * (ridge * level)[:, None, None]
    if group > 1 and width <= BATCHED:
        with contextlib.suppress(np.linalg.LinAlgError):  # one of them may be singular: each by itself, then
            return np.asarray(np.linalg.solve(damped, residual.xr))
    change = np.empty_like(residual.xr)
    for i in range(group):
        try:
            factor = scipy.linalg.cho_factor(damped[i], lower=True, check_finite=False)
            change[i] = scipy.linalg.cho_solve(factor, residual.xr[i], check_finite=False)
        except np.linalg.LinAlgError:  # rounding made it indefinite
            values, vectors = np.linalg.eigh(damped[i])
            values = np.maximum(values, ridge * level[i])
            change[i] = vectors @ ((vectors.T @ residual.xr[i]) / values[:, None])
    return change
