"""Architectures that ship without weights -> models with seeded ones.

The nine "light" models of the onnx package keep their graphs and replace every large weight by a
``ConstantOfShape`` of 0.02. Here each becomes an initializer again, as the original files have it (IR 3: an
initializer is a graph input too). Values are uniform, so they are bit-identical everywhere, and scaled by
their role so that activations neither vanish nor explode: a layer whose input went through ReLU keeps the
variance with ``Var(w) = 2 / fan_in`` (He et al. 2015), any other with ``1 / fan_in``. Trained values that
the files do keep (small biases, batch statistics) belong to the lost weights and are replaced too.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from graphopt.errors import DataError

from .wheels import replacing

_VERSION = 1  # raise when the values change
_RESHAPING = ("Unsqueeze", "Reshape")
_SIGN_KEEPING = (
    "AveragePool",
    "Concat",
    "Dropout",
    "GlobalAveragePool",
    "LRN",
    "MaxPool",
    "Reshape",
    "Transpose",
)
Array = npt.NDArray[np.float32]


def key(_name: str) -> str:
    """Return what the made file depends on besides its name and source."""
    return f"seeded{_VERSION}"


def make(name: str, sources: Sequence[Path], path: Path) -> None:
    """Write the model with seeded weights to ``path``; the seed is the model's name.

    Raises:
        DataError: a weight is used in a way that this module has no rule for.
    """
    model = onnx.load(str(sources[0]))
    _fill(model.graph, np.random.default_rng(zlib.crc32(name.encode())))
    with replacing(path) as temporary:
        onnx.save(model, str(temporary))


def _fill(graph: onnx.GraphProto, rng: np.random.Generator) -> None:
    consumers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
    for node in graph.node:
        for index, tensor in enumerate(node.input):
            consumers.setdefault(tensor, []).append((node, index))
    producers = {tensor: node for node in graph.node for tensor in node.output}
    filled = []
    for tensor, shape in list(_weights(graph)):
        node, index = _consumer(tensor, consumers)
        rectified = _rectified(node.input[0], producers)
        residual = _on_identity(node, consumers, producers)
        values = _values(node, index, shape, rng, rectified=rectified, residual=residual)
        filled.append(numpy_helper.from_array(values, tensor))
    _replace(graph, filled)


def _weights(graph: onnx.GraphProto) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every float weight: made by ConstantOfShape, or kept as an initializer."""
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    used = {tensor for node in graph.node for tensor in node.input}
    for node in graph.node:
        if node.op_type == "ConstantOfShape":
            yield node.output[0], tuple(int(n) for n in numpy_helper.to_array(initializers[node.input[0]]))
    for tensor in graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.name in used:
            yield tensor.name, tuple(tensor.dims)


def _consumer(tensor: str, consumers: dict[str, list[tuple[onnx.NodeProto, int]]]) -> tuple[onnx.NodeProto, int]:
    """Return the node that computes with the weight, and the place it takes there, past any reshaping."""
    node, index = consumers[tensor][0]
    while node.op_type in _RESHAPING:
        node, index = consumers[node.output[0]][0]
    return node, index


def _rectified(tensor: str, producers: dict[str, onnx.NodeProto]) -> bool:
    """Return whether the tensor's values come from a ReLU."""
    while tensor in producers and producers[tensor].op_type in _SIGN_KEEPING:
        tensor = producers[tensor].input[0]
    return tensor in producers and producers[tensor].op_type == "Relu"


def _on_identity(
    node: onnx.NodeProto,
    consumers: dict[str, list[tuple[onnx.NodeProto, int]]],
    producers: dict[str, onnx.NodeProto],
) -> bool:
    """Return whether the node's output is added to a shortcut that is no layer of its own."""
    sums = [user for user, _ in consumers.get(node.output[0], []) if user.op_type == "Sum"]
    return any(producers[other].op_type != node.op_type for user in sums for other in user.input)


def _values(
    node: onnx.NodeProto,
    index: int,
    shape: tuple[int, ...],
    rng: np.random.Generator,
    *,
    rectified: bool,
    residual: bool,
) -> Array:
    def uniform(low: float, high: float) -> Array:
        return (low + (high - low) * rng.random(shape, dtype=np.float32)).astype(np.float32)

    role = (node.op_type, index)
    if role in {("Conv", 1), ("Gemm", 1)}:
        fan_in = int(np.prod(shape)) // _outputs(node, shape)
        bound = float(np.sqrt((6.0 if rectified else 3.0) / fan_in))  # variance of U(-b, b) is b * b / 3
        return uniform(-bound, bound)
    if role == ("BatchNormalization", 1):
        scale = 0.25 if residual else 1.0  # a sum of branches would grow with depth
        return uniform(0.8 * scale, 1.2 * scale)
    if role in {("BatchNormalization", 4), ("Mul", 1)}:
        return uniform(0.8, 1.2)
    if role in {("Conv", 2), ("Gemm", 2), ("Add", 1), ("BatchNormalization", 2), ("BatchNormalization", 3)}:
        return uniform(-0.1, 0.1)
    raise DataError(f"no rule to fill input {index} of {node.op_type}", at=node.name or node.output[0])


def _outputs(node: onnx.NodeProto, shape: tuple[int, ...]) -> int:
    if node.op_type == "Conv":
        return shape[0]
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return shape[-2 if transposed else -1]  # counted from the end: one is stored 4-D and reshaped


def _replace(graph: onnx.GraphProto, filled: Sequence[onnx.TensorProto]) -> None:
    """Put the weights in place of the nodes that made constants, and drop the shapes those nodes read."""
    made = [node for node in graph.node if node.op_type == "ConstantOfShape"]
    gone = {node.input[0] for node in made} | {tensor.name for tensor in filled}
    kept = [tensor for tensor in graph.initializer if tensor.name not in gone]
    inputs = [value for value in graph.input if value.name not in gone]
    inputs += [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in filled]
    nodes = [node for node in graph.node if node.op_type != "ConstantOfShape"]
    for field, values in (("initializer", [*kept, *filled]), ("input", inputs), ("node", nodes)):
        graph.ClearField(field)
        getattr(graph, field).extend(values)
