"""Random graphs of scales and shifts among the operators they go into and through: equal before and after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from graphopt.model import load
from graphopt.pipeline import Pipeline, Settings
from graphopt.runtime import Session
from graphopt.text import to_text

TOLERANCE = 2e-5
"""Relative to the largest element: up to 14 operators deep, each rounds a few times in float32 (6e-8 each), and
random scales and shifts make sums cancel."""

CHANNELS = 4
Array = np.ndarray[Any, Any]


@dataclass
class Graph:
    """Grows over tensors [N, 4, H, W]; every step keeps the channels."""

    rng: np.random.Generator
    opset: int
    dynamic: bool
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)
    values: list[str] = field(default_factory=lambda: ["x"])
    count: int = 0

    def name(self, base: str = "t") -> str:
        self.count += 1
        return f"{base}{self.count}"

    def pick(self) -> str:
        return self.values[-1 - int(self.rng.integers(0, min(3, len(self.values))))]

    def const(self, values: Any, dtype: Any = np.float32) -> str:
        name = self.name("c")
        self.initializers.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def node(self, op: str, inputs: list[str], **attrs: Any) -> str:
        name = self.name()
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"{op}_{name}", **attrs))
        return name

    def nodes_of(self, op: str, inputs: list[str], count: int, **attrs: Any) -> list[str]:
        names = [self.name() for _ in range(count)]
        self.nodes.append(helper.make_node(op, inputs, names, name=f"{op}_{names[0]}", **attrs))
        return names

    def numbers(self) -> Array:
        """Return a constant operand: any broadcastable shape; negative and zero numbers among them."""
        shape = [(), (1,), (1, 1), (4, 1, 1), (1, 4, 1, 1), (1, 1, 1, 1)][self.rng.integers(0, 6)]
        kind = self.rng.integers(0, 8)
        if kind == 0:
            return np.asarray(self.rng.choice([0.0, 1.0, -1.0, 0.5]) * np.ones(shape))
        low = -1.5 if kind == 1 else 0.4
        return np.asarray(self.rng.uniform(low, 1.5, shape))

    def model(self, outputs: list[str]) -> onnx.ModelProto:
        shape: list[int | str] = ["N", CHANNELS, "H", "W"] if self.dynamic else [2, CHANNELS, 6, 6]
        graph = helper.make_graph(
            self.nodes, "random", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None, CHANNELS, None, None]) for n in outputs],
            self.initializers,
        )  # fmt: skip
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)


Step = Callable[[Graph, str], str]


def affine(g: Graph, x: str) -> str:
    op = str(g.rng.choice(["Mul", "Mul", "Add", "Sub", "Div", "Neg"]))
    if op == "Neg":
        return g.node("Neg", [x])
    values = g.numbers()
    if op == "Div":
        values = np.where(np.abs(values) < 0.3, 0.7, values)
    c = g.const(values)
    flipped = op in ("Mul", "Add", "Sub") and g.rng.random() < 0.3
    return g.node(op, [c, x] if flipped else [x, c])


def affines(g: Graph, x: str) -> str:
    for _ in range(int(g.rng.integers(1, 4))):
        x = affine(g, x)
    return x


def norm(g: Graph, x: str) -> str:
    parts = [g.rng.uniform(0.5, 2, 4), g.rng.normal(size=4), g.rng.normal(size=4), g.rng.uniform(0.5, 2, 4)]
    return g.node("BatchNormalization", [x, *map(g.const, parts)], epsilon=1e-3)


def conv(g: Graph, x: str) -> str:
    groups, size = int(g.rng.choice([1, 2, 4])), int(g.rng.choice([1, 3]))
    pad = size // 2 if g.rng.random() < 0.7 else 0
    transposed = g.rng.random() < 0.3
    weight = g.rng.normal(size=(CHANNELS, CHANNELS // groups, size, size)) / size**2
    inputs = [x, g.const(weight), *([g.const(g.rng.normal(size=CHANNELS))] if g.rng.random() < 0.5 else [])]
    if pad == 0 and size == 3:  # keep room for more
        x = inputs[0] = g.node("Pad", [x, g.const([0, 0, 1, 1, 0, 0, 1, 1], np.int64)], mode="edge")
        transposed = False
    if transposed:
        return g.node("ConvTranspose", inputs, group=groups, pads=[size // 2] * 4)
    return g.node("Conv", inputs, group=groups, pads=[pad] * 4)


def shared_conv(g: Graph, x: str) -> str:
    weight = g.const(g.rng.normal(size=(CHANNELS, CHANNELS, 1, 1)))
    other = affine(g, g.node("Sigmoid", [x]))  # not of x alone: conv(x + c) - conv(x) is nothing but roundings
    left, right = g.node("Conv", [other, weight]), g.node("Conv", [x, weight])
    return g.node("Add", [affine(g, left), right])


def matmul(g: Graph, x: str) -> str:
    """Over the channels, moved to the end and back."""
    x = g.node("Transpose", [x], perm=[0, 2, 3, 1])
    weight = g.rng.normal(size=(CHANNELS, CHANNELS)) / 2
    x = g.node("MatMul", [x, g.const(weight)])
    if g.rng.random() < 0.5:
        x = g.node("Add", [x, g.const(g.rng.normal(size=CHANNELS))])
    return g.node("Transpose", [x], perm=[0, 3, 1, 2])


def left_matmul(g: Graph, x: str) -> str:
    flat = g.node("Reshape", [x, g.const([0, 4, -1], np.int64)])
    flat = affine_of(g, flat, (4, 1))
    flat = g.node("MatMul", [g.const(g.rng.normal(size=(CHANNELS, CHANNELS)) / 2), flat])
    flat = affine_of(g, flat, (4, 1))
    return g.node("Reshape", [flat, g.node("Shape", [x])])


def affine_of(g: Graph, x: str, shape: tuple[int, ...]) -> str:
    return g.node(str(g.rng.choice(["Mul", "Add"])), [x, g.const(g.rng.uniform(0.5, 1.5, shape))])


def gemm(g: Graph, x: str) -> str:
    pooled = g.node("Flatten", [g.node("GlobalAveragePool", [x])], axis=1)
    pooled = affine_of(g, pooled, (4,))
    inputs = [pooled, g.const(g.rng.normal(size=(CHANNELS, CHANNELS)))]
    if g.rng.random() < 0.7:
        inputs.append(g.const(g.rng.normal(size=[(4,), (1, 4), (1,), (1, 1)][g.rng.integers(0, 4)])))
    flags = {"transB": int(g.rng.integers(0, 2)), "alpha": 0.5, "beta": 2.0}
    out = affine_of(g, g.node("Gemm", inputs, **flags), (1, 4))
    return g.node("Mul", [x, gate(g, g.node("Reshape", [out, g.const([0, 4, 1, 1], np.int64)]))])


def gate(g: Graph, s: str) -> str:
    if g.rng.random() < 0.5:
        s = affine_of(g, s, ())
    return g.node(str(g.rng.choice(["Sigmoid", "HardSigmoid", "Relu"])), [s])


def excite(g: Graph, x: str) -> str:
    """Squeeze and excite, with a residual now and then."""
    s = g.node("GlobalAveragePool", [x])
    s = gate(g, g.node("Conv", [s, g.const(g.rng.normal(size=(CHANNELS, CHANNELS, 1, 1)))]))
    product = g.node("Mul", [x, s] if g.rng.random() < 0.5 else [s, x])
    return g.node("Add", [x, product] if g.rng.random() < 0.5 else [product, x])


def activation(g: Graph, x: str) -> str:
    op = str(g.rng.choice(["Relu", "LeakyRelu", "Sigmoid", "HardSigmoid", "Clip", "PRelu"]))
    if op == "Clip":
        return g.node("Clip", [x, g.const(-0.5), g.const(1.5)])
    if op == "PRelu":
        return g.node("PRelu", [x, g.const(g.rng.uniform(0.1, 0.4, (4, 1, 1)))])
    return g.node(op, [x])


def pool(g: Graph, x: str) -> str:
    op = str(g.rng.choice(["MaxPool", "AveragePool"]))
    attrs: dict[str, Any] = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    if op == "AveragePool":
        attrs["count_include_pad"] = int(g.rng.integers(0, 2))
    return g.node(op, [x], **attrs)


def movement(g: Graph, x: str) -> str:
    kind = int(g.rng.integers(0, 7))
    if kind == 0:
        return g.node("Transpose", [x], perm=[0, 1, 3, 2])
    if kind == 1:
        y = g.node("Unsqueeze", [x, g.const([1], np.int64)]) if g.opset >= 13 else g.node("Unsqueeze", [x], axes=[1])
        y = affine(g, y)
        return g.node("Squeeze", [y, g.const([1], np.int64)]) if g.opset >= 13 else g.node("Squeeze", [y], axes=[1])
    if kind == 2:
        y = g.node("Reshape", [x, g.const([0, 2, 2, -1], np.int64)])
        y = affine_of(g, y, (2, 2, 1))
        return g.node("Reshape", [y, g.node("Shape", [x])])
    if kind == 3:
        axis = {"axis": 1}
        left, right = (
            g.nodes_of("Split", [x, g.const([2, 2], np.int64)], 2, **axis)
            if g.opset >= 13
            else g.nodes_of("Split", [x], 2, split=[2, 2], **axis)
        )
        return g.node("Concat", [affine_of(g, right, (2, 1, 1)), left], axis=1)
    if kind == 4:
        low, high = (g.const(v, np.int64) for v in ([0], [3]))
        cut = g.node("Slice", [x, low, high, g.const([1], np.int64)])
        rest = g.node("Slice", [x, high, g.const([9], np.int64), g.const([1], np.int64)])
        return g.node("Concat", [cut, affine_of(g, rest, ())], axis=1)
    if kind == 5:
        y = g.node("Resize", [x, g.const([], np.float32), g.const([1, 1, 2, 2])], mode="nearest")
        return g.node("MaxPool", [affine(g, y)], kernel_shape=[2, 2], strides=[2, 2])
    y = g.node("Pad", [x, g.const([0, 0, 0, 0, 0, 0, 1, 1], np.int64), g.const(float(g.rng.choice([0.0, 0.5])))])
    return g.node("AveragePool", [affine(g, y)], kernel_shape=[2, 2])


def join(g: Graph, x: str) -> str:
    op = str(g.rng.choice(["Add", "Add", "Sub", "Mul"]))
    return g.node(op, [affine(g, x), affine(g, g.pick())])


def reduced(g: Graph, x: str) -> str:
    keep = int(g.rng.integers(0, 2))
    if g.opset >= 18:
        s = g.node("ReduceMean", [affine(g, x), g.const([2, 3], np.int64)], keepdims=keep)
    else:
        s = g.node("ReduceMean", [affine(g, x)], axes=[2, 3], keepdims=keep)
    s = affine_of(g, s, (4, 1, 1) if keep else (4,))
    if not keep:
        s = g.node("Reshape", [s, g.const([0, 4, 1, 1], np.int64)])
    return g.node("Add", [x, s])


def normalised(g: Graph, x: str) -> str:
    y = g.node("InstanceNormalization", [x, g.const(g.rng.uniform(0.5, 1, 4)), g.const(g.rng.normal(size=4))])
    return affine(g, y)


STEPS: list[Step] = [
    affines, affines, affines, norm, conv, conv, conv, shared_conv, matmul, left_matmul, gemm, excite, activation,
    activation, pool, movement, movement, movement, join, join, reduced, normalised,
]  # fmt: skip


def build(seed: int, steps: list[int], opset: int, dynamic: bool) -> onnx.ModelProto:
    g = Graph(np.random.default_rng(seed), opset, dynamic)
    for index in steps:
        g.values.append(STEPS[index](g, g.pick()))
    last = g.values[-1] if g.values[-1] != "x" else g.node("Identity", ["x"])
    others = [v for v in g.values[1:-1] if g.rng.random() < 0.1]
    return g.model(list(dict.fromkeys([last, *others])))


models = st.builds(
    build,
    seed=st.integers(0, 1 << 32),
    steps=st.lists(st.integers(0, len(STEPS) - 1), min_size=2, max_size=12),
    opset=st.sampled_from([11, 13, 17, 21]),
    dynamic=st.booleans(),
)


def run(pipeline: str, model: onnx.ModelProto, limit: int | None = None) -> Any:
    return Pipeline(pipeline).run(model, settings=Settings(verify="off", on_failure="stop", limit=limit))


def assert_equal(before: onnx.ModelProto, after: onnx.ModelProto, optimization: Literal["off", "all"]) -> None:
    a, b = (Session(m, optimization=optimization) for m in (before, after))
    rng = np.random.default_rng(0)
    dynamic = not before.graph.input[0].type.tensor_type.shape.dim[0].HasField("dim_value")
    for n, h, w in ((2, 6, 6), (1, 8, 8)) if dynamic else ((2, 6, 6),):
        feeds = {"x": np.asarray(rng.normal(size=(n, CHANNELS, h, w)), np.float32)}
        for (name, wanted), found in zip(a.run(feeds).items(), b.run(feeds).values(), strict=True):
            assert wanted.shape == found.shape, name
            if not np.isfinite(wanted).all():
                continue
            largest = float(np.abs(wanted).max(initial=1e-6))
            assert float(np.abs(wanted - found).max(initial=0.0)) <= TOLERANCE * largest, name


@settings(max_examples=250)
@given(models)
def test_folding_keeps_the_outputs(model: onnx.ModelProto) -> None:
    result = run("fold-affine", model)
    onnx.checker.check_model(result.proto, full_check=True)
    assert_equal(model, result.proto, "off")
    assert_equal(model, result.proto, "all")
    again = run("fold-affine", result.proto)
    assert to_text(again.model) == to_text(load(result.proto)), "a second run changes something"


@settings(max_examples=100)
@given(models, st.sampled_from(["batchnorm", "depthwise", "pad"]))
def test_lowering_keeps_the_outputs(model: onnx.ModelProto, form: str) -> None:
    result = run(f"canonicalize, fold-affine, lower-affine{{form={form}}}", model)
    onnx.checker.check_model(result.proto, full_check=True)
    assert_equal(model, result.proto, "off")
    assert_equal(model, result.proto, "all")


@settings(max_examples=60)
@given(models, st.integers(0, 12))
def test_any_prefix_of_the_changes_is_an_equal_model(model: onnx.ModelProto, limit: int) -> None:
    result = run("fold-affine", model, limit)
    onnx.checker.check_model(result.proto, full_check=True)
    assert_equal(model, result.proto, "off")
