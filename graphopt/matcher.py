"""Finds a pattern in a graph: from a node backwards along its inputs, then forward to further outputs.

What a match binds: every call of the pattern to a node of its own, every capture to a tensor.  Nodes that match must
stand in the graph at hand; captures may come from outer graphs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import Unknown, array_of, is_constant, parameter, refers, scalar_of
from graphopt.analysis.shapes import Shapes
from graphopt.edit import Edit
from graphopt.ops import COMMUTATIVE, MOVED_TO_INPUT, STANDARD_DOMAINS
from graphopt.pattern import (
    Call,
    Choice,
    Constant,
    Literal,
    Many,
    Number,
    Operand,
    Pattern,
    Result,
    Scalar,
    Value,
    as_value,
)
from graphopt.tensors import is_float

if TYPE_CHECKING:
    from graphopt.analysis.shapes import Shapes

_PARAMETERS = frozenset((op, place) for (op, _), (_, place) in MOVED_TO_INPUT.items())
"""Operators with the inputs that were attributes in older opsets."""

_LITERAL = 4096
"""Elements of constants that are compared by value."""

_CLOSE = 1e-6
"""Numbers in attributes are equal to this part: files have them in single precision."""


@dataclass
class Bindings:
    """What stands for what so far."""

    nodes: dict[int, tuple[Call, gs.Node]] = field(default_factory=dict)
    tensors: dict[str, Any] = field(default_factory=dict)

    def copy(self) -> Bindings:
        """Return bindings that can grow on their own."""
        return Bindings(dict(self.nodes), dict(self.tensors))


Goal = tuple["Value | None", "gs.Tensor | None"]


class Matcher:
    """Matches patterns in one graph.

    Args:
        edit: the edits of the graph under way.
    """

    def __init__(self, edit: Edit) -> None:
        self.edit = edit
        self.opset = int(edit.graph.opset)

    def matches(self, pattern: Pattern, node: gs.Node) -> Iterator[Bindings]:
        """Yield every way in which the pattern's first output is an output of `node`."""
        for start in results_of(pattern.outputs[0]):
            if start.call.op != node.op or start.index >= len(node.outputs):
                continue
            found = self._solve([(start, node.outputs[start.index])], Bindings())
            for further in pattern.outputs[1:]:
                found = self._further(found, further)
            yield from found

    def _further(self, found: Iterator[Bindings], output: Value) -> Iterator[Bindings]:
        """Extend matches by one more output, reached from what is bound already."""
        for bound in found:
            for start in results_of(output):
                if id(start.call) in bound.nodes:
                    node = bound.nodes[id(start.call)][1]
                    if start.index < len(node.outputs):
                        yield bound
                    continue
                for node in self._candidates(start, bound):
                    taken = {id(n) for _, n in bound.nodes.values()}
                    if id(node) not in taken and start.index < len(node.outputs):
                        yield from self._solve([(start, node.outputs[start.index])], bound.copy())

    def _candidates(self, value: Value | None, bound: Bindings) -> list[gs.Node]:
        """Return the nodes that may make `value`: readers of what is bound below it."""
        if not isinstance(value, Result):
            return []
        tensors: list[gs.Tensor] = []
        for given in value.call.inputs:
            if isinstance(given, Result) and id(given.call) in bound.nodes:
                tensors.append(bound.nodes[id(given.call)][1].outputs[given.index])
            elif isinstance(given, Result | Choice):
                for start in results_of(given):
                    tensors += [t for n in self._candidates(start, bound) for t in n.outputs]
            elif given is not None and isinstance(bound.tensors.get(given.name), gs.Variable):
                tensors.append(bound.tensors[given.name])
        found = {id(n): n for t in tensors for n in self.edit.consumers(t) if n.op == value.call.op}
        return list(found.values())

    def _solve(self, goals: Sequence[Goal], bound: Bindings) -> Iterator[Bindings]:
        """Yield the bindings under which every value of `goals` is its tensor."""
        if not goals:
            yield bound
            return
        (value, tensor), rest = goals[0], goals[1:]
        if isinstance(value, Choice):
            for option in value.options:
                if self._may_be(option, tensor):
                    yield from self._solve([(option, tensor), *rest], bound.copy())
        elif isinstance(value, Result):
            yield from self._call(value, tensor, rest, bound)
        elif self._leaf(value, tensor, bound):
            yield from self._solve(rest, bound)

    def _call(
        self, value: Result, tensor: gs.Tensor | None, rest: Sequence[Goal], bound: Bindings
    ) -> Iterator[Bindings]:
        if tensor is None or len(tensor.inputs) != 1:
            return
        node, wanted = tensor.inputs[0], value.call
        if node.op != wanted.op or not self._stands(node, wanted.domain):
            return
        if value.index >= len(node.outputs) or node.outputs[value.index] is not tensor:
            return
        if id(wanted) in bound.nodes:
            if bound.nodes[id(wanted)][1] is node:
                yield from self._solve(rest, bound)
            return
        if any(n is node for _, n in bound.nodes.values()):
            return
        likely = [p for p in self._pairs(node, wanted) if all(self._may_be(v, t) for v, t in p)]
        if not likely or not self._attributes(node, wanted):
            return
        for inputs in likely:
            grown = bound.copy()
            grown.nodes[id(wanted)] = wanted, node
            yield from self._solve([*inputs, *rest], grown)

    def _stands(self, node: gs.Node, domain: str) -> bool:
        """Tell whether a node is of the domain, in this graph, and to stay."""
        same = node.domain in STANDARD_DOMAINS if not domain else node.domain == domain
        return same and self.edit.is_local(node) and not self.edit.removed(node)

    def _may_be(self, value: Value | None, tensor: gs.Tensor | None) -> bool:
        """Tell quickly whether a value can be a tensor, before any binding is copied."""
        if isinstance(value, Result):
            return tensor is not None and len(tensor.inputs) == 1 and tensor.inputs[0].op == value.call.op
        if isinstance(value, Choice):
            return any(self._may_be(option, tensor) for option in value.options)
        if isinstance(value, Constant | Number | Literal):
            return (tensor is None and value.optional) or (tensor is not None and is_constant(tensor))
        return True

    def _pairs(self, node: gs.Node, wanted: Call) -> Iterator[list[Goal]]:
        """Yield the ways in which a node's inputs can be the pattern's."""
        given = [None if t.is_empty() else t for t in node.inputs]
        values = list(wanted.inputs)
        if values and isinstance(values[-1], Many):
            many, fixed = values.pop(), len(values)
            if len(given) >= fixed:
                yield [*zip(values, given[:fixed], strict=True), *((many, t) for t in given[fixed:])]
            return
        while len(given) < len(values):
            given.append(None)
        for i, left in enumerate(given[len(values) :], len(values)):
            if left is not None and not _is_parameter(node, i):
                return
        given = given[: len(values)]
        yield list(zip(values, given, strict=True))
        if len(values) == 2 and not wanted.domain and node.op in COMMUTATIVE:
            yield list(zip(values, reversed(given), strict=True))

    def _attributes(self, node: gs.Node, wanted: Call) -> bool:
        if refers(node):
            return False
        view = NodeView(node, self.opset)
        return all(_equal(view.param(name), value) for name, value in wanted.attrs.items())

    def _leaf(self, value: Value | None, tensor: gs.Tensor | None, bound: Bindings) -> bool:
        """Bind a capture, or compare a number; tell whether that goes."""
        if value is None or tensor is None:
            if value is None:
                return tensor is None
            return value.optional and bound.tensors.setdefault(value.name, None) is None
        if isinstance(value, Number):
            return is_number(tensor, value.value)
        if isinstance(value, Literal):
            held = array_of(tensor, limit=_LITERAL)
            return held is not None and held.shape == value.values.shape and bool((held == value.values).all())
        if isinstance(value, Many):
            bound.tensors[value.name] = (*bound.tensors.get(value.name, ()), tensor)
            return True
        if isinstance(value, Constant) and not _is_capturable(value, tensor):
            return False
        if value.name not in bound.tensors:
            bound.tensors[value.name] = tensor
            return True
        return _same(bound.tensors[value.name], tensor)


