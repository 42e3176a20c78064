"""Patterns as algebra: what a rule's `pattern` function computes with, and what it leaves behind.

`trace` calls the function once with unbound captures; operators and `op.Name(...)` record `Call`s.  The same
classes are used when a match is rewritten: captures are bound to tensors then, and the recorded calls become
nodes.

    x + y, x - y, x * y, x / y, -x     the standard operators
    op.Clip(x, 0.0, 6.0, name="clip")  any other; `name` lets `check` and `rewrite` look at the node: m["clip"]
    op.Softmax(x, axis=-1)             attributes that must be so (a default counts); others may be anything
    op.any(p, q)                       one pattern or the other
    a, b = op.Split(x, outputs=2)      several outputs
    3.0                                a constant with one element, whatever its shape

Captures are the function's parameters (all but `op`); their annotation says what they take:

    Value            any tensor                     Constant         an initializer or Constant node
    Scalar           a constant of one element      Many             all further inputs of a node
    Value | None     an input that may be left out

Constants are on the right and `Sub` and `Div` by one are `Add` and `Mul` in canonical graphs; a number in a pattern
finds both spellings, a captured constant must be added or multiplied.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, TypeAlias, Union, get_args, get_origin

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import array_of
from graphopt.errors import SpecError, did_you_mean

if TYPE_CHECKING:
    from graphopt.analysis.shapes import Shapes, TensorType

Array = np.ndarray[Any, Any]
Operand: TypeAlias = "Value | float | int | Sequence[int] | Array | np.generic | None"


class Value:
    """A tensor of a pattern; in `check` and `rewrite`, the tensor that it matched.

    Args:
        name: the capture's name.
        tensor: what it is bound to.
        shapes: where its type is looked up.
        optional: whether an input left out matches, too.
    """

    def __init__(
        self, name: str = "", tensor: gs.Tensor | None = None, shapes: Shapes | None = None, *, optional: bool = False
    ) -> None:
        self.name = name
        self.optional = optional
        self._tensor = tensor
        self._shapes = shapes

    @property
    def tensor(self) -> gs.Tensor:
        """The tensor it is bound to."""
        if self._tensor is None:
            raise SpecError(f"'{self.name}' is a capture of a pattern, bound only in check and rewrite")
        return self._tensor

    @property
    def type(self) -> TensorType:
        """Type and shape, as far as they follow from the model's inputs."""
        tensor = self.tensor
        assert self._shapes is not None
        return self._shapes.proved(tensor)

    @property
    def shape(self) -> tuple[int | str | None, ...] | None:
        """Dimensions: numbers, symbols, None where unknown; None for an unknown rank."""
        return self.type.shape

    @property
    def rank(self) -> int | None:
        """Number of dimensions, None where unknown."""
        return self.type.rank

    @property
    def dtype(self) -> np.dtype[Any] | None:
        """Element type, None where unknown."""
        return self.type.dtype

    def __add__(self, other: Operand) -> Value:
        return call("Add", (self, other))

    def __radd__(self, other: Operand) -> Value:
        return call("Add", (other, self))

    def __sub__(self, other: Operand) -> Value:
        return call("Sub", (self, other))

    def __rsub__(self, other: Operand) -> Value:
        return call("Sub", (other, self))

    def __mul__(self, other: Operand) -> Value:
        return call("Mul", (self, other))

    def __rmul__(self, other: Operand) -> Value:
        return call("Mul", (other, self))

    def __truediv__(self, other: Operand) -> Value:
        return call("Div", (self, other))

    def __rtruediv__(self, other: Operand) -> Value:
        return call("Div", (other, self))

    def __pow__(self, other: Operand) -> Value:
        return call("Pow", (self, other))

    def __neg__(self) -> Value:
        return call("Neg", (self,))

    def __iter__(self) -> Iterator[Value]:
        raise SpecError(f"'{self.name}' is one value", hint="say how many outputs: a, b = op.Split(x, outputs=2)")


