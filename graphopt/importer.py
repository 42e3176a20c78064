"""`onnx.ModelProto` -> `onnx_graphsurgeon` graphs, keeping beside them everything those cannot hold.

Every imported object carries an `origin`: the proto it came from.  `exporter.py` emits that proto again where
nobody edited the object, so a round trip without edits gives back the same message, field by field.
graphsurgeon's own importer is not used: it drops metadata, quantization annotations and empty attributes,
changes exotic types, and copies scopes in quadratic time.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, ValueInfoProto

from graphopt.errors import ModelError
from graphopt.tensors import LazySparse, LazyTensor, numpy_dtype

Values: TypeAlias = LazyTensor | LazySparse | np.ndarray[Any, Any]
StatedType: TypeAlias = tuple[np.dtype[Any] | None, tuple[int | str | None, ...] | None, str]
Resolve: TypeAlias = Callable[[TensorProto], Values]
"""Gives the values of a tensor whose data is not inside its proto."""

_HEAVY_GRAPH = {"node", "initializer", "sparse_initializer", "input", "output", "value_info"}
_HEAVY_FUNCTION = {"node", "input", "output", "value_info"}


class Node(gs.Node):  # type: ignore[misc]
    """A graphsurgeon node compared by identity: the deep comparison makes every detach slow."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__


@dataclass
class NodeOrigin:
    """What a node came from, and its metadata (mutable, emitted)."""

    proto: NodeProto
    metadata: dict[str, str]

    @functools.cached_property
    def attributes(self) -> dict[str, tuple[AttributeProto, object]]:
        """The attributes as they came, with their values in Python."""
        return {a.name: (a, decode_attribute(a)) for a in self.proto.attribute}

    @functools.cached_property
    def stated_metadata(self) -> dict[str, str]:
        """The metadata as they came."""
        return {entry.key: entry.value for entry in self.proto.metadata_props}

    def still_says(self, node: gs.Node) -> bool:
        """Tell whether the proto is still what `node` is; False where there are subgraphs or tensors to look into."""
        attributes = self.attributes
        return (
            self._stated == (node.op, node.name, node.domain, [t.name for t in node.inputs])
            and self._stated_outputs == [t.name for t in node.outputs]
            and list(node.attrs) == list(attributes)
            and all(unchanged(*attributes[name], value) for name, value in node.attrs.items())
            and self.metadata == self.stated_metadata
        )

    @functools.cached_property
    def _stated(self) -> tuple[str, str, str | None, list[str]]:
        """Operator, name, domain and inputs as they came: reading them from the proto takes long."""
        proto = self.proto
        return proto.op_type, proto.name, proto.domain if proto.HasField("domain") else None, list(proto.input)

    @functools.cached_property
    def _stated_outputs(self) -> list[str]:
        return list(self.proto.output)


@dataclass
class GraphOrigin:
    """What a graph holds beside its nodes.

    `declared` lists its constants in file order, used or not; `defaults` the default values of optional inputs;
    `annotated` the tensors of its own that have a quantization annotation; `order` its dense
    constants and defaults together, in file order; `shell` is the proto without its repeated parts.
    """

    shell: Any
    declared: list[gs.Constant] = field(default_factory=list)
    defaults: list[tuple[gs.Variable, Values]] = field(default_factory=list)
    value_info: list[tuple[gs.Tensor | None, ValueInfoProto]] = field(default_factory=list)
    outputs: list[tuple[gs.Tensor, ValueInfoProto]] = field(default_factory=list)
    input_order: list[gs.Tensor] = field(default_factory=list)
    annotated: set[str] = field(default_factory=set)
    order: list[gs.Tensor] = field(default_factory=list)


class Scope:
    """Tensors by name, inner graphs seeing those of the outer ones."""

    def __init__(self, parent: Scope | None, opset: int) -> None:
        self.parent = parent
        self.opset = opset
        self.local: dict[str, gs.Tensor] = {}

    def find(self, name: str) -> gs.Tensor | None:
        """Return the tensor called `name` here or further out."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.local:
                return scope.local[name]
            scope = scope.parent
        return None

    def define(self, tensor: gs.Tensor, where: str) -> gs.Tensor:
        """Add a tensor that this graph defines; a second definition of a name is an error."""
        if tensor.name in self.local:
            raise ModelError(
                f"tensor '{tensor.name}' is defined twice", at=where, hint="names must be unique in a graph"
            )
        self.local[tensor.name] = tensor
        return tensor


@contextmanager
def paused_gc() -> Iterator[None]:
    """Pause the cyclic collector: building a large graph otherwise takes quadratic time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def origin(thing: object) -> Any:
    """Return what `thing` was imported from, None for objects made by passes."""
    return thing.__dict__.get("origin")


