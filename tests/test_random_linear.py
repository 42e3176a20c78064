"""Random composites of convolutions and matrix products through the linear algebra passes: valid, equal, at rest."""

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
from graphopt.pipeline import Pipeline, Result, Settings
from graphopt.runtime import Session
from graphopt.text import to_text

TOLERANCE = 1e-5
"""Relative to the largest element: what the passes promise."""

CLEANUP = (
    "repeat(canonicalize, fold-constants, expand-einsum, fuse-convs, fuse-linear, merge-parallel, "
    "eliminate-common, eliminate-dead)"
)
LOWERING = ("lower-conv1d{seeds=all}", "widen-channels", "lower-pools", "flush-denormals")
PIPELINE = ", ".join([CLEANUP, *LOWERING, "eliminate-dead"])

CHANNELS = 4


@dataclass
class Builder:
    """Grows a graph over tensors of one shape; the last axis but `axes` is the channel."""

    rng: np.random.Generator
    opset: int
    axes: int
    batch: int | str
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)
    values: list[str] = field(default_factory=lambda: ["x"])
    count: int = 0

    @property
    def shape(self) -> list[int | str]:
        return [self.batch, CHANNELS, *[6] * self.axes] if self.axes else [self.batch, 5, CHANNELS]

    def pick(self) -> str:
        return self.values[-1 - int(self.rng.integers(0, min(3, len(self.values))))]

    def const(self, values: Any, dtype: Any = np.float32) -> str:
        self.count += 1
        self.initializers.append(numpy_helper.from_array(np.asarray(values, dtype), f"c{self.count}"))
        return f"c{self.count}"

    def weight(self, *shape: int) -> str:
        wide = self.rng.normal(size=shape) / max(float(np.prod(shape[1:])), 1.0) ** 0.5
        if self.rng.random() < 0.1:
            wide[self.rng.random(shape) < 0.3] = 1e-41
        return self.const(wide)

    def node(self, op: str, *inputs: str, **attrs: Any) -> str:
        self.count += 1
        self.nodes.append(helper.make_node(op, list(inputs), [f"t{self.count}"], f"n{self.count}", **attrs))
        return f"t{self.count}"

    def model(self, outputs: list[str]) -> onnx.ModelProto:
        infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs]
        graph = helper.make_graph(
            self.nodes, "random", [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)], infos,
            self.initializers,
        )  # fmt: skip
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        return onnx.shape_inference.infer_shapes(made, strict_mode=True)


Step = Callable[[Builder, str], str]