class Constant(Value):
    """A constant tensor."""

    @property
    def values(self) -> Array:
        """Its elements, read only."""
        found = array_of(self.tensor)
        assert found is not None
        return found

    @property
    def wide(self) -> Array:
        """Its elements as float64: what new weights are computed from, to be rounded once."""
        return self.values.astype(np.float64)

    @property
    def size(self) -> int:
        """Number of elements, without reading them."""
        return int(np.prod(self.type.static or (), dtype=np.int64))


class Scalar(Constant):
    """A constant of one element, whatever its rank."""

    @property
    def number(self) -> Any:
        """The element as a Python number."""
        return self.values.reshape(-1)[0].item()


class Many(Value):
    """All further inputs of a node; a tuple of `Value` when bound."""


class Number(Value):
    """A number that a constant must hold (integers exactly, others as far as the constant's type can say)."""

    def __init__(self, value: float | int) -> None:
        super().__init__(repr(value))
        self.value = value


class Literal(Value):
    """An array: a constant that must be equal in a pattern, a new constant in a rewriting."""

    def __init__(self, values: Array) -> None:
        super().__init__("literal")
        self.values = values


class Choice(Value):
    """One pattern or another."""

    def __init__(self, options: Sequence[Value]) -> None:
        super().__init__("any")
        self.options = tuple(options)


