"""Hypothesis strategies for ONNX messages that fill every field a model file may have."""

from __future__ import annotations

from typing import Any

import onnx
from hypothesis import strategies as st
from onnx import (
    AttributeProto,
    GraphProto,
    NodeProto,
    SparseTensorProto,
    TensorProto,
    TypeProto,
    ValueInfoProto,
    helper,
)

from graphopt.tensors import byte_size

DTYPES = [v for v in TensorProto.DataType.values() if v not in (TensorProto.UNDEFINED, TensorProto.STRING)]
TEXT = st.text(st.sampled_from("ab/:. é漢\n"), max_size=6)
SMALL = st.integers(0, 3)
Draw = st.DrawFn


def some(draw: Draw) -> bool:
    return draw(st.booleans())


def documented(draw: Draw, message: Any) -> None:
    """Maybe give a message a doc string (an empty one is not none) and metadata (keys may repeat)."""
    if some(draw):
        message.doc_string = draw(TEXT)
    for _ in range(draw(SMALL) if hasattr(message, "metadata_props") and some(draw) else 0):
        message.metadata_props.add(key=draw(TEXT), value=draw(TEXT))


@st.composite
def tensors(draw: Draw, name: str | None = None, *, large: bool = False) -> TensorProto:
    """A dense tensor of any type, its data raw or in the field of its type."""
    out = TensorProto(data_type=draw(st.sampled_from([*DTYPES, TensorProto.STRING])))
    out.dims.extend([300] if large and some(draw) else draw(st.lists(SMALL, max_size=3)))
    if name is not None:
        out.name = name
    documented(draw, out)
    size = byte_size(out.data_type, out.dims, "")
    count = 1
    for dim in out.dims:
        count *= dim
    if out.data_type == TensorProto.STRING:
        out.string_data.extend(draw(st.sampled_from([b"", b"a", "漢".encode()])) for _ in range(count))
    elif some(draw):
        out.raw_data = bytes([draw(st.integers(0, 255))]) * size
    else:
        fill_field(draw, out, count)
    return out


def fill_field(draw: Draw, out: TensorProto, count: int) -> None:
    field = getattr(out, helper.tensor_dtype_to_field(out.data_type))
    packed: dict[int, int] = {TensorProto.INT4: 4, TensorProto.UINT4: 4, TensorProto.FLOAT4E2M1: 4}
    packed |= {getattr(TensorProto, n): 2 for n in ("INT2", "UINT2") if hasattr(TensorProto, n)}
    if out.data_type in packed:
        count = (count * packed[out.data_type] + 7) // 8
    elif out.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128):
        count *= 2
    field.extend([draw(st.integers(0, 1))] * count)


@st.composite
def sparse_tensors(draw: Draw, name: str | None = None) -> SparseTensorProto:
    rows = draw(st.integers(1, 3))
    wide = some(draw)
    indices = [0, rows - 1] if wide else [rows - 1]
    values = helper.make_tensor(name or "", TensorProto.FLOAT, [1], [2.5])
    positions = helper.make_tensor("", TensorProto.INT64, [1, 2] if wide else [1], indices)
    out = SparseTensorProto(values=values, indices=positions, dims=[1, rows])
    documented(draw, out.values)
    return out


@st.composite
def types(draw: Draw, depth: int = 0) -> TypeProto:
    out = TypeProto()
    kinds = ["tensor", "tensor", "sparse", "none"] + ["sequence", "optional", "map"] * (depth < 2)
    kind = draw(st.sampled_from(kinds))
    if kind in ("tensor", "sparse"):
        inner = out.tensor_type if kind == "tensor" else out.sparse_tensor_type
        inner.elem_type = draw(st.sampled_from([TensorProto.UNDEFINED, *DTYPES]))
        if some(draw):
            fill_shape(draw, inner.shape)
    elif kind == "sequence":
        out.sequence_type.elem_type.CopyFrom(draw(types(depth + 1)))
    elif kind == "optional":
        out.optional_type.elem_type.CopyFrom(draw(types(depth + 1)))
    elif kind == "map":
        out.map_type.key_type = TensorProto.INT64
        out.map_type.value_type.CopyFrom(draw(types(depth + 1)))
    if some(draw):
        out.denotation = draw(TEXT)
    return out


