"""Activations as ORT's CPU kernels run them fastest.

ORT's own kernels of Softplus, Mish, Elu, Selu, Celu and PRelu compute element by element; its Exp, Clip and Max are
vectorised.  With e = exp(min(x, 20)), 1 + e and all that follows stay finite, and nothing that float32 can say is lost:

    mish(x)        =  x * n / (n + 2)                    n = e * (e + 2)              0.08 of the time
    softplus(x)    =  max(log u - ((u - 1) - e) / u, x)  u = 1 + e                    0.28
    elu(x, a)      =  max(x, exp(min(x, 0)) - 1)         relu(x) + a * (…) for a != 1 0.35
    selu, celu     =  the same with their factors                                     0.44, 0.29
    prelu(x, s)    =  max(x, s * x)                      for s <= 1                   0.62 between two Convs
    swish(x, a)    =  x * sigmoid(a * x)                 ORT takes Swish apart        0.43
    gelu(x)        =  x * (erf(x / sqrt 2) + 1) * 0.5    ORT has a kernel for it      0.55

The correction in softplus, ((u - 1) - e) / u, is what rounding 1 + e took away: exact where e alone is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_graphsurgeon as gs

from graphopt.base import Change, Context
from graphopt.edit import Edit
from graphopt.pattern import Constant, Op, Value
from graphopt.registry import register
from graphopt.rewrite import Match, Rewriter, Rule, RulePass

from .fuse_gelu import ROOT_2

FLOAT32 = frozenset({"float32"})
"""Below, ORT's Max is slow and the exponential of 20 too large; float64 has no kernels for some."""

_CEILING = 20.0
"""Above, softplus(x) = x and mish(x) = x as far as float32 can say, and exp(2 * 20) is far from its largest number."""


def rising(op: Op, x: Value) -> Value:
    """Return exp(min(x, 20))."""
    return op.Exp(op.Clip(x, max=_CEILING))


class MishByExp(Rule):
    """mish(x)  ->  x * n / (n + 2), n = e * (e + 2), e = exp(min(x, 20))

    YOLOv4 and its kind, by every exporter.
    """

    min_opset = 6
    types = FLOAT32

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        softplus = op.any(op.Softplus(x), op.Log(op.Exp(x) + 1.0))
        return op.any(op.Mish(x), x * op.Tanh(softplus))

    @staticmethod
    def rewrite(op: Op, x: Value) -> Value:
        e = rising(op, x)
        n = e * (e + 2.0)
        return x * (n / (n + 2.0))


class SoftplusByLog(Rule):
    """softplus(x)  ->  max(log(u) - ((u - 1) - e) / u, x), u = 1 + e, e = exp(min(x, 20))

    State-space models, densities and detectors, by every exporter.
    """

    min_opset = 8
    types = FLOAT32

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        return op.Softplus(x)

    @staticmethod
    def rewrite(op: Op, x: Value) -> Value:
        e = rising(op, x)
        u = e + 1.0
        lost = (u - 1.0) - e
        return op.Max(op.Log(u) - lost / u, x)


class EluByExp(Rule):
    """elu(x, a), selu(x, a, g), celu(x, a)  ->  relu(x) * g + (exp(min(x, 0)) - 1) * ag

    Every exporter.
    """

    min_opset = 8
    types = FLOAT32

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        return op.any(op.Elu(x, name="curve"), op.Selu(x, name="curve"), op.Celu(x, name="curve"))

    @staticmethod
    def rewrite(op: Op, x: Value, m: Match) -> Value:
        node = m["curve"]
        slope, gain = float(node.param("alpha")), float(node.param("gamma") if node.node.op == "Selu" else 1.0)
        low = op.Clip(x, max=0.0)
        if node.node.op == "Celu" and slope != 1.0:
            low = low * (1.0 / slope)
        curve = op.Exp(low) - 1.0
        if slope == gain == 1.0:
            return op.Max(x, curve)
        positive = op.Relu(x)
        return (positive if gain == 1.0 else positive * gain) + curve * (slope * gain)


class PReluByMax(Rule):
    """prelu(x, s)  ->  max(x, x * s) for s <= 1

    Every exporter: face and super-resolution networks.
    """

    min_opset = 9
    types = FLOAT32

    @staticmethod
    def pattern(op: Op, x: Value, s: Constant) -> Value:
        return op.PRelu(x, s)

    @staticmethod
    def check(s: Constant) -> str | None:
        return None if (s.wide <= 1).all() else "a slope is above 1"

    @staticmethod
    def rewrite(op: Op, x: Value, s: Constant) -> Value:
        return op.Max(x, x * s)


class SwishBySigmoid(Rule):
    """swish(x, a)  ->  x * sigmoid(x * a)

    The newest exporters: ORT has a kernel for the right side, none for the left.
    """

    min_opset = 24

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        return op.Swish(x, name="swish")

    @staticmethod
    def rewrite(op: Op, x: Value, m: Match) -> Value:
        slope = float(m["swish"].param("alpha"))
        return x * op.Sigmoid(x if slope == 1.0 else x * slope)


class GeluForKernel(Rule):
    """x * (erf(x / sqrt 2) / 2 + 1/2)  ->  x * (erf(x / sqrt 2) + 1) * 0.5

    What `FuseGelu` leaves below opset 20: ORT fuses it only where x is *divided* by sqrt 2 and the half comes last.
    """

    min_opset = 9
    max_opset = 19
    types = FLOAT32

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        return x * (op.Erf(x / ROOT_2) * 0.5 + 0.5)

    @staticmethod
    def rewrite(op: Op, x: Value) -> Value:
        return x * (op.Erf(x / ROOT_2) + 1.0) * 0.5


class GeluIntoWeights(Rule):
    """(x * (erf(x / sqrt 2) + 1)) @ W  ->  (x * (erf(x / sqrt 2) + 1) * 0.5) @ 2W

    The same where `FoldAffine` has moved the half into the weights behind: exact, a power of two goes back.
    """

    min_opset = 9
    max_opset = 19
    types = FLOAT32

    @staticmethod
    def pattern(op: Op, x: Value, w: Constant, c: Value | None) -> Value:
        doubled = x * (op.Erf(x / ROOT_2) + 1.0)
        return op.any(
            op.MatMul(doubled, w, name="product"),
            op.Gemm(doubled, w, c, name="product", transA=0),
            op.Conv(doubled, w, c, name="product"),
            op.ConvTranspose(doubled, w, c, name="product"),
        )

    @staticmethod
    def rewrite(op: Op, x: Value, w: Constant, m: Match) -> Value:
        return m["product"].again(x * (op.Erf(op.Div(x, ROOT_2)) + 1.0) * 0.5, w.wide * 2.0)


@register
@dataclass(frozen=True)
class LowerActivations(RulePass):
    """Write activations as ORT's CPU kernels run them fastest.

    Exact but for roundings, keeps the signature, standard operators only.  Only for the CPU provider: others have
    kernels of their own.
    """

    name: ClassVar[str] = "lower-activations"
    stage: ClassVar[Literal["canonical", "lowering"]] = "lowering"
    optional: ClassVar[bool] = True
    rules: ClassVar[tuple[type[Rule], ...]] = (
        MishByExp,
        SoftplusByLog,
        EluByExp,
        PReluByMax,
        SwishBySigmoid,
        GeluForKernel,
        GeluIntoWeights,
    )

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose one change per activation, on CPU."""
        if ctx.target.provider != "cpu":
            return
        with Edit(graph) as edit:
            for rules in ((MishByExp,), self.rules):  # Mish first: it may have a Softplus in it
                yield from Rewriter(edit, ctx, rules).changes()
