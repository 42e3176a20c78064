"""Random graphs through the passes: valid, equal, at a fixpoint; and each change can be left out on its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from graphopt.model import load
from graphopt.optimizer import CLEANUP
from graphopt.pipeline import Pipeline, Result, Settings
from graphopt.registry import all_passes
from graphopt.runtime import Session
from graphopt.text import to_text

TOLERANCE = 1e-5
"""Relative to the largest element: what the passes promise (each folds or reorders a few float32 roundings)."""

CHANNELS = 4

BUILT_IN = sorted(
    n for n, cls in all_passes().items() if cls.__module__.startswith("graphopt.passes") and cls.exactness == "exact"
)
"""Other tests register passes of their own; lossy ones have tests of their own."""


@dataclass
class Builder:
    """Grows a graph over tensors of shape [N, 4, 4, 4] from random choices."""

    rng: np.random.Generator
    opset: int
    batch: int | str
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)
    values: list[str] = field(default_factory=lambda: ["x"])
    count: int = 0

    def name(self, base: str = "t") -> str:
        self.count += 1
        return f"{base}{self.count}"

    def pick(self) -> str:
        """Return a tensor, rather a late one."""
        return self.values[-1 - int(self.rng.integers(0, min(3, len(self.values))))]

    def const(self, values: Any, dtype: Any = np.float32) -> str:
        array = np.asarray(values, dtype)
        name = self.name("c")
        if self.rng.random() < 0.5:
            self.initializers.append(numpy_helper.from_array(array, name))
        else:
            self.nodes.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array)))
        return name

    def node(self, op: str, inputs: list[str], outputs: int = 1, **attrs: Any) -> str:
        names = [self.name() for _ in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, **attrs))
        return names[0]

    def vector(self) -> np.ndarray[Any, Any]:
        """Return a constant operand of some broadcastable shape, ones and zeros among them."""
        shape = [(), (1,), (4,), (4, 1, 1), (1, 4, 1, 1), (1, 1, 1, 1)][self.rng.integers(0, 6)]
        kind = self.rng.integers(0, 4)
        if kind == 0:
            return np.ones(shape, np.float32)
        return np.asarray(self.rng.uniform(0.5, 2.0, shape), np.float32)

    def model(self, outputs: list[str]) -> onnx.ModelProto:
        shape = [self.batch, CHANNELS, 4, 4]
        infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in outputs]
        graph = helper.make_graph(
            self.nodes, "random",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape),
             helper.make_tensor_value_info("flag", TensorProto.BOOL, [])],
            infos, self.initializers,
        )  # fmt: skip
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)


Step = Callable[[Builder, str], str]


def binary(op: str) -> Step:
    def step(b: Builder, x: str) -> str:
        c = b.const(b.vector())
        return b.node(op, [c, x] if op in ("Add", "Mul") and b.rng.random() < 0.5 else [x, c])

    return step


def zero_or_one(b: Builder, x: str) -> str:
    if b.rng.random() < 0.5:
        return b.node("Add", [x, b.const(np.zeros((4, 1, 1)))])
    return b.node("Pow", [b.node("Abs", [x]), b.const(1.0)])


def twice(b: Builder, x: str) -> str:
    left, right = b.node("Sigmoid", [x]), b.node("Sigmoid", [x])
    return b.node("Sum" if b.rng.random() < 0.5 else "Add", [left, right])


def conv(b: Builder, x: str) -> str:
    groups = int(b.rng.choice([1, 2, 4]))
    transpose = b.rng.random() < 0.3
    size = int(b.rng.choice([1, 3]))
    weight = b.rng.normal(size=(CHANNELS, CHANNELS // groups, size, size)) / (size * 2)
    inputs = [x, b.const(weight)]
    if b.rng.random() < 0.5:
        inputs.append(b.const(b.rng.normal(size=CHANNELS)))
    pads = [size // 2] * 4
    return b.node("ConvTranspose" if transpose else "Conv", inputs, group=groups, pads=pads)


def conv_norm(b: Builder, x: str) -> str:
    return norm(b, conv(b, x))


def norm(b: Builder, x: str) -> str:
    rng = b.rng
    mean, var = rng.normal(size=4), rng.uniform(0.5, 2, 4)
    return b.node(
        "BatchNormalization",
        [x, b.const(rng.uniform(0.5, 2, 4)), b.const(rng.normal(size=4)), b.const(mean), b.const(var)],
        epsilon=float(rng.choice([1e-5, 1e-2])),
    )


def there_and_back(b: Builder, x: str) -> str:
    axes = sorted(int(a) for a in b.rng.choice(6, 2, replace=False))
    if b.opset >= 13:
        a = b.const(axes, np.int64)
        return b.node("Squeeze", [b.node("Unsqueeze", [x, a]), a])
    return b.node("Squeeze", [b.node("Unsqueeze", [x], axes=axes)], axes=axes)


def reshape(b: Builder, x: str) -> str:
    shape = [[0, 4, 4, -1], [0, 4, 4, 4], [-1, 4, 4, 4], [0, 0, -1, 4]][b.rng.integers(0, 4)]
    return b.node("Reshape", [x, b.const(shape, np.int64)])


def reshape_by_shape(b: Builder, x: str) -> str:
    shape = b.node("Shape", [x])
    first = b.node("Gather", [shape, b.const([0], np.int64)], axis=0)
    rest = b.const([4, 16], np.int64)
    target = b.node("Concat", [first, rest], axis=0)
    flat = b.node("Reshape", [x, target])
    return b.node("Reshape", [b.node("Tanh", [flat]), shape])


def movement(b: Builder, x: str) -> str:
    kind = b.rng.integers(0, 6)
    if kind == 0:
        return b.node("Transpose", [x], perm=[0, 1, 2, 3] if b.rng.random() < 0.5 else [0, 1, 3, 2])
    if kind == 1:
        return b.node("Concat", [x], axis=1)
    if kind == 2:
        return b.node("Slice", [x, b.const([0], np.int64), b.const([1 << 40], np.int64), b.const([1], np.int64)])
    if kind == 3:
        return b.node("Pad", [x, b.const([0] * 8, np.int64)])
    if kind == 4:
        return b.node("Expand", [x, b.const([1, 1, 1, 1], np.int64)])
    return b.node("Flatten", [b.node("Flatten", [x], axis=1)], axis=1) and b.node("Cast", [x], to=TensorProto.FLOAT)


def computed_constant(b: Builder, x: str) -> str:
    c = b.node("Transpose", [b.const(b.rng.normal(size=(1, 4)))], perm=[1, 0])
    c = b.node("Reshape", [b.node("Mul", [c, b.const(0.5)]), b.const([4, 1, 1], np.int64)])
    return b.node("Mul", [x, c])


def branch(b: Builder, x: str) -> str:
    kind = b.rng.integers(0, 3)
    condition = "flag" if kind == 0 else b.const(bool(kind == 1), np.bool_)
    names = b.name("p"), b.name("q")
    c = numpy_helper.from_array(b.vector(), b.name("k"))
    yes = helper.make_graph(
        [helper.make_node("Sub", [x, c.name], [names[0]])], "yes", [],
        [helper.make_tensor_value_info(names[0], TensorProto.FLOAT, None)], [c],
    )  # fmt: skip
    no = helper.make_graph(
        [helper.make_node("Identity", [x], [names[1]])], "no", [],
        [helper.make_tensor_value_info(names[1], TensorProto.FLOAT, None)],
    )  # fmt: skip
    return b.node("If", [condition], then_branch=yes, else_branch=no)


def dead(b: Builder, x: str) -> str:
    b.node("Exp", [b.node("Neg", [x])])
    return x


STEPS: list[Step] = [
    binary("Add"), binary("Sub"), binary("Mul"), binary("Div"), zero_or_one, twice, conv_norm, conv_norm, norm,
    conv, there_and_back, reshape, reshape_by_shape, movement, movement, computed_constant, branch, branch, dead,
    lambda b, x: b.node("Relu", [x]),
    lambda b, x: b.node("Identity", [x]),
    lambda b, x: b.node("Dropout", [x], outputs=int(b.rng.integers(1, 3))),
    lambda b, x: b.node("Add", [x, b.pick()]),
    lambda b, x: b.node("Where", [b.const(True, np.bool_), x, b.const(1.0)]),
]  # fmt: skip


def build(seed: int, steps: list[int], opset: int, dynamic: bool) -> onnx.ModelProto:
    b = Builder(np.random.default_rng(seed), opset, "N" if dynamic else 2)
    for index in steps:
        b.values.append(STEPS[index](b, b.pick()))
    made = [v for v in dict.fromkeys(reversed(b.values)) if v != "x"]
    outputs = made[:1] + [v for v in made[1:] if b.rng.random() < 0.15]
    if not outputs:
        outputs = [b.node("Identity", ["x"])]
    return b.model(outputs)


models = st.builds(
    build,
    seed=st.integers(0, 1 << 32),
    steps=st.lists(st.integers(0, len(STEPS) - 1), min_size=1, max_size=14),
    opset=st.sampled_from([11, 13, 17, 21]),
    dynamic=st.booleans(),
)


def run(pipeline: str, model: onnx.ModelProto, limit: int | None = None) -> Result:
    return Pipeline(pipeline).run(model, settings=Settings(verify="off", on_failure="stop", limit=limit))


def assert_equal(before: onnx.ModelProto, after: onnx.ModelProto, *, dynamic: bool) -> None:
    a, b = (Session(m, optimization="off") for m in (before, after))
    rng = np.random.default_rng(0)
    for size in (2, 3) if dynamic else (2,):
        x = np.asarray(rng.normal(size=(size, CHANNELS, 4, 4)), np.float32)
        for flag in (True, False):
            feeds = {"x": x, "flag": np.array(flag)}
            for (name, wanted), found in zip(a.run(feeds).items(), b.run(feeds).values(), strict=True):
                assert wanted.shape == found.shape, name
                largest = float(np.abs(wanted).max(initial=1e-30))
                assert float(np.abs(wanted - found).max(initial=0.0)) <= TOLERANCE * largest, name


def is_dynamic(model: onnx.ModelProto) -> bool:
    return bool(model.graph.input[0].type.tensor_type.shape.dim[0].HasField("dim_param"))


@settings(max_examples=120)
@given(models)
def test_all_passes_together(model: onnx.ModelProto) -> None:
    result = run(f"repeat({CLEANUP})", model)
    onnx.checker.check_model(result.proto, full_check=True)
    assert_equal(model, result.proto, dynamic=is_dynamic(model))
    again = run(f"repeat({CLEANUP})", result.proto)
    assert to_text(again.model) == to_text(load(result.proto))


@settings(max_examples=80)
@given(models, st.lists(st.sampled_from(BUILT_IN), min_size=1, max_size=4))
def test_passes_in_any_order(model: onnx.ModelProto, names: list[str]) -> None:
    result = run(", ".join(names), model)
    onnx.checker.check_model(result.proto, full_check=True)
    assert_equal(model, result.proto, dynamic=is_dynamic(model))
    once = run(names[-1], result.proto)
    assert once.report.passes[0].status != "changed", "a second run changes something"


@settings(max_examples=60)
@given(models, st.data())
def test_changes_can_be_left_out(model: onnx.ModelProto, data: st.DataObject) -> None:
    total = sum(r.changes for r in run(CLEANUP, model).report.passes)
    limit = data.draw(st.integers(0, max(total, 1)))
    result = run(CLEANUP, model, limit=limit)
    onnx.checker.check_model(result.proto, full_check=True)
    assert_equal(model, result.proto, dynamic=is_dynamic(model))


@settings(max_examples=60)
@given(models, st.floats(0.0, 0.5))
def test_folding_keeps_to_its_growth(model: onnx.ModelProto, max_growth: float) -> None:
    result = run(f"fold-constants{{max_growth={max_growth:.3f}}}", model)
    assert len(result.proto.SerializeToString()) <= len(model.SerializeToString()) * (1 + max_growth) + 1


@pytest.mark.parametrize("divisor", [4.0, 3.0])
def test_half_precision_division_only_by_powers_of_two(divisor: float) -> None:
    c = numpy_helper.from_array(np.array(divisor, np.float16), "c")
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT16, [3]) for n in "xy"]
    graph = helper.make_graph([helper.make_node("Div", ["x", "c"], ["y"])], "g", info[:1], info[1:], [c])
    result = run("canonicalize", helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    assert result.model.graph.nodes[0].op == ("Mul" if divisor == 4.0 else "Div")
    assert len(result.report.passes[0].blocked) == (divisor == 3.0)
