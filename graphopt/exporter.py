"""`onnx_graphsurgeon` graphs -> `onnx.ModelProto`; what nobody edited is emitted as it came (see importer.py)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, ValueInfoProto, helper

from graphopt.analysis.constants import array_of, constant_node
from graphopt.errors import ModelError
from graphopt.importer import (
    GraphOrigin,
    NodeOrigin,
    Values,
    origin,
    paused_gc,
    shell_of,
    stated_type,
    unchanged,
)
from graphopt.sparse_marks import marks
from graphopt.tensors import LazySparse, LazyTensor, encode, encode_into, onnx_dtype, same_dtype, sparse_form

Place: TypeAlias = Callable[[TensorProto, str, Values], bool]
"""Puts a constant under its name into an empty proto; False leaves it out and makes it a graph input of its type
(main graph only)."""


def put_inline(out: TensorProto, name: str, values: Values) -> bool:
    """Place a constant's data inside its proto."""
    if isinstance(values, LazyTensor):
        values.put(out, name)
    else:
        encode_into(out, values.load() if isinstance(values, LazySparse) else values, name)
    return True


def inline(name: str, values: Values) -> TensorProto:
    """Return a constant as a proto that holds its data."""
    out = TensorProto()
    put_inline(out, name, values)
    return out


def untouched(constant: gs.Constant) -> Values:
    """Return the constant's values, as the lazy original when nobody replaced them."""
    values, came_from = constant._values, origin(constant)
    if isinstance(came_from, LazyTensor | LazySparse) and came_from.is_loaded_as(values):
        return came_from
    return values  # type: ignore[no-any-return]


SPARSE_CONSTANTS = 11
"""First operator set whose Constant holds sparse tensors."""

_EDITABLE = {"input", "output", "attribute", "metadata_props"}


