"""Rounding of a weight to codes so that the layer's output, not the weight, stays near: GPTQ and coordinate descent.

A layer computes X W, as MatMul has it.  Rounding W to Q costs trace(Dᵀ H D) on the samples, with D = W - Q and H = XᵀX,
the Gram matrix of its inputs.  `round_to_codes` makes that small, in four steps that each use H alone:

    grid        scale and zero point of each block of each output, of least squared error weighted by the diagonal of H
    GPTQ        input by input; the error of each is made up for by the inputs that are still to come
                (Frantar, Ashkboos, Hoefler, Alistarh: GPTQ, ICLR 2023)
    rescaling   each scale again, the others and the codes held: least squares
    descent     each code again, the others and the scales held (cyclic coordinate descent, as in QuantEase: Behdin and
                others, 2023)

None of the last two raises the cost.  A weight of K inputs and N outputs takes a few times N K² operations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from graphopt.codes import normal
from graphopt.obs import LAZY, carry

Array: TypeAlias = np.ndarray[Any, Any]

DAMPING = 0.01
"""Of the mean diagonal of H, added to all of it: few samples leave directions that nothing is known of."""

SHRINKS: tuple[float, ...] = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)
"""What the range of a block is cut to on trial."""


@dataclass
class Grid:
    """The codes of a weight (inputs, outputs): ``value = (code - zero) * scale``.

    Attributes:
        scale: float32 (blocks, outputs).
        zero: int32 (blocks, outputs).
        low: smallest code.
        high: largest code.
        block: inputs that share a scale.
    """

    scale: Array
    zero: Array
    low: int
    high: int
    block: int

    def row(self, index: int, values: Array) -> tuple[Array, Array]:
        """Return the codes (int32) of one input's values (outputs,), and what these come back as."""
        scale, zero = self.scale[index // self.block], self.zero[index // self.block]
        steps = np.clip(np.rint(values / scale), self.low - zero, self.high - zero)
        return (steps + zero).astype(np.int32), steps * scale

    def steps(self, codes: Array) -> Array:
        """Return how many scales codes (inputs, outputs) stand for: float32."""
        return np.asarray(codes - np.repeat(self.zero, self.block, axis=0)[: len(codes)], np.float32)

    def values(self, codes: Array) -> Array:
        """Return what codes (inputs, outputs) stand for: float32."""
        return np.asarray(self.steps(codes) * np.repeat(self.scale, self.block, axis=0)[: len(codes)])


def search_grid(weight: Array, importance: Array, bits: int, block: int, *, symmetric: bool) -> Grid:
    """Return the grid of least squared error, each input weighted by its importance.

    Args:
        weight: (inputs, outputs).
        importance: (inputs,), not negative.
        bits: of a code.
        block: inputs that share a scale.
        symmetric: zero point 0 and signed codes.
    """
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if symmetric else (0, (1 << bits) - 1)
    inputs, outputs = weight.shape
    blocks = -(-inputs // block)
    grid = Grid(np.ones((blocks, outputs), np.float32), np.zeros((blocks, outputs), np.int32), low, high, block)
    for i in range(blocks):
        part = slice(i * block, (i + 1) * block)
        grid.scale[i], grid.zero[i] = _search(weight[part], importance[part], low, high, symmetric=symmetric)
    return grid


def _search(values: Array, importance: Array, low: int, high: int, *, symmetric: bool) -> tuple[Array, Array]:
    """Return scale and zero point of each output."""
    smallest, largest = np.minimum(values.min(axis=0), 0), np.maximum(values.max(axis=0), 0)
    outputs = values.shape[1]
    least = np.full(outputs, np.inf)
    best_scale, best_zero = np.ones(outputs, np.float32), np.zeros(outputs, np.int32)
    weights = importance + 1e-3 * max(float(importance.mean()), 1e-30)  # inputs that the samples leave at zero
    for shrink in SHRINKS:
        if symmetric:
            scale = normal(np.maximum(-smallest, largest) * shrink / high)
            zero = np.zeros(outputs, np.float32)
        else:
            scale = normal((largest - smallest) * shrink / (high - low))
            zero = np.clip(np.rint(low - smallest * shrink / scale), low, high)
        steps = np.clip(np.rint(values / scale), low - zero, high - zero)
        error = weights @ np.square(steps * scale - values)
        better = error < least
        least[better], best_scale[better], best_zero[better] = error[better], scale[better], zero[better]
    return best_scale, best_zero


def cost(weight: Array, rounded: Array, gram: Array) -> float:
    """Return trace(Dᵀ H D) of D = weight - rounded, (inputs, outputs): the squared error of the layer's output."""
    difference = (weight - rounded).astype(np.float64)
    return float(np.sum((gram @ difference) * difference))


def damped(gram: Array, damping: float = DAMPING) -> Array:
    """Return a Gram matrix (float64) with a share of its mean diagonal added, positive definite."""
    diagonal = np.diagonal(gram)
    mean = float(diagonal.mean()) if len(diagonal) else 0.0
    return np.asarray(gram + np.eye(len(gram)) * (damping * mean if mean > 0 else 1.0))


def round_to_codes(
    weight: Array,
    gram: Array,
    *,
    bits: int = 4,
    block: int = 0,
    symmetric: bool = False,
    damping: float = DAMPING,
    ordered: bool = True,
    sweeps: int = 2,
    rounded: Callable[[Array], Array] = lambda scale: scale,
) -> tuple[Array, Grid]:
    """Return the codes of a weight and their grid.

    Args:
        weight: float (inputs, outputs).
        gram: XᵀX of the inputs, (inputs, inputs).
        bits: of a code, 2 to 8.
        block: inputs that share a scale, 0 for all.
        symmetric: zero point 0 and signed codes.
        damping: see `DAMPING`.
        ordered: the inputs that matter most first (act-order): these have most others to make up for them.
        sweeps: of rescaling and descent, at most.
        rounded: how scales are stored; the codes are chosen for what comes back.

    Returns:
        int32 (inputs, outputs) codes, and the grid.
    """
    weight = np.asarray(weight, np.float32)
    block = block or max(len(weight), 1)
    hessian = damped(np.asarray(gram, np.float64), damping)
    grid = search_grid(weight, np.diagonal(hessian), bits, block, symmetric=symmetric)
    grid.scale = rounded(grid.scale).astype(np.float32)
    codes = _gptq(weight, hessian, grid, ordered=ordered)
    single = (hessian / np.diagonal(hessian).mean()).astype(np.float32)
    for _ in range(sweeps):
        rescale(weight, codes, grid, single)
        grid.scale = rounded(grid.scale).astype(np.float32)
        if not descend(weight, codes, grid, single):
            break
    return codes, grid


def _gptq(weight: Array, hessian: Array, grid: Grid, *, ordered: bool) -> Array:
    """Return codes of the inputs one by one, later ones making up for the errors of earlier ones."""
    codes = np.zeros(weight.shape, np.int32)

    def settle(index: Array, values: Array) -> Array:
        codes[index[0]], rounded = grid.row(int(index[0]), values[0])
        return rounded[None]

    carry(weight[None], hessian[None], settle, ordered=ordered)
    return codes


def rescale(weight: Array, codes: Array, grid: Grid, hessian: Array) -> None:
    """Set each scale of `grid` to that of least cost, the others held; in place.

    Args:
        weight: (inputs, outputs).
        codes: of it.
        grid: of the codes.
        hessian: float32, positive definite.
    """
    steps = grid.steps(codes)
    pull = hessian @ (weight - grid.values(codes))
    for i in range(len(grid.scale)):
        part = slice(i * grid.block, (i + 1) * grid.block)
        curvature = np.sum(steps[part] * (hessian[part, part] @ steps[part]), axis=0)
        wanted = grid.scale[i] + np.sum(steps[part] * pull[part], axis=0) / np.maximum(curvature, 1e-30)
        new = normal(np.where((curvature > 0) & (wanted > 0), wanted, grid.scale[i]))
        pull -= hessian[:, part] @ (steps[part] * (new - grid.scale[i]))
        grid.scale[i] = new


def descend(weight: Array, codes: Array, grid: Grid, hessian: Array) -> int:
    """Choose each code anew, the others held; change `codes` in place and return how many changed.

    Args:
        weight: (inputs, outputs).
        codes: of it.
        grid: of the codes.
        hessian: float32, positive definite.
    """
    rounded = grid.values(codes)
    pull = hessian @ (weight - rounded)
    changed = 0
    for start in range(0, len(weight), LAZY):
        part = slice(start, min(start + LAZY, len(weight)))
        inner, near, moves = hessian[part, part], pull[part].copy(), rounded[part].copy()
        for i in range(len(near)):
            new, values = grid.row(start + i, moves[i] + near[i] / inner[i, i])
            changed += int((new != codes[start + i]).sum())
            near -= inner[:, i, None] * (values - moves[i])
            codes[start + i], moves[i] = new, values
        pull -= hessian[:, part] @ (moves - rounded[part])
        rounded[part] = moves
    return changed
