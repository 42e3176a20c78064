"""Layers that are linear in their input, whatever the operator: their weight as columns, their bias, and both put back.

A layer computes X W + b: X are the rows that `graphopt.layer_inputs` describes, W is (group, width, outputs of a
group), b is (group, outputs of a group).

    MatMul           W is the weight; b the constant of an Add that alone reads the product
    Gemm             alpha, beta and both transpositions are taken into W and b
    Conv             W holds a column for each output channel
    ConvTranspose    a row makes a block of pixels: W holds a column for each channel and place in the block; only where
                     blocks do not overlap
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import array_of, is_constant
from graphopt.analysis.placement import output_axis
from graphopt.base import Context
from graphopt.edit import Edit, drop_declared, is_output, label
from graphopt.layer_inputs import GramRequest, request_of
from graphopt.ops import is_standard
from graphopt.tensors import is_float

Array: TypeAlias = np.ndarray[Any, Any]

CHANNEL_AXIS: Mapping[str, int] = {"Conv": 1, "ConvTranspose": 1, "Gemm": -1, "MatMul": -1}
"""Linear layers: the axis of their output's channels."""


@dataclass(frozen=True)
class LinearLayer:
    """A layer with a constant weight.

    Attributes:
        node: Conv, ConvTranspose, Gemm or MatMul.
        label: how reports call it.
        request: the rows that it reads.
        adds: where its bias stands: the node itself, an Add behind it, None for a MatMul without one.
        block: pixels that a row makes along each spatial axis; empty where it makes one.
    """

    node: gs.Node
    label: str
    request: GramRequest
    adds: gs.Node | None
    block: tuple[int, ...] = ()

    @property
    def output(self) -> gs.Tensor:
        """What the layer gives, its bias included."""
        return (self.node if self.adds is None else self.adds).outputs[0]

    @property
    def axis(self) -> int:
        """Axis of the channels of its output."""
        return CHANNEL_AXIS[self.node.op]

    @property
    def channels(self) -> int:
        """Output channels."""
        shape = _values(self.node.inputs[1], None).shape
        if self.node.op == "ConvTranspose":
            return int(shape[1]) * self.request.group
        return int(shape[output_axis(self.node)])

    def weight(self) -> Array:
        """Return W: float64 (group, width, outputs of a group)."""
        values = _values(self.node.inputs[1])
        group, width = self.request.group, self.request.width
        if self.node.op == "ConvTranspose":  # (channels in, channels out of a group, block…)
            return values.reshape(group, width, -1)
        rows = np.moveaxis(values, output_axis(self.node), 0)
        columns = rows.reshape(group, rows.shape[0] // group, width).transpose(0, 2, 1)
        return columns * float(self.node.attrs.get("alpha", 1.0))

    def bias(self) -> Array:
        """Return b: float64 (group, outputs of a group); zeros where there is none."""
        group = self.request.group
        held = self._bias_tensor()
        scale = float(self.node.attrs.get("beta", 1.0)) if self.node.op == "Gemm" else 1.0
        values = np.zeros(1) if held is None else _values(held).reshape(-1) * scale
        spread = np.broadcast_to(values, (self.channels,)).reshape(group, -1)
        return np.repeat(spread, math.prod(self.block), axis=1)

    def _bias_tensor(self) -> gs.Tensor | None:
        if self.adds is None:
            return None
        if self.adds is not self.node:
            return self.adds.inputs[_constant_input(self.adds)]
        return self.node.inputs[2] if len(self.node.inputs) > 2 and self.node.inputs[2].name else None

    def put(self, edit: Edit, ctx: Context, weight: Array | None, bias: Array | None) -> None:
        """Give the layer another W and b; None leaves one as it is.

        Args:
            edit: of its graph.
            ctx: names constants.
            weight: (group, width, outputs of a group).
            bias: (group, outputs of a group).
        """
        old = self.node.inputs[1]
        if weight is not None:
            values = self._stored(weight, _values(old, None).shape).astype(_values(old, None).dtype)
            edit.set_input(self.node, 1, ctx.constant(f"{old.name}_fitted", np.ascontiguousarray(values)))
            _forget(edit, old)
        if bias is None or self.adds is None:
            return
        flat = bias.reshape(self.channels, -1).mean(axis=1).astype(_values(old, None).dtype)
        held = self._bias_tensor()
        made = ctx.constant(f"{held.name if held is not None else self.label + '_bias'}_fitted", flat)
        index = 2 if self.adds is self.node else _constant_input(self.adds)
        edit.set_input(self.adds, index, made)
        if held is not None:
            _forget(edit, held)
        if self.adds is self.node:
            self.node.attrs.pop("beta", None)

    def _stored(self, weight: Array, shape: tuple[int, ...]) -> Array:
        if self.node.op == "ConvTranspose":
            return weight.reshape(shape)
        axis = output_axis(self.node)
        rows = weight.transpose(0, 2, 1).reshape(-1, weight.shape[1]) / float(self.node.attrs.get("alpha", 1.0))
        return np.moveaxis(rows.reshape(-1, *(s for i, s in enumerate(shape) if i != axis)), 0, axis)


def linear_layers(graph: gs.Graph) -> Iterator[LinearLayer | tuple[str, str]]:
    """Yield each linear layer of a graph, in its order; (label, reason) for one that cannot be treated as such."""
    for node in graph.nodes:
        if not is_standard(node, *CHANNEL_AXIS):
            continue
        if not is_constant(node.inputs[1]):
            maker = node.inputs[1].inputs[0].op if node.inputs[1].inputs else "a graph input"
            if node.op != "MatMul" or maker == "DequantizeLinear":
                yield label(node), f"its weight is not a constant: {maker} makes it"
            continue
        found = linear_layer(graph, node)
        yield (label(node), found) if isinstance(found, str) else found


def linear_layer(graph: gs.Graph, node: gs.Node) -> LinearLayer | str:
    """Return a node with a constant weight as a layer, or why it is none."""
    weight = node.inputs[1]
    values = array_of(weight)
    if values is None or not is_float(values.dtype):
        return "its weight is not a constant of floats"
    request = request_of(node, values.shape)
    if request is None or is_constant(node.inputs[0]):
        return "its inputs are no rows that one matrix is multiplied with"
    if len({id(reader) for reader in weight.outputs}) > 1:
        return f"several layers share its weight '{weight.name}'"
    if node.op == "ConvTranspose":
        why, block = _block(node, values.shape)
        return why or LinearLayer(node, label(node), request, node, block)
    if node.op == "MatMul":
        return LinearLayer(node, label(node), request, _bias_add(graph, node, values.shape[1]))
    why = _why_not_bias(node, values)
    return why or LinearLayer(node, label(node), request, node)


def _why_not_bias(node: gs.Node, weight: Array) -> str:
    """Return why input 2 of a Conv or Gemm is no bias, empty where it is one."""
    if float(node.attrs.get("alpha", 1.0)) == 0:
        return "its alpha is 0"
    if len(node.inputs) < 3 or not node.inputs[2].name:
        return ""
    values = array_of(node.inputs[2])
    outputs = weight.shape[output_axis(node)]
    if values is None:
        return "its bias is not a constant"
    if values.size == 1 or (values.size == outputs and values.shape[-1] == outputs):
        return ""
    return "its bias differs from row to row"


def _block(node: gs.Node, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Return why a ConvTranspose makes pixels of more than one row, else the block that a row makes."""
    kernel = tuple(shape[2:])
    ones, zeros = [1] * len(kernel), [0] * len(kernel)
    attrs = node.attrs
    plain = (
        list(attrs.get("strides", ones)) == list(kernel)
        and not any(attrs.get("pads", zeros))
        and not any(attrs.get("output_padding", zeros))
        and all(d == 1 for d in attrs.get("dilations", ones))
        and "output_shape" not in attrs
        and attrs.get("auto_pad", "NOTSET") in {"NOTSET", b"NOTSET", "VALID", b"VALID"}
    )
    if not plain:
        return (
            "it is a transposed convolution whose patches overlap or are cut: its outputs are sums of several rows",
            (),
        )
    if len(node.inputs) > 2 and node.inputs[2].name and array_of(node.inputs[2]) is None:
        return "its bias is not a constant", ()
    return "", kernel


def _bias_add(graph: gs.Graph, node: gs.Node, outputs: int) -> gs.Node | None:
    """Return the Add of one constant per output that alone reads a MatMul."""
    made = node.outputs[0]
    readers = {id(reader): reader for reader in made.outputs}
    if len(readers) != 1 or is_output(graph, made):
        return None
    (reader,) = readers.values()
    if not is_standard(reader, "Add") or all(t is made for t in reader.inputs):
        return None
    values = array_of(reader.inputs[_constant_input(reader)])
    if values is None or values.size not in {1, outputs} or (values.ndim and values.shape[-1] != values.size):
        return None
    return reader


def _constant_input(node: gs.Node) -> int:
    """Return which input of a commutative node is the constant: 1, unless 0 is."""
    return 0 if is_constant(node.inputs[0]) else 1


def _forget(edit: Edit, tensor: gs.Tensor) -> None:
    """Let go of a constant that nobody reads any more."""
    if not edit.is_used(tensor):
        drop_declared(edit.graph, {id(tensor)})


def _values(tensor: gs.Tensor, dtype: type | None = np.float64) -> Array:
    """Return a constant's values."""
    values = array_of(tensor)
    assert values is not None
    return values if dtype is None else values.astype(dtype)
