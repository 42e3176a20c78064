"""Types and shapes of every tensor: as the file states them, by ONNX's own inference, and as far as they are proved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.analysis.facts import Fact
from graphopt.analysis.symbolic import Symbolic
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
    """What inference finds, by tensor; each reading is made when first asked for.

    Args:
        model: the model, as it is now.
        inputs: input name -> shape, to find what follows from it where the model leaves dimensions open.
    """

    def __init__(self, model: Model, inputs: Mapping[str, Sequence[int]] | None = None) -> None:
        self._model = model
        self._inputs = dict(inputs or {})
        self._trusting: _Found | None = None
        self._symbolic: Symbolic | None = None
        self._proved: dict[int, tuple[TensorType, gs.Tensor]] = {}

    def of(self, tensor: gs.Tensor) -> TensorType:
        """Return the type of `tensor`: what inference finds from what the file states, else what it states."""
        if isinstance(tensor, gs.Constant):
            return TensorType(tensor.dtype, tuple(tensor.shape))
        found = self.read().of(tensor)
        stated = TensorType(tensor.dtype, None if tensor.shape is None else tuple(tensor.shape))
        if found is None:
            return stated
        return TensorType(
            found.dtype if found.dtype is not None else stated.dtype,
            found.shape if found.shape is not None else stated.shape,
        )

    def read(self) -> _Found:
        """Infer now, if that was not done yet."""
        if self._trusting is None:
            self._trusting = _infer(self._model, self._inputs)
        return self._trusting

    @property
    def symbolic(self) -> Symbolic:
        """What follows from the types of the model's inputs, small values and sizes as expressions included."""
        if self._symbolic is None:
            self._symbolic = Symbolic(self._model, self._inputs)
        return self._symbolic

    def proved(self, tensor: gs.Tensor) -> TensorType:
        """Return the type of `tensor` as far as it follows from the types of the model's inputs.

        What a file states of inner values and outputs may be out of date (inputs made dynamic after the export),
        and ORT does not hold a model to it; a rewrite that is right only for one shape must not rely on it.
        Dimensions of equal text are equal; those of different text may be.
        """
        if isinstance(tensor, gs.Constant):
            return TensorType(tensor.dtype, tuple(tensor.shape))
        held = self._proved.get(id(tensor))
        if held is None:
            held = self._proved[id(tensor)] = _stated(self.symbolic.of(tensor)), tensor
        return held[0]

    def learn(self, tensor: gs.Tensor, found: TensorType) -> None:
        """Take down the type of a tensor that a pass has made since."""
        self._proved[id(tensor)] = found, tensor
        if self._trusting is not None:
            self._trusting.add(tensor, found)


def _stated(fact: Fact) -> TensorType:
    """Return a fact as a type, sizes that are not numbers as text."""
    shape = fact.shape
    return TensorType(fact.dtype, None if shape is None else tuple(d if isinstance(d, int) else d.text for d in shape))


def infer(model: Model, inputs: Mapping[str, Sequence[int]] | None = None) -> Shapes:
    """Return the types and shapes of the model as it is now.

    Args:
        model: what to look at; not changed.
        inputs: input name -> shape, where the model leaves dimensions open.
    """
    shapes = Shapes(model, inputs)
    shapes.read()
    return shapes


class _Found:
    """Types by tensor; keeps the tensors alive, since an id belongs to one only as long as it lives."""

    def __init__(self) -> None:
        self._types: dict[int, tuple[TensorType, gs.Tensor]] = {}

    def of(self, tensor: gs.Tensor) -> TensorType | None:
        found = self._types.get(id(tensor))
        return None if found is None else found[0]

    def add(self, tensor: gs.Tensor, found: TensorType) -> None:
        known = self.of(tensor)
        if known is None or known.shape is None:
            self._types[id(tensor)] = found, tensor


def _infer(model: Model, inputs: Mapping[str, Sequence[int]]) -> _Found:
    """Infer all types and shapes; where inference fails, only what the file states is known."""
    skeleton = model.skeleton()
    for info in skeleton.graph.input:
        if info.name in inputs and info.type.WhichOneof("value") == "tensor_type":
            dims = [onnx.TensorShapeProto.Dimension(dim_value=int(d)) for d in inputs[info.name]]
            info.type.tensor_type.shape.CopyFrom(onnx.TensorShapeProto(dim=dims))
    try:
        inferred = onnx.shape_inference.infer_shapes(skeleton, data_prop=True)
    except onnx.shape_inference.InferenceError:
        inferred = skeleton
    found = _Found()
    _read(model.graph, inferred.graph, found)
    return found


def _read(graph: gs.Graph, proto: onnx.GraphProto, found: _Found) -> None:
    tensors = {t.name: t for node in graph.nodes for t in node.outputs if t.name}
    tensors.update((t.name, t) for t in graph.inputs)
    for info in (*proto.value_info, *proto.output, *proto.input):
        tensor = tensors.get(info.name)
        if isinstance(tensor, gs.Variable):
            dtype, shape, _ = tensor_type(info)
            found.add(tensor, TensorType(dtype, None if shape is None else tuple(shape)))
    for node, node_proto in zip(graph.nodes, proto.node, strict=True):
        inner = {a.name: a.g for a in node_proto.attribute if a.type == onnx.AttributeProto.GRAPH}
        for name, attribute in node.attrs.items():
            if isinstance(attribute, gs.Graph):
                _read(attribute, inner[name], found)
