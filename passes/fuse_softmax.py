"""Softmax and its logarithm where exporters take them apart.

    e / sum(e), e = exp(x - max(x))            ->  Softmax(x)
    d - log(sum(exp(d))), d = x - max(x)       ->  LogSoftmax(x)
    x - logsumexp(x)                           ->  LogSoftmax(x)
    log(softmax(x))                            ->  LogSoftmax(x)
    argmax(softmax(x))                         ->  ArgMax(x)

One kernel in ORT takes half of the time of the five, LogSoftmax a fifth of Softmax and Log, a seventh of
ReduceLogSumExp and Sub.  From opset 13 on, where Softmax is about one axis.  The left sides lose more: log(softmax(x))
is -inf where softmax(x) underflows, exp(x) overflows without max(x), and argmax takes the first of two probabilities
that rounding made equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from graphopt.matcher import NodeView
from graphopt.pattern import Op, Value
from graphopt.registry import register
from graphopt.rewrite import Match, RefusedError, Rule, RulePass


def axes_of(reduction: NodeView, rank: int | None) -> list[int] | None:
    """Return what a reduction reduces, from the left where the rank is known; None for all, or where computed."""
    values = reduction.param("axes")
    if not isinstance(values, np.ndarray | Sequence) or not len(values):
        return None
    found = [int(a) for a in values]
    return found if rank is None else sorted(a % rank for a in found)


def one_axis(m: Match, x: Value, names: Sequence[str]) -> int:
    """Return the axis that the reductions of a softmax have in common.

    Raises:
        RefusedError: there are several, or not the same, or it has one element.
    """
    found = {name: axes_of(m[name], x.rank) for name in names if name in m}
    total = found[names[0]]
    if total is None or len(total) != 1:
        raise RefusedError("the sum is not over one axis")
    for name, axes in found.items():
        if axes is None or total[0] not in axes:
            raise RefusedError(f"'{name}' is along other axes")
    if x.shape is not None and x.shape[total[0]] == 1:
        raise RefusedError("the axis has one element: all that is left is noise")
    return total[0]


def divided(op: Op, e: Value) -> Value:
    """Return a pattern for e / sum(e)."""
    total = op.ReduceSum(e, keepdims=1, name="sum")
    return op.any(e / total, e * op.Reciprocal(total))


class Softmax(Rule):
    """exp(x - max(x)) / sum(exp(x - max(x)))  ->  Softmax(x)

    JAX, TensorFlow's XLA, hand-written attention.
    """

    min_opset = 13

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        return divided(op, op.Exp(x - op.ReduceMax(x, keepdims=1, name="max")))

    @staticmethod
    def rewrite(op: Op, x: Value, m: Match) -> Value:
        return op.Softmax(x, axis=one_axis(m, x, ("sum", "max")))


class BareSoftmax(Rule):
    """exp(x) / sum(exp(x))  ->  Softmax(x)

    Hand-written attention that trusts its logits.
    """

    min_opset = 13

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        return divided(op, op.Exp(x))

    @staticmethod
    def rewrite(op: Op, x: Value, m: Match) -> Value:
        return op.Softmax(x, axis=one_axis(m, x, ("sum",)))


class LogSoftmax(Rule):
    """x - max(x) - log(sum(exp(x - max(x))))  ->  LogSoftmax(x)

    JAX, TensorFlow's XLA, losses and beam searches.
    """

    min_opset = 13

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        d = x - op.ReduceMax(x, keepdims=1, name="max")
        return d - op.Log(op.ReduceSum(op.Exp(d), keepdims=1, name="sum"))

    @staticmethod
    def rewrite(op: Op, x: Value, m: Match) -> Value:
        return op.LogSoftmax(x, axis=one_axis(m, x, ("sum", "max")))


class BareLogSoftmax(Rule):
    """x - log(sum(exp(x))), x - logsumexp(x)  ->  LogSoftmax(x)

    torch.logsumexp and hand-written losses.
    """

    min_opset = 13

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        total = op.Log(op.ReduceSum(op.Exp(x), keepdims=1, name="sum"))
        return x - op.any(total, op.ReduceLogSumExp(x, keepdims=1, name="sum"))

    @staticmethod
    def rewrite(op: Op, x: Value, m: Match) -> Value:
        return op.LogSoftmax(x, axis=one_axis(m, x, ("sum",)))


class LogSoftmaxOfSum(Rule):
    """x - (max(x) + log(sum(exp(x - max(x)))))  ->  LogSoftmax(x)

    A hand-written logsumexp before it is subtracted.
    """

    min_opset = 13

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        top = op.ReduceMax(x, keepdims=1, name="max")
        return x - (top + op.Log(op.ReduceSum(op.Exp(x - top), keepdims=1, name="sum")))

    @staticmethod
    def rewrite(op: Op, x: Value, m: Match) -> Value:
        return op.LogSoftmax(x, axis=one_axis(m, x, ("sum", "max")))


class LogOfSoftmax(Rule):
    """log(softmax(x))  ->  LogSoftmax(x)

    Recognisers and classifiers whose training loss was left in, by every exporter.
    """

    min_opset = 13

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        return op.Log(op.Softmax(x, name="softmax"))

    @staticmethod
    def rewrite(op: Op, x: Value, m: Match) -> Value:
        return op.LogSoftmax(x, axis=m["softmax"].param("axis"))


class ArgMaxOfSoftmax(Rule):
    """argmax(softmax(x))  ->  ArgMax(x)

    Segmenters, classifiers and recognisers that return classes, by every exporter.
    """

    min_opset = 13
    types = None

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        likely = op.any(op.Softmax(x, name="softmax"), op.LogSoftmax(x, name="softmax"))
        return op.ArgMax(likely, name="argmax")

    @staticmethod
    def check(x: Value, m: Match) -> str | None:
        ends = [int(m[name].param("axis")) for name in ("softmax", "argmax")]
        if x.rank is not None:
            ends = [axis % x.rank for axis in ends]
        return None if ends[0] == ends[1] else f"softmax is along axis {ends[0]}, argmax along {ends[1]}"

    @staticmethod
    def rewrite(x: Value, m: Match) -> Value:
        return m["argmax"].again(x)


@register
@dataclass(frozen=True)
class FuseSoftmax(RulePass):
    """Recognise Softmax and LogSoftmax where exporters take them apart.

    Exact but for roundings, keeps the signature; finite where the original overflows.
    """

    name: ClassVar[str] = "fuse-softmax"
    optional: ClassVar[bool] = True
    rules: ClassVar[tuple[type[Rule], ...]] = (
        Softmax,
        BareSoftmax,
        LogSoftmax,
        BareLogSoftmax,
        LogSoftmaxOfSum,
        LogOfSoftmax,
        ArgMaxOfSoftmax,
    )
