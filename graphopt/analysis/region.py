"""A set of nodes that depends on constants alone, as a small model of its own that can be run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper

from graphopt.analysis.shapes import TensorType
from graphopt.exporter import Exporter, put_inline
from graphopt.importer import Values, tensor_type

Array = np.ndarray[Any, Any]
Evaluate = Callable[[onnx.ModelProto, Mapping[str, Any], Sequence[str] | None], dict[str, Any]]

_IR_VERSION = 8
_FED = 1024
"""Bytes from which on a constant is fed instead of being copied into the model."""

_CARRIERS: Mapping[str, tuple[int, np.dtype[Any]]] = {
    "bfloat16": (TensorProto.FLOAT, np.dtype(ml_dtypes.bfloat16)),
    "float8_e4m3fn": (TensorProto.FLOAT, np.dtype(ml_dtypes.float8_e4m3fn)),
    "float8_e4m3fnuz": (TensorProto.FLOAT, np.dtype(ml_dtypes.float8_e4m3fnuz)),
    "float8_e5m2": (TensorProto.FLOAT, np.dtype(ml_dtypes.float8_e5m2)),
    "float8_e5m2fnuz": (TensorProto.FLOAT, np.dtype(ml_dtypes.float8_e5m2fnuz)),
    "int4": (TensorProto.INT8, np.dtype(ml_dtypes.int4)),
    "uint4": (TensorProto.UINT8, np.dtype(ml_dtypes.uint4)),
}
"""Types that ORT's Python interface cannot return, and the wider type that carries them without loss."""


@dataclass(frozen=True)
class Region:
    """Nodes whose inputs are constants or each other's outputs, in order.

    Attributes:
        proto: the nodes as a model without outputs; small constants are its initializers, large ones its inputs.
        feeds: the large constants, by name.
        types: types of the nodes' outputs by name, as inference finds them.
    """

    proto: onnx.ModelProto
    feeds: dict[str, gs.Constant]
    types: dict[str, TensorType]

    def evaluate(self, tensors: Iterable[gs.Tensor], run: Evaluate) -> dict[str, Array]:
        """Return the values of some of the nodes' outputs, by name.

        Raises:
            GraphoptError: ORT refuses or fails.
        """
        model = onnx.ModelProto()
        model.CopyFrom(self.proto)
        carried: dict[str, np.dtype[Any]] = {}
        names = {t.name: t.name for t in tensors}
        for name in list(names):
            dtype = self.types[name].dtype
            if dtype is not None and dtype.name in _CARRIERS:
                wide, carried[name] = _CARRIERS[dtype.name]
                names[name] = f"{name}/carried"
                model.graph.node.append(helper.make_node("Cast", [name], [names[name]], to=wide))
        feeds = {name: constant.values for name, constant in self.feeds.items()}
        values = run(model, feeds, list(names.values()))
        return {
            name: np.asarray(values[returned]).astype(carried[name]) if name in carried else values[returned]
            for name, returned in names.items()
        }


def extract(nodes: Sequence[gs.Node], opset: int) -> Region:
    """Return standard nodes as a region; the nodes are not changed and no weight is read."""
    feeds: dict[str, gs.Constant] = {}
    constants = {t.name: t for n in nodes for t in n.inputs if isinstance(t, gs.Constant)}

    def place(out: onnx.TensorProto, name: str, values: Values) -> bool:
        if values.nbytes < _FED or name not in constants:
            return put_inline(out, name, values)
        feeds[name] = constants[name]
        return False

    shell = onnx.ModelProto(ir_version=_IR_VERSION, opset_import=[helper.make_opsetid("", opset)])
    graph = gs.Graph(nodes=nodes, name="region", opset=opset)
    proto = Exporter(shell, place).run(graph, [])
    del proto.graph.value_info[:]
    return Region(proto, feeds, _types(proto))


def _types(proto: onnx.ModelProto) -> dict[str, TensorType]:
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except onnx.shape_inference.InferenceError:
        return {}
    found = {}
    for info in inferred.graph.value_info:
        dtype, shape, _ = tensor_type(info)
        found[info.name] = TensorType(dtype, None if shape is None else tuple(shape))
    return found
