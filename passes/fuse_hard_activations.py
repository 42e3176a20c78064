"""Bounds in one spelling, and the activations that are made of bounds.

    max(x, a), min(x, b)              ->  Clip(x, a), Clip(x, max=b)           Relu(x) for a = 0
    clip(clip(x, a, b), c, d)         ->  Clip(x, …)                           Relu is a bound, too
    clip(x * a + b, 0, 1)             ->  HardSigmoid(x, a, b)
    clip(x + b, 0, c) * s             ->  HardSigmoid(x, 1 / c, b / c) * cs
    x * hard_sigmoid(x, 1/6, 1/2)     ->  HardSwish(x)
    x * s * clip(x + 3, 0, 6)         ->  HardSwish(x) * 6s                    wherever the division by 6 stands

HardSwish alone takes 0.58 of the time of its four steps in ORT, HardSigmoid 0.56 of its three, and behind a Conv they
become part of it, as do Clip and Relu.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from graphopt.matcher import NodeView
from graphopt.pattern import Op, Scalar, Value
from graphopt.rewrite import Match, RefusedError, Rule

SINGLE = frozenset({"float16", "float32"})
"""Types for which ORT has HardSigmoid and HardSwish (float16 by casts, as for Clip)."""

NO_BOUND = float(np.finfo(np.float32).max)
"""Clip's default while its bounds are attributes (before opset 11)."""

Bounds = tuple[float | None, float | None]


def bounds(clip: NodeView) -> Bounds | None:
    """Return the bounds of a Clip or Relu, None for a side without; None alone where one is computed."""
    if clip.node.op == "Relu":
        return 0.0, None
    found: list[float | None] = []
    for name in ("min", "max"):
        value = clip.param(name)
        if value is None:
            found.append(None)
            continue
        number = np.asarray(value)
        if number.dtype == object or number.size != 1 or np.isnan(number).any():
            return None
        bound = float(number.reshape(-1)[0])
        open_ended = np.isinf(bound) or (clip.opset < 11 and abs(bound) >= NO_BOUND)
        found.append(None if open_ended else bound)
    return found[0], found[1]


def clamp(number: float, to: Bounds) -> float:
    """Return what a Clip of such bounds makes of a number."""
    low, high = to
    number = number if low is None else max(number, low)
    return number if high is None else min(number, high)


def clipped(op: Op, x: Value, to: Bounds) -> Value:
    """Return `x` within bounds, Relu where that is all."""
    low, high = to
    made: Value = op.Relu(x) if high is None and low == 0 else op.Clip(x, min=low, max=high)
    return made


def times(x: Value, factor: float, dtype: np.dtype[Any] | None) -> Value:
    """Return `x * factor`, or `x` alone where the factor is 1 as far as the type can say."""
    one = abs(factor - 1.0) <= (1e-6 if dtype is None or dtype.itemsize >= 4 else 1e-3)
    return x if one else x * factor


class LowerBound(Rule):
    """max(x, a)  ->  Clip(x, min=a), Relu(x) for a = 0

    Keras and TFLite converters write Relu and Relu6 so.
    """

    min_opset = 8

    @staticmethod
    def pattern(op: Op, x: Value, a: Scalar) -> Value:
        return op.Max(x, a)

    @staticmethod
    def rewrite(op: Op, x: Value, a: Scalar) -> Value:
        return clipped(op, x, (a.number, None))


class UpperBound(Rule):
    """min(x, b)  ->  Clip(x, max=b)

    Half of a Relu6 of Keras and TFLite converters.
    """

    min_opset = 8

    @staticmethod
    def pattern(op: Op, x: Value, b: Scalar) -> Value:
        return op.Min(x, b)

    @staticmethod
    def rewrite(op: Op, x: Value, b: Scalar) -> Value:
        return clipped(op, x, (None, b.number))


class MergeBounds(Rule):
    """clip(clip(x, a, b), c, d)  ->  Clip(x, …), Relu where only 0 is left

    Exact: clamping twice is clamping once, to the images of the two ends.
    """

    min_opset = 6

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        first = op.any(op.Clip(x, name="first"), op.Relu(x, name="first"))
        return op.any(op.Clip(first, name="second"), op.Relu(first, name="second"))

    @staticmethod
    def rewrite(op: Op, x: Value, m: Match) -> Value:
        first, second = bounds(m["first"]), bounds(m["second"])
        if first is None or second is None:
            raise RefusedError("a bound is computed, or not a number")
        low, high = (clamp(clamp(end, first), second) for end in (-np.inf, np.inf))
        return clipped(op, x, (None if np.isinf(low) else low, None if np.isinf(high) else high))