def fill_shape(draw: Draw, shape: onnx.TensorShapeProto) -> None:
    shape.SetInParent()
    for _ in range(draw(SMALL)):
        dim = shape.dim.add()
        kind = draw(SMALL)
        if kind == 0:
            dim.dim_value = draw(st.integers(-1, 5))
        elif kind == 1:
            dim.dim_param = draw(TEXT)
        if some(draw):
            dim.denotation = draw(TEXT)


@st.composite
def value_infos(draw: Draw, name: str) -> ValueInfoProto:
    out = ValueInfoProto(name=name)
    if some(draw):
        out.type.CopyFrom(draw(types()))
    documented(draw, out)
    return out


@st.composite
def attributes(draw: Draw, name: str, visible: list[str], depth: int, *, in_function: bool) -> AttributeProto:
    kind = draw(st.sampled_from([k for k in AttributeProto.AttributeType.values() if k]))
    out = AttributeProto(name=name, type=kind)
    if some(draw):
        out.doc_string = draw(TEXT)
    if in_function and some(draw):
        out.ref_attr_name = draw(TEXT) + "r"
        return out
    floats, ints = st.floats(width=32, allow_nan=False), st.integers(-(2**63), 2**63 - 1)
    simple = {"FLOAT": ("f", floats), "INT": ("i", ints), "STRING": ("s", st.binary(max_size=4))}
    lists: dict[str, tuple[str, st.SearchStrategy[Any]]] = {
        "FLOATS": ("floats", floats), "INTS": ("ints", ints), "STRINGS": ("strings", st.binary(max_size=4)),
        "TENSORS": ("tensors", tensors()), "SPARSE_TENSORS": ("sparse_tensors", sparse_tensors()),
        "TYPE_PROTOS": ("type_protos", types()), "GRAPHS": ("graphs", graphs([], 9)),
    }  # fmt: skip
    single = {"TENSOR": ("t", tensors(large=True)), "SPARSE_TENSOR": ("sparse_tensor", sparse_tensors()),
              "TYPE_PROTO": ("tp", types()), "GRAPH": ("g", graphs(visible, depth + 1))}  # fmt: skip
    key = AttributeProto.AttributeType.Name(kind)
    if key in simple:
        field, strategy = simple[key]
        setattr(out, field, draw(strategy))
    elif key in lists:
        field, strategy = lists[key]
        getattr(out, field).extend(draw(st.lists(strategy, max_size=2)))  # often empty
    else:
        field, strategy = single[key]
        getattr(out, field).CopyFrom(draw(strategy))
    return out


@st.composite
def nodes(draw: Draw, visible: list[str], made: list[str], depth: int, *, in_function: bool = False) -> NodeProto:
    """A node that reads visible names and makes those in `made` (which may be empty: left out)."""
    custom = some(draw)
    out = NodeProto(op_type="Anything" if custom else draw(st.sampled_from(["Identity", "Add", "Loop"])))
    if custom or some(draw):
        out.domain = "my.domain" if custom else draw(st.sampled_from(["", "ai.onnx"]))
    if some(draw):
        out.name = draw(TEXT)
    if custom and some(draw):
        out.overload = draw(TEXT)
    out.input.extend(draw(st.lists(st.sampled_from(["", *visible]), max_size=3)))
    out.output.extend(made)
    for i in range(draw(SMALL) if depth < 2 else 0):
        out.attribute.append(draw(attributes(f"a{i}", visible, depth, in_function=in_function)))
    documented(draw, out)
    if some(draw) and hasattr(out, "device_configurations"):
        out.device_configurations.add(configuration_id=draw(TEXT), pipeline_stage=draw(SMALL))
    return out


def annotate(draw: Draw, out: Any, names: list[str]) -> None:
    for name in draw(st.lists(st.sampled_from([*names, "nobody"]), max_size=2, unique=True)):
        out.value_info.append(draw(value_infos(name)))