@dataclass(frozen=True)
class NodeView:
    """A matched node, as check and rewrite see it."""

    node: gs.Node
    opset: int
    shapes: Shapes | None = None

    @property
    def attrs(self) -> dict[str, Any]:
        """The attributes that the node states."""
        return dict(self.node.attrs)

    def param(self, name: str) -> Any:
        """Return an attribute or parameter input as the opset has it, or its default: numbers, lists, arrays.

        None where there is none; `DYNAMIC` (of `graphopt.analysis.constants`) where it is computed.
        """
        if (self.node.op, name) in MOVED_TO_INPUT:
            found = parameter(self.node, name, self.opset)
            if found is not None:
                return found
        if name in self.node.attrs:
            return self.node.attrs[name]
        return _default(self.node, name, self.opset)

    def again(self, *inputs: Operand) -> Value:
        """Return the same operator with the same attributes and parameters, on other inputs."""
        values = [as_value(i) for i in inputs]
        values += [None if t.is_empty() else Value(t.name, t, self.shapes) for t in self.node.inputs[len(values) :]]
        domain = "" if self.node.domain in STANDARD_DOMAINS else self.node.domain
        return Result(Call(self.node.op, tuple(values), dict(self.node.attrs), domain, "", len(self.node.outputs)))


def results_of(value: Value) -> list[Result]:
    """Return the results that a value may be."""
    if isinstance(value, Choice):
        return [found for option in value.options for found in results_of(option)]
    return [value] if isinstance(value, Result) else []