class Exporter:
    """Emits one model.

    Args:
        shell: the `ModelProto` without graph and functions.
        place: where the data of constants goes.
        compact: weights that are sparse on purpose (`sparse_marks`) are put into Constant nodes that hold them in
            sparse form, where that is smaller: ONNX's full checker and ONNX Runtime take these everywhere, while the
            checker's type inference refuses sparse initializers wherever a dense tensor is read.
    """

    def __init__(self, shell: onnx.ModelProto, place: Place = put_inline, *, compact: bool = False) -> None:
        self.shell = shell
        self.place = place
        self.compact = compact
        self.listed = shell.ir_version < 4  # before IR 4 every initializer is listed as an input

    def run(self, graph: gs.Graph, functions: Iterable[gs.Function]) -> onnx.ModelProto:
        """Return the whole model."""
        out = onnx.ModelProto()
        out.CopyFrom(self.shell)
        with paused_gc():
            self._graph(graph, out.graph, set(), main=True)
            for function in functions:
                self._function(function, out.functions.add())
        return out

    def _graph(self, graph: gs.Graph, out: GraphProto, outer: set[int], *, main: bool = False) -> None:
        held: GraphOrigin = origin(graph) or GraphOrigin(shell=GraphProto())
        out.CopyFrom(held.shell)
        if out.name != (graph.name or ""):  # setting an empty name would make it a field that is there
            out.name = graph.name or ""
        constants = constants_of(graph, outer)
        sparse = _sparse_weights(graph, held) if main and self.compact else {}
        kept = [c for c in constants if id(c) not in sparse]
        extra_inputs = self._initializers(kept, held, out, main=main)
        self._inputs(graph, held, out, extra_inputs)
        own = {id(c) for c in constants} - outer
        outer |= own  # one set for all depths: a copy per subgraph takes quadratic time
        for tensor in sparse.values():
            node = out.node.add(op_type="Constant", output=[tensor.values.name])
            node.attribute.add(name="sparse_value", type=AttributeProto.SPARSE_TENSOR, sparse_tensor=tensor)
        self._nodes((n for n in graph.nodes if id(n) not in sparse), out.node, outer)
        outer -= own
        out.output.extend(_output_infos(graph, held))
        out.value_info.extend(_value_infos(graph, held))
        _prune_annotations(held, out)

    def _initializers(
        self, constants: list[gs.Constant], held: GraphOrigin, out: GraphProto, *, main: bool
    ) -> list[ValueInfoProto]:
        extra: list[ValueInfoProto] = []
        dense: list[tuple[gs.Tensor, Values]] = []
        listed = {id(t) for t in held.input_order} if self.listed else set()
        for constant in constants:
            values = untouched(constant)
            if isinstance(values, LazySparse):
                out.sparse_initializer.append(values.sparse_proto(constant.name))
                continue
            dense.append((constant, values))
        if held.defaults:  # they stand among the constants
            place = {id(t): i for i, t in enumerate(held.order)}
            dense = sorted([*dense, *held.defaults], key=lambda pair: place.get(id(pair[0]), len(place)))
        for tensor, values in dense:
            proto = out.initializer.add()
            there = self.place(proto, tensor.name, values) or (not main and put_inline(proto, tensor.name, values))
            if not there:
                del out.initializer[-1]
            if isinstance(tensor, gs.Constant) and main and (not there or self.listed) and id(tensor) not in listed:
                extra.append(_constant_info(tensor))
        return extra

    def _inputs(self, graph: gs.Graph, held: GraphOrigin, out: GraphProto, extra: list[ValueInfoProto]) -> None:
        current = {id(t) for t in graph.inputs}
        kept = {id(c) for c in held.declared if isinstance(c, gs.Constant)} if self.listed else set()
        emitted: set[int] = set()
        for tensor in held.input_order:
            if id(tensor) in current:
                out.input.append(variable_info(tensor))
            elif id(tensor) in kept:
                out.input.append(_info_of(tensor, tensor.input_info))
            emitted.add(id(tensor))
        out.input.extend(variable_info(t) for t in graph.inputs if id(t) not in emitted)
        out.input.extend(extra)

    def _nodes(self, nodes: Iterable[gs.Node], out: Any, outer: set[int]) -> None:
        for node in nodes:
            came_from: NodeOrigin | None = origin(node)
            if came_from is not None and came_from.still_says(node):
                out.append(came_from.proto)
            else:
                self._node(node, out.add(), outer)

    def _node(self, node: gs.Node, out: NodeProto, outer: set[int]) -> None:
        came_from: NodeOrigin | None = origin(node)
        if came_from is not None and came_from.proto.op_type == node.op:
            out.CopyFrom(shell_of(came_from.proto, _EDITABLE))
        for name, value in (("op_type", node.op), ("name", node.name), ("domain", node.domain)):
            if value is None:
                out.ClearField(name)
            elif value != getattr(out, name) or name == "op_type" or (name == "domain" and not out.HasField(name)):
                setattr(out, name, value)
        out.input.extend(t.name for t in node.inputs)
        out.output.extend(t.name for t in node.outputs)
        originals: dict[str, tuple[AttributeProto, object]] = {}
        if came_from is not None:
            originals = came_from.attributes
            _metadata(came_from, out)
        for name, value in node.attrs.items():
            if value is not None:
                out.attribute.append(self._attribute(node, name, value, originals.get(name), outer))

    def _attribute(
        self, node: gs.Node, name: str, value: object, came_from: tuple[AttributeProto, object] | None, outer: set[int]
    ) -> AttributeProto:
        original, decoded = came_from or (None, None)
        if isinstance(value, gs.Graph):
            out = AttributeProto(name=name, type=AttributeProto.GRAPH)
            if original is not None and original.HasField("doc_string"):
                out.doc_string = original.doc_string
            self._graph(value, out.g, outer)
            return out
        if isinstance(value, gs.Constant):
            values = untouched(value)
            out = AttributeProto(name=name, type=AttributeProto.TENSOR)
            if original is not None and original.HasField("doc_string"):
                out.doc_string = original.doc_string
            if not self.place(out.t, value.name, values):
                put_inline(out.t, value.name, values)
            return out
        if original is not None and unchanged(original, decoded, value):
            return original
        return encode_attribute(node, name, value, original)

    def _function(self, function: gs.Function, out: onnx.FunctionProto) -> None:
        held: GraphOrigin = origin(function) or GraphOrigin(shell=onnx.FunctionProto())
        out.CopyFrom(held.shell)
        if (out.name, out.domain) != (function.name, function.domain):
            out.name, out.domain = function.name, function.domain
        out.input.extend(t.name for t in function.inputs)
        out.output.extend(t.name for t in function.outputs)
        constants = constants_of(function, set())
        for constant in constants:  # function bodies have no initializers
            node = out.node.add(op_type="Constant", output=[constant.name])
            node.attribute.append(helper.make_attribute("value", inline("", untouched(constant))))
        outer = {id(c) for c in constants}
        self._nodes(function.nodes, out.node, outer)
        if hasattr(out, "value_info"):
            out.value_info.extend(_value_infos(function, held))


