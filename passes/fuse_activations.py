"""Activations that exporters take apart.

    max(x, a), clip(x + 3, 0, 6) …    ->  Clip, Relu, HardSigmoid, HardSwish    as fuse_hard_activations.py says
    1 / (1 + exp(-x))                 ->  Sigmoid(x)
    2 sigmoid(2x) - 1                 ->  Tanh(x)
    max(x, a * x)                     ->  LeakyRelu(x, a)                       for a <= 1
    x / (1 + |x|)                     ->  Softsign(x)
    where(x > 0, x, exp(x) - 1)       ->  Elu(x)
    x * tanh(softplus(x))             ->  Mish(x)

Each is one pass over memory in ORT where there were two to five, and Sigmoid, Tanh and LeakyRelu behind a Conv become
part of it.  `x * Sigmoid(x)` is left: ORT has a kernel for it, and takes opset 24's Swish apart.  `log(1 + exp(x))` is
left, too: ORT's Softplus takes five times as long.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from graphopt.pattern import Array, Constant, Op, Scalar, Value
from graphopt.registry import register
from graphopt.rewrite import Match, Rule, RulePass

from .fuse_hard_activations import RULES, SINGLE, times


def negated(op: Op, x: Value) -> Value:
    """Return a pattern for -x."""
    return op.any(-x, x * -1.0, 0.0 - x)


class Sigmoid(Rule):
    """1 / (1 + exp(-x)), exp(x) / (1 + exp(x))  ->  Sigmoid(x)

    Keras backends, JAX and hand-written losses; 0.63 of the time in ORT.
    """

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        e, falling = op.Exp(x), op.Exp(negated(op, x)) + 1.0
        return op.any(1.0 / falling, op.Reciprocal(falling), e / (e + 1.0))

    @staticmethod
    def rewrite(op: Op, x: Value) -> Value:
        return op.Sigmoid(x)


class SigmoidGate(Rule):
    """y / (1 + exp(-x))  ->  y * Sigmoid(x)

    For y = x this is the SiLU that ORT has a kernel for: 0.43 of the time.
    """

    @staticmethod
    def pattern(op: Op, x: Value, y: Value) -> Value:
        return y / (op.Exp(negated(op, x)) + 1.0)

    @staticmethod
    def rewrite(op: Op, x: Value, y: Value) -> Value:
        return y * op.Sigmoid(x)


class TanhOfSigmoid(Rule):
    """sigmoid(x * a) * 2 - 1  ->  Tanh(x * a/2)

    Hand-written recurrent cells and gates; half the time in ORT.
    """

    @staticmethod
    def pattern(op: Op, x: Value, a: Scalar) -> Value:
        return op.Sigmoid(x * a) * 2.0 - 1.0

    @staticmethod
    def rewrite(op: Op, x: Value, a: Scalar, m: Match) -> Value:
        return op.Tanh(times(x, a.number / 2.0, m.out[0].dtype))


class TanhOfExp(Rule):
    """(exp(x) - exp(-x)) / (exp(x) + exp(-x))  ->  Tanh(x)

    Mish and Tanh written by hand; finite where the left side overflows.
    """

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        rising, falling = op.Exp(x), op.Exp(negated(op, x))
        return (rising - falling) / (rising + falling)

    @staticmethod
    def rewrite(op: Op, x: Value) -> Value:
        return op.Tanh(x)


class Softsign(Rule):
    """x / (1 + |x|)  ->  Softsign(x)

    torch's exporters write it so; 0.57 of the time in ORT.
    """

    types = SINGLE

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        return x / (op.Abs(x) + 1.0)

    @staticmethod
    def rewrite(op: Op, x: Value) -> Value:
        return op.Softsign(x)


class LeakyRelu(Rule):
    """max(x, x * a)  ->  LeakyRelu(x, a) for a <= 1

    TensorFlow, TFLite and Darknet converters; 0.7 of the time, none behind a Conv.
    """

    min_opset = 8
    types = SINGLE

    @staticmethod
    def pattern(op: Op, x: Value, a: Scalar) -> Value:
        return op.Max(x, x * a)

    @staticmethod
    def check(a: Scalar) -> str | None:
        return None if a.number <= 1 else f"the slope is {a.number}, above 1"

    @staticmethod
    def rewrite(op: Op, x: Value, a: Scalar) -> Value:
        return op.LeakyRelu(x, alpha=a.number)


class SlopeOfOne(Rule):
    """prelu(x, a)  ->  LeakyRelu(x, a) for one slope

    torch.nn.PReLU() with its default of one parameter: ORT's PRelu takes ten times as long.
    """

    min_opset = 9
    types = SINGLE

    @staticmethod
    def pattern(op: Op, x: Value, a: Scalar) -> Value:
        return op.PRelu(x, a)

    @staticmethod
    def check(x: Value, a: Scalar) -> str | None:
        known = x.rank is not None and a.rank is not None and a.rank <= x.rank
        return None if known else "the slope may have more axes"

    @staticmethod
    def rewrite(op: Op, x: Value, a: Scalar) -> Value:
        return op.LeakyRelu(x, alpha=a.number)


class TwoSlopes(Rule):
    """relu(x) - relu(-x) * a  ->  LeakyRelu(x, a), max(x, x * a) for a slope per channel

    Keras' PReLU and its spellings min(x, 0) * a and (x - |x|) * a/2.  PRelu itself is slower in ORT than what it
    would replace.
    """

    min_opset = 8
    types = SINGLE

    @staticmethod
    def pattern(op: Op, x: Value, c: Constant) -> Value:
        negative = op.any(
            op.Relu(negated(op, x), name="mirrored") * c,
            -op.Relu(negated(op, x), name="kept") * c,
            op.Clip(x, min=None, max=0.0, name="kept") * c,
            (x - op.Abs(x, name="doubled")) * c * 0.5,
            (x - op.Abs(x, name="doubled")) * 0.5 * c,
            (x - op.Abs(x, name="twice")) * c,
        )
        return op.Relu(x) + negative

    @staticmethod
    def check(c: Constant, m: Match) -> str | None:
        return None if (slopes(c, m) <= 1).all() else "a slope is above 1"

    @staticmethod
    def rewrite(op: Op, x: Value, c: Constant, m: Match) -> Value:
        slope = slopes(c, m)
        if slope.size == 1:
            return op.LeakyRelu(x, alpha=float(slope.reshape(-1)[0]))
        return op.Max(x, x * slope)


def slopes(c: Constant, m: Match) -> Array:
    """Return the slope of the negative side of what `TwoSlopes` matched, in float64."""
    factor = -1.0 if "mirrored" in m else 2.0 if "twice" in m else 1.0
    return np.asarray(c.wide * factor)


class Elu(Rule):
    """where(x > 0, x, (exp(x) - 1) * a)  ->  Elu(x, a)

    JAX, and functional code traced by torch.  `LowerActivations` writes it as ORT runs it fastest.
    """

    min_opset = 9
    types = SINGLE

    @staticmethod
    def pattern(op: Op, x: Value, a: Scalar) -> Value:
        positive = op.any(op.Greater(x, 0.0), op.GreaterOrEqual(x, 0.0))
        low = op.any(x, op.Clip(x, min=None, max=0.0), op.Where(positive, 0.0, x))
        curve = op.Exp(low) - 1.0
        return op.Where(positive, x, op.any(curve, curve * a))

    @staticmethod
    def rewrite(op: Op, x: Value, a: Scalar | None) -> Value:
        return op.Elu(x, alpha=1.0 if a is None else a.number)


class Mish(Rule):
    """x * tanh(softplus(x))  ->  Mish(x)

    torch below opset 18, Darknet and Keras.  `LowerActivations` writes it as ORT runs it fastest.
    """

    min_opset = 18
    types = SINGLE

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        return x * op.Tanh(op.any(op.Softplus(x), op.Log(op.Exp(x) + 1.0)))

    @staticmethod
    def rewrite(op: Op, x: Value) -> Value:
        return op.Mish(x)


@register
@dataclass(frozen=True)
class FuseActivations(RulePass):
    """Recognise activations that exporters take apart, and merge bounds.

    Exact but for roundings, keeps the signature.  The canonical form has standard operators only.
    """

    name: ClassVar[str] = "fuse-activations"
    optional: ClassVar[bool] = True
    rules: ClassVar[tuple[type[Rule], ...]] = (
        *RULES,
        Sigmoid,
        SigmoidGate,
        TanhOfSigmoid,
        TanhOfExp,
        Softsign,
        LeakyRelu,
        SlopeOfOne,
        TwoSlopes,
        Elu,
        Mish,
    )
