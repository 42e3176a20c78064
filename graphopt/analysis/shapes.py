"""Types and shapes of every tensor, by ONNX's own shape inference over the weightless skeleton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.importer import tensor_type
from graphopt.model import Model


@dataclass(frozen=True)
class TensorType:
    """dtype and shape of a tensor, None where unknown; a dimension is an int, a symbol, or None."""

    dtype: np.dtype[Any] | None
    shape: tuple[int | str | None, ...] | None

    @property
    def static(self) -> tuple[int, ...] | None:
        """The shape if every dimension is a number."""
        if self.shape is None or not all(isinstance(d, int) for d in self.shape):
            return None
        return tuple(int(d) for d in self.shape)  # type: ignore[arg-type]

    @property
    def rank(self) -> int | None:
        """Number of dimensions."""
        return None if self.shape is None else len(self.shape)


class Shapes:
    """What inference found, by tensor; falls back to what the tensor itself states."""

    def __init__(self, found: dict[int, TensorType], keep: list[gs.Tensor]) -> None:
        self._found = found
        self._keep = keep  # an id belongs to its tensor only while that lives, in the graph or not

    def of(self, tensor: gs.Tensor) -> TensorType:
        """Return the type of `tensor`."""
        if isinstance(tensor, gs.Constant):
            return TensorType(tensor.dtype, tuple(tensor.shape))
        found = self._found.get(id(tensor))
        if found is not None and found.dtype is not None and found.shape is not None:
            return found
        stated_shape = None if tensor.shape is None else tuple(tensor.shape)
        if found is None:
            return TensorType(tensor.dtype, stated_shape)
        return TensorType(found.dtype if found.dtype is not None else tensor.dtype,
                          found.shape if found.shape is not None else stated_shape)  # fmt: skip


def infer(model: Model) -> Shapes:
    """Infer all types and shapes; where inference fails, only what the file states is known."""
    skeleton = model.skeleton()
    try:
        inferred = onnx.shape_inference.infer_shapes(skeleton, data_prop=True)
    except onnx.shape_inference.InferenceError:
        inferred = skeleton
    found: dict[int, TensorType] = {}
    _read(model.graph, inferred.graph, found)
    keep = [t for graph in model.graphs() for t in (*graph.inputs, *(o for n in graph.nodes for o in n.outputs))]
    return Shapes(found, keep)


def _read(graph: gs.Graph, proto: onnx.GraphProto, found: dict[int, TensorType]) -> None:
    tensors = {t.name: t for node in graph.nodes for t in node.outputs if t.name}
    tensors.update((t.name, t) for t in graph.inputs)
    for info in (*proto.value_info, *proto.output, *proto.input):
        tensor = tensors.get(info.name)
        if isinstance(tensor, gs.Variable):
            dtype, shape, _ = tensor_type(info)
            known = found.get(id(tensor))
            if known is None or known.shape is None:
                found[id(tensor)] = TensorType(dtype, None if shape is None else tuple(shape))
    for node, node_proto in zip(graph.nodes, proto.node, strict=True):
        inner = {a.name: a.g for a in node_proto.attribute if a.type == onnx.AttributeProto.GRAPH}
        for name, attribute in node.attrs.items():
            if isinstance(attribute, gs.Graph):
                _read(attribute, inner[name], found)