def _metadata(came_from: NodeOrigin, out: NodeProto) -> None:
    if came_from.metadata == came_from.stated_metadata:
        out.metadata_props.extend(came_from.proto.metadata_props)
    else:
        for key, value in came_from.metadata.items():
            out.metadata_props.add(key=key, value=value)


def constants_of(graph: gs.Graph, outer: set[int]) -> list[gs.Constant]:
    """Return a graph's own constants: declared ones first, then those its nodes and outputs use.

    `outer` holds the ids of constants that belong to a graph around it.
    """
    held: GraphOrigin | None = origin(graph)
    found = {id(c): c for c in (held.declared if held else []) if isinstance(c, gs.Constant)}
    for tensor in [t for n in graph.nodes for t in n.inputs] + list(graph.outputs):
        if isinstance(tensor, gs.Constant) and id(tensor) not in outer:
            found.setdefault(id(tensor), tensor)
    return list(found.values())


def _sparse_weights(graph: gs.Graph, held: GraphOrigin) -> dict[int, onnx.SparseTensorProto]:
    """Return the constants that are to be stored in sparse form, by the id of the initializer or of its node."""
    if graph.opset < SPARSE_CONSTANTS:
        return {}
    fixed = {id(t) for t in (*graph.outputs, *held.input_order)}
    found: dict[int, onnx.SparseTensorProto] = {}
    for node in graph.nodes:
        came_from: NodeOrigin | None = origin(node)
        for port, mark in marks(came_from.metadata).items() if came_from is not None else ():
            tensor = node.inputs[port] if port < len(node.inputs) else None
            if mark.storage != "sparse" or tensor is None or id(tensor) in fixed:
                continue
            fixed.add(id(tensor))
            holder = constant_node(tensor) or tensor
            values = None if "sparse_value" in getattr(holder, "attrs", {}) else array_of(tensor)
            stored = None if values is None else sparse_form(values, tensor.name)
            if stored is not None:
                found[id(holder)] = stored
    return found


def _constant_info(constant: gs.Constant) -> ValueInfoProto:
    return helper.make_tensor_value_info(constant.name, onnx_dtype(constant.dtype), list(constant.shape))


def _info_of(constant: gs.Constant, info: ValueInfoProto) -> ValueInfoProto:
    """Return the type that the file states of a constant, unless a pass has given it another one since."""
    came_from = origin(constant)
    if not isinstance(came_from, LazyTensor | LazySparse | np.ndarray):
        return info
    same = came_from.dtype == constant.dtype and tuple(came_from.shape) == tuple(constant.shape)
    return info if same else _constant_info(constant)


def _output_infos(graph: gs.Graph, held: GraphOrigin) -> Iterable[ValueInfoProto]:
    """Yield the types of a graph's outputs: as they came where that still holds."""
    stated: dict[int, list[ValueInfoProto]] = {}
    for tensor, info in held.outputs:
        stated.setdefault(id(tensor), []).append(info)
    for tensor in graph.outputs:
        infos = stated.get(id(tensor), [])
        yield _output_info(tensor, infos.pop(0) if infos else None)


def _output_info(tensor: gs.Tensor, stated: ValueInfoProto | None) -> ValueInfoProto:
    if isinstance(tensor, gs.Constant):
        if stated is None or stated.name != tensor.name:
            return _constant_info(tensor)
        was_constant = isinstance(origin(tensor), LazyTensor | LazySparse)
        if not was_constant and not stated.type.tensor_type.elem_type:
            return _constant_info(tensor)  # a type left open is inferred from a node, never from an initializer
        return stated
    if stated is not None and _still_says(stated, tensor, compare_type=origin(tensor) is stated):
        return stated
    return variable_info(tensor)


def _still_says(info: ValueInfoProto, tensor: gs.Variable, *, compare_type: bool) -> bool:
    """Tell whether `info` still describes the variable."""
    if info.name != tensor.name:
        return False
    if not compare_type:
        return True
    dtype, shape, kind = stated_type(tensor, info)
    present = None if tensor.shape is None else tuple(tensor.shape)
    return kind == tensor.type and same_dtype(dtype, tensor.dtype) and shape == present


