"""Attention as ORT's CPU kernels run it fastest.

    Attention(qT, kT, vT, mask)T      ->  Attention(q, k, v, mask)                 0.6-0.9
    (softmax(qT @ kT^T * s) @ vT)T    ->  Attention(q, k, v)                       0.6-0.9, of fixed sizes
    (p, 0 where not a number) @ v     ->  p @ v, 0 where not a number              0.7-0.9, more elements than v

xT swaps the axes of heads and sequence of x (B, S, H, d).  With both last axes in one, (B, S, H*d), ORT's Attention
reads and writes the heads where they lie; its results are those of the operators one by one.  On four axes it is no
faster than these.  With a mask it gives other results: zeros for a row of which all is masked, even where the mask's
lowest number is finite and the softmax would be of equal parts.  So a chain that adds a mask stays.

A row of a softmax is not a number as a whole or nowhere, and so is that row times v, if v is finite.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.base import Change, Context
from graphopt.pattern import Op, Scalar, Value
from graphopt.registry import register
from graphopt.rewrite import Match, RefusedError, Rule, RulePass

FLOAT32 = frozenset({"float32"})
SWAP = [0, 2, 1, 3]

Shape = tuple[int | str | None, ...]


def known(x: Value) -> Shape:
    """Return the shape (B, S, H, d): all sizes known or named, the last two numbers.

    Raises:
        RefusedError: it is not so.
    """
    shape = x.shape
    if shape is None or len(shape) != 4 or None in shape or not all(isinstance(size, int) for size in shape[2:]):
        raise RefusedError(f"of '{x.tensor.name}' the number of heads or their size is unknown")
    return shape


def joined(op: Op, x: Value) -> Value:
    """Return `x` (B, S, H, d) as (B, S, H*d)."""
    _, _, count, width = known(x)
    return op.Reshape(x, shape=[0, 0, int(count or 0) * int(width or 0)])


def attention(op: Op, parts: tuple[Value, Value, Value], attrs: dict[str, Any], mask: Value | None = None) -> Value:
    """Return the attention of q, k, v (B, S, H, d) as (B, S, H, e)."""
    (_, _, count, _), (_, _, groups, _), (_, _, _, width) = (known(x) for x in parts)
    given = [joined(op, x) for x in parts] + ([] if mask is None else [mask])
    rows = op.Attention(*given, **{**attrs, "q_num_heads": count, "kv_num_heads": groups})
    return op.Reshape(rows, shape=[0, 0, count, width])


def alike(q: Value, k: Value, v: Value) -> None:
    """Check that three tensors (B, S, H, d) make an attention.

    Raises:
        RefusedError: they may be of sizes that broadcast.
    """
    a, b, c = known(q), known(k), known(v)
    if not (a[0] == b[0] == c[0] and b[1] == c[1] and a[2] == b[2] == c[2] and a[3] == b[3]):
        raise RefusedError("queries, keys and values may be of sizes that do not go together")


def sizes(rng: np.random.Generator) -> dict[str, Any]:
    """Return shapes of q, k and v for trials."""
    b, h, s, t, d, e = (int(n) for n in rng.integers(1, 5, 6))
    return {"q": (b, s, h, d), "k": (b, t, h, d), "v": (b, t, h, e)}


class AttentionOfRows(Rule):
    """(softmax(qT @ kT^T * s) @ vT)T  ->  Attention(q, k, v)

    Vision transformers and other encoders without a mask, by every exporter, from opset 23 on, of fixed sizes: the
    kernel refuses empty tensors, the chain does not.
    """

    min_opset = 23
    types = FLOAT32

    @staticmethod
    def pattern(op: Op, q: Value, k: Value, v: Value, s: Scalar) -> Value:
        product = op.MatMul(op.Transpose(q, perm=SWAP), op.Transpose(k, perm=[0, 2, 3, 1]))
        p = op.Softmax(op.any(product, product * s), name="softmax")
        return op.Transpose(op.MatMul(p, op.Transpose(v, perm=SWAP)), perm=SWAP)

    @staticmethod
    def examples(rng: np.random.Generator) -> dict[str, Any]:
        return {**sizes(rng), "softmax.axis": int(rng.choice([-1, 3]))}

    @staticmethod
    def check(s: Scalar | None) -> str | None:
        return None if s is None or s.number > 0 else "the scale is not positive: the kernel multiplies by its root"

    @staticmethod
    def rewrite(op: Op, q: Value, k: Value, v: Value, s: Scalar | None, m: Match) -> Value:
        if int(m["softmax"].param("axis")) not in (-1, 3):
            raise RefusedError("the softmax is along another axis")
        alike(q, k, v)
        if not all(isinstance(size, int) and size > 0 for x in (q, k, v) for size in known(x)):
            raise RefusedError("a size may be zero: the kernel refuses such tensors")
        scale = 1.0 if s is None else float(s.number)
        return attention(op, (q, k, v), {"scale": scale})


class AttentionInPlace(Rule):
    """Attention(qT, kT, vT, mask)T  ->  Attention(q, k, v, mask)

    torch's exporter from opset 23 on.
    """

    min_opset = 23
    types = None  # what Attention makes has no proved type; that of q is looked at instead

    @staticmethod
    def pattern(op: Op, q: Value, k: Value, v: Value, mask: Value | None) -> Value:
        split = [op.Transpose(x, perm=SWAP) for x in (q, k, v)]
        return op.Transpose(op.Attention(*split, mask, name="attention"), perm=SWAP)

    @staticmethod
    def examples(rng: np.random.Generator) -> dict[str, Any]:
        found = sizes(rng)
        mask = (found["q"][0], 1, found["q"][1], found["k"][1])
        return {**found, "mask": mask, "attention.is_causal": int(rng.integers(2))}

    @staticmethod
    def rewrite(op: Op, q: Value, k: Value, v: Value, mask: Value | None, m: Match) -> Value:
        if q.dtype != np.float32:
            raise RefusedError(f"the type is {q.dtype or 'unknown'}")
        return attention(op, (q, k, v), m["attention"].attrs, mask)


class NumbersLater(Rule):
    """Where(IsNaN(p), 0, p) @ v  ->  Where(IsNaN(p @ v), 0, p @ v), p a softmax

    torch's scaled_dot_product_attention with a mask, by both exporters below opset 23.
    """

    min_opset = 13

    @staticmethod
    def pattern(op: Op, x: Value, v: Value) -> Value:
        p = op.Softmax(x, name="softmax")
        return op.MatMul(op.Where(op.IsNaN(p), 0.0, p), v)

    @staticmethod
    def examples(rng: np.random.Generator) -> dict[str, Any]:
        before, (rows, n, d) = (2, 3)[: int(rng.integers(3))], (int(i) for i in rng.integers(1, 4, 3))
        return {"x": (*before, rows, n + d), "v": (*before, n + d, d)}

    @staticmethod
    def worth(x: Value, v: Value) -> str | None:
        columns, width = (x.shape or (None,))[-1], (v.shape or (None,))[-1]
        if isinstance(columns, int) and isinstance(width, int) and columns <= width:
            return "the product has no fewer elements"
        return None

    @staticmethod
    def rewrite(op: Op, x: Value, v: Value, m: Match) -> Value:
        if x.rank is None or int(m["softmax"].param("axis")) % x.rank != x.rank - 1:
            raise RefusedError("the softmax is not known to be along the last axis")
        rows = op.MatMul(op.Softmax(x, axis=-1), v)
        return op.Where(op.IsNaN(rows), 0.0, rows)


@register
@dataclass(frozen=True)
class LowerAttention(RulePass):
    """Write attention as ORT's CPU kernels run it fastest.

    Exact but for roundings, where values are finite; keeps the signature, standard operators only.  Only for the CPU
    provider.
    """

    name: ClassVar[str] = "lower-attention"
    stage: ClassVar[Literal["canonical", "lowering"]] = "lowering"
    optional: ClassVar[bool] = True
    rules: ClassVar[tuple[type[Rule], ...]] = (NumbersLater, AttentionOfRows, AttentionInPlace)

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose one change per attention, on CPU."""
        if ctx.target.provider == "cpu":
            yield from super().run(graph, ctx)