@dataclass(eq=False)
class Call:
    """An operator applied to values.

    Attributes:
        op: operator type.
        inputs: values in order, None where one is left out.
        attrs: attributes and parameters by name (in a pattern: those that must be so).
        domain: operator domain, empty for the standard one.
        name: how check and rewrite find the node.
        outputs: how many outputs are named.
    """

    op: str
    inputs: tuple[Value | None, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    domain: str = ""
    name: str = ""
    outputs: int = 1


class Result(Value):
    """One output of a call: the first, unless it was unpacked (`a, b = op.Split(x, outputs=2)`)."""

    def __init__(self, made_by: Call, index: int = 0) -> None:
        super().__init__(made_by.name or made_by.op)
        self.call = made_by
        self.index = index

    def __iter__(self) -> Iterator[Value]:
        return (Result(self.call, i) for i in range(self.call.outputs))


def as_value(thing: Operand) -> Value | None:
    """Return an operand as a value: numbers and arrays become constants.

    Raises:
        SpecError: it is something else.
    """
    if thing is None or isinstance(thing, Value):
        return thing
    if isinstance(thing, bool | int | float):
        return Number(thing)
    if isinstance(thing, np.ndarray | np.generic | list | tuple):
        return Literal(np.asarray(thing))
    raise SpecError(f"{thing!r} is not an operand", hint="tensors, numbers, lists of numbers and arrays are")


def call(op: str, inputs: Sequence[Operand], **attrs: Any) -> Value:
    """Return the one output of a standard operator."""
    return Result(Call(op, tuple(as_value(i) for i in inputs), attrs))


class Op:
    """Any operator by its name: `op.Conv(x, w, b, strides=[2, 2])`."""

    def __getattr__(self, op: str) -> Callable[..., Value]:
        if op.startswith("_"):
            raise AttributeError(op)

        def record(*inputs: Operand, name: str = "", outputs: int = 1, domain: str = "", **attrs: Any) -> Value:
            if not domain and not onnx.defs.has(op):
                known = {s.name for s in onnx.defs.get_all_schemas() if not s.domain}
                raise SpecError(
                    f"ONNX has no operator '{op}'", hint=did_you_mean(op, known) or "name its domain: domain='…'"
                )
            return Result(Call(op, tuple(as_value(i) for i in inputs), attrs, domain, name, outputs))

        return record

    def any(self, *options: Operand) -> Value:
        """Return a pattern that matches where one of `options` does; the first that does is taken."""
        return Choice([v for o in options if (v := as_value(o)) is not None])


@dataclass(frozen=True)
class Pattern:
    """A traced pattern.

    Attributes:
        captures: the unbound captures by name.
        outputs: what the pattern computes; the first one is where matching starts.
    """

    captures: dict[str, Value]
    outputs: tuple[Value, ...]

    def depth(self) -> int:
        """Return the number of nodes on the longest path."""
        return max(_depth(v) for v in self.outputs)

    def needs(self) -> frozenset[str]:
        """Return the operators that every match has."""
        return frozenset().union(*map(_needs, self.outputs))


def trace(function: Callable[..., Any]) -> Pattern:
    """Call a pattern function with unbound captures and return what it computes.

    Raises:
        SpecError: a parameter's annotation is none of the captures', or the pattern is no operator.
    """
    parameters = list(inspect.signature(function, eval_str=True).parameters.values())
    captures = {p.name: _capture(p, function) for p in parameters if p.name != "op"}
    made = function(**captures, **({"op": Op()} if len(captures) < len(parameters) else {}))
    outputs = made if isinstance(made, tuple) else (made,)
    if not outputs or not all(isinstance(v, Result | Choice) for v in outputs):
        raise SpecError(f"the pattern computes {made!r}, not the output of an operator", at=function.__qualname__)
    seen: dict[int, Value] = {}
    return Pattern(captures, tuple(_spelled(v, seen, function) for v in outputs))


def _capture(parameter: inspect.Parameter, function: Callable[..., Any]) -> Value:
    kind, optional = parameter.annotation, False
    if get_origin(kind) in (Union, UnionType):
        members = get_args(kind)
        optional = NoneType in members
        kind = next((m for m in members if m is not NoneType), None)
    if kind is inspect.Parameter.empty:
        kind = Value
    if not (isinstance(kind, type) and kind in (Value, Constant, Scalar, Many)):
        raise SpecError(
            f"'{parameter.name}' is annotated {parameter.annotation!r}",
            at=function.__qualname__,
            hint="captures are Value, Constant, Scalar or Many, optional ones `| None`",
        )
    captured: Value = kind(parameter.name, optional=optional)
    return captured


def _spelled(value: Value, seen: dict[int, Value], function: Callable[..., Any]) -> Value:
    """Return the value with every spelling that canonical graphs have: x - 3 as x + (-3) too, x / 3 as x * (1/3)."""
    if id(value) in seen:
        return seen[id(value)]
    made = value
    if isinstance(value, Choice):
        made = Choice([_spelled(v, seen, function) for v in value.options])
    elif isinstance(value, Result):
        if id(value.call) not in seen:  # changed in place, once: all results of a call stay results of it
            seen[id(value.call)] = value
            given = value.call.inputs
            value.call.inputs = tuple(None if v is None else _spelled(v, seen, function) for v in given)
        made = _other_spelling(value, function)
    seen[id(value)] = made
    return made


def _other_spelling(value: Result, function: Callable[..., Any]) -> Value:
    made = value.call
    if made.op not in ("Sub", "Div") or made.domain or len(made.inputs) != 2:
        return value
    left, right = made.inputs
    if isinstance(right, Constant):
        raise SpecError(
            f"the pattern has {made.op} by the constant '{right.name}'",
            at=function.__qualname__,
            hint="canonical graphs have Add and Mul there",
        )
    if not isinstance(right, Number) or right.value == 0:
        return value
    other = ("Add", -right.value) if made.op == "Sub" else ("Mul", 1.0 / right.value)
    second = Call(other[0], (left, Number(other[1])), dict(made.attrs), "", made.name)
    return Choice([value, Result(second)])


def _needs(value: Value | None) -> frozenset[str]:
    if isinstance(value, Choice):
        return frozenset.intersection(*map(_needs, value.options))
    if isinstance(value, Result):
        return frozenset({value.call.op}).union(*map(_needs, value.call.inputs))
    return frozenset()


def _depth(value: Value | None) -> int:
    if isinstance(value, Choice):
        return max(_depth(v) for v in value.options)
    if isinstance(value, Result):
        return 1 + max((_depth(v) for v in value.call.inputs), default=0)
    return 0
