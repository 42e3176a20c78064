"""Traces a rule's pattern into a small random model: see rule_cases.py for what is made of it.

Operands of commutative operators come in any order, patterns with several spellings in any, constants with any rank,
sizes as `Rule.shapes` says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from graphopt.ops import COMMUTATIVE, MOVED_TO_INPUT
from graphopt.pattern import Call, Choice, Constant, Many, Number, Result, Scalar, Value
from graphopt.pattern import Literal as Given
from graphopt.rewrite import Rule
from graphopt.rule_draws import PARAMETERS, SHAPES, SIZES, Shape, broadcast_to, some_shape
from graphopt.tensors import onnx_dtype

Array = np.ndarray[Any, Any]

OPSET = 17
"""Of the cases, or the rule's oldest where that is newer."""

_INDICES = {("Gather", 1), ("GatherElements", 1), ("GatherND", 1)}
"""Inputs that are indices."""

_POSITIVE = {("BatchNormalization", 4)}
"""Inputs that must be positive."""


class InvalidDrawError(Exception):
    """A draw that makes no valid model: draw again."""


@dataclass
class Draft:
    """A pattern traced into nodes, with everything by tensor name."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    inputs: dict[str, Array] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
    results: list[str] = field(default_factory=list)
    numbers: list[str] = field(default_factory=list)
    captured: list[str] = field(default_factory=list)
    opset: int = OPSET
    dynamic: bool = False

    def inner(self) -> list[str]:
        """Return the values between the pattern's nodes."""
        return [t for n in self.nodes for t in n.output if t not in (*self.outputs, *self.results)]

    def read_on(self) -> None:
        """Put a reader behind each output, so that a rule may put one of its captures there."""
        self.results, self.outputs = self.outputs, [f"{name}_read" for name in self.outputs]
        self.nodes += [
            helper.make_node("Identity", [old], [new], new) for old, new in zip(self.results, self.outputs, strict=True)
        ]