class ClipToRelu(Rule):
    """clip(x, 0)  ->  Relu(x)

    torch.clamp(x, min=0) and what is left of merged bounds.
    """

    min_opset = 6

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        return op.any(
            op.Clip(x, min=0.0, max=None),
            op.Clip(x, min=0.0, max=np.inf),
            op.Clip(x, min=0.0, max=NO_BOUND),
        )

    @staticmethod
    def rewrite(op: Op, x: Value) -> Value:
        return op.Relu(x)


class HardSigmoid(Rule):
    """clip(x * a + b, 0, 1)  ->  HardSigmoid(x, a, b)

    Keras; Paddle before its own HardSigmoid.
    """

    min_opset = 6
    types = SINGLE

    @staticmethod
    def pattern(op: Op, x: Value, a: Scalar, b: Scalar) -> Value:
        return op.Clip(x * a + b, min=0.0, max=1.0)

    @staticmethod
    def rewrite(op: Op, x: Value, a: Scalar, b: Scalar) -> Value:
        return op.HardSigmoid(x, alpha=a.number, beta=b.number)


class ScaledHardSigmoid(Rule):
    """clip(x + b, 0, c) * s  ->  HardSigmoid(x, 1/c, b/c) * cs

    `relu6(x + 3) / 6` of torch, Keras and Paddle: there cs is 1 and the product goes.
    """

    min_opset = 6
    types = SINGLE

    @staticmethod
    def pattern(op: Op, x: Value, b: Scalar, s: Scalar) -> Value:
        return op.Clip(x + b, min=0.0, name="clip") * s

    @staticmethod
    def rewrite(op: Op, x: Value, b: Scalar, s: Scalar, m: Match) -> Value:
        found = bounds(m["clip"])
        if found is None or found[1] is None or found[1] <= 0:
            raise RefusedError("there is no upper bound above 0")
        high = found[1]
        hard = op.HardSigmoid(x, alpha=1.0 / high, beta=b.number / high)
        return times(hard, high * s.number, m.out[0].dtype)


class HardSigmoidOfSix(Rule):
    """clip(x + 3, 0, 6) / 6  ->  HardSigmoid(x, 1/6, 1/2)

    The same where the division stays one: its reciprocal is not exact in float16.
    """

    min_opset = 6
    types = SINGLE

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        return op.Clip(x + 3.0, min=0.0, max=6.0) / 6.0

    @staticmethod
    def rewrite(op: Op, x: Value) -> Value:
        return op.HardSigmoid(x, alpha=1.0 / 6.0, beta=0.5)


class HardSwish(Rule):
    """x * hard_sigmoid(x, 1/6, 1/2)  ->  HardSwish(x)

    ORT takes it apart again, and makes both part of a Conv before it.
    """

    min_opset = 14
    types = SINGLE

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        return x * op.HardSigmoid(x, alpha=1.0 / 6.0, beta=0.5)

    @staticmethod
    def rewrite(op: Op, x: Value) -> Value:
        return op.HardSwish(x)


class ScaledHardSwish(Rule):
    """x * s * clip(x + 3, 0, 6)  ->  HardSwish(x) * 6s

    Every exporter's spelling: the division by 6 stands on either factor or, as `MergeScales` finds, behind them.
    """

    min_opset = 14
    types = SINGLE

    @staticmethod
    def pattern(op: Op, x: Value, s: Scalar) -> Value:
        return op.any(op.Div(x, 6.0, name="sixth"), x * s, x) * op.Clip(x + 3.0, min=0.0, max=6.0)

    @staticmethod
    def rewrite(op: Op, x: Value, s: Scalar | None, m: Match) -> Value:
        before = 1.0 / 6.0 if "sixth" in m else 1.0 if s is None else s.number
        return times(op.HardSwish(x), 6.0 * before, m.out[0].dtype)


class MergeScales(Rule):
    """hard_swish(x) * a * b  ->  HardSwish(x) * ab

    Second half of `ScaledHardSwish`, where the division stands behind.
    """

    min_opset = 14
    types = SINGLE

    @staticmethod
    def pattern(op: Op, x: Value, a: Scalar, b: Scalar) -> Value:
        return op.any(op.HardSwish(x) * a / 6.0, op.HardSwish(x) * a * b)

    @staticmethod
    def rewrite(op: Op, x: Value, a: Scalar, b: Scalar | None, m: Match) -> Value:
        return times(op.HardSwish(x), a.number * (1.0 / 6.0 if b is None else b.number), m.out[0].dtype)


RULES: tuple[type[Rule], ...] = (
    LowerBound,
    UpperBound,
    MergeBounds,
    ClipToRelu,
    HardSigmoid,
    HardSigmoidOfSix,
    ScaledHardSigmoid,
    HardSwish,
    ScaledHardSwish,
    MergeScales,
)
"""In the order in which `FuseActivations` tries them."""
