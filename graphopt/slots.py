"""Where a model keeps its constants, by name: read for the bridge, written back in place.

A slot is an initializer, the default of an input, or what a Constant node holds, in the main graph, in a subgraph or
in a local function.  Its key is its ONNX name; where two graphs use one name, the key of the inner one has the place
before it (`node/branch/name`, `domain.function/name`).  What is written keeps type, shape, doc string, metadata and
form (sparse stays sparse, a Constant of one number stays one).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import constant_node, node_values
from graphopt.edit import label
from graphopt.importer import origin
from graphopt.model import Model
from graphopt.ops import is_standard
from graphopt.tensors import LazySparse, LazyTensor, encode_into

Array = np.ndarray[Any, Any]

_NUMBERS: Mapping[str, Callable[[Array], Any]] = {
    "value_float": lambda array: float(array.reshape(-1)[0]),
    "value_floats": lambda array: [float(v) for v in array],
    "value_int": lambda array: int(array.reshape(-1)[0]),
    "value_ints": lambda array: [int(v) for v in array],
}


@dataclass(frozen=True)
class Slot:
    """One place that holds a constant.

    Attributes:
        key: its name, unique in the model.
        tensor: what nodes read: a `gs.Constant`, or the variable of an input with a default or of a Constant node.
        graph: the graph, subgraph or function that it stands in.
    """

    key: str
    tensor: gs.Tensor
    graph: gs.Graph

    @property
    def stored(self) -> Any:
        """What is stored: lazy values or an array; None for a Constant that takes an attribute of its function."""
        if isinstance(self.tensor, gs.Constant):
            return self.tensor._values
        node = constant_node(self.tensor)
        if node is not None:
            return node_values(node)
        return next(values for variable, values in origin(self.graph).defaults if variable is self.tensor)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape; nothing is read."""
        return tuple(int(size) for size in self.stored.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype; nothing is read."""
        found: np.dtype[Any] = np.dtype(self.stored.dtype)
        return found

    @property
    def sparse(self) -> bool:
        """Whether it is stored in sparse form."""
        return isinstance(_lazy(self), LazySparse)

    def read(self) -> Array:
        """Return the values."""
        stored = self.stored
        return np.asarray(stored if isinstance(stored, np.ndarray) else stored.load())

    def write(self, array: Array) -> None:
        """Store other values of the same dtype and shape; nothing happens where they are those that are there."""
        held = self.read()
        if held.dtype == array.dtype and held.tobytes() == array.tobytes():
            return
        values = _stored_like(_lazy(self), np.ascontiguousarray(array).reshape(array.shape))
        if isinstance(self.tensor, gs.Constant):
            self.tensor._values, self.tensor.origin = values, values
            return
        node = constant_node(self.tensor)
        if node is not None:
            _write_node(node, array, values)
            return
        defaults = origin(self.graph).defaults
        defaults[:] = [(v, values if v is self.tensor else old) for v, old in defaults]


def slots_of(model: Model) -> dict[str, Slot]:
    """Return every constant of a model by its key, those of the main graph first."""
    found: dict[str, Slot] = {}
    seen: set[int] = set()
    for place, graph in _graphs(model):
        for tensor in _constants(graph):
            if id(tensor) in seen or not tensor.name:
                continue
            seen.add(id(tensor))
            key = tensor.name if tensor.name not in found else f"{place}/{tensor.name}"
            while key in found:
                key += "'"
            found[key] = Slot(key, tensor, graph)
    return found


def _graphs(model: Model) -> Iterator[tuple[str, gs.Graph]]:
    """Yield every graph with what says where it is."""
    stack: list[tuple[str, gs.Graph]] = [(f"{f.domain}.{f.name}", f) for f in reversed(model.functions)]
    stack.append(("", model.graph))
    while stack:
        place, graph = stack.pop()
        yield place, graph
        inner = [
            (f"{place}/{label(node)}/{name}".lstrip("/"), value)
            for node in graph.nodes
            for name, value in node.attrs.items()
            if isinstance(value, gs.Graph)
        ]
        stack.extend(reversed(inner))


def _constants(graph: gs.Graph) -> Iterator[gs.Tensor]:
    held = origin(graph)
    if held is not None:
        yield from held.declared
        yield from (variable for variable, _ in getattr(held, "defaults", ()))
    for node in graph.nodes:
        yield from (tensor for tensor in node.inputs if isinstance(tensor, gs.Constant))
        if is_standard(node, "Constant") and node_values(node) is not None:
            yield node.outputs[0]
    yield from (tensor for tensor in graph.outputs if isinstance(tensor, gs.Constant))


def _lazy(slot: Slot) -> Any:
    """Return the proto that the values came in, where they still are those; else what is stored."""
    if isinstance(slot.tensor, gs.Constant):
        return _came_from(slot.tensor)
    node = constant_node(slot.tensor)
    if node is not None:
        held = next((v for v in node.attrs.values() if isinstance(v, gs.Constant)), None)
        return slot.stored if held is None else _came_from(held)
    return slot.stored


def _came_from(constant: gs.Constant) -> Any:
    held = origin(constant)
    same = isinstance(held, LazyTensor | LazySparse) and held.dtype == constant.dtype and held.shape == constant.shape
    return held if same else constant._values


def _stored_like(old: Any, array: Array) -> Any:
    """Return an array in the form that `old` has."""
    if isinstance(old, LazySparse):
        return _sparse_like(old, array)
    proto = onnx.TensorProto()
    encode_into(proto, array, "")
    if isinstance(old, LazyTensor):
        for field in ("name", "doc_string"):
            if old.tensor.HasField(field):
                setattr(proto, field, getattr(old.tensor, field))
        proto.metadata_props.extend(old.tensor.metadata_props)
    return LazyTensor(proto)


def _sparse_like(old: LazySparse, array: Array) -> Any:
    """Return an array in sparse form with the same places; dense where it is not zero elsewhere."""
    out = old.sparse_proto(old.tensor.values.name)
    indices = onnx.numpy_helper.to_array(old.tensor.indices)
    places = np.ravel_multi_index(tuple(indices.T), array.shape) if indices.ndim == 2 else indices
    flat = array.reshape(-1)
    if np.count_nonzero(flat) > np.count_nonzero(flat[places]):
        return array
    values = onnx.TensorProto()
    encode_into(values, flat[places], old.tensor.values.name)
    out.values.CopyFrom(values)
    return LazySparse(out)


def _write_node(node: gs.Node, array: Array, values: Any) -> None:
    """Store values in a Constant node, in the attribute that it has."""
    (name,) = (n for n in node.attrs if n in _NUMBERS or n in ("value", "sparse_value"))
    if name in _NUMBERS:
        node.attrs[name] = _NUMBERS[name](array)
    elif name == "value":
        held = node.attrs["value"]
        held._values, held.origin = values, values
    elif isinstance(values, LazySparse):
        attribute = onnx.AttributeProto(name=name, type=onnx.AttributeProto.SPARSE_TENSOR)
        attribute.sparse_tensor.CopyFrom(values.tensor)
        node.attrs[name] = attribute
    else:
        del node.attrs[name]
        node.attrs["value"] = gs.Constant("", array)
