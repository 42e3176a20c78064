"""What is known of a tensor when only the types of the model's inputs are: `Fact`, and `Site`, what a rule sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import DYNAMIC, Unknown, array_of, parameter
from graphopt.analysis.symbolic_expr import Expr, Size
from graphopt.ops import MOVED_TO_INPUT

Array: TypeAlias = np.ndarray[Any, Any]

_FOLLOWED = frozenset(np.dtype(t) for t in (np.int32, np.int64, np.bool_, np.float32, np.float64))
"""Types that hold sizes, and what is computed of them, without wrapping around."""

MOST_VALUES = 256
"""Elements up to which the values of a tensor are followed."""

MOST_FLOATS = 16
"""The same for floats, which are only of use as scales."""


@dataclass(frozen=True, slots=True)
class Fact:
    """What is known of one tensor.

    Attributes:
        dtype: None where unknown.
        shape: a size per axis, None where not even the rank is known.
        values: of small tensors, an object array of the tensor's shape: a number, a bool, an `Expr`, or None for an
            element of which nothing is known.
    """

    dtype: np.dtype[Any] | None = None
    shape: tuple[Size, ...] | None = None
    values: Array | None = None

    @property
    def static(self) -> tuple[int, ...] | None:
        """The shape if every size is a number."""
        if self.shape is None or not all(isinstance(d, int) for d in self.shape):
            return None
        return tuple(int(d) for d in self.shape if isinstance(d, int))

    @property
    def known_values(self) -> Array | None:
        """The values if each is a number or a bool."""
        if self.values is None or any(v is None or isinstance(v, Expr) for v in self.values.flat):
            return None
        return self.values

    @property
    def follows_values(self) -> bool:
        """Whether the values of such a tensor are worth following."""
        shape = self.static
        if shape is None or self.dtype not in _FOLLOWED or self.dtype is None:
            return False
        return math.prod(shape) <= (MOST_FLOATS if self.dtype.kind == "f" else MOST_VALUES)


UNKNOWN = Fact()


def of_constant(constant: gs.Tensor) -> Fact:
    """Return what is known of an initializer or of a Constant node's output; large ones are not read."""
    if isinstance(constant, gs.Constant):
        dtype, shape = constant.dtype, tuple(int(d) for d in constant.shape)
        fact = Fact(None if dtype is None else np.dtype(dtype), shape)
        if not fact.follows_values:
            return fact
        found: Array | None = np.asarray(constant.values)
    else:
        found = array_of(constant)
        if found is None:
            return UNKNOWN
        fact = Fact(found.dtype, found.shape)
    if found is None or not fact.follows_values:
        return fact
    return Fact(found.dtype, fact.shape, objects(found))


def objects(values: Array) -> Array:
    """Return numbers as an array of Python's own."""
    found = np.empty(values.shape, object)
    found[...] = values.astype(object)
    return found


Shape: TypeAlias = tuple[Size, ...] | None


class Site:
    """One node and what is known of its inputs, for a rule that says what follows for its outputs.

    Args:
        node: a node of the standard domain.
        opset: of its graph.
        inputs: a fact per input, `UNKNOWN` for those left out.
        fresh: makes a new symbol.
    """

    __slots__ = ("_fresh", "inputs", "node", "opset")

    def __init__(self, node: gs.Node, opset: int, inputs: Sequence[Fact], fresh: Callable[[], Expr]) -> None:
        self.node = node
        self.opset = opset
        self.inputs = inputs
        self._fresh = fresh

    def has(self, index: int) -> bool:
        """Tell whether input `index` is given."""
        return index < len(self.node.inputs) and not self.node.inputs[index].is_empty()

    def fact(self, index: int = 0) -> Fact:
        """Return what is known of input `index`."""
        return self.inputs[index] if index < len(self.inputs) else UNKNOWN

    def shape(self, index: int = 0) -> Shape:
        """Return the shape of input `index`."""
        return self.fact(index).shape

    def attr(self, name: str, default: Any) -> Any:
        """Return an attribute."""
        return self.node.attrs.get(name, default)

    def fresh(self) -> Expr:
        """Return a size of which nothing is known."""
        return self._fresh()

    def unknown_shape(self, rank: int) -> tuple[Size, ...]:
        """Return a shape of which only the rank is known."""
        return tuple(self._fresh() for _ in range(rank))

    def values(self, name: str) -> Array | Unknown | None:
        """Return a parameter's values as objects: attribute or input, None where left out, `DYNAMIC` if unknown."""
        since, index = MOVED_TO_INPUT.get((self.node.op, name), (1 << 30, 0))
        if self.opset < since:
            found = parameter(self.node, name, self.opset)
            return objects(found) if isinstance(found, np.ndarray) else found
        if not self.has(index):
            return None
        known = self.fact(index).values
        return DYNAMIC if known is None else known

    def ints(self, name: str) -> list[int] | Unknown | None:
        """Return a parameter of integers, None where left out, `DYNAMIC` if not all are known numbers."""
        found = self.values(name)
        if found is None or isinstance(found, Unknown):
            return found
        if any(v is None or isinstance(v, Expr) for v in found.flat):
            return DYNAMIC
        return [int(v) for v in found.flat]
