"""Normalisations as ORT's CPU kernels run them fastest.

    group_norm(x, w, b)              ->  Reshape, InstanceNormalization, Reshape, BatchNormalization      0.4
    group_norm(x, 1, 0) * w + b      ->  the last of these for torch's form                               0.75
    x / sqrt(mean(x^2) + e) * w      ->  Pow, ReduceMean, Add, Sqrt, Div, Mul                  0.4, below opset 23
    x / sqrt(mean(x^2) + e)          ->  the same, by a weight of ones                         0.5, below opset 23
    layer_norm(x + y)                ->  layer_norm(Sum(x, y))                                 0.15

BatchNormalization with mean 0 and variance 1 is a product and a sum in one pass over memory.  ORT takes
GroupNormalization apart into 28 operators.  It fuses RMSNorm in exactly the spelling on the right.  Where it knows the
shapes it makes SkipLayerNormalization of an Add and a LayerNormalization; its kernel (ORT 1.31) goes element by element
where those two are vectorised: 0.95 ms against 0.14 ms for 512 rows of 384.  It does not look for a Sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import is_constant
from graphopt.base import Change, Context
from graphopt.edit import Edit
from graphopt.pattern import Array, Constant, Op, Scalar, Value
from graphopt.registry import register
from graphopt.rewrite import Match, RefusedError, Rewriter, Rule, RulePass

from .fuse_normalization import LAST_AXES, average, examples_over, reduced_axes, squared

FLOAT32 = frozenset({"float32"})


def per_channel(x: Value, scale: Array, shift: Array, op: Op) -> Value:
    """Return x * scale + shift for vectors along axis 1."""
    return op.BatchNormalization(x, scale, shift, np.zeros(scale.size), np.ones(scale.size), epsilon=0.0)


def grouped(op: Op, x: Value, groups: int, epsilon: float) -> Value:
    """Return `x` normalised over groups of channels.

    Raises:
        RefusedError: more than the batch is unknown, or an axis is empty.
    """
    shape = x.shape or ()
    if len(shape) < 3 or not all(isinstance(size, int) and size > 0 for size in shape[1:]):
        raise RefusedError("an axis behind the batch is of unknown size")
    inner = int(np.prod([size for size in shape[1:] if isinstance(size, int)])) // groups
    rows = op.Reshape(x, shape=[0, groups, inner])
    normalised = op.InstanceNormalization(rows, np.ones(groups), np.zeros(groups), epsilon=epsilon)
    batch = shape[0] if isinstance(shape[0], int) else -1
    return op.Reshape(normalised, shape=[batch, *shape[1:]])


class GroupNormByInstance(Rule):
    """group_norm(x, w, b)  ->  BatchNormalization(Reshape(InstanceNormalization(Reshape(x))), w, b)

    torch's exporter from opset 21 on.
    """

    min_opset = 21
    types = None  # ONNX infers no type for GroupNormalization's output

    @staticmethod
    def pattern(op: Op, x: Value, w: Constant, b: Constant) -> Value:
        return op.GroupNormalization(x, w, b, name="norm")

    @staticmethod
    def rewrite(op: Op, x: Value, w: Constant, b: Constant, m: Match) -> Value:
        if x.dtype != np.float32:
            raise RefusedError(f"the type is {x.dtype or 'unknown'}")
        norm = m["norm"]
        rows = grouped(op, x, int(norm.param("num_groups")), float(norm.param("epsilon")))
        return per_channel(rows, w.wide, b.wide, op)


class GroupNormAffine(Rule):
    """Reshape(instance_norm(r)) * w + b  ->  BatchNormalization(Reshape(instance_norm(r)), w, b)

    torch's GroupNorm below opset 21, by both exporters.
    """

    min_opset = 15
    types = FLOAT32

    @staticmethod
    def pattern(op: Op, r: Value, v: Constant, s: Constant, shape: Constant, w: Constant, b: Constant) -> Value:
        normalised = op.InstanceNormalization(r, v, s, name="norm")
        return op.Reshape(normalised, shape, name="back") * w + b

    @staticmethod
    def examples(rng: np.random.Generator) -> dict[str, Any]:
        found = {"r": (2, 2, 12), "v": (2,), "s": (2,), "shape": np.array([0, 4, 3, 2]), "norm.epsilon": 1e-5}
        return {**found, "w": (4, 1, 1) if rng.random() < 0.5 else (1, 4, 1, 1), "b": (4, 1, 1)}

    @staticmethod
    def rewrite(
        op: Op, r: Value, v: Constant, s: Constant, shape: Constant, w: Constant, b: Constant, m: Match
    ) -> Value:
        out = m.out[0].shape
        if out is None or len(out) < 3 or not isinstance(out[1], int):
            raise RefusedError("the number of channels is unknown")
        wanted = (out[1],) + (1,) * (len(out) - 2)
        for c in (w, b):
            if c.values.size != out[1] or c.values.shape[max(0, c.values.ndim - len(wanted)) :] != wanted:
                raise RefusedError("the constants are not one number for each channel")
        back = op.Reshape(m["norm"].again(r, v, s), shape, allowzero=m["back"].param("allowzero"))
        return per_channel(back, w.wide.reshape(-1), b.wide.reshape(-1), op)


class RmsForKernel(Rule):
    """x / sqrt(mean(x^2) + e) * w  ->  x / Sqrt(ReduceMean(Pow(x, 2)) + e) * w

    Language models by every exporter below opset 23, where x^2 is a product or the division a reciprocal.
    """

    min_opset = 13
    max_opset = 22
    types = FLOAT32

    @staticmethod
    def pattern(op: Op, x: Value, e: Scalar, n: Scalar, w: Constant) -> Value:
        square = op.any(op.Pow(x, 2.0, name="power"), x * x)
        root = op.Sqrt(average(op, square, n, "variance") + e)
        inverse = op.any(op.Reciprocal(root), 1.0 / root)
        return op.any(op.Div(x, root, name="quotient") * w, x * inverse * w, x * (inverse * w))

    @staticmethod
    def examples(rng: np.random.Generator) -> dict[str, Any]:
        return examples_over(rng, LAST_AXES[:2])

    @staticmethod
    def rewrite(op: Op, x: Value, e: Scalar, n: Scalar | None, w: Constant, m: Match) -> Value:
        if "power" in m and "quotient" in m and n is None:
            raise RefusedError("it is spelled so already")
        axes = reduced_axes(m, x, n)
        if axes != [(x.rank or 0) - 1] or w.shape != (x.shape or ())[-1:]:
            raise RefusedError("the weight does not have the shape of the last axis")
        return x / op.Sqrt(op.ReduceMean(op.Pow(x, 2.0), axes=[-1], keepdims=1) + e) * w


class BareRmsForKernel(Rule):
    """x / sqrt(mean(x^2) + e)  ->  x / Sqrt(ReduceMean(Pow(x, 2)) + e) * ones

    The same where there is no weight, or it has moved into what follows: ORT's kernel has one, half the time with it.
    """

    min_opset = 13
    max_opset = 22
    types = FLOAT32

    @staticmethod
    def pattern(op: Op, x: Value, e: Scalar, n: Scalar) -> Value:
        root = op.Sqrt(average(op, squared(op, x), n, "variance") + e)
        return op.any(x / root, x * op.any(op.Reciprocal(root), 1.0 / root))

    @staticmethod
    def examples(rng: np.random.Generator) -> dict[str, Any]:
        return examples_over(rng, LAST_AXES[:2])

    @staticmethod
    def rewrite(op: Op, x: Value, e: Scalar, n: Scalar | None, m: Match) -> Value:
        if any(reader.op == "Mul" and any(map(is_constant, reader.inputs)) for reader in m.out[0].tensor.outputs):
            raise RefusedError("a weight follows")
        axes, width = reduced_axes(m, x, n), (x.shape or (None,))[-1]
        if axes != [(x.rank or 0) - 1] or not isinstance(width, int):
            raise RefusedError("it is not over the last axis, or that is of unknown size")
        return x / op.Sqrt(op.ReduceMean(op.Pow(x, 2.0), axes=[-1], keepdims=1) + e) * np.ones(width)


class SumForNorm(Rule):
    """layer_norm(x + y)  ->  layer_norm(Sum(x, y))

    Encoders with the normalisation behind the block, by every exporter.
    """

    min_opset = 17
    types = FLOAT32

    @staticmethod
    def pattern(op: Op, x: Value, y: Value, w: Value, b: Value | None) -> Value:
        return op.LayerNormalization(x + y, w, b, name="norm")

    @staticmethod
    def examples(rng: np.random.Generator) -> dict[str, Any]:
        width = int(rng.integers(1, 9))
        return {"x": (2, 3, width), "y": (2, 3, width), "w": (width,), "b": (width,)}

    @staticmethod
    def rewrite(op: Op, x: Value, y: Value, m: Match) -> Value:
        if is_constant(x.tensor) or is_constant(y.tensor):
            raise RefusedError("one side is constant: ORT does not fuse it")
        return m["norm"].again(op.Sum(x, y))


@register
@dataclass(frozen=True)
class LowerNormalization(RulePass):
    """Write normalisations as ORT's CPU kernels run them fastest.

    Exact but for roundings, keeps the signature, standard operators only.  Only for the CPU provider.
    """

    name: ClassVar[str] = "lower-normalization"
    stage: ClassVar[Literal["canonical", "lowering"]] = "lowering"
    optional: ClassVar[bool] = True
    rules: ClassVar[tuple[type[Rule], ...]] = (GroupNormAffine, RmsForKernel, BareRmsForKernel, SumForNorm)

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose one change per normalisation, on CPU."""
        if ctx.target.provider != "cpu":
            return
        with Edit(graph) as edit:  # GroupNormalization apart: the rules' own tests need inferred types
            yield from Rewriter(edit, ctx, (GroupNormByInstance, *self.rules)).changes()