class Tracer:
    """Draws one model of a rule's pattern.

    Args:
        rule: the rule.
        rng: the source of all choices.
        dtype: element type of the floats.
        opset: operator set of the model.
    """

    def __init__(self, rule: type[Rule], rng: np.random.Generator, dtype: np.dtype[Any], opset: int) -> None:
        self.rule, self.rng, self.dtype = rule, rng, dtype
        self.draft = Draft(opset=opset)
        self.letters: dict[str, int] = {}
        self.names: dict[int, tuple[str, ...]] = {}
        self.known: dict[str, tuple[Any, Shape | None]] = {}
        self.chosen: dict[int, Value] = {}
        self.bound: dict[str, list[str]] = {}
        self.base = some_shape(rng)
        examples: Callable[..., dict[str, Any]] | None = getattr(rule, "examples", None)
        self.examples = examples(rng) if examples is not None else {}

    def run(self) -> Draft:
        """Return the traced model.

        Raises:
            InvalidDrawError: the draw fits no operator.
        """
        self.draft.outputs = [self._name(v) for v in self.rule.traced.outputs]
        return self.draft

    def _choose(self, value: Value) -> Value:
        while isinstance(value, Choice):
            if id(value) not in self.chosen:
                self.chosen[id(value)] = value.options[int(self.rng.integers(len(value.options)))]
            value = self.chosen[id(value)]
        return value

    def _name(self, value: Value) -> str:
        value = self._choose(value)
        assert isinstance(value, Result)
        if id(value.call) not in self.names:
            self.names[id(value.call)] = self._call(value.call)
        return self.names[id(value.call)][value.index]

    def _call(self, call: Call) -> tuple[str, ...]:
        """Add a node and return its outputs."""
        inputs: list[list[str]] = [[] for _ in call.inputs]
        late = [i for i, v in enumerate(call.inputs) if isinstance(v, Number | Given) or self._parameter(call.op, i)]
        order = [i for i in range(len(call.inputs)) if i not in late]
        order.sort(key=lambda i: not isinstance(self._choose(call.inputs[i] or Value()), Result))
        for i in order:
            inputs[i] = self._input(call, i, inputs, {})
        shapes = [self._shape(names[0]) for names in inputs if names and names[0]]
        drawn = self._drawn(call, shapes)
        for i in late:
            inputs[i] = self._input(call, i, inputs, drawn)
        flat = [name for names in inputs for name in names]
        if len(flat) == 2 and call.op in COMMUTATIVE and not call.domain and self.rng.random() < 0.5:
            flat.reverse()
        return self._emit(call, flat, drawn)

    def _drawn(self, call: Call, shapes: Sequence[Shape]) -> dict[str, Any]:
        maker = PARAMETERS.get(call.op)
        drawn = maker(self.rng, shapes, call.outputs) if maker and shapes else {}
        drawn.update(
            {k.split(".")[1]: v for k, v in self.examples.items() if k.startswith(f"{call.name}.") and call.name}
        )
        drawn.update(call.attrs)
        return drawn

    def _parameter(self, op: str, index: int) -> str | None:
        return next(
            (name for (o, name), (since, i) in MOVED_TO_INPUT.items()
             if o == op and i == index and self.draft.opset >= since),
            None,
        )  # fmt: skip

    def _input(self, call: Call, index: int, inputs: list[list[str]], drawn: dict[str, Any]) -> list[str]:
        value = call.inputs[index]
        if value is None:
            return [""]
        value = self._choose(value)
        if isinstance(value, Result):
            return [self._name(value)]
        if isinstance(value, Number | Given):
            return [self._literal(value, inputs)]
        if value.name not in self.bound:
            if value.optional and self.rng.random() < 0.3:
                self.bound[value.name] = [""]
            else:
                self.bound[value.name] = self._capture(value, call, index, inputs, drawn)
        drawn.pop(self._parameter(call.op, index) or "", None)
        return self.bound[value.name]

    def _literal(self, value: Number | Given, inputs: list[list[str]]) -> str:
        others = [self.known[n[0]] for n in inputs if n and n[0]]
        beside = next((known for known in others if known[0].kind != "b"), (self.dtype, ()))
        name = f"number{len(self.draft.constants)}"
        if isinstance(value, Given):
            wide = value.values.dtype == np.float64
            return self._constant(name, value.values.astype(beside[0]) if wide else value.values)
        rank = min(len(beside[1] or ()), 2)
        shape = (1,) * int(self.rng.integers(rank + 1))
        self.draft.numbers.append(name)
        return self._constant(name, np.full(shape, value.value, beside[0]))

    def _capture(
        self, value: Value, call: Call, index: int, inputs: list[list[str]], drawn: dict[str, Any]
    ) -> list[str]:
        given = self.examples.get(value.name)
        parameter = self._parameter(call.op, index)
        if isinstance(given, np.ndarray):
            array = given if given.dtype.kind in "iub" else given.astype(self.dtype)
        elif given is None and parameter in drawn:
            held = np.asarray(drawn[parameter])
            array = held.astype(np.int64 if held.dtype.kind in "iu" else self.dtype)
        else:
            shape = tuple(given) if given is not None else self._capture_shape(value, call, index, inputs)
            array = self._values(shape, call, index, inputs)
        count = int(self.rng.integers(1, 4)) if isinstance(value, Many) else 1
        return [
            self._add(f"{value.name}{i or ''}", value, array if i == 0 else self._like(array)) for i in range(count)
        ]

    def _add(self, name: str, value: Value, array: Array) -> str:
        if isinstance(value, Constant):
            self.draft.captured.append(name)
            return self._constant(name, array)
        self.draft.inputs[name] = array
        self.known[name] = array.dtype, tuple(array.shape)
        return name

    def _like(self, array: Array) -> Array:
        return array if array.dtype.kind in "iub" else np.asarray(self.rng.normal(size=array.shape)).astype(array.dtype)

    def _capture_shape(self, value: Value, call: Call, index: int, inputs: list[list[str]]) -> Shape:
        declared = self.rule.shapes.get(value.name)
        if declared is not None:
            return self._declared(declared)
        if isinstance(value, Scalar):
            return ((), (1,), (1, 1))[int(self.rng.integers(3))]
        known = [self._shape(n[0]) if n and n[0] else None for n in inputs[:index]]
        maker = SHAPES.get(call.op)
        if maker is not None:
            return maker(self.rng, known)
        beside = [self._shape(n[0]) for n in inputs if n and n[0]]
        if not beside:
            return self.base
        return (
            broadcast_to(self.rng, max(beside, key=len))
            if isinstance(value, Constant) or self.rng.random() < 0.4
            else beside[0]
        )

    def _declared(self, text: str) -> Shape:
        shape: list[int] = []
        for letter in text.split():
            if letter == "...":
                shape += [int(s) for s in self.rng.choice(SIZES, self.rng.integers(0, 3))]
            elif letter.isdigit():
                shape.append(int(letter))
            else:
                shape.append(self.letters.setdefault(letter, int(self.rng.choice((1, 2, 3, 4, 6)))))
        return tuple(shape)

    def _values(self, shape: Shape, call: Call, index: int, inputs: list[list[str]]) -> Array:
        if (call.op, index) in _INDICES:
            data = self._shape(inputs[0][0])
            size = min(data, default=1) if data else 1
            return self.rng.integers(0, max(size, 1), shape)
        values = np.asarray(self.rng.normal(size=shape) * self.rng.choice((0.5, 1.0, 3.0)))
        if (call.op, index) == ("Pow", 1):
            values = self.rng.choice((2.0, 3.0, 0.5, -1.0), shape)
        if (call.op, index) in _POSITIVE:
            values = np.abs(values) + 0.1
        return values.astype(self.dtype)

    def _constant(self, name: str, values: Array) -> str:
        self.draft.constants[name] = np.asarray(values)
        self.known[name] = values.dtype, tuple(values.shape)
        return name

    def _shape(self, name: str) -> Shape:
        shape = self.known[name][1]
        if shape is None:
            raise InvalidDrawError(name)
        return shape

    def _emit(self, call: Call, inputs: list[str], drawn: Mapping[str, Any]) -> tuple[str, ...]:
        attrs: dict[str, Any] = {}
        for name, value in drawn.items():
            since, place = MOVED_TO_INPUT.get((call.op, name), (1 << 30, 0))
            if self.draft.opset < since:
                attrs[name] = value.tolist() if isinstance(value, np.ndarray) else value
            elif value is not None and not (place < len(inputs) and inputs[place]):
                inputs += [""] * (place + 1 - len(inputs))
                held = np.asarray(value)
                with np.errstate(over="ignore"):
                    held = held.astype(np.int64 if held.dtype.kind in "iu" else self.known[inputs[0]][0])
                inputs[place] = self._constant(f"{name}{len(self.draft.constants)}", held)
        number = len(self.draft.nodes)
        outputs = tuple(f"{call.op.lower()}{number}_{i}" for i in range(call.outputs))
        node = helper.make_node(call.op, inputs, outputs, f"{call.op}{number}", domain=call.domain, **attrs)
        self._infer(node)
        self.draft.nodes.append(node)
        return outputs

    def _infer(self, node: onnx.NodeProto) -> None:
        types = {
            n: helper.make_tensor_type_proto(onnx_dtype(np.dtype(self.known[n][0])), self.known[n][1])
            for n in node.input
            if n
        }
        data = {n: numpy_helper.from_array(self.draft.constants[n], n) for n in node.input if n in self.draft.constants}
        try:
            schema = onnx.defs.get_schema(node.op_type, self.draft.opset, node.domain)
            found = onnx.shape_inference.infer_node_outputs(
                schema, node, types, data, opset_imports=[helper.make_opsetid("", self.draft.opset)]
            )
        except Exception as error:  # onnx raises several kinds for operators that do not fit
            raise InvalidDrawError(str(error)) from error
        for name in node.output:
            kind = found[name].tensor_type if name in found else None
            if kind is None or not kind.elem_type:
                raise InvalidDrawError(name)
            dims = tuple(d.dim_value for d in kind.shape.dim) if kind.HasField("shape") else None
            if dims is not None and (0 in dims or any(d > 4096 for d in dims)):
                dims = None
            self.known[name] = helper.tensor_dtype_to_np_dtype(kind.elem_type), dims


def draw(rule: type[Rule], rng: np.random.Generator) -> Draft | None:
    """Return a random model of a rule's pattern, None where the draw came to nothing."""
    floats = [t for t in ("float32", "float32", "float32", "float64", "float16") if not rule.types or t in rule.types]
    kind = str(rng.choice(floats or sorted(rule.types or {"float32"})))
    opset = max(OPSET, rule.min_opset)
    if rule.max_opset is not None:
        opset = min(opset, rule.max_opset)
    try:
        draft = Tracer(rule, rng, np.dtype(kind), opset).run()
    except (InvalidDrawError, ValueError, IndexError):
        return None
    draft.dynamic = bool(rng.random() < 0.3)
    if rng.random() < 0.5:
        draft.read_on()
    return draft
