"""Why a node between DequantizeLinear and QuantizeLinear does not become an integer kernel in ONNX Runtime (ORT).

ORT replaces dequantize → operator → quantize by one integer kernel where it knows the operator and every side is as
it wants it.  What it leaves runs in float and dequantises its weight on every run.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import array_of, is_constant
from graphopt.ops import DEQUANTIZE, MOVEMENT, is_standard

INTEGER_FORMS: Mapping[str, int] = {
    "Conv": 2, "MatMul": 2, "Gemm": 2, "Add": 2, "Mul": 2, "Concat": 0, "Sigmoid": 1, "LeakyRelu": 1, "Softmax": 1,
    "AveragePool": 1, "GlobalAveragePool": 1, "Where": 3,
}  # fmt: skip
"""Operators with an integer kernel -> how many of their first inputs must be dequantized (0: all)."""

ABSORBED = frozenset({"Relu", "Clip"})
"""Activations that ORT drops before a QuantizeLinear that cuts off the same."""

LABELS = 2
"""Nodes named in one reason."""


def dequantized(tensor: gs.Tensor) -> bool:
    """Tell whether a tensor comes from a DequantizeLinear."""
    return bool(tensor.inputs) and is_standard(tensor.inputs[0], *DEQUANTIZE)


def is_wrapped(node: gs.Node) -> bool:
    """Tell whether a node computes on dequantized values (data movement left out)."""
    quantizes = is_standard(node, "QuantizeLinear", *DEQUANTIZE)
    return not quantizes and node.op not in MOVEMENT - {"Where", "Concat"} and any(map(dequantized, node.inputs))


def why_float(node: gs.Node, last: gs.Node) -> str:
    """Return why ORT runs a wrapped node in float, `unknown` where the known reasons do not apply.

    Args:
        node: which `is_wrapped`.
        last: the last node of the kernel that it runs in: itself, or an activation or bias fused behind it.
    """
    if not is_standard(node) or node.op not in INTEGER_FORMS:
        return f"{node.op} has no integer kernel"
    inputs = [t for t in node.inputs if t.name]
    inputs = inputs[: INTEGER_FORMS[node.op] or len(inputs)]
    plain = [t for t in inputs if not dequantized(t)]
    if plain:
        rest = [t for t in inputs if dequantized(t)]
        if not rest:
            return "none of its inputs is quantized"
        if all(is_constant(t.inputs[0].inputs[0]) for t in rest):
            return f"only its weight is quantized: input '{plain[0].name}' is float"
        return f"its {'constant ' if is_constant(plain[0]) else ''}input '{plain[0].name}' is float"
    if wide := _wide(inputs):
        return f"'{wide}' has 16 bits"
    return _output_reason(node, last) or "unknown"


def _wide(inputs: list[gs.Tensor]) -> str | None:
    """Return the first input that is dequantized from 16 bits."""
    for tensor in inputs:
        zero = tensor.inputs[0].inputs[2] if len(tensor.inputs[0].inputs) > 2 else None
        kind = None if zero is None else zero.dtype
        if kind is not None and np.dtype(kind).kind in "iu" and np.dtype(kind).itemsize == 2:
            return str(tensor.name)
    return None


def _output_reason(node: gs.Node, last: gs.Node) -> str:
    output = node.outputs[0]
    readers = list(output.outputs)
    quantizing = [n for n in readers if is_standard(n, "QuantizeLinear")]
    others = [n for n in readers if n not in quantizing]
    if len(quantizing) == len(readers) == 1:
        return ""
    if quantizing and others:
        return f"its raw output is also read by {_names(others)}"
    if quantizing:
        return "several QuantizeLinear read its output"
    if not readers:
        return "its raw output is an output of the model"
    if len(readers) == 1 and is_standard(readers[0], *ABSORBED):
        return _activation_reason(readers[0])
    if last is not node and last.outputs and any(n.op == "Add" for n in readers):
        behind = last.outputs[0].outputs
        if not any(is_standard(n, "QuantizeLinear") for n in behind):
            return f"ORT makes one Gemm of it and {_names(readers)}, with no QuantizeLinear behind"
    if len(readers) == 1 and any(is_standard(n, "QuantizeLinear") for t in readers[0].outputs for n in t.outputs):
        return f"{_names(readers)} stands between it and QuantizeLinear: quantize in between too"
    return f"no QuantizeLinear on its output: {_names(readers)} reads it"


def _activation_reason(activation: gs.Node) -> str:
    readers = activation.outputs[0].outputs
    if len(readers) != 1 or not is_standard(readers[0], "QuantizeLinear"):
        return f"no QuantizeLinear right behind {_names([activation])}"
    zero = array_of(readers[0].inputs[2], limit=1) if len(readers[0].inputs) > 2 else np.zeros(1, np.uint8)
    if zero is None or zero.dtype.kind not in "iu":
        return "the zero point behind it is not a constant scalar"
    least = np.iinfo(zero.dtype).min
    if activation.op == "Relu" and int(zero.reshape(-1)[0]) != least:
        return f"{_names([activation])} stays: the zero point behind it is {int(zero.reshape(-1)[0])}, not {least}"
    return f"{_names([activation])} stays: the QuantizeLinear behind it has another range"


def _names(nodes: list[gs.Node]) -> str:
    named = [f"{n.op} '{n.name or n.outputs[0].name}'" for n in nodes[:LABELS]]
    more = f" and {len(nodes) - LABELS} more" if len(nodes) > LABELS else ""
    return " and ".join(named) + more
