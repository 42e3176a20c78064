"""What a rule's rewriting becomes: first the types that it would have, then nodes.

Types are inferred operator by operator (ONNX's own inference) before anything in the graph is touched, so that a
replacement of another type or shape is refused, and later rules know the types of new tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import array_of
from graphopt.analysis.shapes import TensorType
from graphopt.base import Context
from graphopt.edit import Edit, carry_metadata, label
from graphopt.exporter import encode_attribute
from graphopt.importer import Node, NodeOrigin, origin, tensor_type
from graphopt.ops import MOVED_TO_INPUT
from graphopt.pattern import Call, Literal, Number, Result, Value
from graphopt.tensors import encode, is_float, onnx_dtype

Array = np.ndarray[Any, Any]

RULE, FROM = "graphopt.rule", "graphopt.from"
"""Metadata keys of nodes that rules made: the rule's name, and the nodes it replaced."""

_NAMED = 16
"""Original nodes that the metadata of a new node names."""

_UNINFERRED = (
    onnx.defs.SchemaError, onnx.shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError, ValueError,
)  # fmt: skip
"""What ONNX raises where it cannot infer."""

_SMALL = 1024
"""Elements of constants that shape inference is given."""


@dataclass
class Replacement:
    """New values for old tensors, typed, not yet nodes.

    Attributes:
        opset: of the graph.
        values: for each old output, what stands for it.
        calls: the new operators in topological order.
        types: of each result, by (id of its call, index).
        constants: new constants by (id of the value, id of the call that reads it).
    """

    opset: int
    values: list[Value]
    calls: list[Call] = field(default_factory=list)
    types: dict[tuple[int, int], TensorType] = field(default_factory=dict)
    constants: dict[tuple[int, int], Array] = field(default_factory=dict)

    def new_bytes(self) -> int:
        """Return the size of all new constants."""
        return sum(values.nbytes for values in self.constants.values())

    def type_of(self, value: Value) -> TensorType:
        """Return the type of one of its values or captures."""
        if isinstance(value, Result):
            return self.types[id(value.call), value.index]
        return value.type


def plan(values: Sequence[Value], opset: int) -> Replacement:
    """Return the typed replacement for what a `rewrite` returned."""
    planned = Replacement(opset, list(values))
    for value in values:
        for made in _ordered(value):
            if id(made) not in {id(c) for c in planned.calls}:
                _move_parameters(made, opset)
                _resolve_constants(made, planned)
                _infer(made, planned)
                planned.calls.append(made)
    return planned


def _ordered(value: Value | None) -> Iterator[Call]:
    if isinstance(value, Result):
        for given in value.call.inputs:
            yield from _ordered(given)
        yield value.call


def _move_parameters(made: Call, opset: int) -> None:
    """Turn attributes into inputs where the opset has them so."""
    for name in list(made.attrs):
        since, index = MOVED_TO_INPUT.get((made.op, name), (1 << 30, 0))
        if made.domain or opset < since:
            continue
        value = made.attrs.pop(name)
        if value is None:
            continue
        inputs = list(made.inputs) + [None] * (index + 1 - len(made.inputs))
        inputs[index] = value if isinstance(value, Value) else Literal(np.asarray(value))
        made.inputs = tuple(inputs)


def _resolve_constants(made: Call, planned: Replacement) -> None:
    """Give numbers and float64 arrays the type of the tensors beside them."""
    beside = [v for v in made.inputs if v is not None and not isinstance(v, Number | Literal)]
    known = [t.dtype for v in beside if (t := planned.type_of(v)).dtype is not None]
    known.sort(key=lambda dtype: dtype.kind == "b")  # a condition's type is not that of what is chosen
    dtype = known[0] if known else np.dtype(np.float32)
    for value in made.inputs:
        with np.errstate(over="ignore"):  # what overflows is found, and refused, by the rule's driver
            if isinstance(value, Number):
                planned.constants[id(value), id(made)] = np.asarray(value.value).astype(dtype)
            elif isinstance(value, Literal):
                wide = value.values.dtype == np.float64
                planned.constants[id(value), id(made)] = value.values.astype(dtype) if wide else value.values


