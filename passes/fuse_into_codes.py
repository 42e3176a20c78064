"""Elementwise operators before a QuantizeLinear, as changes of its code; HardSwish between codes as a product.

    Q(x * c; s, z)               ->  Q(x; s / c, z)                                 c > 0, a scalar
    Q(x + b; s, z)               ->  Q(x; s, z + b / s)                             b / s a whole number
    Q(HardSwish(DQ(q; s, z)))    ->  Q(DQ(q; s, z) * DQ(Q(DQ(q; s / 6, z - 3 / s); 1 / 255, 0)))

HardSwish is x * clip(x / 6 + 1 / 2, 0, 1), and the second factor is q read with another code, cut off where the code
0 … 1 ends: ONNX Runtime makes DequantizeLinear, QuantizeLinear and one QLinearMul of it, where it would dequantize,
take HardSigmoid, multiply and quantize floats (PP-OCR's recogniser takes 0.92 of the time with it, ORT 1.31, one
thread).  quantize-static chooses scales such that b / s and 3 / s are whole where that costs little.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import array_of, scalar_of
from graphopt.base import Change, Context, Pass
from graphopt.edit import Edit, label, make_node
from graphopt.ops import is_standard
from graphopt.registry import register

WHOLE = 1e-3
"""How far a quotient may be from a whole number: a thousandth of a step."""


@register
@dataclass(frozen=True)
class FuseIntoCodes(Pass):
    """Take scalar products and sums into the code behind them, and let HardSwish between codes be an integer product.

    Lossy by at most one step of the code, keeps the signature.  Refuses values that are read elsewhere, codes per
    channel, and shifts that leave the code or are no whole number of steps.
    """

    name: ClassVar[str] = "fuse-into-codes"
    exactness: ClassVar[Any] = "lossy"

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose one change per operator that goes."""
        with Edit(graph) as edit:
            for node in list(graph.nodes):
                if not is_standard(node, "QuantizeLinear") or edit.removed(node):
                    continue
                while (change := self._before(edit, ctx, node)) is not None:
                    yield change
                    if change.blocked:
                        break

    def _before(self, edit: Edit, ctx: Context, quantize: gs.Node) -> Change | None:
        """Return what can be done about the operator before a QuantizeLinear, None where there is nothing to say."""
        tensor = quantize.inputs[0]
        producer = tensor.inputs[0] if tensor.inputs else None
        if producer is None or not is_standard(producer, "Mul", "Add", "HardSwish"):
            return None
        if not edit.is_local(producer) or edit.sole_consumer(tensor) is not quantize:
            return None
        code = _code(quantize)
        if code is None:
            return None
        if producer.op == "HardSwish":
            return _hard_swish(edit, ctx, producer, quantize)
        operand = next((i for i, t in enumerate(producer.inputs) if scalar_of(t) is not None), None)
        if operand is None or array_of(producer.inputs[operand], limit=1) is None:
            return None
        value = float(scalar_of(producer.inputs[operand]))
        moved = _scaled(code, value) if producer.op == "Mul" else _shifted(code, value)
        what = f"{producer.op} of {value:.4g} into the code behind it"
        if isinstance(moved, str):
            return Change(label(producer), what, moved)

        def apply() -> None:
            _set_code(edit, ctx, quantize, *moved)
            edit.set_input(quantize, 0, producer.inputs[1 - operand])
            edit.remove(producer)

        return Change(label(producer), what, "the code can say it", apply)


def _code(node: gs.Node) -> tuple[float, int, np.dtype[Any]] | None:
    """Return scale, zero point and type of a QuantizeLinear or DequantizeLinear with one constant code."""
    if len(node.inputs) < 3:
        return None
    scale, zero = scalar_of(node.inputs[1]), array_of(node.inputs[2], limit=1)
    if scale is None or zero is None or zero.dtype.kind not in "iu":
        return None
    return float(scale), int(zero.reshape(-1)[0]), zero.dtype


