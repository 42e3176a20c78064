"""Normalisations that exporters take apart.

    d / sqrt(mean(d^2) + e), d = x - mean(x)     ->  LayerNormalization(x, 1)              over the last axes
                                                 ->  InstanceNormalization(x, 1, 0)        over all after the second
                                                 ->  Transpose, LayerNormalization(…, 1), Transpose   over axis 1
    layer_norm(x, w, b) * c, layer_norm(…) + c   ->  LayerNormalization(x, w * c, b * c), (…, w, b + c)
    x / sqrt(mean(x^2) + e) * w                  ->  RMSNormalization(x, w)                opset 23

The mean may be a sum times 1/n, the variance mean(x^2) - mean(x)^2, the division a product with a reciprocal.  ORT
knows one spelling of the first, with weight and bias, and the divisions only: LayerNorm with x * x takes 2.2 times as
long as the operator, without affine 1.8 times, channels first 1.9, InstanceNorm 3.8 times.  GroupNorm is left in
torch's form (Reshape, InstanceNormalization, Reshape): ORT takes GroupNormalization apart.  So is x / |x|: ORT's
LpNormalization is no faster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from graphopt.pattern import Array, Constant, Op, Scalar, Value
from graphopt.registry import register
from graphopt.rewrite import Match, RefusedError, Rule, RulePass

from .fuse_softmax import axes_of

TYPES = frozenset({"float16", "float32", "float64"})
SINGLE = frozenset({"float16", "float32"})

Shape = tuple[int, ...]
LAST_AXES: Sequence[tuple[Shape, list[int], Shape]] = (
    ((2, 3, 8), [-1], (8,)),
    ((5, 7), [1], (7,)),
    ((2, 3, 4), [1, 2], (3, 4)),
)
"""Shapes, axes and shapes of weights for cases of the rules."""


def squared(op: Op, x: Value) -> Value:
    """Return a pattern for x^2."""
    return op.any(op.Pow(x, 2.0), x * x)


def average(op: Op, x: Value, n: Value, name: str) -> Value:
    """Return a pattern for the mean of `x`, by itself or as a sum times `n`."""
    return op.any(op.ReduceMean(x, keepdims=1, name=name), op.ReduceSum(x, keepdims=1, name=f"{name} sum") * n)


def over_root(op: Op, d: Value, variance: Value, e: Value) -> Value:
    """Return a pattern for d / sqrt(variance + e)."""
    root = op.Sqrt(variance + e)
    return op.any(d / root, d * op.any(op.Reciprocal(root), 1.0 / root, op.Pow(variance + e, -0.5)))


def centred(op: Op, x: Value, e: Value, n: Value) -> Value:
    """Return a pattern for (x - mean(x)) / sqrt(var(x) + e)."""
    mean = average(op, x, n, "mean")
    d = x - mean
    again = op.any(d, x - mean)  # TorchScript subtracts twice
    direct = average(op, squared(op, again), n, "variance")
    moments = average(op, squared(op, x), n, "variance") - squared(op, mean)
    return over_root(op, d, op.any(direct, moments, op.Relu(moments)), e)


def reduced_axes(m: Match, x: Value, n: Scalar | None) -> list[int]:
    """Return the axes over which all means of a match go, from the left.

    Raises:
        RefusedError: they differ, or cannot be told, or the factor of a sum is not one over their size.
    """
    if x.shape is None:
        raise RefusedError("the rank is unknown")
    names = [f"{name}{kind}" for name in ("mean", "variance") for kind in ("", " sum") if f"{name}{kind}" in m]
    found = [axes_of(m[name], x.rank) for name in names]
    if not found or found[0] is None or any(axes != found[0] for axes in found):
        raise RefusedError("the means are not over the same axes")
    sizes = [x.shape[a] for a in found[0]]
    if n is not None:
        known = math.prod(s for s in sizes if isinstance(s, int))
        if not all(isinstance(s, int) for s in sizes) or abs(n.number * known - 1.0) > 1e-5:
            raise RefusedError(f"a sum is multiplied by {n.number}, which is not known to be one over its length")
    return found[0]


def normalized(op: Op, x: Value, axes: list[int], epsilon: float) -> Value:
    """Return the operator that normalises `x` over `axes`.

    Raises:
        RefusedError: there is none.
    """
    shape = x.shape or ()
    rank, first = len(shape), axes[0]
    if axes == list(range(2, rank)) and rank >= 4 and isinstance(shape[1], int):
        return op.InstanceNormalization(x, np.ones(shape[1]), np.zeros(shape[1]), epsilon=epsilon)
    sizes = [s for s in shape[first:] if isinstance(s, int)]
    if axes == list(range(first, rank)) and len(sizes) == len(axes):
        return op.LayerNormalization(x, np.ones(sizes), axis=first - rank, epsilon=epsilon)
    if axes == [1] and isinstance(shape[1], int):
        there, back = [0, *range(2, rank), 1], [0, rank - 1, *range(1, rank - 1)]
        last = op.LayerNormalization(op.Transpose(x, perm=there), np.ones(shape[1]), axis=-1, epsilon=epsilon)
        return op.Transpose(last, perm=back)
    raise RefusedError(f"no operator normalises over axes {axes}, or their sizes are unknown")


def examples_over(rng: np.random.Generator, choices: Sequence[tuple[Shape, list[int], Shape]]) -> dict[str, Any]:
    """Return captures and attributes for a case of one of the rules below.

    Args:
        rng: the source of choices.
        choices: shapes of x, the axes, shapes of w.
    """
    shape, axes, weight = choices[int(rng.integers(len(choices)))]
    found: dict[str, Any] = {"x": shape, "w": weight, "e": np.array(10.0 ** rng.uniform(-6, -2))}
    found["n"] = np.array(1.0 / math.prod(shape[a] for a in axes))
    for name in ("mean", "variance"):
        found[f"{name}.axes"] = found[f"{name} sum.axes"] = axes
    return found


class Normalization(Rule):
    """(x - mean(x)) / sqrt(mean((x - mean(x))^2) + e)  ->  LayerNormalization, or InstanceNormalization

    Every exporter below opset 17; Paddle; channels-first and functional norms of any age.
    """

    min_opset = 17
    types = SINGLE

    @staticmethod
    def pattern(op: Op, x: Value, e: Scalar, n: Scalar) -> Value:
        return centred(op, x, e, n)

    @staticmethod
    def examples(rng: np.random.Generator) -> dict[str, Any]:
        return examples_over(rng, [*LAST_AXES, ((2, 3, 4, 5), [2, 3], ()), ((2, 6, 3, 4), [1], ())])

    @staticmethod
    def rewrite(op: Op, x: Value, e: Scalar, n: Scalar | None, m: Match) -> Value:
        return normalized(op, x, reduced_axes(m, x, n), e.number)


class ScaledNormalization(Rule):
    """(x - mean(x)) * (w / sqrt(var(x) + e))  ->  the same normalisation, times w

    JAX and Keras: the weight is on the reciprocal.
    """

    min_opset = 17
    types = SINGLE

    @staticmethod
    def pattern(op: Op, x: Value, e: Scalar, n: Scalar, w: Constant) -> Value:
        mean = average(op, x, n, "mean")
        d = x - mean
        direct = average(op, squared(op, op.any(d, x - mean)), n, "variance")
        moments = average(op, squared(op, x), n, "variance") - squared(op, mean)
        root = op.Sqrt(op.any(direct, moments, op.Relu(moments)) + e)
        return d * (op.any(op.Reciprocal(root), 1.0 / root) * w)

    @staticmethod
    def examples(rng: np.random.Generator) -> dict[str, Any]:
        return examples_over(rng, [*LAST_AXES, ((2, 3, 4, 5), [2, 3], (3, 1, 1)), ((2, 6, 3, 4), [1], (6, 1, 1))])

    @staticmethod
    def rewrite(op: Op, x: Value, e: Scalar, n: Scalar | None, w: Constant, m: Match) -> Value:
        return normalized(op, x, reduced_axes(m, x, n), e.number) * w


def any_layer_norm(op: Op, x: Value, w: Value, b: Value) -> Value:
    """Return a pattern for LayerNormalization, maybe transposed."""
    norm = op.LayerNormalization(x, w, b, name="norm")
    return op.any(norm, op.Transpose(norm, name="turn"))


def aligned(c: Constant, w: Constant, m: Match) -> Array:
    """Return what the output of a normalisation is multiplied by, or gets added, as its weight has it.

    Raises:
        RefusedError: it varies over other axes.
    """
    rank = m.out[0].rank
    if rank is None or c.wide.ndim > rank:
        raise RefusedError("the rank is unknown or rises")
    wide = c.wide.reshape((1,) * (rank - c.wide.ndim) + c.wide.shape)
    if "turn" in m:
        perm = m["turn"].param("perm")
        wide = wide.transpose(np.argsort(perm)) if perm is not None else wide.transpose()
    inner = wide.shape[rank - w.values.ndim :]
    fits = all(a in (1, b) for a, b in zip(inner, w.values.shape, strict=True))
    if wide.shape[: rank - w.values.ndim] != (1,) * (rank - w.values.ndim) or not fits:
        raise RefusedError("the constant varies over axes that are not normalised")
    return np.broadcast_to(wide.reshape(inner), w.values.shape)


def rewritten_norm(op: Op, x: Value, w: Array | Value, b: Array | Value | None, m: Match) -> Value:
    """Return the matched LayerNormalization, transposed as it was, with other parameters."""
    norm = m["norm"]
    made = op.LayerNormalization(
        x, w, b, axis=norm.param("axis"), epsilon=norm.param("epsilon"), stash_type=norm.param("stash_type")
    )
    return op.Transpose(made, perm=m["turn"].param("perm")) if "turn" in m else made


class LayerNormScale(Rule):
    """layer_norm(x, w, b) * c  ->  LayerNormalization(x, w * c, b * c)

    The second half of the norms above, and of elementwise_affine=False followed by a modulation.
    """

    min_opset = 17
    types = TYPES

    @staticmethod
    def pattern(op: Op, x: Value, w: Constant, b: Constant | None, c: Constant) -> Value:
        return any_layer_norm(op, x, w, b) * c  # type: ignore[arg-type]  # None is for the trace's readers

    @staticmethod
    def rewrite(op: Op, x: Value, w: Constant, b: Constant | None, c: Constant, m: Match) -> Value:
        factor = aligned(c, w, m)
        return rewritten_norm(op, x, w.wide * factor, None if b is None else b.wide * factor, m)


class LayerNormShift(Rule):
    """layer_norm(x, w, b) + c  ->  LayerNormalization(x, w, b + c)

    The last third of the norms above.
    """

    min_opset = 17
    types = TYPES

    @staticmethod
    def pattern(op: Op, x: Value, w: Constant, b: Constant | None, c: Constant) -> Value:
        return any_layer_norm(op, x, w, b) + c  # type: ignore[arg-type]  # None is for the trace's readers

    @staticmethod
    def rewrite(op: Op, x: Value, w: Constant, b: Constant | None, c: Constant, m: Match) -> Value:
        shift = aligned(c, w, m)
        return rewritten_norm(op, x, w, shift if b is None else b.wide + shift, m)


class RmsNorm(Rule):
    """x / sqrt(mean(x^2) + e) * w  ->  RMSNormalization(x, w)

    Language models by every exporter below opset 23.
    """

    min_opset = 23
    types = SINGLE

    @staticmethod
    def pattern(op: Op, x: Value, e: Scalar, n: Scalar, w: Constant) -> Value:
        return over_root(op, x, average(op, squared(op, x), n, "variance"), e) * w

    @staticmethod
    def examples(rng: np.random.Generator) -> dict[str, Any]:
        return examples_over(rng, LAST_AXES)

    @staticmethod
    def rewrite(op: Op, x: Value, e: Scalar, n: Scalar | None, w: Constant, m: Match) -> Value:
        axes = reduced_axes(m, x, n)
        first = (x.rank or 0) - len(axes)
        if axes != list(range(first, x.rank or 0)) or w.shape != (x.shape or ())[first:]:
            raise RefusedError("the weight does not have the shape of the last axes")
        return op.RMSNormalization(x, w, axis=-len(axes), epsilon=e.number)


@register
@dataclass(frozen=True)
class FuseNormalization(RulePass):
    """Recognise LayerNorm, InstanceNorm and RMSNorm where exporters take them apart.

    Exact but for roundings, keeps the signature.  Standard operators only, those of the graph's opset.
    """

    name: ClassVar[str] = "fuse-normalization"
    optional: ClassVar[bool] = True
    rules: ClassVar[tuple[type[Rule], ...]] = (
        Normalization,
        ScaledNormalization,
        LayerNormScale,
        LayerNormShift,
        RmsNorm,
    )
