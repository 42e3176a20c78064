"""Which weights of a graph may become sparse, how they lie, and what was done to them before.

    MatMul, Gemm          (inputs, outputs), turned where the operator does
    Conv                  one matrix per group: inputs are channels x kernel
    ConvTranspose         one matrix per group: inputs are channels, outputs are channels x kernel
    LSTM, GRU, RNN        W and R: one matrix per direction
    batched MatMul        one matrix per batch

What is done to one is written down as metadata of its node: see `graphopt.sparse_marks`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import array_of, constant_node, is_constant, node_values
from graphopt.edit import is_output, label
from graphopt.layer_inputs import GramRequest, request_of
from graphopt.model import Model
from graphopt.names import matches
from graphopt.ops import DECODES, DEQUANTIZE, is_standard

Array: TypeAlias = np.ndarray[Any, Any]

PORTS: Mapping[str, tuple[int, ...]] = {
    "Conv": (1,), "ConvTranspose": (1,), "Gemm": (1,), "MatMul": (1,), "LSTM": (1, 2), "GRU": (1, 2), "RNN": (1, 2),
}  # fmt: skip
"""Inputs of operators that are weights."""

LEAST = 512
"""Elements that a weight has at least: of smaller ones there is nothing to save."""

FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.float64))


@dataclass(frozen=True)
class SparseLayer:
    """A weight that may become sparse.

    Attributes:
        node: the first that reads it.
        port: as which input.
        shape: of the weight.
        dtype: of the weight.
        users: all nodes that read it, each as `port`.
        request: what its inputs are, None where they are not rows of a matrix.
    """

    node: gs.Node
    port: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    users: tuple[gs.Node, ...]
    request: GramRequest | None

    @property
    def label(self) -> str:
        """What reports call it."""
        name = label(self.node)
        return name if PORTS[self.node.op] == (1,) else f"{name}:{self.tensor.name}"

    @property
    def tensor(self) -> gs.Tensor:
        """The weight."""
        return self.node.inputs[self.port]

    @property
    def size(self) -> int:
        """Elements of the weight."""
        return math.prod(self.shape)

    def values(self) -> Array:
        """Return the weight."""
        found = array_of(self.tensor)
        assert found is not None  # `find` looked
        return found

    def write(self, values: Array) -> None:
        """Put other values in the weight's place, under its name."""
        values = np.ascontiguousarray(values, self.dtype)
        holder = constant_node(self.tensor)
        if holder is None:
            self.tensor.values = values
        else:
            holder.attrs.clear()
            holder.attrs["value"] = gs.Constant("", values)

    def rows(self, values: Array) -> Array:
        """Return a weight, or anything of its shape, as (group, inputs, outputs); a view where that is possible."""
        shape = self.shape
        if self.node.op in ("Conv", "ConvTranspose"):
            group = int(self.node.attrs.get("group", 1))
            flat = values.reshape(group, shape[0] // group, -1)
            return np.swapaxes(flat, 1, 2) if self.node.op == "Conv" else flat
        turned = self.node.op in ("LSTM", "GRU", "RNN") or bool(
            self.node.op == "Gemm" and self.node.attrs.get("transB")
        )
        matrices = values.reshape(-1, *shape[-2:])
        return np.swapaxes(matrices, 1, 2) if turned else matrices

    def from_rows(self, rows: Array) -> Array:
        """Return a weight from what `rows` makes of it."""
        places = self.rows(np.arange(self.size).reshape(self.shape))
        found = np.empty(self.size, rows.dtype)
        found[places] = rows
        return found.reshape(self.shape)

    def pattern_order(self) -> tuple[Array, int]:
        """Return the inputs in the order that N:M patterns count them in, and after how many a run ends."""
        inputs = self.rows(np.empty(self.shape, bool)).shape[1]
        if self.node.op != "Conv":
            return np.arange(inputs), inputs
        channels = self.shape[1]
        return np.arange(inputs).reshape(channels, -1).T.reshape(-1), channels


def find(
    model: Model, graph: gs.Graph, only: Sequence[str] = (), skip: Sequence[str] = (), least: int = LEAST
) -> tuple[list[SparseLayer], dict[str, str]]:
    """Return the weights of a graph that may become sparse, in its order; and label -> reason of those that may not.

    Small weights and layers that the globs leave out are in neither.
    """
    found: list[SparseLayer] = []
    blocked: dict[str, str] = {}
    seen: set[int] = set()
    local = {id(node) for node in graph.nodes}
    for node, port in _places(graph):
        tensor = node.inputs[port]
        if id(tensor) in seen or not matches(label(node), only, skip):
            continue
        seen.add(id(tensor))
        why = _why_not(model, graph, node, port, local)
        held = _held(tensor)
        if why:
            blocked[label(node)] = why
        elif held is not None and math.prod(held[0]) >= least:
            users = tuple({id(n): n for n in tensor.outputs}.values())
            request = request_of(node, held[0]) if port == 1 else None
            found.append(SparseLayer(node, port, *held, users, request))
    return found, blocked


def _places(graph: gs.Graph) -> Iterator[tuple[gs.Node, int]]:
    for node in graph.nodes:
        if is_standard(node):
            yield from ((node, port) for port in PORTS.get(node.op, ()) if port < len(node.inputs))


def _held(tensor: gs.Tensor) -> tuple[tuple[int, ...], np.dtype[Any]] | None:
    """Return shape and type of a constant of floats with at least two dimensions; None of anything else."""
    holder = constant_node(tensor)
    values = tensor._values if isinstance(tensor, gs.Constant) else None if holder is None else node_values(holder)
    if values is None or values.dtype not in FLOATS or len(values.shape) < 2:
        return None
    return tuple(int(size) for size in values.shape), np.dtype(values.dtype)


def _why_not(model: Model, graph: gs.Graph, node: gs.Node, port: int, local: set[int]) -> str:
    """Return why a weight must stay as it is, '' where nothing stands against it."""
    tensor = node.inputs[port]
    if not is_constant(tensor):
        maker = tensor.inputs[0] if tensor.inputs else None
        decoded = maker is not None and (maker.op in DEQUANTIZE or DECODES in model.metadata(maker))
        return "its weight is quantized: make it sparse before that" if decoded else ""
    if _held(tensor) is None:
        return ""
    if is_output(graph, tensor):
        return "its weight is an output of the graph"
    for user in tensor.outputs:
        if id(user) not in local:
            return "several graphs read its weight"
        if user.op != node.op or [i for i, t in enumerate(user.inputs) if t is tensor] != [port]:
            return f"{user.op} '{label(user)}' reads its weight, too"
        if any(user.attrs.get(name) != node.attrs.get(name) for name in ("group", "transB")):
            return f"'{label(user)}' reads its weight another way"
    values = array_of(tensor)
    if values is None or not np.isfinite(values).all():
        return "its weight has NaN or infinite elements"
    return ""