def _scaled(code: tuple[float, int, np.dtype[Any]], factor: float) -> tuple[float, int, np.dtype[Any]] | str:
    scale, zero, kind = code
    if factor <= 0.0:
        return "the factor is not positive"
    moved = scale / factor
    return (
        (moved, zero, kind) if np.finfo(np.float32).tiny < moved < np.finfo(np.float32).max else "the scale overflows"
    )


def _shifted(code: tuple[float, int, np.dtype[Any]], shift: float) -> tuple[float, int, np.dtype[Any]] | str:
    scale, zero, kind = code
    steps = shift / scale
    if abs(steps - round(steps)) > WHOLE:
        return f"it is {steps:.3f} steps of the code, which is no whole number"
    moved = zero + round(steps)
    limits = np.iinfo(kind)
    return (scale, moved, kind) if limits.min <= moved <= limits.max else "the zero point leaves the code"


def _set_code(edit: Edit, ctx: Context, node: gs.Node, scale: float, zero: int, kind: np.dtype[Any]) -> None:
    base = node.outputs[0].name
    edit.set_input(node, 1, ctx.constant(f"{base}_scale", np.array(scale, np.float32)))
    edit.set_input(node, 2, ctx.constant(f"{base}_zero_point", np.array(zero, kind)))


def _hard_swish(edit: Edit, ctx: Context, node: gs.Node, quantize: gs.Node) -> Change | None:
    source = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
    if source is None or not is_standard(source, "DequantizeLinear"):
        return None
    what, code = "HardSwish as an integer product", _code(source)
    if code is None:
        return Change(label(node), what, "its input has no single code")
    scale, zero, kind = code
    if kind != np.uint8 or zero_of(quantize) != np.uint8:
        return Change(label(node), what, "its codes are not uint8")
    moved = zero - round(3.0 / scale)
    if not 0 <= moved <= 255:
        return Change(label(node), what, f"a gate of the input's code would begin at {moved}, outside of it")
    if abs(3.0 / scale - round(3.0 / scale)) > 0.5 * WHOLE * round(3.0 / scale) + WHOLE:
        return Change(label(node), what, f"3 is {3.0 / scale:.3f} steps of its input, which is no whole number")

    def apply() -> None:
        base, shape = node.outputs[0].name, node.outputs[0].shape
        gate_scale = ctx.constant(f"{base}_gate_scale", np.array(1.0 / 255.0, np.float32))
        gate_zero = ctx.constant(f"{base}_gate_zero_point", np.array(0, np.uint8))
        sixth = ctx.constant(f"{base}_sixth_scale", np.array(scale / 6.0, np.float32))
        begin = ctx.constant(f"{base}_sixth_zero_point", np.array(moved, np.uint8))
        names = ("sixth", "gate_quantized", "gate", "product")
        kinds = (np.float32, np.uint8, np.float32, np.float32)
        made = [
            gs.Variable(ctx.fresh_name(f"{base}_{n}"), np.dtype(k), shape) for n, k in zip(names, kinds, strict=True)
        ]
        nodes = [
            make_node("DequantizeLinear", [source.inputs[0], sixth, begin], [made[0]], like=[node]),
            make_node("QuantizeLinear", [made[0], gate_scale, gate_zero], [made[1]], like=[node]),
            make_node("DequantizeLinear", [made[1], gate_scale, gate_zero], [made[2]], like=[node]),
            make_node("Mul", [node.inputs[0], made[2]], [made[3]], like=[node]),
        ]
        for new, name in zip(nodes, names, strict=True):
            new.name = ctx.fresh_name(f"{label(node)}_{name}")
        edit.set_input(quantize, 0, made[3])
        edit.replace(node, nodes)

    return Change(label(node), what, "its gate is a cut-off reading of the same codes", apply)


def zero_of(node: gs.Node) -> np.dtype[Any] | None:
    """Return the type of a QuantizeLinear's code, None where it is not constant."""
    code = _code(node)
    return None if code is None else code[2]
