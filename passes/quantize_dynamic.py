"""Dynamic quantization of products: int8 weights, and activations in the range that each run has.

    y = x @ W + b   ->   q, s, z = DynamicQuantizeLinear(x)
                         y = MatMulInteger(q, W_q, z) * (s * s_W) + b        W_q: int8, a scale per output column

ORT makes one kernel of it (DynamicQuantizeMatMul; MatMulIntegerToFloat where several products read one q).  No samples
are needed, and nothing saturates.  The result of one row depends on the other rows of its batch: they share s.

Time against float, a product with its bias (ORT 1.31, AVX-512 VNNI, one thread; elements of W by rows of x):

               1 row   4 rows   16 rows   64 rows   256 rows   1,024 rows
    32 x 32     1.49     1.48      1.42      1.29       1.15         1.04
    64 x 64     1.43     1.40      1.25      0.94       0.71         0.64
    128 x 128   1.23     1.26      0.85      0.65       0.56         0.46
    256 x 256   0.66     0.69      0.47      0.41       0.37         0.37
    512 x 512   0.42     0.43      0.35      0.31       0.31         0.32

which gives `LEAST_SIZE`.  Other forms, on all-MiniLM-L6 with 8 x 64 tokens: this one 0.42 of float; ranges fixed by
samples (MatMulIntegerToFloat, without the bias) 0.43; MatMulNBits of 8 bits with int8 activations in blocks of 32, 64,
128: 0.93, 0.80, 0.85 (and 0.58, 0.51, 0.51 with 1 x 16), which loses ten times less.

Sources: ONNX operators DynamicQuantizeLinear and MatMulInteger.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import array_of, refers
from graphopt.analysis.quantized import dequantized
from graphopt.analysis.shapes import TensorType
from graphopt.base import Change, Context, Pass
from graphopt.codes import Affine, WeightMethod, weight_code
from graphopt.edit import Edit, label, replace_output
from graphopt.names import left_out
from graphopt.ops import is_standard
from graphopt.registry import register

from .new_nodes import Maker

Array = np.ndarray[Any, Any]
FLOAT: np.dtype[Any] = np.dtype(np.float32)

LEAST_OPSET = 11
"""DynamicQuantizeLinear is there from here on."""

LEAST_SIZE: tuple[tuple[int, int], ...] = ((64, 4096), (16, 16384), (0, 65536))
"""(rows of x at least, elements of the weight from which the integer kernel is faster)."""

USUAL_ROWS = 16
"""Rows taken for certain where some are only known at run time."""

LONGEST = (2**31 - 1) // (255 * 127)
"""Products that an int32 sum has room for, whatever they are."""


@register
@dataclass(frozen=True)
class QuantizeDynamic(Pass):
    """Let MatMul and Gemm multiply 8-bit integers, with the range of the activations taken in each run.

    Lossy, keeps the signature; needs no samples.  Refuses computed weights, weights on the left, batches of weights,
    types other than float32, values that are quantized already, and products too small to gain.

    Options:
        only, skip: globs of layer names; what `only` does not name, or `skip` does, stays float.
        weights: `absmax`, or `mse` for the scale with the least squared error of the weight.
        bits: of the weights; 7 where the processor adds two products in 16 bits (x86 without VNNI).
        any_size: also where the integer kernel is slower.
    """

    name: ClassVar[str] = "quantize-dynamic"
    exactness: ClassVar[Any] = "lossy"
    only: tuple[str, ...] = ("*",)
    skip: tuple[str, ...] = ()
    weights: WeightMethod = "absmax"
    bits: int = 8
    any_size: bool = False

    def __post_init__(self) -> None:
        """Refuse values that are none of the choices.

        Raises:
            ValueError: `weights` or `bits` is something else.
        """
        if self.weights not in get_args(WeightMethod):
            raise ValueError(f"weights is one of {', '.join(get_args(WeightMethod))}, not {self.weights!r}")
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits is 2 to 8, not {self.bits}")

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose one change per layer."""
        with Edit(graph) as edit:
            writer = _Writer(Maker(edit, ctx), self.weights, self.bits)
            for node in list(graph.nodes):
                if not is_standard(node, "MatMul", "Gemm"):
                    continue
                where, what = label(node), f"{node.op} in int8, range of each run"
                reason = self._left_out(where) or why_not(node, ctx) or self._too_small(node, ctx)
                if reason:
                    yield Change(where, what, reason)
                else:
                    yield Change(where, what, _gain(node), lambda node=node: writer.write(node))  # type: ignore[misc]

    def _left_out(self, where: str) -> str:
        return left_out(where, self.only, self.skip)

    def _too_small(self, node: gs.Node, ctx: Context) -> str:
        """Return why the integer kernel would be slower, empty where it would not."""
        shape = ctx.shapes.proved(node.inputs[0]).shape
        known = [d for d in shape[:-1] if isinstance(d, int)] if shape is not None else []
        rows = math.prod(known)
        if shape is None or len(known) < len(shape) - 1:
            rows = max(rows, USUAL_ROWS)
        least = next(size for at_least, size in LEAST_SIZE if rows >= at_least)
        size = math.prod(node.inputs[1].shape)
        if self.any_size or size >= least:
            return ""
        return f"a weight of {size} elements is too small for {rows} rows: the integer kernel would be slower"


