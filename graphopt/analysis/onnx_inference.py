"""ONNX's own shape inference for one node, with sizes that are expressions as its names of dimensions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, TypeProto

from graphopt.analysis.facts import Fact
from graphopt.analysis.symbolic_expr import Expr, Size
from graphopt.errors import GraphoptError
from graphopt.exporter import encode_attribute
from graphopt.ops import STANDARD_DOMAINS
from graphopt.tensors import encode, numpy_dtype, onnx_dtype

_MISREAD = frozenset({"Attention"})
"""Operators whose inference takes a named dimension for 0."""

_MOST_BYTES = 1 << 12
"""Bytes of a constant that inference may look at."""


def infer(node: gs.Node, opset: int, inputs: Sequence[Fact], fresh: Callable[[], Expr]) -> list[Fact]:
    """Return what ONNX infers of the outputs of a node without subgraphs, nothing where it infers nothing.

    Args:
        node: any node; operators that ONNX does not know give nothing.
        opset: of the standard domain.
        inputs: a fact per input.
        fresh: makes a symbol for a dimension that stays open.
    """
    schema = _schema(node.op, opset, node.domain or "")
    if schema is None or any(f.dtype is None and not t.is_empty() for f, t in zip(inputs, node.inputs, strict=True)):
        return []
    if node.op in _MISREAD and any(f.static is None for f, t in zip(inputs, node.inputs, strict=True) if t.name):
        return []
    known: dict[str, Size] = {}
    types = {f"i{i}": _type(f, known) for i, (f, t) in enumerate(zip(inputs, node.inputs, strict=True)) if t.name}
    data = {f"i{i}": found for i, f in enumerate(inputs) if (found := _data(f, node.inputs[i])) is not None}
    imports = [onnx.helper.make_opsetid("", opset)]
    try:
        proto = _proto(node)
        outputs = onnx.shape_inference.infer_node_outputs(schema, proto, types, data, opset_imports=imports)
    except (onnx.shape_inference.InferenceError, GraphoptError, RuntimeError, ValueError, KeyError, TypeError):
        return []
    return [_fact(outputs.get(f"o{i}"), known, fresh) for i in range(len(node.outputs))]


@functools.cache
def _schema(op: str, opset: int, domain: str) -> onnx.defs.OpSchema | None:
    if domain not in STANDARD_DOMAINS:
        return None
    try:
        return onnx.defs.get_schema(op, opset, "")
    except onnx.defs.SchemaError:
        return None


def _proto(node: gs.Node) -> onnx.NodeProto:
    proto = onnx.NodeProto(op_type=node.op)
    proto.input.extend("" if t.is_empty() else f"i{i}" for i, t in enumerate(node.inputs))
    proto.output.extend("" if t.is_empty() else f"o{i}" for i, t in enumerate(node.outputs))
    for name, value in node.attrs.items():
        if isinstance(value, gs.Graph):
            raise ValueError(name)
        if isinstance(value, gs.Constant):
            tensor = onnx.AttributeProto(name=name, type=onnx.AttributeProto.TENSOR)
            tensor.t.CopyFrom(encode(np.asarray(value.values), ""))
            proto.attribute.append(tensor)
        elif value is not None:
            proto.attribute.append(encode_attribute(node, name, value))
    return proto


def _type(fact: Fact, known: dict[str, Size]) -> TypeProto:
    found = TypeProto()
    assert fact.dtype is not None
    found.tensor_type.elem_type = onnx_dtype(fact.dtype)
    if fact.shape is None:
        return found
    found.tensor_type.shape.SetInParent()
    for size in fact.shape:
        dim = found.tensor_type.shape.dim.add()
        if isinstance(size, int):
            dim.dim_value = size
        else:
            dim.dim_param = size.text
            known[size.text] = size
    return found


def _data(fact: Fact, tensor: gs.Tensor) -> TensorProto | None:
    """Return an input's values where they are known and few."""
    values = fact.known_values
    if values is not None and fact.dtype is not None:
        return encode(np.asarray(values.tolist(), fact.dtype).reshape(values.shape), "")
    if isinstance(tensor, gs.Constant) and tensor._values.nbytes <= _MOST_BYTES and fact.dtype is not None:
        return encode(np.asarray(tensor.values), "") if fact.dtype.kind in "iufb" else None
    return None


def _fact(found: Any, known: dict[str, Size], fresh: Callable[[], Expr]) -> Fact:
    if found is None or found.WhichOneof("value") != "tensor_type":
        return Fact()
    tensor = found.tensor_type
    dtype = numpy_dtype(tensor.elem_type)
    if not tensor.HasField("shape"):
        return Fact(dtype)
    sizes: list[Size] = []
    for dim in tensor.shape.dim:
        if dim.WhichOneof("value") == "dim_value" and dim.dim_value >= 0:
            sizes.append(int(dim.dim_value))
        else:
            sizes.append(known.get(dim.dim_param) or fresh())
    return Fact(dtype, tuple(sizes))
