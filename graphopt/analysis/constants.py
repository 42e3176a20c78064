"""Which tensors are constant and what they hold, whichever way the model spells it.

A constant is an initializer or the output of a Constant node (function bodies have nothing else).  A parameter
is an attribute in old operator sets and an input in newer ones; `parameter` reads both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.ops import MOVED_TO_INPUT, NONDETERMINISTIC, is_standard
from graphopt.tensors import LazySparse

Array = np.ndarray[Any, Any]


class Unknown:
    """The type of `DYNAMIC`."""

    def __repr__(self) -> str:
        return "DYNAMIC"


DYNAMIC: Final = Unknown()
"""A parameter that is only known when the model runs."""

_SPELLINGS: Mapping[str, Callable[[Any], Array]] = {
    "value_float": lambda v: np.array(v, np.float32),
    "value_floats": lambda v: np.array(v, np.float32).reshape(-1),
    "value_int": lambda v: np.array(v, np.int64),
    "value_ints": lambda v: np.array(v, np.int64).reshape(-1),
    "value_string": lambda v: np.array(v, object),
    "value_strings": lambda v: np.array(v, object).reshape(-1),
}


def is_constant(tensor: gs.Tensor) -> bool:
    """Tell whether a tensor is an initializer or made by a Constant node."""
    return isinstance(tensor, gs.Constant) or constant_node(tensor) is not None


def constant_node(tensor: gs.Tensor) -> gs.Node | None:
    """Return the Constant node that makes a tensor, if one does."""
    if len(tensor.inputs) == 1 and is_standard(tensor.inputs[0], "Constant"):
        return tensor.inputs[0]
    return None


def node_values(node: gs.Node) -> Any:
    """Return what a Constant node holds: an array, lazy values (sparse ones too), None where it is an attribute's."""
    for name, value in node.attrs.items():
        if isinstance(value, gs.Constant):
            return value._values
        if name == "sparse_value" and isinstance(value, onnx.AttributeProto) and value.HasField("sparse_tensor"):
            return LazySparse(value.sparse_tensor)
        if name in _SPELLINGS and not isinstance(value, gs.Node.AttributeRef):
            return _SPELLINGS[name](value)
    return None


def array_of(tensor: gs.Tensor, limit: int | None = None) -> Array | None:
    """Return a constant's values, None for anything else or for more than `limit` elements."""
    if isinstance(tensor, gs.Constant):
        if limit is not None and int(np.prod(tensor.shape, dtype=np.int64)) > limit:
            return None
        return np.asarray(tensor.values)
    node = constant_node(tensor)
    values = None if node is None else node_values(node)
    if values is None or (limit is not None and int(np.prod(values.shape, dtype=np.int64)) > limit):
        return None
    return np.asarray(values if isinstance(values, np.ndarray) else values.load())


def scalar_of(tensor: gs.Tensor) -> Any:
    """Return the only element of a constant as a Python value, None for anything else."""
    values = array_of(tensor, limit=1)
    return values.reshape(-1)[0].item() if values is not None and values.size == 1 and values.dtype != object else None


def parameter(node: gs.Node, name: str, opset: int) -> Array | Unknown | None:
    """Return a parameter of a standard operator, attribute or input as the opset has it.

    Returns:
        Its values as an array; None where it is left out; `DYNAMIC` where it is computed, or refers to an
        attribute of the function around it.
    """
    since, index = MOVED_TO_INPUT.get((node.op, name), (1 << 30, 0))
    if opset < since:
        value = node.attrs.get(name)
        if isinstance(value, gs.Node.AttributeRef):
            return DYNAMIC
        return None if value is None else np.asarray(value)
    if index >= len(node.inputs) or node.inputs[index].is_empty():
        return None
    values = array_of(node.inputs[index])
    return DYNAMIC if values is None else values


def refers(node: gs.Node) -> bool:
    """Tell whether an attribute takes its value from the function around the node."""
    return any(isinstance(v, gs.Node.AttributeRef) for v in node.attrs.values())


def is_deterministic(node: gs.Node, opset: int) -> bool:
    """Tell whether a standard operator gives equal results for equal inputs, each time it runs."""
    if not is_standard(node) or node.op in NONDETERMINISTIC:
        return False
    return not is_standard(node, "Dropout") or not trains(node, opset)


def trains(node: gs.Node, opset: int) -> bool:
    """Tell whether a Dropout may drop anything."""
    if opset < 7:
        return not node.attrs.get("is_test", 0)
    mode = parameter(node, "training_mode", opset) if opset >= 12 else None
    return mode is not None and (isinstance(mode, Unknown) or bool(mode.reshape(-1)[0]))