def why_not(node: gs.Node, ctx: Context) -> str:
    """Return why a MatMul or Gemm cannot multiply integers with its constant weight, empty where it can."""
    if ctx.target.provider != "cpu":
        return f"the {ctx.target.provider} provider has no kernel for it"
    if ctx.model.opset < LEAST_OPSET:
        return f"opset {ctx.model.opset} has no DynamicQuantizeLinear: upgrade-opset{{to={LEAST_OPSET}}} before"
    return why_not_layer(node, ctx)


def why_not_layer(node: gs.Node, ctx: Context) -> str:
    """Return what of the layer itself stands against it, whatever runs it."""
    source, weight = node.inputs[0], node.inputs[1]
    if not isinstance(weight, gs.Constant):
        if dequantized(weight):
            return "its weight is quantized already"
        return "its weight is on the left" if isinstance(source, gs.Constant) else "it has no constant weight"
    if dequantized(source):
        return "its input is quantized already"
    if weight.dtype != FLOAT:
        return f"its weight is {np.dtype(weight.dtype).name}, not float32"
    if len(weight.shape) != 2:
        return f"its weight is of shape {list(weight.shape)}, no matrix"
    if ctx.shapes.proved(source).rank == 1:
        return "its input is a vector"
    return _why_not_gemm(node) or _why_not_values(node)


def _why_not_gemm(node: gs.Node) -> str:
    if refers(node):
        return "an attribute is an argument of the function around it"
    if node.op == "Gemm" and node.attrs.get("transA", 0):
        return "its input is transposed"
    if _bias(node) is not None and node.attrs.get("beta", 1.0) != 1.0:
        return "its bias has a factor: canonicalize before"
    return ""


def _why_not_values(node: gs.Node) -> str:
    depth = node.inputs[1].shape[1 if node.attrs.get("transB", 0) else 0]
    if depth > LONGEST:
        return f"the sum of {depth} products may not fit in 32 bits"
    if math.prod(node.inputs[1].shape) == 0:
        return "its weight is empty"
    values = array_of(node.inputs[1])
    return "" if values is not None and np.isfinite(values).all() else "its weight has values that are not finite"


def _bias(node: gs.Node) -> gs.Tensor | None:
    """Return the bias of a Gemm."""
    return node.inputs[2] if node.op == "Gemm" and len(node.inputs) > 2 and node.inputs[2].name else None


