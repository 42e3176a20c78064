"""Layers of a quantized (QDQ) graph: where their codes, scales and biases stand, and their weights as rows.

A layer's weight as rows: (group, rows, columns), a row for each output channel; columns in the order in which
`graphopt.layer_inputs` lays out what they are multiplied with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import array_of
from graphopt.analysis.placement import output_axis
from graphopt.edit import label
from graphopt.names import left_out
from graphopt.ops import DEQUANTIZE, is_standard
from graphopt.targets import CPU_FORMS, IntegerForm

Array: TypeAlias = np.ndarray[Any, Any]

FORMS: Mapping[str, IntegerForm] = {op: form for op, form in CPU_FORMS.items() if form.weight is not None}
"""Layers of every target that has integer kernels: inputs for weight and bias are the operator's own."""


@dataclass(frozen=True)
class IntegerLayer:
    """A layer whose weight is dequantized from int8 codes.

    Attributes:
        node: Conv, MatMul or Gemm.
        label: how reports call it.
        dequantize: the node that makes its weight, for it alone.
        codes: int8, of the weight's shape.
        scale: float32, one per output channel.
    """

    node: gs.Node
    label: str
    dequantize: gs.Node
    codes: Array
    scale: Array

    @property
    def group(self) -> int:
        """Groups of a convolution, else 1."""
        return int(self.node.attrs.get("group", 1)) if self.node.op == "Conv" else 1

    def rows(self, weight: Array) -> Array:
        """Return an array of the weight's shape as (group, rows, columns)."""
        turned = np.moveaxis(weight, output_axis(self.node), 0)
        return turned.reshape(self.group, turned.shape[0] // self.group, -1)

    def from_rows(self, rows: Array) -> Array:
        """Return (group, rows, columns) in the weight's own shape."""
        axis = output_axis(self.node)
        shape = self.codes.shape
        turned = rows.reshape(shape[axis], *(s for i, s in enumerate(shape) if i != axis))
        return np.ascontiguousarray(np.moveaxis(turned, 0, axis))

    @property
    def spread_scale(self) -> Array:
        """The scales, to be multiplied with codes of the weight's shape."""
        shape = [1] * self.codes.ndim
        shape[output_axis(self.node)] = -1
        return self.scale.reshape(shape)

    @property
    def row_scale(self) -> Array:
        """The scales as (group, rows)."""
        return self.scale.reshape(self.group, -1)

    @property
    def input_scale(self) -> float | None:
        """Scale of the layer's input, None where that is not dequantized with one scale."""
        source = self.node.inputs[0]
        maker = source.inputs[0] if source.inputs else None
        if maker is None or not is_standard(maker, *DEQUANTIZE):
            return None
        values = array_of(maker.inputs[1])
        return None if values is None or values.size != 1 else float(values.reshape(-1)[0])


def integer_layer(node: gs.Node) -> IntegerLayer | str | None:
    """Return a node as an integer layer, or why its weight is not as it should be; None where it has no codes."""
    form = FORMS.get(node.op) if is_standard(node) else None
    if form is None or form.weight is None or len(node.inputs) <= form.weight:
        return None
    weight = node.inputs[form.weight]
    maker = weight.inputs[0] if weight.inputs else None
    if maker is None or not is_standard(maker, *DEQUANTIZE) or not isinstance(maker.inputs[0], gs.Constant):
        return None
    if len(weight.outputs) > 1:
        return f"several layers share its weight '{weight.name}'"
    codes, scale = array_of(maker.inputs[0]), array_of(maker.inputs[1])
    if codes is None or scale is None or codes.dtype != np.int8:
        return "its weight is not stored as 8-bit signed codes"
    if len(maker.inputs) > 2 and ((zero := array_of(maker.inputs[2])) is None or zero.any()):
        return "its weight has zero points other than 0"
    axis = output_axis(node)
    channels = codes.shape[axis]
    if scale.ndim == 1 and scale.size == channels and int(maker.attrs.get("axis", 1)) % codes.ndim == axis:
        return IntegerLayer(node, label(node), maker, codes, scale)
    if scale.size == 1:
        return IntegerLayer(node, label(node), maker, codes, np.full(channels, scale.reshape(-1)[0], np.float32))
    return "its weight has not one scale per output channel"


def find_layers(
    graph: gs.Graph, only: Iterable[str] = ("*",), skip: Iterable[str] = ()
) -> tuple[dict[str, IntegerLayer], dict[str, str]]:
    """Return the integer layers of a graph that globs of names choose, by label, and why others are none."""
    found: dict[str, IntegerLayer] = {}
    blocked: dict[str, str] = {}
    for node in graph.nodes:
        layer = integer_layer(node)
        name = label(node)
        if layer is None:
            continue
        if why := left_out(name, only, skip):
            blocked[name] = why
        elif isinstance(layer, str):
            blocked[name] = layer
        else:
            found[name] = layer
    return found, blocked


def twins(layers: Mapping[str, IntegerLayer], reference: gs.Graph) -> dict[str, gs.Node]:
    """Return, by label, the node of the graph before quantizing that each layer was."""
    known = {label(node): node for node in reference.nodes}
    return {n: known[n] for n, layer in layers.items() if n in known and known[n].op == layer.node.op}


def float_weights(layers: Mapping[str, IntegerLayer], reference: gs.Graph) -> dict[str, Array | str]:
    """Return, by label, the float weight of each layer in the graph before quantizing, or why there is none."""
    known = twins(layers, reference)
    return {name: _float_weight(layer, known.get(name)) for name, layer in layers.items()}


def _float_weight(layer: IntegerLayer, twin: gs.Node | None) -> Array | str:
    if twin is None:
        return "the model before quantizing has no such layer"
    values = array_of(twin.inputs[FORMS[twin.op].weight or 0])
    if values is None or values.dtype != np.float32:
        return "its weight was quantized before this pipeline began: what it was in float is not known"
    if values.shape != layer.codes.shape:
        return f"its weight had another shape before quantizing: {list(values.shape)}"
    return values