def shell_of(proto: Any, drop: set[str]) -> Any:
    """Return a copy of a message without the named fields."""
    out = type(proto)()
    for descriptor, value in proto.ListFields():
        if descriptor.name in drop:
            continue
        if descriptor.is_repeated:
            if descriptor.message_type is not None and descriptor.message_type.GetOptions().map_entry:
                getattr(out, descriptor.name).MergeFrom(value)
            else:
                getattr(out, descriptor.name).extend(value)
        elif descriptor.message_type is not None:
            getattr(out, descriptor.name).CopyFrom(value)
        else:
            setattr(out, descriptor.name, value)
    return out


def tensor_type(info: ValueInfoProto) -> tuple[np.dtype[Any] | None, list[int | str | None] | None, str]:
    """Return (dtype, shape, kind) of a value; dtype and shape are None for anything but dense tensors."""
    kind = info.type.WhichOneof("value") or "tensor_type"
    if kind != "tensor_type":
        return None, None, kind
    tensor = info.type.tensor_type
    shape: list[int | str | None] | None = None
    if tensor.HasField("shape"):
        shape = [_dim(dim) for dim in tensor.shape.dim]
    return numpy_dtype(tensor.elem_type), shape, kind


def _dim(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    which = dim.WhichOneof("value")
    if which == "dim_value":
        return int(dim.dim_value) if dim.dim_value >= 0 else None
    return (dim.dim_param or None) if which == "dim_param" else None


class Importer:
    """Builds the graphs of one model.

    Args:
        proto: the model; its messages are referenced, never changed.
        resolve: gives the values of tensors whose data lies outside `proto`.
    """

    def __init__(self, proto: onnx.ModelProto, resolve: Resolve) -> None:
        self.proto = proto
        self.resolve = resolve
        self.opset = opset_of(proto.opset_import) or 1
        self.overridable = proto.ir_version >= 4
        self.domains = list(proto.opset_import)

    def run(self) -> tuple[gs.Graph, list[gs.Function]]:
        """Return the main graph and the local functions."""
        with paused_gc():
            if holds_external(self.proto.training_info):
                raise ModelError("training information with external data", hint="store it in the model itself")
            functions = [self._function(f) for f in self.proto.functions]
            graph = self._graph(self.proto.graph, None, f"graph '{self.proto.graph.name}'", functions)
        return graph, functions

    def _graph(
        self, proto: GraphProto, outer: Scope | None, where: str, functions: Sequence[gs.Function] = ()
    ) -> gs.Graph:
        scope = Scope(outer, outer.opset if outer else self.opset)
        held = GraphOrigin(shell=shell_of(proto, _HEAVY_GRAPH))
        input_names = {info.name for info in proto.input}
        self._initializers(proto, scope, held, input_names, where)
        inputs = self._inputs(proto, scope, held, where)
        self._outputs_of_nodes(proto.node, scope, where)
        self._value_info(proto.value_info, scope, held)
        nodes = [self._node(node, scope, where) for node in proto.node]
        held.annotated = {a.tensor_name for a in proto.quantization_annotation} & set(scope.local)
        held.outputs = [(self._graph_output(info, scope, where), info) for info in proto.output]
        outputs = [tensor for tensor, _ in held.outputs]
        graph = gs.Graph(
            nodes=nodes, inputs=inputs, outputs=outputs, name=proto.name, doc_string=proto.doc_string,
            opset=scope.opset, import_domains=self.domains, functions=list(functions), ir_version=self.proto.ir_version,
            producer_name=self.proto.producer_name, producer_version=self.proto.producer_version,
        )  # fmt: skip
        graph.origin = held
        return graph

    def _initializers(
        self, proto: GraphProto, scope: Scope, held: GraphOrigin, input_names: set[str], where: str
    ) -> None:
        for tensor in proto.initializer:
            if tensor.name in input_names and self.overridable:
                default = gs.Variable(tensor.name)
                held.defaults.append((default, self._values(tensor)))
                held.order.append(default)
                continue
            constant = self._constant(tensor.name, self._values(tensor), scope, where)
            held.declared.append(constant)
            held.order.append(constant)
        for sparse in proto.sparse_initializer:
            held.declared.append(self._constant(sparse.values.name, LazySparse(sparse), scope, where))

    def _constant(self, name: str, values: Values, scope: Scope, where: str) -> gs.Constant:
        constant = gs.Constant(name, values)
        constant.origin = values
        scope.define(constant, where)
        return constant

    def _values(self, tensor: TensorProto) -> Values:
        if tensor.data_location == TensorProto.EXTERNAL:
            return self.resolve(tensor)
        return LazyTensor(tensor)

    def _inputs(self, proto: GraphProto, scope: Scope, held: GraphOrigin, where: str) -> list[gs.Tensor]:
        defaults = {variable.name: variable for variable, _ in held.defaults}
        inputs = []
        for info in proto.input:
            known = scope.local.get(info.name)
            if isinstance(known, gs.Constant) and any(
                known is c for c in (held.declared if not self.overridable else [])
            ):
                held.input_order.append(known)  # IR 3: a constant that is listed as an input too
                known.input_info = info
                continue
            variable = scope.define(defaults.get(info.name) or gs.Variable(info.name), where)
            annotate(variable, info)
            held.input_order.append(variable)
            inputs.append(variable)
        return inputs

    def _outputs_of_nodes(self, nodes: Iterable[NodeProto], scope: Scope, where: str) -> None:
        for node in nodes:
            for name in node.output:
                if name:
                    scope.define(gs.Variable(name), where)

    def _value_info(self, infos: Iterable[ValueInfoProto], scope: Scope, held: GraphOrigin) -> None:
        for info in infos:
            tensor = scope.local.get(info.name)
            if isinstance(tensor, gs.Variable) and origin(tensor) is None:
                annotate(tensor, info)
            held.value_info.append((tensor, info))

    def _graph_output(self, info: ValueInfoProto, scope: Scope, where: str) -> gs.Tensor:
        tensor = scope.find(info.name)
        if tensor is None:
            raise ModelError(f"graph output '{info.name}' is not produced by any node", at=where)
        if isinstance(tensor, gs.Variable) and origin(tensor) is None:
            annotate(tensor, info)
        return tensor

    def _node(self, proto: NodeProto, scope: Scope, where: str) -> Node:
        inputs = []
        for name in proto.input:
            tensor = scope.find(name) if name else gs.Variable.empty()
            if tensor is None:
                raise ModelError(
                    f"tensor '{name}' is used but never produced",
                    at=f"node '{proto.name}' ({proto.op_type}) in {where}",
                )
            inputs.append(tensor)
        if len({a.name for a in proto.attribute}) < len(proto.attribute):
            raise ModelError("an attribute is given twice", at=f"node '{proto.name}' ({proto.op_type}) in {where}")
        node = Node(
            op=proto.op_type,
            name=proto.name,
            attrs={a.name: self._attribute(a, scope, proto) for a in proto.attribute},
            inputs=inputs,
            outputs=[scope.local[name] if name else gs.Variable.empty() for name in proto.output],
            domain=proto.domain if proto.HasField("domain") else None,
        )
        node.origin = NodeOrigin(proto, {entry.key: entry.value for entry in proto.metadata_props})
        return node

    def _attribute(self, attribute: AttributeProto, scope: Scope, node: NodeProto) -> object:
        if attribute.type == AttributeProto.GRAPH and not attribute.ref_attr_name:
            return self._graph(
                attribute.g, scope, f"attribute '{attribute.name}' of node '{node.name}' ({node.op_type})"
            )
        if attribute.type == AttributeProto.TENSOR and not attribute.ref_attr_name:
            values = self._values(attribute.t)
            constant = gs.Constant(attribute.t.name, values)
            constant.origin = values
            return constant
        if attribute.type in _PROTO_ATTRIBUTES and holds_external([attribute]):
            raise ModelError(
                f"attribute '{attribute.name}' has external data",
                at=f"node '{node.name}' ({node.op_type})",
                hint="store it in the model itself",
            )
        return decode_attribute(attribute)

    def _function(self, proto: onnx.FunctionProto) -> gs.Function:
        where = f"function '{proto.domain}.{proto.name}'"
        scope = Scope(None, opset_of(proto.opset_import) or self.opset)
        inputs = [scope.define(gs.Variable(name), where) for name in proto.input]
        self._outputs_of_nodes(proto.node, scope, where)
        held = GraphOrigin(shell=shell_of(proto, _HEAVY_FUNCTION))
        self._value_info(getattr(proto, "value_info", ()), scope, held)
        nodes = [self._node(node, scope, where) for node in proto.node]
        outputs = []
        for name in proto.output:
            tensor = scope.find(name)
            if tensor is None:
                raise ModelError(f"function output '{name}' is not produced by any node", at=where)
            outputs.append(tensor)
        attrs: dict[str, object] = dict.fromkeys(proto.attribute)
        attrs.update({a.name: decode_attribute(a) for a in proto.attribute_proto})
        function = gs.Function(
            proto.name, proto.domain, nodes=nodes, inputs=inputs, outputs=outputs, doc_string=proto.doc_string,
            opset=scope.opset, import_domains=list(proto.opset_import), attrs=attrs,
        )  # fmt: skip
        function.origin = held
        return function


_PROTO_ATTRIBUTES = frozenset(
    {
        AttributeProto.TENSORS, AttributeProto.GRAPHS, AttributeProto.SPARSE_TENSOR, AttributeProto.SPARSE_TENSORS,
        AttributeProto.GRAPH, AttributeProto.TENSOR,
    }
)  # fmt: skip
"""Attributes that may hold tensors and stay protos (GRAPH and TENSOR only where they name a parameter)."""


def holds_external(messages: Iterable[Any]) -> bool:
    """Tell whether a tensor inside these messages has its data in another file."""
    stack = list(messages)
    while stack:
        message = stack.pop()
        if isinstance(message, TensorProto) and message.data_location == TensorProto.EXTERNAL:
            return True
        for descriptor, value in message.ListFields():
            if descriptor.message_type is not None:
                stack.extend(value if descriptor.is_repeated else [value])
    return False


def annotate(variable: gs.Variable, info: ValueInfoProto) -> None:
    """Give a variable the type that `info` states, and keep `info` beside it."""
    variable.dtype, variable.shape, variable.type = dtype, shape, kind = tensor_type(info)
    variable.origin = info
    variable.stated = info, (dtype, None if shape is None else tuple(shape), kind)


def stated_type(variable: gs.Variable, info: ValueInfoProto) -> StatedType:
    """Return (dtype, shape, kind) that `info` states, decoded once where it is what the variable came with."""
    held, known = variable.__dict__.get("stated", (None, None))
    if held is info and known is not None:
        return known  # type: ignore[no-any-return]  # an attribute of a class that is not typed
    dtype, shape, kind = tensor_type(info)
    return dtype, None if shape is None else tuple(shape), kind


def decode_attribute(attribute: AttributeProto) -> object:
    """Return an attribute as Python: numbers, str (bytes if not UTF-8), lists; else the proto itself."""
    if attribute.ref_attr_name:
        return gs.Node.AttributeRef(attribute.ref_attr_name, attribute.type)
    decode = _DECODE.get(attribute.type)
    return decode(attribute) if decode else attribute


def unchanged(original: AttributeProto, decoded: object, value: object) -> bool:
    """Tell whether an attribute of a node is the one that it came with; `decoded` is what that is in Python."""
    return value is original or (type(decoded) is type(value) and bool(decoded == value))


def _text(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


_DECODE: Mapping[int, Callable[[AttributeProto], object]] = {
    AttributeProto.FLOAT: lambda a: a.f,
    AttributeProto.INT: lambda a: a.i,
    AttributeProto.STRING: lambda a: _text(a.s),
    AttributeProto.FLOATS: lambda a: list(a.floats),
    AttributeProto.INTS: lambda a: list(a.ints),
    AttributeProto.STRINGS: lambda a: [_text(s) for s in a.strings],
}


def opset_of(imports: Iterable[onnx.OperatorSetIdProto]) -> int | None:
    """Return the version of the standard operator set among `imports`."""
    versions = [int(entry.version) for entry in imports if entry.domain in ("", "ai.onnx")]
    return max(versions) if versions else None