@st.composite
def graphs(draw: Draw, outer: list[str], depth: int, *, ir_version: int = 10) -> GraphProto:
    """A graph of a few nodes; depth 9 makes one that stands by itself, with no node."""
    out = GraphProto()
    if some(draw):
        out.name = draw(TEXT)
    documented(draw, out)
    prefix = f"g{depth}_{draw(st.integers(0, 10**9))}_"
    inputs = [f"{prefix}in{i}" for i in range(draw(SMALL))]
    weights = [f"{prefix}w{i}" for i in range(draw(SMALL))]
    out.input.extend(draw(value_infos(name)) for name in inputs)
    out.initializer.extend(draw(tensors(name, large=True)) for name in weights)
    if some(draw):
        weights.append(f"{prefix}sparse")
        out.sparse_initializer.append(draw(sparse_tensors(weights[-1])))
    if depth == 0:
        listed = [t for t in out.initializer if ir_version < 4 or some(draw)]
        out.input.extend(helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in listed)
    visible = [*outer, *inputs, *weights]
    made: list[str] = []
    for i in range(draw(st.integers(0, 4)) if depth < 3 else 0):
        names = draw(st.sampled_from([[f"{prefix}n{i}"], [f"{prefix}n{i}", f"{prefix}m{i}"], ["", f"{prefix}m{i}"]]))
        out.node.append(draw(nodes(visible, names, depth)))
        made += [n for n in names if n]
        visible += [n for n in names if n]
    local = [*inputs, *weights, *made]
    for name in draw(st.lists(st.sampled_from(local), max_size=3)) if local else []:
        out.output.append(draw(value_infos(name)))  # a name may come twice
    annotate(draw, out, local)
    for name in draw(st.lists(st.sampled_from([*local, "nobody"]), max_size=2)):
        entry = out.quantization_annotation.add(tensor_name=name)
        entry.quant_parameter_tensor_names.add(key=draw(TEXT), value=draw(TEXT))
    return out


@st.composite
def functions(draw: Draw, name: str) -> onnx.FunctionProto:
    out = onnx.FunctionProto(name=name, domain="my.domain", input=["a", "b"], attribute=["p", "q"])
    out.opset_import.extend([helper.make_opsetid("", 17), helper.make_opsetid("my.domain", 1)])
    out.attribute_proto.append(helper.make_attribute("d", draw(st.lists(SMALL, min_size=1))))
    if some(draw):
        out.overload = draw(TEXT)
    documented(draw, out)
    out.node.append(draw(nodes(["a", "b"], ["c"], 1, in_function=True)))
    out.node.append(draw(nodes(["a", "b", "c"], ["d"], 1, in_function=True)))
    out.output.extend(draw(st.lists(st.sampled_from(["a", "c", "d"]), min_size=1, unique=True)))
    annotate(draw, out, ["a", "b", "c", "d"])
    return out


@st.composite
def models(draw: Draw) -> onnx.ModelProto:
    out = onnx.ModelProto(ir_version=draw(st.sampled_from([3, 4, 8, 10, onnx.IR_VERSION])))
    out.graph.CopyFrom(draw(graphs([], 0, ir_version=out.ir_version)))
    out.opset_import.extend([helper.make_opsetid("", 18), helper.make_opsetid("my.domain", 2)])
    for field in ("producer_name", "producer_version", "domain"):
        if some(draw):
            setattr(out, field, draw(TEXT))
    if some(draw):
        out.model_version = draw(st.integers(0, 2**40))
    documented(draw, out)
    out.functions.extend(draw(functions(f"F{i}")) for i in range(draw(st.integers(0, 2))))
    if some(draw):
        info = out.training_info.add()
        info.initialization.CopyFrom(draw(graphs([], 9)))
        info.algorithm.CopyFrom(draw(graphs([], 9)))
        info.update_binding.add(key=draw(TEXT), value=draw(TEXT))
    if some(draw) and hasattr(out, "configuration"):
        out.configuration.add(name=draw(TEXT), num_devices=draw(SMALL), device=["cpu"])
    return out
