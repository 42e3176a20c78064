"""Layers that two thinner ones could stand for: products, convolutions and look-ups with a constant weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import array_of, constant_node, is_constant, node_values, refers
from graphopt.analysis.quantized import dequantized
from graphopt.edit import is_output, label
from graphopt.layer_inputs import GramRequest, Window, request_of
from graphopt.low_rank import WIDEST, Split, conv_splits, product_split, table_split
from graphopt.ops import is_standard
from graphopt.tensors import is_float

Array: TypeAlias = np.ndarray[Any, Any]

MARK = "graphopt.factorized"
"""Metadata of both factors: which one, how, of which rank, and the request that asked for it."""

OPS = ("Conv", "Gemm", "MatMul")
TABLES = ("Gather",)


@dataclass(frozen=True)
class Bias:
    """Where the bias of a layer stands: input `port` of `node`; `tensor` is None where there is room for one."""

    node: gs.Node
    port: int
    tensor: gs.Tensor | None
    scale: float = 1.0


@dataclass(frozen=True)
class Factorable:
    """A layer, and the ways to factorise it.

    Attributes:
        node: Conv, Gemm or MatMul with its weight at input 1, or a Gather of rows of its input 0.
        label: how reports call it.
        shape: of the weight, as it is stored.
        splits: the ways, each of which may save work at some rank.
        bias: None where the layer has none, and one would cost a node.
        why: what stands against it; the other fields then mean little.
    """

    node: gs.Node
    label: str
    shape: tuple[int, ...] = ()
    splits: tuple[Split, ...] = ()
    bias: Bias | None = None
    why: str = ""

    @property
    def port(self) -> int:
        """Which input is the weight."""
        return 0 if is_standard(self.node, *TABLES) else 1

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as (outputs, inputs)."""
        return is_standard(self.node, "Gemm") and bool(self.node.attrs.get("transB", 0))

    @property
    def outputs(self) -> int:
        """Number of outputs."""
        split = self.splits[0]
        return split.shape[1] if split.flat else split.shape[0]

    def weight(self) -> Array:
        """Return what the layer multiplies with: (inputs, outputs), or as a Conv has it; in the stored type."""
        values = array_of(self.node.inputs[self.port])
        assert values is not None
        if not is_standard(self.node, "Gemm"):
            return values
        alpha = float(self.node.attrs.get("alpha", 1.0))
        values = values.T if self.transposed else values
        return values if alpha == 1.0 else (values * alpha).astype(values.dtype)

    def bias_values(self) -> Array:
        """Return the bias as one float64 number per output; zeros where there is none."""
        if self.bias is None or self.bias.tensor is None:
            return np.zeros(self.outputs)
        values = array_of(self.bias.tensor)
        assert values is not None
        return np.broadcast_to(values.astype(np.float64).reshape(-1), (self.outputs,)) * self.bias.scale

    def request(self, split: Split) -> tuple[GramRequest, bool] | None:
        """Return the second moments that a split is chosen by, and whether they are of the layer's output.

        None for tables, whose rows all count, whether samples name them or not.  Those of the smaller side, where both
        would do: an output holds its bias, which must be known then.
        """
        node, (rows, columns) = self.node, split.size
        if split.way == "table":
            return None
        if split.way == "narrow":
            return GramRequest(node.inputs[0].name, rows, axis=1), False
        found = request_of(node, self.shape)
        assert found is not None
        if split.way == "spatial":
            assert found.window is not None
            return GramRequest(found.tensor, rows, 1, _vertical(found.window)), False
        known = self.bias is not None or is_standard(node, "MatMul")
        if rows <= columns or not known:
            return found, False
        return GramRequest(node.outputs[0].name, columns, axis=1 if split.way == "wide" else -1), True


def _vertical(window: Window) -> Window:
    """Return the first axis of a window of two."""
    return Window(
        (window.kernel[0], 1), (window.strides[0], 1), (window.dilations[0], 1), (window.pads[0], 0, window.pads[2], 0),
        window.auto_pad,
    )  # fmt: skip


def find(
    graph: gs.Graph, metadata: Mapping[int, Mapping[str, str]] | None = None, *, tables: bool = False
) -> Iterator[Factorable]:
    """Yield the layers of a graph that have a constant weight, with what stands against factorising them.

    Args:
        graph: the graph, not its subgraphs.
        metadata: of nodes by id, where some are factors already.
        tables: whether embedding tables count.
    """
    for node in graph.nodes:
        if len(node.inputs) < 2 or not is_standard(node, *OPS, *(TABLES if tables else ())):
            continue
        found = _table(node) if is_standard(node, *TABLES) else _layer(graph, node)
        if found is None:
            continue
        if metadata is not None and MARK in metadata.get(id(node), {}):
            found = replace(found, why="it is a factor already")
        yield found


