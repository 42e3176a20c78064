"""What a model's outputs are, read off the graph: which are probabilities, and how finely the model computes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from graphopt.model import Model
from graphopt.ops import DEQUANTIZE, QUANTIZE

_MAKES_PROBABILITIES = {"Softmax": "softmax", "Sigmoid": "sigmoid"}
_KEEPS_PROBABILITIES = frozenset({
    "Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Slice", "Gather", "ReduceMean",
    "ReduceMax", "Expand",
})  # fmt: skip
"""Their first output holds values, or means, of their first input."""

SATURATION = 1e-3
"""How near to 0 or 1 all probabilities of an output must be for it to say nothing (softmax: a hundredth of it)."""

_HALF = {np.dtype(np.float16): 2.0**-10, np.dtype(ml_dtypes.bfloat16): 2.0**-7}


def probability_outputs(model: Model) -> dict[str, str]:
    """Return the outputs that a `softmax` or `sigmoid` makes, also in a branch of an If, with which it is."""
    found = {tensor.name: _maker(tensor) for tensor in model.graph.outputs}
    return {name: maker for name, maker in found.items() if maker}


def saturated(maker: str, values: np.ndarray[Any, Any]) -> bool:
    """Tell whether probabilities that a `softmax` or `sigmoid` made are all 0 or 1, so that errors hide in them."""
    if values.size == 0 or maker == "softmax":
        return bool(values.size and values.ndim and values.max(axis=-1).min() > 1 - SATURATION / 100)
    return bool(values.max() < SATURATION or values.min() > 1 - SATURATION)


def _maker(tensor: gs.Tensor) -> str:
    stack, seen = [tensor], set()
    while stack:
        current = stack.pop()
        if id(current) in seen or isinstance(current, gs.Constant) or not current.inputs:
            continue
        seen.add(id(current))
        node = current.inputs[0]
        if node.op in _MAKES_PROBABILITIES:
            return _MAKES_PROBABILITIES[node.op]
        written_out = _decomposed(node)
        if written_out:
            return written_out
        if node.op in _KEEPS_PROBABILITIES:
            stack.append(node.inputs[0])
        elif node.op == "If":
            slot = next(i for i, t in enumerate(node.outputs) if t is current)
            stack += [b.outputs[slot] for b in node.attrs.values() if isinstance(b, gs.Graph)]
    return ""


def _decomposed(node: gs.Node) -> str:
    """Return which of the two a quotient of exponentials is: e / sum(e), 1 / (1 + e); '' for anything else."""
    if node.op not in ("Div", "Mul", "Reciprocal"):
        return ""
    makers = [t.inputs[0] if isinstance(t, gs.Variable) and t.inputs else None for t in node.inputs]
    if node.op != "Reciprocal" and any(n is not None and n.op == "Exp" for n in makers):
        return "softmax"
    below = makers[-1]
    if node.op != "Mul" and below is not None and below.op == "Add":
        parts = [t.inputs[0].op for t in below.inputs if isinstance(t, gs.Variable) and t.inputs]
        return "sigmoid" if "Exp" in parts else ""
    return ""


def compute_precision(model: Model) -> float:
    """Return the spacing at 1.0 of the coarsest float type that the model computes in; 0 for float32 and finer.

    Half-precision weights that are only cast or dequantized do not count: what follows computes in float32.
    """
    coarsest = 0.0
    for spec in (*model.inputs, *model.outputs):
        coarsest = max(coarsest, _HALF.get(spec.dtype, 0.0) if spec.dtype is not None else 0.0)
    for node in model.nodes():
        if node.op in DEQUANTIZE or node.op in QUANTIZE or node.op == "Cast":
            continue
        for tensor in (*node.inputs, *node.outputs):
            if tensor.dtype is not None:
                coarsest = max(coarsest, _HALF.get(np.dtype(tensor.dtype), 0.0))
    return coarsest