def _infer(made: Call, planned: Replacement) -> None:
    """Find the types of a call's outputs; unknown ones where inference cannot."""
    names = [f"i{i}" if v is not None else "" for i, v in enumerate(made.inputs)]
    types: dict[str, onnx.TypeProto] = {}
    data: dict[str, onnx.TensorProto] = {}
    for name, value in zip(names, made.inputs, strict=True):
        if value is None:
            continue
        held = planned.constants.get((id(value), id(made)))
        if held is None:
            known = planned.type_of(value)
            held = None if isinstance(value, Result) else array_of(value.tensor, limit=_SMALL)
        else:
            known = TensorType(held.dtype, tuple(held.shape))
        types[name] = _type_proto(known)
        if held is not None and held.size <= _SMALL and held.dtype != object:
            data[name] = encode(np.asarray(held), name)
    outputs = [f"o{i}" for i in range(made.outputs)]
    node = onnx.NodeProto(op_type=made.op, domain=made.domain, input=names, output=outputs)
    template = Node(op=made.op, domain=made.domain or None)
    node.attribute.extend(encode_attribute(template, k, v) for k, v in made.attrs.items() if v is not None)
    found: Mapping[str, onnx.TypeProto] = {}
    try:
        schema = onnx.defs.get_schema(made.op, planned.opset, made.domain)
        imports = [onnx.helper.make_opsetid("", planned.opset)]
        found = onnx.shape_inference.infer_node_outputs(schema, node, types, data, opset_imports=imports)
    except _UNINFERRED:
        pass  # another domain, or shapes that do not fit: the driver compares what is known
    for i, name in enumerate(outputs):
        planned.types[id(made), i] = _read_type(found.get(name))


def _type_proto(known: TensorType) -> onnx.TypeProto:
    if known.dtype is None:
        return onnx.TypeProto()
    made = onnx.TypeProto()
    made.tensor_type.elem_type = onnx_dtype(known.dtype)
    if known.shape is not None:
        made.tensor_type.shape.SetInParent()
        for size in known.shape:
            dim = made.tensor_type.shape.dim.add()
            if isinstance(size, int):
                dim.dim_value = size
            elif size is not None:
                dim.dim_param = size
    return made


def _read_type(found: onnx.TypeProto | None) -> TensorType:
    if found is None:
        return TensorType(None, None)
    dtype, shape, _ = tensor_type(onnx.ValueInfoProto(type=found))
    return TensorType(dtype, None if shape is None else tuple(shape))


def differs(new: TensorType, old: TensorType) -> str | None:
    """Return in words how a type contradicts another, None where it does not as far as both are known."""
    if None not in (new.dtype, old.dtype) and new.dtype != old.dtype:
        return f"the result would be {new.dtype}, not {old.dtype}"
    if new.shape is None or old.shape is None:
        return None
    same = len(new.shape) == len(old.shape) and all(
        a == b or not (isinstance(a, int) and isinstance(b, int)) for a, b in zip(new.shape, old.shape, strict=True)
    )
    return None if same else f"the result would have shape {list(new.shape)}, not {list(old.shape)}"


def not_finite(planned: Replacement) -> str | None:
    """Return which new constant is not finite, None where all are."""
    for values in planned.constants.values():
        if is_float(values.dtype) and not np.isfinite(values.astype(np.float64)).all():
            return f"a new constant is not a finite {values.dtype}"
    return None