def _gain(node: gs.Node) -> str:
    weight = node.inputs[1]
    others = next((n for n in weight.outputs if n is not node and not is_standard(n, "MatMul", "Gemm")), None)
    if others is None:
        return "ORT has an integer kernel for it"
    return f"ORT has an integer kernel for it; {others.op} '{label(others)}' keeps the float weight"


class _Writer:
    """Writes integer products into a graph; what several have in common stands there once."""

    def __init__(self, maker: Maker, method: WeightMethod, bits: int) -> None:
        self.maker, self.method, self.bits = maker, method, bits
        self._inputs: dict[int, list[gs.Tensor]] = {}
        self._weights: dict[tuple[int, bool, float], tuple[gs.Tensor, gs.Tensor]] = {}

    def write(self, node: gs.Node) -> None:
        """Put the integer product in the place of a node."""
        source, output, layer = node.inputs[0], node.outputs[0], label(node)
        codes, scale, zero = self._input(source, node)
        weight, weight_scale = self._weight(node)
        known = self.maker.ctx.shapes.proved(output)
        replace_output(node, output, gs.Variable.empty())
        name, bias = output.name, _bias(node)
        summed = self._tensor(f"{name}/integer", np.int32, known)
        self._node("MatMulInteger", [codes, weight, zero], summed, node).name = layer
        floats = self._tensor(f"{name}/float", np.float32, known)
        self._node("Cast", [summed], floats, node, {"to": int(onnx.TensorProto.FLOAT)})
        factor = self.maker.tensor(f"{name}/scale", TensorType(FLOAT, tuple(weight_scale.shape)))
        self._node("Mul", [scale, weight_scale], factor, node)
        product = output if bias is None else self._tensor(f"{name}/product", np.float32, known)
        self._node("Mul", [floats, factor], product, node)
        if bias is not None:
            self._node("Add", [product, bias], output, node)
        self.maker.edit.remove(node)

    def _node(
        self, op: str, inputs: list[gs.Tensor], output: gs.Tensor, like: gs.Node, attrs: dict[str, Any] | None = None
    ) -> gs.Node:
        return self.maker.node(op, inputs, [output], attrs, like=[like])

    def _tensor(self, name: str, dtype: Any, known: TensorType) -> gs.Variable:
        return self.maker.tensor(name, TensorType(np.dtype(dtype), known.shape))

    def _input(self, tensor: gs.Tensor, reader: gs.Node) -> list[gs.Tensor]:
        """Return codes, scale and zero point of an activation."""
        if id(tensor) not in self._inputs:
            known = self.maker.ctx.shapes.proved(tensor)
            made: list[gs.Tensor] = [
                self._tensor(f"{tensor.name}/quantized", np.uint8, known),
                self.maker.tensor(f"{tensor.name}/scale", TensorType(FLOAT, ())),
                self.maker.tensor(f"{tensor.name}/zero_point", TensorType(np.dtype(np.uint8), ())),
            ]
            self.maker.node("DynamicQuantizeLinear", [tensor], made, like=[reader])
            self._inputs[id(tensor)] = made
        return self._inputs[id(tensor)]

    def _weight(self, node: gs.Node) -> tuple[gs.Tensor, gs.Tensor]:
        """Return the codes of a weight (inputs by outputs) and their scales."""
        weight, turned = node.inputs[1], bool(node.attrs.get("transB", 0))
        factor = float(node.attrs.get("alpha", 1.0)) if node.op == "Gemm" else 1.0
        key = id(weight), turned, factor
        if key not in self._weights:
            values = np.asarray(array_of(weight))
            values = np.ascontiguousarray(values.T if turned else values) * np.float32(factor)
            code: Affine = weight_code(values, 1, self.bits, method=self.method, narrow=True)
            self._weights[key] = (
                self.maker.constant(f"{weight.name}/quantized", code.quantize(values)),
                self.maker.constant(f"{weight.name}/scale", code.scale),
            )
        return self._weights[key]