def _layer(graph: gs.Graph, node: gs.Node) -> Factorable | None:
    """Return a layer, None for nodes that multiply computed values only."""
    name, weight = label(node), node.inputs[1]
    held = held_type(weight)
    if held is None:
        if dequantized(weight):
            return Factorable(node, name, why="its weight is quantized")
        if is_standard(node, "MatMul") and is_constant(node.inputs[0]):
            return Factorable(node, name, why="its weight stands on the left")
        return None
    dtype, shape = held
    why = _why_not(node, dtype, shape)
    if why:
        return Factorable(node, name, shape, why=why)
    if is_standard(node, "Conv"):
        strides = list(node.attrs.get("strides") or [1] * (len(shape) - 2))
        splits = conv_splits(shape, strides)
    else:
        inputs, outputs = shape[::-1] if node.attrs.get("transB", 0) else shape
        splits = (product_split(inputs, outputs),)
    useful = tuple(s for s in splits if s.limit >= 1)
    if not useful:
        return Factorable(node, name, shape, why="no rank would save work")
    solvable = tuple(s for s in useful if min(s.size) <= WIDEST)
    if not solvable:
        return Factorable(node, name, shape, why=f"both of its sides are above {WIDEST}")
    return Factorable(node, name, shape, solvable, _bias(graph, node, solvable[0]))


def _table(node: gs.Node) -> Factorable | None:
    """Return an embedding table, None for nodes that look something else up."""
    held = held_type(node.inputs[0])
    if held is None or not is_float(held[0]) or len(held[1]) != 2 or is_constant(node.inputs[1]):
        return None
    if refers(node) or node.attrs.get("axis", 0) not in (0, -2):
        return Factorable(node, label(node), held[1], why="its columns are looked up, not its rows")
    split = table_split(*held[1])
    if split.limit < 1 or min(split.size) > WIDEST:
        return Factorable(node, label(node), held[1], why="no rank would save bytes")
    return Factorable(node, label(node), held[1], (split,))


def held_type(tensor: gs.Tensor) -> tuple[np.dtype[Any], tuple[int, ...]] | None:
    """Return type and shape of a constant, None for anything else; its values are not read."""
    holder = constant_node(tensor)
    held = tensor if isinstance(tensor, gs.Constant) else None if holder is None else node_values(holder)
    if held is None or held.dtype is None:
        return None
    return np.dtype(held.dtype), tuple(int(size) for size in held.shape)


def _why_not(node: gs.Node, dtype: np.dtype[Any], shape: tuple[int, ...]) -> str:
    if refers(node):
        return "its attributes come from the function around it"
    if not is_float(dtype):
        return f"its weight is {dtype}"
    if is_standard(node, "Conv"):
        group = int(node.attrs.get("group", 1))
        if group > 1:
            return f"it has {group} groups"
        return "" if len(shape) > 2 else f"its weight has {len(shape)} dimensions"
    if len(shape) != 2:
        return f"its weight has {len(shape)} dimensions, not 2"
    if is_standard(node, "Gemm") and float(node.attrs.get("alpha", 1.0)) == 0.0:
        return "its alpha is 0"
    return ""


def _bias(graph: gs.Graph, node: gs.Node, split: Split) -> Bias | None:
    """Return where the bias stands: at the node itself, or at an Add of a constant that alone reads its output."""
    outputs = split.shape[1] if split.flat else split.shape[0]
    if not is_standard(node, "MatMul"):
        scale = float(node.attrs.get("beta", 1.0)) if is_standard(node, "Gemm") else 1.0
        if len(node.inputs) < 3 or node.inputs[2].is_empty():
            return Bias(node, 2, None)
        held = node.inputs[2]
        return Bias(node, 2, held, scale) if _one_per_output(held, outputs) else None
    made = node.outputs[0]
    readers = list({id(n): n for n in made.outputs}.values())
    if len(readers) != 1 or is_output(graph, made) or not is_standard(readers[0], "Add"):
        return None
    port = 1 if readers[0].inputs[0] is made else 0
    held = readers[0].inputs[port]
    return Bias(readers[0], port, held) if held is not made and _one_per_output(held, outputs) else None


def _one_per_output(tensor: gs.Tensor, outputs: int) -> bool:
    """Tell whether a constant is one number for each output, or one for all."""
    held = held_type(tensor)
    if held is None:
        return False
    shape, size = held[1], int(np.prod(held[1]))
    return size == 1 or (size == outputs and bool(shape) and shape[-1] == outputs)
