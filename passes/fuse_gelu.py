"""Gelu, exact and by tanh, in the many ways in which exporters place its halves.

    x * (1 + erf(x / sqrt 2)) / 2                          ->  Gelu(x)                          opset 20
                                                           ->  x * (erf(…) * 0.5 + 0.5)         below
    x * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))) / 2    ->  Gelu(x, approximate="tanh")      opset 20
                                                           ->  x * sigmoid(x * (a * x^2 + b))   below

Below opset 20 there is no operator.  The form kept for erf has no constant at its ends that could move into other
weights; `LowerActivations` makes of it the one spelling that ORT fuses.  For tanh ORT fuses nothing:
(1 + tanh z) / 2 = sigmoid(2z) saves two of eight steps, 0.70 of the time (Gelu: 0.42).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from graphopt.pattern import Op, Value
from graphopt.registry import register
from graphopt.rewrite import Rule, RulePass

from .fuse_hard_activations import SINGLE

ROOT_2 = math.sqrt(2.0)
SLOPE = math.sqrt(2.0 / math.pi)
CUBIC = 0.044715


def ends_halved(op: Op, x: Value, inner: Value) -> Value:
    """Return a pattern for x * (inner + 1) / 2, the half anywhere but inside."""
    one_more = inner + 1.0
    return op.any(x * one_more * 0.5, x * (one_more * 0.5), (x * 0.5) * one_more)


def halved(op: Op, x: Value, inner: Value) -> Value:
    """Return a pattern for x * (inner + 1) / 2, the half anywhere."""
    return op.any(ends_halved(op, x, inner), x * (inner * 0.5 + 0.5))


def tanh_argument(op: Op, x: Value) -> Value:
    """Return a pattern for sqrt(2/pi) * (x + 0.044715 x^3) in its known spellings."""
    square = op.any(x * x, op.Pow(x, 2.0))
    cube = op.any(op.Pow(x, 3.0), square * x)
    scaled_cube = op.any(cube * CUBIC, x * (x * (x * CUBIC)), x * (square * CUBIC), square * (x * CUBIC))
    scaled_square = op.any(square * CUBIC, x * (x * CUBIC))
    return op.any(
        (x + scaled_cube) * SLOPE,
        x * (scaled_square + 1.0) * SLOPE,
        (x * SLOPE) * (scaled_square + 1.0),
        x * ((scaled_square + 1.0) * SLOPE),
        x * (square * (CUBIC * SLOPE) + SLOPE),
        x * SLOPE + cube * (CUBIC * SLOPE),
    )


class Gelu(Rule):
    """x * (1 + erf(x / sqrt 2)) / 2  ->  Gelu(x)

    Every exporter below opset 20.
    """

    min_opset = 20
    types = SINGLE

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        return halved(op, x, op.Erf(x / ROOT_2))

    @staticmethod
    def rewrite(op: Op, x: Value) -> Value:
        return op.Gelu(x)


class SpellGelu(Rule):
    """x * (1 + erf(x / sqrt 2)) / 2  ->  x * (erf(x / sqrt 2) * 0.5 + 0.5)

    Every exporter.  One spelling, safe from other rules, for `LowerActivations`.
    """

    min_opset = 9
    max_opset = 19
    types = SINGLE

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        return ends_halved(op, x, op.Erf(x / ROOT_2))

    @staticmethod
    def rewrite(op: Op, x: Value) -> Value:
        return x * (op.Erf(x * (1.0 / ROOT_2)) * 0.5 + 0.5)


class TanhGelu(Rule):
    """x * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))) / 2  ->  Gelu(x, approximate="tanh")

    GPT-2 and its kind, JAX and Keras by default.
    """

    min_opset = 20
    types = SINGLE

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        return halved(op, x, op.Tanh(tanh_argument(op, x)))

    @staticmethod
    def rewrite(op: Op, x: Value) -> Value:
        return op.Gelu(x, approximate="tanh")


class SigmoidGelu(Rule):
    """x * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))) / 2  ->  x * sigmoid(x * (x * x * a + b))

    The same below opset 20, by (1 + tanh z) / 2 = sigmoid(2z).
    """

    max_opset = 19
    types = SINGLE

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        return halved(op, x, op.Tanh(tanh_argument(op, x)))

    @staticmethod
    def rewrite(op: Op, x: Value) -> Value:
        return x * op.Sigmoid(x * (x * x * (2.0 * CUBIC * SLOPE) + 2.0 * SLOPE))


@register
@dataclass(frozen=True)
class FuseGelu(RulePass):
    """Recognise Gelu, exact and by tanh.

    Exact but for roundings, keeps the signature.  Below opset 20, where it has no operator, it gets one spelling.
    """

    name: ClassVar[str] = "fuse-gelu"
    optional: ClassVar[bool] = True
    rules: ClassVar[tuple[type[Rule], ...]] = (Gelu, SpellGelu, TanhGelu, SigmoidGelu)
