"""Transposes of channels-last exports, the minimum cut that places them, and what stops it."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.pipeline import Pipeline, Result, Settings
from graphopt.runtime import Session

HEAD = '<ir_version: 8, opset_import: ["": 17]>\n'

TOLERANCE = 1e-5
"""Relative to the largest element: some reductions sum in another order."""


def run(model: onnx.ModelProto | str, pipeline: str = "sink-transposes") -> Result:
    parsed = onnx.parser.parse_model(HEAD + model) if isinstance(model, str) else model
    return Pipeline(pipeline).run(parsed, settings=Settings(verify="off", on_failure="stop"))


def ops(result: Result) -> Counter[str]:
    return Counter(n.op for n in result.model.graph.nodes)


def assert_equal(before: onnx.ModelProto, after: onnx.ModelProto, **feeds: Any) -> None:
    for optimization in ("off", "all"):
        a, b = (Session(m, optimization=optimization).run(feeds) for m in (before, after))
        for name, x in a.items():
            np.testing.assert_allclose(b[name], x, rtol=0, atol=TOLERANCE * np.abs(x).max(), err_msg=name)


class Keras:
    """Builds a channels-last network as tf2onnx writes it: a Transpose before and behind every Conv."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[TensorProto] = []

    def const(self, values: Any, dtype: Any = np.float32) -> str:
        name = f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def node(self, op: str, *inputs: str, **attrs: Any) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=f"n{len(self.nodes)}", **attrs))
        return name

    def conv(self, x: str, channels: int, out: int, size: int = 3, **attrs: Any) -> str:
        weight = self.const(self.rng.normal(size=(out, channels // attrs.get("group", 1), size, size)) / size)
        inner = self.node("Conv", self.node("Transpose", x, perm=[0, 3, 1, 2]), weight, pads=[size // 2] * 4, **attrs)
        return self.node("Add", self.node("Transpose", inner, perm=[0, 2, 3, 1]), self.const(self.rng.normal(size=out)))

    def block(self, x: str, channels: int) -> str:
        """An inverted residual with squeeze-excite."""
        y = self.node("Clip", self.conv(x, channels, 16, 1), self.const(0.0), self.const(6.0))
        y = self.node("Pad", y, self.const([0, 1, 1, 0, 0, 0, 0, 0], np.int64))
        y = self.node("Relu", self.conv(y, 16, 16, group=16))
        y = self.node("Slice", y, *(self.const(v, np.int64) for v in ([1, 1], [1 << 40] * 2, [1, 2])))
        scale = self.conv(self.node("ReduceMean", y, axes=[1, 2], keepdims=1), 16, 16, 1)
        y = self.node("Mul", y, self.node("Sigmoid", scale))
        return self.node("Add", x, self.conv(y, 16, channels, 1))

    def model(self, batch: int | str) -> onnx.ModelProto:
        x = self.node("Relu", self.conv("x", 3, 8, strides=[2, 2]))
        for _ in range(2):
            x = self.block(x, 8)
        x = self.node("Concat", self.conv(x, 8, 4, 1), self.conv(x, 8, 4), axis=3)
        x = self.node("LeakyRelu", x)
        dense = self.node("MatMul", self.node("ReduceMean", x, axes=[1, 2], keepdims=0), self.const(np.eye(8, 5)))
        pooled = self.node("Transpose", self.node("MaxPool", self.node("Transpose", x, perm=[0, 3, 1, 2]),
                           kernel_shape=[2, 2]), perm=[0, 2, 3, 1])  # fmt: skip
        graph = helper.make_graph(
            self.nodes, "keras", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 16, 16, 3])],
            [helper.make_tensor_value_info(dense, TensorProto.FLOAT, [batch, 5]),
             helper.make_tensor_value_info(pooled, TensorProto.FLOAT, [batch, 4, 4, 8])], self.initializers,
        )  # fmt: skip
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("batch", [1, "N"])
def test_channels_last_exports_keep_transposes_at_their_ends_only(batch: int | str) -> None:
    model = Keras().model(batch)
    assert sum(n.op_type == "Transpose" for n in model.graph.node) == 24
    result = run(model)
    kept = [n for n in result.model.graph.nodes if n.op == "Transpose"]
    assert kept[0].inputs[0].name == "x"
    assert len(kept) == 2
    assert kept[1].outputs[0].name == model.graph.output[1].name
    assert_equal(model, result.proto, x=np.random.default_rng(1).normal(size=(1, 16, 16, 3)).astype(np.float32))


def test_two_before_an_addition_become_one_behind_it() -> None:
    result = run(
        """g (float[2,3,4,5] x, float[2,3,4,5] z) => (float[2,4,5,3] y)
        { a = Transpose<perm = [0, 2, 3, 1]>(x) b = Transpose<perm = [0, 2, 3, 1]>(z) y = Add(a, b) }"""
    )
    assert ops(result) == {"Add": 1, "Transpose": 1}


def test_the_smaller_side_of_a_reduction_is_transposed() -> None:
    result = run(
        """g (float[2,30,40,50] x) => (float[2,50,40] y)
        { a = Transpose<perm = [0, 3, 2, 1]>(x) y = ReduceMax<axes = [3], keepdims = 0>(a) }"""
    )
    assert [n.op for n in result.model.graph.nodes] == ["ReduceMax", "Transpose"]
    assert result.model.graph.nodes[0].attrs["axes"] == [1]


def test_a_larger_side_is_not() -> None:
    text = """g (float[2,3,1,5] x, float[2,5,40,3] z) => (float[2,5,40,3] y)
        { a = Transpose<perm = [0, 3, 2, 1]>(x) y = Add(a, z) }"""
    assert run(text).report.passes[0].status != "changed"


def test_a_tensor_needed_in_both_ways_is_transposed_once() -> None:
    result = run(
        """g (float[2,3,4,5] x, float[3,3,1,1] w) => (float[2,4,5,3] y, float[2,3,4,5] z, float[2,3,4,5] u)
        { a = Transpose<perm = [0, 2, 3, 1]>(x) b = Relu(a) y = Exp(b)
          c = Transpose<perm = [0, 3, 1, 2]>(b) z = Conv(c, w) d = Transpose<perm = [0, 3, 1, 2]>(b) u = Neg(d) }"""
    )
    assert ops(result)["Transpose"] == 1


def test_shared_constants_are_permuted_for_one_reader_only() -> None:
    text = """g (float[2,3,4,5] x) => (float[2,3,4,5] y, float[2,4,5,3] z) <float[3] c = {1, 2, 3}>
        { a = Transpose<perm = [0, 2, 3, 1]>(x) b = Add(a, c) y = Transpose<perm = [0, 3, 1, 2]>(b) z = Mul(a, c) }"""
    result = run(text)
    assert_equal(onnx.parser.parse_model(HEAD + text), result.proto, x=np.ones((2, 3, 4, 5), np.float32))


@pytest.mark.parametrize(
    ("operator", "reason"),
    [
        ("b = Add(a, row)", "Add 'b' needs its tensors as they are"),
        ("b = CumSum(a, last)", "CumSum 'b' needs its tensors as they are"),
        ("b = LayerNormalization(a, scale)", "LayerNormalization 'b' needs its tensors as they are"),
    ],
)
def test_what_cannot_move_is_named(operator: str, reason: str) -> None:
    result = run(
        f"""g (float[2,3,4,5] x, float[3] row) => (float[2,3,4,5] y) <int64 last = {{3}}, float[3] scale = {{1, 2, 3}}>
        {{ a = Transpose<perm = [0, 2, 3, 1]>(x) {operator} y = Transpose<perm = [0, 3, 1, 2]>(b) }}"""
    )
    assert reason in " ".join(b["why"] for b in result.report.passes[0].blocked)
    assert ops(result)["Transpose"] == 2


def test_subgraphs_that_read_a_tensor_see_it_as_it_was() -> None:
    text = """g (float[2,3,4,5] x, bool flag) => (float[2,3,4,5] y, float[2,4,5,3] z)
        { a = Transpose<perm = [0, 2, 3, 1]>(x) b = Relu(a) y = Transpose<perm = [0, 3, 1, 2]>(b)
          z = If(flag) <then_branch = t () => (float[2,4,5,3] p) { p = Neg(b) },
                        else_branch = e () => (float[2,4,5,3] q) { q = Abs(b) }> }"""
    result = run(text)
    feeds = {"x": np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32), "flag": np.array(True)}
    assert_equal(onnx.parser.parse_model(HEAD + text), result.proto, **feeds)
    assert ops(result)["Transpose"] == 1


@pytest.mark.parametrize("pipeline", ["sink-transposes", "hoist-slices", "fuse-parts", "eliminate-casts"])
def test_branches_of_old_models_get_constant_nodes(pipeline: str) -> None:
    """Up to IR 3 a subgraph has no initializers."""
    model = onnx.parser.parse_model(
        """<ir_version: 3, opset_import: ["": 12]>
        g (float[2,3,4,6] x, bool flag) => (float[2,3,4,1] y) {
          y = If(flag) <then_branch = t () => (float[2,3,4,1] u) {
            v = Constant<value = float[6] {1, 2, 3, 4, 5, 6}>()
            a = Transpose<perm = [0, 2, 3, 1]>(x) v1 = Constant<value = float[3] {1, 2, 3}>() b = Mul(a, v1)
            d = Transpose<perm = [0, 3, 1, 2]>(b)
            e = Cast<to = 11>(d) half = Constant<value = double[2,3,4,1] {0.5, 1.5, 2.5, 0.5, 1.5, 2.5, 0.5, 1.5, 2.5,
              0.5, 1.5, 2.5, 0.5, 1.5, 2.5, 0.5, 1.5, 2.5, 0.5, 1.5, 2.5, 0.5, 1.5, 2.5}>()
            h = Concat<axis = 3>(e, half) i = Cast<to = 1>(h)
            one = Constant<value_ints = [1]>() two = Constant<value_ints = [2]>() seven = Constant<value_ints = [7]>()
            axis = Constant<value_ints = [3]>() r = Relu(i) p = Slice(r, one, two, axis) q = Slice(r, two, seven, axis)
            t = Concat<axis = 3>(p, q) j = Add(t, v) k = Exp(j) l = Sin(k) u = Slice(l, one, two, axis) },
          else_branch = f () => (float[2,3,4,1] w) {
            n = Constant<value_ints = [-1]>() w = ReduceMean<axes = [3]>(x) }> }"""
    )
    result = run(model, pipeline)
    assert result.report.passes[0].status == "changed"
    onnx.checker.check_model(result.proto, full_check=True)
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 6)).astype(np.float32)
    assert_equal(model, result.proto, x=x, flag=np.array(True))


def test_time_is_near_linear_in_nodes() -> None:
    """Ten times the nodes take less than 25 times the processor time."""

    def seconds(count: int) -> float:
        nodes = [helper.make_node("Transpose", ["x"], ["t0"], perm=[1, 0])]
        for i in range(count):
            plain = helper.make_node("Relu", [f"t{i}"], [f"t{i + 1}"])
            nodes.append(plain if i % 3 else helper.make_node("Transpose", [f"t{i}"], [f"t{i + 1}"], perm=[1, 0]))
        graph = helper.make_graph(
            nodes, "long", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])],
            [helper.make_tensor_value_info(f"t{count}", TensorProto.FLOAT, None)],
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        started = time.process_time()
        assert ops(run(model))["Transpose"] <= 1
        return time.process_time() - started

    seconds(100)
    assert seconds(5000) < 25 * seconds(500)