def variable_info(tensor: gs.Variable) -> ValueInfoProto:
    """Return the type of a variable as a proto: its original if unedited, else a new one."""
    came_from = origin(tensor)
    if came_from is not None and _still_says(came_from, tensor, compare_type=True):
        return came_from  # type: ignore[no-any-return]
    if came_from is not None and tensor.dtype is None:
        out = ValueInfoProto()
        out.CopyFrom(came_from)
        out.name = tensor.name
        return out
    if tensor.dtype is None:
        return ValueInfoProto(name=tensor.name)
    shape = None if tensor.shape is None else [d if d != "" else None for d in tensor.shape]
    out = helper.make_tensor_value_info(tensor.name, onnx_dtype(tensor.dtype), shape)
    if came_from is not None:
        out.doc_string = came_from.doc_string
        out.metadata_props.extend(came_from.metadata_props)
    return out


def _value_infos(graph: gs.Graph, held: GraphOrigin) -> Iterable[ValueInfoProto]:
    """Yield the types of inner values: those that came with one first, in file order, then new ones."""
    ends = {id(t) for t in graph.outputs} | {id(t) for t in graph.inputs}
    alive = {id(t): t for n in graph.nodes for t in n.outputs if t.name}
    alive.update((id(t), t) for t in held.declared)
    done = set()
    for tensor, info in held.value_info:
        if tensor is None:
            yield info
        elif isinstance(tensor, gs.Constant) or (id(tensor) in ends and tensor.name == info.name):
            if id(tensor) in alive or id(tensor) in ends:
                yield _info_of(tensor, info) if isinstance(tensor, gs.Constant) else info
        elif id(tensor) in alive:
            done.add(id(tensor))
            yield info if _still_says(info, tensor, compare_type=True) else variable_info(tensor)
    for key, tensor in alive.items():
        if key not in done and key not in ends and isinstance(tensor, gs.Variable) and tensor.dtype is not None:
            yield variable_info(tensor)


def _prune_annotations(held: GraphOrigin, out: GraphProto) -> None:
    """Drop the annotations of tensors that are gone."""
    if not held.annotated:
        return
    names = {i.name for i in (*out.initializer, *out.input)} | {t for n in out.node for t in n.output}
    names.update(s.values.name for s in out.sparse_initializer)
    kept = [a for a in out.quantization_annotation if a.tensor_name in names or a.tensor_name not in held.annotated]
    if len(kept) != len(out.quantization_annotation):
        del out.quantization_annotation[:]
        out.quantization_annotation.extend(kept)


_SCALARS: Mapping[type, int] = {
    bool: AttributeProto.INT, int: AttributeProto.INT, float: AttributeProto.FLOAT,
    str: AttributeProto.STRING, bytes: AttributeProto.STRING,
}  # fmt: skip


def encode_attribute(node: gs.Node, name: str, value: object, original: AttributeProto | None = None) -> AttributeProto:
    """Return `value` as an attribute, typed by the operator's schema where Python's type leaves a choice.

    Raises:
        ModelError: the value has no ONNX form, or is an empty list of unknown type.
    """
    if isinstance(value, AttributeProto):
        return value
    if isinstance(value, gs.Node.AttributeRef):
        return AttributeProto(name=name, type=value.type, ref_attr_name=value.name)
    wanted = original.type if original is not None else _schema_type(node.op, node.domain or "", name)
    value = _plain(value)
    if isinstance(value, np.ndarray):
        return helper.make_attribute(name, encode(value, ""))
    try:
        if wanted is not None:
            return helper.make_attribute(name, _cast(value, wanted), attr_type=wanted)
        return helper.make_attribute(name, value)
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"attribute '{name}' cannot hold {value!r}", at=f"node '{node.name}' ({node.op})", hint=str(error)
        ) from error


def _plain(value: object) -> object:
    """Return NumPy scalars as Python's, tuples as lists, 0-d and n-d arrays as they are."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return int(value) if isinstance(value, bool) else value


def _cast(value: Any, wanted: int) -> Any:
    if wanted == AttributeProto.FLOAT:
        return float(value)
    if wanted == AttributeProto.FLOATS:
        return [float(v) for v in value]
    return value


@functools.cache
def _schema_type(op: str, domain: str, name: str) -> int | None:
    try:
        schema = onnx.defs.get_schema(op, domain)
    except onnx.defs.SchemaError:
        return None
    attribute: Any = schema.attributes.get(name)
    return int(attribute.type) if attribute is not None else None