def conv(b: Builder, x: str, outputs: int = CHANNELS, inputs: int = CHANNELS, size: int = 0) -> str:
    size = size or int(b.rng.choice([1, 1, 3]))
    group = int(b.rng.choice([1, 1, 2, 4])) if outputs % 4 == inputs % 4 == 0 else 1
    given = [x, b.weight(outputs, inputs // group, *[size] * b.axes)]
    if b.rng.random() < 0.5:
        given.append(b.const(b.rng.normal(size=outputs)))
    return b.node("Conv", *given, group=group, pads=[size // 2] * 2 * b.axes)


def branches(b: Builder, x: str) -> str:
    made = [conv(b, x) for _ in range(int(b.rng.integers(1, 4)))]
    made += [x, scaled(b, x), norm(b, x)][: int(b.rng.integers(0, 4))]
    b.rng.shuffle(made)
    total = made[0]
    for value in made[1:]:
        total = b.node("Add", total, value) if b.rng.random() < 0.7 else b.node("Add", value, total)
    return total


def scaled(b: Builder, x: str) -> str:
    shape = [(CHANNELS, *[1] * b.axes), (1,), (1, CHANNELS, *[1] * b.axes)][b.rng.integers(3)]
    made = b.node("Mul", x, b.const(b.rng.uniform(0.5, 2, shape)))
    return b.node("Add", made, b.const(b.rng.normal(size=shape))) if b.rng.random() < 0.5 else made


def norm(b: Builder, x: str) -> str:
    given = [b.const(b.rng.uniform(0.5, 2, CHANNELS)) for _ in range(4)]
    return b.node("BatchNormalization", x, *given)


def row(b: Builder, x: str) -> str:
    middle = int(b.rng.integers(1, 8))
    size = int(b.rng.choice([1, 3]))
    first = conv(b, x, middle, CHANNELS, 1 if size == 3 else 0)
    return conv(b, first, CHANNELS, middle, size)


def wide(b: Builder, x: str) -> str:
    width = int(b.rng.choice([13, 14, 15, 22, 30]))
    first = conv(b, x, width, CHANNELS, 3)
    if b.rng.random() < 0.5:
        first = b.node("HardSwish" if b.opset >= 14 else "Sigmoid", first)
    if b.rng.random() < 0.5:
        first = b.node("Add", first, conv(b, x, width, CHANNELS, 1))
    return conv(b, first, CHANNELS, width, 1)


def inception(b: Builder, x: str) -> str:
    widths = [int(w) for w in b.rng.integers(1, 4, 3)]
    size = int(b.rng.choice([1, 3]))
    made = [conv(b, x, w, CHANNELS, size) for w in widths]
    if b.rng.random() < 0.6:
        made = [b.node("Relu", m) for m in made]
    if b.rng.random() < 0.3:
        made[1] = b.node("Sigmoid", made[1])
    return conv(b, b.node("Concat", *made, axis=1), CHANNELS, sum(widths), 1)


def pool(b: Builder, x: str) -> str:
    op = "MaxPool" if b.rng.random() < 0.5 else "AveragePool"
    return b.node(op, x, kernel_shape=[3] * b.axes, pads=[1] * 2 * b.axes)


def masked(b: Builder, x: str) -> str:
    weight = np.zeros((CHANNELS, CHANNELS, *[5] * b.axes))
    low = int(b.rng.integers(0, 4))
    weight[(slice(None), slice(None), *[slice(low, low + 2)] * b.axes)] = 0.3
    return b.node("Conv", x, b.const(weight), pads=[2] * 2 * b.axes)


def squeeze_excite(b: Builder, x: str) -> str:
    axes = list(range(2, 2 + b.axes))
    if b.rng.random() < 0.5 or b.opset >= 18:
        mean = b.node("GlobalAveragePool", x)
    else:
        mean = b.node("ReduceMean", x, axes=axes)
    return b.node("Mul", x, b.node("Sigmoid", conv(b, mean, CHANNELS, CHANNELS, 1)))


def dense(b: Builder, x: str, outputs: int = CHANNELS, inputs: int = CHANNELS) -> str:
    made = b.node("MatMul", x, b.weight(inputs, outputs))
    shape = [(outputs,), (1,), (1, outputs), (1, 1, outputs)][b.rng.integers(4)]
    return b.node("Add", made, b.const(b.rng.normal(size=shape))) if b.rng.random() < 0.5 else made


def dense_row(b: Builder, x: str) -> str:
    middle = int(b.rng.integers(1, 8))
    return dense(b, dense(b, x, middle), CHANNELS, middle)


def dense_sum(b: Builder, x: str) -> str:
    made = [
        dense(b, x),
        dense_row(b, x) if b.rng.random() < 0.5 else dense(b, x),
        *([x] if b.rng.random() < 0.3 else []),
    ]
    total = made[0]
    for value in made[1:]:
        total = b.node("Add", value, total) if b.rng.random() < 0.5 else b.node("Add", total, value)
    return total


def dense_heads(b: Builder, x: str) -> str:
    widths = [int(w) for w in b.rng.integers(1, 4, 3)]
    made = [dense(b, x, w) for w in widths]
    if b.rng.random() < 0.5:
        made = [b.node("Tanh", m) for m in made]
    if b.rng.random() < 0.5:
        return dense(b, b.node("Concat", *made, axis=-1 if b.rng.random() < 0.5 else 2), CHANNELS, sum(widths))
    parts = [b.node("Sigmoid", dense(b, m, CHANNELS, w)) for m, w in zip(made, widths, strict=True)]
    return b.node("Sum", *parts)


def einsum(b: Builder, x: str) -> str:
    kind = int(b.rng.integers(5))
    if kind == 0:
        return b.node("Einsum", x, b.weight(CHANNELS, CHANNELS), equation="btd,df->btf")
    if kind == 1:
        score = b.node("Softmax", b.node("Einsum", x, dense(b, x), equation="btd,bsd->bts"))
        return b.node("Einsum", score, x, equation="bts,bsd->btd")
    if kind == 2:
        wide = b.node("Einsum", x, b.weight(CHANNELS, 2, 3), equation="btd,dhk->bthk")
        return b.node("Einsum", wide, b.weight(2, 3, CHANNELS), equation="bthk,hkd->btd")
    if kind == 3:
        return b.node("Einsum", x, b.weight(CHANNELS), equation="btd,d->btd")
    return b.node("Einsum", b.node("Einsum", x, equation="btd->dbt"), equation="dbt->btd")


def flat_gemm(b: Builder, x: str) -> str:
    flat = b.node("Reshape", x, b.const([-1, CHANNELS], np.int64))
    turned = int(b.rng.integers(2))
    made = b.node("Gemm", flat, b.weight(CHANNELS, CHANNELS), b.const(b.rng.normal(size=CHANNELS)), transB=turned)
    if b.rng.random() < 0.5:
        made = b.node("Add", made, b.const(b.rng.normal(size=(1, CHANNELS))))
    if b.rng.random() < 0.5:
        made = b.node("MatMul", b.node("Transpose", made, perm=[1, 0]), b.node("Abs", made))
        made = b.node("MatMul", flat, made)
    return b.node("Reshape", made, b.const([-1, 5, CHANNELS], np.int64))


COMMON: list[Step] = [lambda b, x: b.node("Relu", x), lambda b, x: b.node("Add", x, b.pick())]
CONVS: list[Step] = [
    conv, branches, branches, row, row, wide, inception, inception, pool, masked, squeeze_excite, scaled, norm, *COMMON,
]  # fmt: skip
DENSE: list[Step] = [
    dense,
    dense_row,
    dense_sum,
    dense_sum,
    dense_heads,
    dense_heads,
    einsum,
    einsum,
    flat_gemm,
    *COMMON,
]


def build(seed: int, steps: list[int], opset: int, axes: int, dynamic: bool) -> onnx.ModelProto:
    b = Builder(np.random.default_rng(seed), opset, axes, "N" if dynamic else 2)
    choice = CONVS if axes else DENSE
    for index in steps:
        b.values.append(choice[index % len(choice)](b, b.pick()))
    made = list(dict.fromkeys(reversed(b.values)))
    return b.model(made[:1] + [v for v in made[1:-1] if b.rng.random() < 0.15])


models = st.builds(
    build,
    seed=st.integers(0, 1 << 32),
    steps=st.lists(st.integers(0, 99), min_size=1, max_size=8),
    opset=st.sampled_from([12, 13, 17, 21]),
    axes=st.sampled_from([0, 1, 2]),
    dynamic=st.booleans(),
)


def run(pipeline: str, model: onnx.ModelProto, limit: int | None = None) -> Result:
    return Pipeline(pipeline).run(model, settings=Settings(verify="off", on_failure="stop", limit=limit))


def assert_equal(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    sizes = [d.dim_value for d in before.graph.input[0].type.tensor_type.shape.dim]
    rng = np.random.default_rng(0)
    for mode in ("off", "all"):
        a, b = (Session(m, optimization=mode) for m in (before, after))
        for batch in (2, 3) if sizes[0] == 0 else (2,):
            feeds = {"x": np.asarray(rng.normal(size=(batch, *sizes[1:])), np.float32)}
            for (name, wanted), found in zip(a.run(feeds).items(), b.run(feeds).values(), strict=True):
                assert wanted.shape == found.shape, name
                largest = float(np.abs(wanted).max(initial=1e-30))
                assert float(np.abs(wanted - found).max(initial=0.0)) <= TOLERANCE * largest, (name, mode)


@settings(max_examples=220)
@given(models)
def test_composites_stay_equal(model: onnx.ModelProto) -> None:
    result = run(PIPELINE, model)
    onnx.checker.check_model(result.proto, full_check=True)
    assert_equal(model, result.proto)


@settings(max_examples=60)
@given(models)
def test_composites_come_to_rest(model: onnx.ModelProto) -> None:
    once = run(CLEANUP, model).proto
    assert to_text(run(CLEANUP, once).model) == to_text(load(once))
    for name in LOWERING:
        lowered = run(name, once).proto
        assert run(name, lowered).report.passes[0].status != "changed", name


@settings(max_examples=60)
@given(models, st.data())
def test_changes_can_be_left_out(model: onnx.ModelProto, data: st.DataObject) -> None:
    total = sum(r.changes for r in run(CLEANUP, model).report.passes)
    result = run(CLEANUP, model, limit=data.draw(st.integers(0, max(total, 1))))
    onnx.checker.check_model(result.proto, full_check=True)
    assert_equal(model, result.proto)


@pytest.mark.parametrize(
    "name",
    [
        "lower-conv1d",
        "expand-einsum",
        "fuse-convs",
        "fuse-linear",
        "merge-parallel",
        "widen-channels",
        "flush-denormals",
    ],
)
def test_composites_reach_each_pass(name: str) -> None:
    rng = np.random.default_rng(7)
    for seed in range(300):
        steps = [int(s) for s in rng.integers(0, 99, 6)]
        changed = run(PIPELINE, build(seed, steps, 17, int(rng.integers(3)), dynamic=False)).report.passes
        if any(r.name == name and r.changes for r in changed):
            return
    pytest.fail(f"300 random models, and {name} never fires")
