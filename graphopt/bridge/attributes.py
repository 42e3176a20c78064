"""Attributes of a node -> keyword arguments of the function that computes it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto, TensorProto

from graphopt.analysis.constants import array_of
from graphopt.bridge.host import torch_kind
from graphopt.edit import label
from graphopt.errors import ModelError
from graphopt.importer import decode_attribute
from graphopt.ops import STANDARD_DOMAINS

_WIDER: Mapping[int, int] = {TensorProto.FLOAT16: TensorProto.FLOAT, TensorProto.BFLOAT16: TensorProto.FLOAT}
"""Half precision is computed in float32: parameters have float32 masters."""

_KINDS = frozenset({"to", "dtype", "output_dtype", "stash_type", "precision"})
"""Attributes that name an element type."""

_LEFT_OUT = frozenset({"consumed_inputs", "onnx_opset"})
"""Attributes that change nothing: of opsets before 6, or notes of a producer."""


def where(node: gs.Node) -> str:
    """Return how errors name a node."""
    domain = "" if node.domain in STANDARD_DOMAINS else f"{node.domain}."
    return f"node '{label(node)}' ({domain}{node.op})"


def arguments(
    node: gs.Node, function: Callable[..., Any], opset: int, given: Mapping[str, Any], extras: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the keyword arguments for a node.

    Args:
        node: the node.
        function: what computes it; see `table.py` for what it is called with.
        opset: version of its operator set.
        given: attributes of the call, where the node is in a local function.
        extras: what a function may ask for by the name of a parameter, besides attributes.

    Raises:
        ModelError: an attribute that the function does not know, with a value that matters.
    """
    known = parameters_of(function)
    defaults = _defaults(node.op, node.domain or "", opset)
    values = dict(defaults)
    for name, held in node.attrs.items():
        value = given.get(held.name, defaults.get(name)) if isinstance(held, gs.Node.AttributeRef) else held
        if value is not None and not isinstance(value, gs.Graph):
            values[name] = _plain(node, name, value)
    out = {name: value for name, value in extras.items() if name in known}
    for name, value in values.items():
        if name in known:
            out[name] = value
        elif name not in _LEFT_OUT and value != defaults.get(name):
            raise ModelError(
                f"the bridge does not know attribute '{name}' of {node.op}",
                at=where(node),
                hint="graphopt optimize --stage canonical may remove it; otherwise please report it",
            )
    return out


@functools.cache
def parameters_of(function: Callable[..., Any]) -> frozenset[str]:
    """Return the names of the parameters that may be given by keyword."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # torch's own functions: the tables name those that take inputs alone
        return frozenset()
    return frozenset(n for n, p in parameters.items() if p.kind in kinds)


@functools.cache
def schema_of(op: str, domain: str, opset: int) -> Any:
    """Return the schema of an operator at an opset, None where ONNX has none."""
    domain = "" if domain in STANDARD_DOMAINS else domain
    try:
        return onnx.defs.get_schema(op, opset, domain)
    except onnx.defs.SchemaError:
        return None


@functools.cache
def _defaults(op: str, domain: str, opset: int) -> Mapping[str, Any]:
    schema = schema_of(op, domain, opset)
    attributes = schema.attributes.items() if schema is not None else ()
    held = {name: decode_attribute(a.default_value) for name, a in attributes if a.default_value.name}
    return {name: _hashed(name, value) for name, value in held.items()}


def _plain(node: gs.Node, name: str, value: Any) -> Any:
    """Return an attribute as `torch.fx` can write it into code: numbers, strings, tuples."""
    if isinstance(value, gs.Constant):
        array = array_of(value)
        if array is None or array.size != 1 or array.dtype.kind not in "biufV":
            raise ModelError(f"attribute '{name}' holds a tensor that is not one number", at=where(node))
        return array.reshape(-1)[0].item(), torch_kind(array.dtype)
    if isinstance(value, AttributeProto):
        raise ModelError(f"the bridge cannot read attribute '{name}' of {node.op}", at=where(node))
    return _hashed(name, value)


def _hashed(name: str, value: Any) -> Any:
    if name in _KINDS and isinstance(value, int):
        return _WIDER.get(value, value)
    return tuple(value) if isinstance(value, list) else value
