"""Which elements of weights are set to zero: by a score each, in a layer or over all, or N of every M.

    magnitude   |W|
    random      a number drawn for each
    gradient    |W g|: how the loss changes to first order without it (Molchanov and others, 2017; SNIP: Lee and others,
                ICLR 2019)
    wanda       |W| times the norm of its input, compared within each output (Sun and others, ICLR 2024)
    sparsegpt   W² over its pivot, what its loss costs once all behind it makes up for it; and the rest does so
                (Frantar, Alistarh: SparseGPT, ICML 2023; see `obs.py`).  Beside it the zeros are made in stages, by
                Wanda's score, with a fit after each (as in Boža: Fast and Effective Weight Update for Pruned Large
                Language Models, TMLR 2024), and what errs less is taken: from 80 % on, that is mostly the latter

All weights are (group, inputs, outputs).  What is zero already goes first, so masks only grow.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from graphopt import obs
from graphopt.errors import SpecError
from graphopt.rounding import damp

Array: TypeAlias = np.ndarray[Any, Any]
Criterion: TypeAlias = Literal["magnitude", "random", "gradient", "wanda", "sparsegpt"]
Spread: TypeAlias = Literal["per-layer", "global"]

SAMPLED = frozenset({"wanda", "sparsegpt"})
"""Criteria that look at what flows into the layers."""

DAMPING = 0.01
"""Of the mean diagonal of a Gram matrix, added to all of it."""

STAGES = 8
"""In which zeros are made gradually."""

STEPS = 24
"""Of conjugate gradients on what is left, once the mask is known; in the stages before the last, a quarter."""

BLOCK = 128
"""Inputs whose mask is chosen at a time, on the weights as they are by then."""


@dataclass(frozen=True)
class Pattern:
    """At most `kept` of every `run` inputs that follow each other are not zero."""

    kept: int
    run: int

    @classmethod
    def parse(cls, text: str) -> Pattern | None:
        """Return the pattern of `N:M`; None of ''.

        Raises:
            SpecError: it is none.
        """
        if not text:
            return None
        found = re.fullmatch(r"(\d{1,4}):(\d{1,4})", text)
        if found is None or not 0 < int(found[1]) < int(found[2]):
            raise SpecError(f"a pattern is N:M with 0 < N < M, not {text!r}", at="pattern", hint="2:4")
        return cls(int(found[1]), int(found[2]))

    @property
    def amount(self) -> float:
        """Part of the elements that is zero."""
        return 1 - self.kept / self.run

    def __str__(self) -> str:
        return f"{self.kept}:{self.run}"


def lowest(scores: Array, count: int) -> Array:
    """Return a mask, True at the `count` lowest scores, equal ones in order."""
    mask = np.zeros(scores.size, bool)
    if count > 0:
        mask[np.argsort(scores, axis=None, kind="stable")[:count]] = True
    return mask.reshape(scores.shape)


def lowest_per_output(scores: Array, amount: float) -> Array:
    """Return a mask of (group, inputs, outputs): the same part of each output's inputs, as near as whole numbers come.

    The rest that whole numbers leave goes to the lowest scores of what is next in each output.
    """
    inputs = scores.shape[1]
    wanted = round(amount * scores.size)
    each = min(wanted // max(scores.shape[0] * scores.shape[2], 1), inputs)
    ranks = np.argsort(np.argsort(scores, axis=1, kind="stable"), axis=1, kind="stable")
    mask = ranks < each
    left = wanted - int(mask.sum())
    if left > 0:
        mask |= lowest(np.where(ranks == each, scores, np.inf), left)
    return np.asarray(mask)


def lowest_in_runs(scores: Array, pattern: Pattern, order: Array) -> Array:
    """Return a mask of (group, inputs, outputs): of each run of inputs, in this order, all but the `kept` highest."""
    group, inputs, outputs = scores.shape
    runs = scores[:, order].reshape(group, inputs // pattern.run, pattern.run, outputs)
    ranks = np.argsort(np.argsort(runs, axis=2, kind="stable"), axis=2, kind="stable")
    mask = np.empty(scores.shape, bool)
    mask[:, order] = (ranks < pattern.run - pattern.kept).reshape(scores.shape)
    return mask


def over_all(scores: Mapping[str, Array], amount: float) -> dict[str, Array]:
    """Return masks of weights: the lowest scores of all of them together."""
    names = list(scores)
    together = np.concatenate([scores[name].reshape(-1) for name in names]) if names else np.empty(0)
    mask = lowest(together, round(amount * together.size))
    ends: Array = np.cumsum([scores[name].size for name in names])[:-1]
    return {name: part.reshape(scores[name].shape) for name, part in zip(names, np.split(mask, ends), strict=True)}


@dataclass(frozen=True)
class Sparse:
    """A weight made sparse.

    Attributes:
        weight: float (group, inputs, outputs), zero under the mask.
        mask: True where it is zero.
        error: what is left of the layer's error, relative to its output's power: see `relative_error`.
    """

    weight: Array
    mask: Array
    error: float


def relative_error(wanted: Array, found: Array, matrix: Array) -> float:
    """Return trace(Dᵀ H D) / trace(Wᵀ H W), D = wanted - found: squared error over power of a layer's output.

    Args:
        wanted: W, (group, inputs, outputs).
        found: what stands in its place.
        matrix: H, second moments of the inputs (group, inputs, inputs).
    """
    difference = wanted - found
    power = float(np.sum((matrix @ wanted) * wanted))
    return float(np.sum((matrix @ difference) * difference)) / power if power > 0 else 0.0


def wanda_scores(weight: Array, matrix: Array) -> Array:
    """Return |W| times the norm of each input."""
    norms = np.sqrt(np.maximum(np.diagonal(matrix, axis1=-2, axis2=-1), 0.0))
    return np.asarray(np.abs(weight) * norms[..., None])


def made_up_for(
    weight: Array,
    matrix: Array,
    amount: float,
    *,
    pattern: Pattern | None = None,
    order: Array | None = None,
    zero: Array | None = None,
    damping: float = DAMPING,
    stages: int = STAGES,
) -> Sparse:
    """Return a weight made sparse, the rest of it made up for what goes: `swept` or `gradual`, what errs less.

    Args:
        weight: (group, inputs, outputs).
        matrix: second moments of the inputs, (group, inputs, inputs).
        amount: part that becomes zero; without meaning under a pattern.
        pattern: zeros come in runs.
        order: of the inputs, in which runs are counted.
        zero: mask of elements that must be zero.
        damping: see `DAMPING`.
        stages: of `gradual`; 0 leaves it out.
    """
    order = np.arange(weight.shape[1]) if order is None else order
    damped = damp(np.asarray(matrix, np.float64), damping)[:, order][:, :, order]
    wanted = np.asarray(weight, np.float64)[:, order]
    held = np.zeros(wanted.shape, bool) if zero is None else zero[:, order]
    single = damped.astype(np.float32)  # the factor alone needs more
    ways = [swept(wanted.astype(np.float32), damped, amount, pattern, held)]
    if stages:
        ways.append(gradual(wanted.astype(np.float32), single, amount, pattern, held, stages))
    tried = [Sparse(values, mask, relative_error(wanted, values, damped)) for values, mask in ways]
    found = min(tried, key=lambda each: each.error)
    back = np.argsort(order)
    return Sparse(found.weight[:, back], found.mask[:, back], found.error)


def swept(wanted: Array, matrix: Array, amount: float, pattern: Pattern | None, held: Array) -> tuple[Array, Array]:
    """Return a sparse weight and its mask as SparseGPT makes them: input by input, each block's mask when it comes.

    Args:
        wanted: (group, inputs, outputs).
        matrix: of its inputs, positive definite.
        amount: part of each block that becomes zero.
        pattern: or of each run of inputs.
        held: what must be zero.
    """
    mask = np.zeros(wanted.shape, bool)

    def ahead(part: slice, left: Array, pivots: Array) -> None:
        scores = np.square(left / pivots[..., None])
        mask[:, part] = _chosen(scores, amount, pattern, held[:, part]) | held[:, part]

    def settle(index: Array, values: Array) -> Array:
        return np.where(np.take_along_axis(mask, index[:, None, None], axis=1)[:, 0], 0.0, values)

    block = BLOCK if pattern is None else max(BLOCK // pattern.run, 1) * pattern.run
    found = obs.carry(wanted, matrix, settle, ordered=False, ahead=ahead, block=block)
    refit(found, wanted, matrix.astype(wanted.dtype), mask, STEPS)
    return found, mask


def gradual(
    wanted: Array, matrix: Array, amount: float, pattern: Pattern | None, held: Array, stages: int
) -> tuple[Array, Array]:
    """Return a sparse weight and its mask: what matters least goes, the rest is fitted again, and so on.

    The last stages take fewest: |1 - t|³ of the elements are left to go after the part t of the stages (Zhu, Gupta: To
    prune, or not to prune, 2017).  Arguments are those of `swept`.
    """
    found, mask = np.where(held, 0.0, wanted), held.copy()
    plan: list[tuple[float, Pattern | None]] = [
        (amount * (1 - (1 - i / stages) ** 3), None) for i in range(1, stages + 1)
    ]
    if pattern is not None:
        plan = [(0.0, Pattern(kept, pattern.run)) for kept in range(pattern.run - 1, pattern.kept - 1, -1)]
    for i, (part, runs) in enumerate(plan):
        mask = _chosen(wanda_scores(found, matrix), part, runs, mask) | held
        found[mask] = 0.0
        refit(found, wanted, matrix, mask, STEPS if i == len(plan) - 1 else STEPS // 4)
    return found, mask


def _chosen(scores: Array, amount: float, pattern: Pattern | None, first: Array) -> Array:
    """Return the mask of the lowest scores; what is in `first` goes before all."""
    scores = np.where(first, -1.0, scores)
    if pattern is not None:
        return lowest_in_runs(scores, pattern, np.arange(scores.shape[1]))
    return lowest(scores, round(amount * scores.size))


def refit(found: Array, wanted: Array, matrix: Array, mask: Array, steps: int) -> None:
    """Bring a sparse weight nearer to what is wanted, its zeros held; change it in place.

    Conjugate gradients on trace(Dᵀ H D), all outputs at once, each with its own steps; H scaled by its diagonal.

    Args:
        found: zero under the mask.
        wanted: of the same shape, (group, inputs, outputs).
        matrix: H, positive definite (group, inputs, inputs).
        mask: True where it must stay zero.
        steps: of descent.
    """
    scale = 1.0 / np.diagonal(matrix, axis1=-2, axis2=-1)[..., None]
    pull = np.where(mask, 0.0, matrix @ (wanted - found))
    direction = scale * pull
    size = np.sum(pull * direction, axis=1, keepdims=True)
    for _ in range(steps):
        bent = np.where(mask, 0.0, matrix @ direction)
        curvature = np.sum(direction * bent, axis=1, keepdims=True)
        step = np.divide(size, curvature, out=np.zeros_like(size), where=curvature > 0)
        found += step * direction
        pull -= step * bent
        scaled = scale * pull
        new = np.sum(pull * scaled, axis=1, keepdims=True)
        direction = scaled + np.divide(new, size, out=np.zeros_like(size), where=size > 0) * direction
        size = new