class Emitter:
    """Puts replacements into a graph.

    Args:
        edit: the edits of the graph under way.
        ctx: names, and the types of new tensors.
        initializers: whether constants may be initializers here (else they are Constant nodes).
    """

    def __init__(self, edit: Edit, ctx: Context, *, initializers: bool) -> None:
        self.edit = edit
        self.ctx = ctx
        self.initializers = initializers

    def put(
        self, planned: Replacement, old: Sequence[gs.Tensor], replaced: Sequence[gs.Node], rule: str
    ) -> list[gs.Node]:
        """Make the nodes, let them produce the old tensors, and return them.

        Args:
            planned: what to put.
            old: the tensors that its values stand for.
            replaced: the matched nodes, the last one first.
            rule: name of the rule, for the new nodes' metadata.
        """
        made: dict[int, gs.Node] = {}
        new: list[gs.Node] = []
        place = replaced[0]
        for wanted in planned.calls:
            node = self._node(wanted, planned, made, old[0].name, new)
            made[id(wanted)] = node
            new.append(node)
        for node in new:
            carry_metadata(replaced, node)
            _provenance(node, replaced, rule)
        self.edit.insert_after(place, new)
        for value, tensor in zip(planned.values, old, strict=True):
            self._stand_in(value, tensor, made)
        if new and isinstance(planned.values[0], Result):
            new[-1].name = place.name  # the place keeps its name; `place` itself goes
        return new

    def _node(
        self, wanted: Call, planned: Replacement, made: Mapping[int, gs.Node], base: str, new: list[gs.Node]
    ) -> gs.Node:
        inputs = [self._input(v, wanted, planned, made, base, new) for v in wanted.inputs]
        while inputs and inputs[-1].is_empty():
            inputs.pop()
        outputs = []
        for i in range(wanted.outputs):
            tensor = gs.Variable(self.ctx.fresh_name(f"{base}/{wanted.op}"))
            found = planned.types[id(wanted), i]
            tensor.dtype, tensor.shape = found.dtype, None if found.shape is None else list(found.shape)
            self.ctx.shapes.learn(tensor, found)
            outputs.append(tensor)
        attrs = {k: v for k, v in wanted.attrs.items() if v is not None}
        name = self.ctx.fresh_name(f"{base}/{wanted.op}/node")
        return Node(op=wanted.op, name=name, attrs=attrs, inputs=inputs, outputs=outputs, domain=wanted.domain or None)

    def _input(
        self,
        value: Value | None,
        wanted: Call,
        planned: Replacement,
        made: Mapping[int, gs.Node],
        base: str,
        new: list[gs.Node],
    ) -> gs.Tensor:
        if value is None:
            return gs.Variable.empty()
        if isinstance(value, Result):
            return made[id(value.call)].outputs[value.index]
        if (id(value), id(wanted)) not in planned.constants:
            return value.tensor
        values = planned.constants[id(value), id(wanted)]
        if self.initializers:
            return self.ctx.constant(f"{base}/{wanted.op}/constant", values)
        held = gs.Constant("", np.asarray(values))
        tensor = gs.Variable(self.ctx.fresh_name(f"{base}/{wanted.op}/constant"), values.dtype, list(values.shape))
        self.ctx.shapes.learn(tensor, TensorType(values.dtype, tuple(values.shape)))
        new.append(Node(op="Constant", name=tensor.name, attrs={"value": held}, inputs=[], outputs=[tensor]))
        return tensor

    def _stand_in(self, value: Value, old: gs.Tensor, made: Mapping[int, gs.Node]) -> None:
        """Make a value stand for an old tensor everywhere."""
        if isinstance(value, Result):
            producer = made[id(value.call)]
            self.edit.hand_over(producer, producer.outputs[value.index], old)
        else:
            self.edit.bypass(old, value.tensor)


def _provenance(node: gs.Node, replaced: Sequence[gs.Node], rule: str) -> None:
    """Record in a new node's metadata which rule made it of which nodes."""
    names: dict[str, None] = {}
    for other in reversed(replaced):
        came_from = origin(other)
        known = came_from.metadata.get(FROM, "") if came_from is not None else ""
        names.update(dict.fromkeys(known.split(", ") if known else [label(other)]))
    listed = list(names)
    if len(listed) > _NAMED:
        listed = [*listed[:_NAMED], "…"]
    held = origin(node)
    metadata = dict(held.metadata) if held is not None else {}
    metadata.update({RULE: rule, FROM: ", ".join(listed)})
    node.origin = NodeOrigin(onnx.NodeProto(), metadata)
