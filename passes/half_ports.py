"""Which inputs and outputs of a node can be float16, read off ONNX's operator schemas."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import refers
from graphopt.edit import subgraphs
from graphopt.half import BITS
from graphopt.ops import DEQUANTIZE, QUANTIZE, is_standard

_HALF = "tensor(float16)"
_NOT_TENSORS = ("seq(", "optional(", "map(", "sparse_tensor(")

ATTRIBUTE_TYPED = frozenset({"Cast", "ConstantOfShape"})
"""Operators whose output has the type that an attribute says."""


@dataclass(frozen=True)
class Ports:
    """The inputs and outputs of a node that are float32 now and can be float16, by index."""

    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()


@functools.cache
def _schema(op: str, opset: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op, opset, "")
    except onnx.defs.SchemaError:
        return None


@functools.cache
def _allowed(op: str, opset: int) -> Mapping[str, frozenset[str]]:
    schema = _schema(op, opset)
    return {c.type_param_str: frozenset(c.allowed_type_strs) for c in schema.type_constraints} if schema else {}


@functools.cache
def is_function(op: str, opset: int) -> bool:
    """Tell whether ONNX spells an operator out in others, which a provider without a kernel for it then runs."""
    schema = _schema(op, opset)
    spelled: Any = schema  # its type stub lacks these
    return schema is not None and bool(spelled.has_function or spelled.has_context_dependent_function)


def ports(node: gs.Node, opset: int, is_float: Callable[[gs.Tensor], bool | None]) -> Ports | str | None:
    """Return what of a node can be float16.

    Args:
        node: the node.
        opset: its operator set.
        is_float: whether a tensor is float32; None where its type is not known.

    Returns:
        Its ports, None where it has nothing to do with float32, or why it must stay float32.
    """
    read = [i for i, t in enumerate(node.inputs) if t.name and is_float(t)]
    made = [i for i, t in enumerate(node.outputs) if t.name and is_float(t)]
    if not read and not made:
        return None
    reason = _closed(node, opset)
    if reason is not None:
        return reason
    if is_standard(node, "Cast"):
        return Ports((), (0,)) if made else None
    schema, allowed = _schema(node.op, opset), _allowed(node.op, opset)
    assert schema is not None  # or it were closed
    bound = {_variable(schema.inputs, i) for i in read}
    variables = {v for v in bound if _HALF in allowed.get(v, ())}
    if node.op in ATTRIBUTE_TYPED:
        variables |= {_variable(schema.outputs, i) for i in made}
    inputs = tuple(_of(variables, schema.inputs, node.inputs, is_float))
    outputs = tuple(_of(variables, schema.outputs, node.outputs, is_float))
    if not inputs and not outputs:
        return None if is_standard(node, "Constant") else f"ONNX has no float16 {node.op} (opset {opset})"
    if shared := {id(node.inputs[i]) for i in inputs} & {id(node.inputs[i]) for i in read if i not in inputs}:
        name = next(t.name for t in node.inputs if id(t) in shared)
        return f"one of its inputs must be float32, and '{name}' is that, too"
    return _untyped(node, schema, allowed, is_float) or Ports(inputs, outputs)


def _closed(node: gs.Node, opset: int) -> str | None:
    """Return why a node is not looked into."""
    if not is_standard(node):
        return f"operators of '{node.domain}' take the types they were written for"
    if subgraphs(node):
        return "the types of its subgraphs stay as they are"
    if refers(node):
        return "an attribute of the function around it decides"
    if is_standard(node, *QUANTIZE, *DEQUANTIZE):
        return "scales of quantized values stay float32"
    if node.op in BITS:
        return "it reads the bits of its input"
    return None if _schema(node.op, opset) is not None else f"ONNX has no {node.op} in opset {opset}"


def _variable(formals: Sequence[onnx.defs.OpSchema.FormalParameter], index: int) -> str:
    return str(formals[min(index, len(formals) - 1)].type_str)


def _of(
    variables: set[str],
    formals: Sequence[onnx.defs.OpSchema.FormalParameter],
    tensors: Sequence[gs.Tensor],
    is_float: Callable[[gs.Tensor], bool | None],
) -> Iterator[int]:
    """Yield the places whose type is one of these variables; what shares a variable with a float32 is one itself."""
    for i, tensor in enumerate(tensors):
        if tensor.name and is_float(tensor) is not False and _variable(formals, i) in variables:
            yield i


def _untyped(
    node: gs.Node,
    schema: onnx.defs.OpSchema,
    allowed: Mapping[str, frozenset[str]],
    is_float: Callable[[gs.Tensor], bool | None],
) -> str | None:
    """Return why a node that handles more than tensors stays as it is, None for others."""
    for formals, tensors in ((schema.inputs, node.inputs), (schema.outputs, node.outputs)):
        for i, tensor in enumerate(tensors):
            kinds = allowed.get(_variable(formals, i), frozenset()) if tensor.name else frozenset()
            if any(kind.startswith(_NOT_TENSORS) for kind in kinds) and is_float(tensor) is None:
                return "it handles sequences or optional values, whose type stays as it is"
    return None