def _is_parameter(node: gs.Node, index: int) -> bool:
    return (node.op, index) in _PARAMETERS


def _default(node: gs.Node, name: str, opset: int) -> Any:
    try:
        schema = onnx.defs.get_schema(node.op, opset, "")
    except onnx.defs.SchemaError:
        return None
    attribute = schema.attributes.get(name)
    if attribute is None or not attribute.default_value.name:
        return None
    return onnx.helper.get_attribute_value(attribute.default_value)


def _equal(found: Any, wanted: Any) -> bool:
    if found is None or wanted is None or isinstance(found, Unknown):
        return found is wanted
    if isinstance(found, bytes):
        found = found.decode("utf-8", "replace")
    if isinstance(wanted, str) or isinstance(found, str):
        return bool(found == wanted)
    if not (isinstance(found, int | float) and isinstance(wanted, int | float)):
        left, right = np.asarray(found), np.asarray(wanted)
        if left.size != right.size:
            return False
        if left.size != 1:
            return _equal_arrays(left, right)
        found, wanted = left.item(), right.item()
    return math.isclose(found, wanted, rel_tol=_CLOSE)  # infinity is close to itself only


def _equal_arrays(left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> bool:
    return left.shape == right.shape and bool(np.allclose(left, right, rtol=_CLOSE, atol=0))


def is_number(tensor: gs.Tensor, number: float | int) -> bool:
    """Tell whether a tensor is a constant that holds one number, as exactly as its type can."""
    found = scalar_of(tensor)
    if found is None or isinstance(found, str | bytes):
        return False
    if not is_float(np.dtype(tensor.dtype if tensor.dtype is not None else type(found))):
        return bool(found == number)
    if not np.isfinite(number):
        return bool(found == number)
    width = np.dtype(tensor.dtype).itemsize if tensor.dtype is not None else 4
    return bool(abs(found - number) <= (4e-3 if width < 4 else 1e-6) * abs(number))


def _is_capturable(value: Constant, tensor: gs.Tensor) -> bool:
    if not is_constant(tensor):
        return False
    return not isinstance(value, Scalar) or scalar_of(tensor) is not None


def _same(a: Any, b: gs.Tensor) -> bool:
    """Tell whether a capture used twice is one tensor, or two equal small constants."""
    if a is b:
        return True
    if a is None or not (is_constant(a) and is_constant(b)):
        return False
    left, right = array_of(a, limit=_LITERAL), array_of(b, limit=_LITERAL)
    return (
        left is not None
        and right is not None
        and left.shape == right.shape
        and left.dtype == right.dtype
        and bool((left == right).all())
    )
