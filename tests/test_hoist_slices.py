"""What is read of a last layer is all that is computed: which operators a Slice moves above, and which not."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from graphopt.analysis.shapes import infer
from graphopt.pipeline import Pipeline, Result, Settings
from graphopt.runtime import Session

HEAD = '<ir_version: 8, opset_import: ["": 17]>\n'

TOLERANCE = 1e-5
"""Relative to the largest element: a product of fewer rows may be summed in another order."""


def run(text: str) -> Result:
    model = onnx.parser.parse_model(HEAD + text)
    return Pipeline("hoist-slices").run(model, settings=Settings(verify="off", on_failure="stop"))


def assert_equal(text: str, result: Result, **feeds: Any) -> None:
    before = onnx.parser.parse_model(HEAD + text)
    for optimization in ("off", "all"):
        a, b = (Session(m, optimization=optimization).run(feeds) for m in (before, result.proto))
        for name, x in a.items():
            assert x.shape == b[name].shape
            np.testing.assert_allclose(b[name], x, rtol=0, atol=TOLERANCE * np.abs(x).max(), err_msg=name)


def sizes(result: Result, op: str) -> list[list[Any]]:
    shapes = infer(result.model)
    return [list(shapes.of(n.outputs[0]).shape or ()) for n in result.model.graph.nodes if n.op == op]


ATTENTION = """g (float[N,12,32] x, float[32,32] q, float[32,32] k, float[32,32] v, float[32,32] o) => (float[N,32] y)
<int64 last = {-1}, int64[4] heads = {0, 12, 4, 8}, int64[3] joined = {0, 12, 32}>
{
  q0 = MatMul(x, q) q1 = Reshape(q0, heads) q2 = Transpose<perm = [0, 2, 1, 3]>(q1)
  k0 = MatMul(x, k) k1 = Reshape(k0, heads) k2 = Transpose<perm = [0, 2, 3, 1]>(k1)
  v0 = MatMul(x, v) v1 = Reshape(v0, heads) v2 = Transpose<perm = [0, 2, 1, 3]>(v1)
  s = MatMul(q2, k2) p = Softmax<axis = -1>(s) c = MatMul(p, v2)
  c1 = Transpose<perm = [0, 2, 1, 3]>(c) c2 = Reshape(c1, joined) c3 = MatMul(c2, o) r = Add(x, c3)
  y = Gather<axis = 1>(r, last)
}"""


def test_the_last_token_asks_one_query_of_all_keys() -> None:
    result = run(ATTENTION)
    assert sorted(s[1] for s in sizes(result, "Reshape")) == [1, 1, 12, 12]
    assert sizes(result, "Softmax")[0][1:] == [4, 1, 12]
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=(32, 32)).astype(np.float32) / 5 for name in "qkvo"}
    assert_equal(ATTENTION, result, x=rng.normal(size=(2, 12, 32)).astype(np.float32), **weights)


def test_dynamic_lengths() -> None:
    text = """g (float[N,T,8] x, float[8,64] w, float[64,8] u) => (float[N,8] y) <int64 last = {-1}>
        { a = MatMul(x, w) b = Erf(a) c = MatMul(b, u) d = Add(c, x) y = Gather<axis = 1>(d, last) }"""
    result = run(text)
    assert [s[1] for s in sizes(result, "MatMul")] == [1, 1]
    rng = np.random.default_rng(0)
    for length in (1, 5):
        feeds = {"x": rng.normal(size=(2, length, 8)), "w": rng.normal(size=(8, 64)), "u": rng.normal(size=(64, 8))}
        assert_equal(text, result, **{k: v.astype(np.float32) for k, v in feeds.items()})


def test_embeddings_are_looked_up_for_what_is_read() -> None:
    text = """g (int64[N,16] ids, float[99,64] table, float[64,64] w) => (float[N,1,64] y)
        <int64[1] a = {0}, int64[1] b = {1}>
        { e = Gather(table, ids) f = MatMul(e, w) g1 = Tanh(f) y = Slice(g1, a, b, b) }"""
    result = run(text)
    assert [n.op for n in result.model.graph.nodes] == ["Slice", "Gather", "MatMul", "Tanh"]
    rng = np.random.default_rng(0)
    floats = {k: rng.normal(size=s).astype(np.float32) for k, s in (("table", (99, 64)), ("w", (64, 64)))}
    assert_equal(text, result, ids=rng.integers(0, 99, (2, 16)), **floats)


def test_columns_of_a_product_are_columns_of_its_weight() -> None:
    text = """g (float[4,8] x) => (float[4,2] y) <int64[1] a = {0}, int64[1] b = {2}, int64[1] one = {1}>
        { w = ConstantOfShape<value = float[1]{2}>(s) s = Constant<value_ints = [8, 6]>()
          h = MatMul(x, w) y = Slice(h, a, b, one) }"""
    result = run(text)
    assert [n.op for n in result.model.graph.nodes][-1] == "MatMul"
    assert_equal(text, result, x=np.ones((4, 8), np.float32))


@pytest.mark.parametrize(
    "body",
    [
        "b = Softmax<axis = 1>(x) y = Slice(b, zero, one, one)",
        "b = CumSum(x, axis) y = Slice(b, zero, one, one)",
        "b = ReduceMean<axes = [1]>(x) y = Slice(b, zero, one, one)",
        "b = LayerNormalization<axis = 1>(x, scale) y = Slice(b, zero, one, one)",
        "b = Reshape(x, merged) y = Slice(b, zero, one, one)",
        "b = Relu(x) y = Slice(b, zero, all, one)",
    ],
)
def test_what_mixes_the_axis_stays(body: str) -> None:
    text = f"""g (float[2,16,8] x, float[16,8] scale) => (float[a,b,c] y)
        <int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] all = {{99}}, int64 axis = {{1}},
         int64[3] merged = {{4, 8, 8}}>
        {{ {body} }}"""
    assert run(text).report.passes[0].status != "changed"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("b = Relu(x) y = Slice(b, zero, one, one) z = Neg(b)", "'b' is used elsewhere, too"),
        ("b = Add(x, u) z = Relu(x) y = Slice(b, zero, one, one)", "it takes 1 more Slices"),
    ],
)
def test_near_misses_say_why(body: str, reason: str) -> None:
    text = f"""g (float[2,16,8] x, float[2,16,8] u) => (float[2,1,8] y, float[2,16,8] z)
        <int64[1] zero = {{0}}, int64[1] one = {{1}}> {{ {body} }}"""
    result = run(text)
    assert result.report.passes[0].status != "changed"
    assert reason in result.report.passes[0].blocked[0]["why"]


def test_sizes_that_may_broadcast_are_not_cut() -> None:
    """The second operand has another symbol: it may be 1 when the model runs."""
    text = """g (float[N,T,8] x, float[N,S,8] u, float[8,64] w) => (float[N,K,64] y)
        <int64[1] zero = {0}, int64[1] one = {1}> { b = Add(x, u) c = MatMul(b, w) y = Slice(c, zero, one, one) }"""
    result = run(text)
    order = [n.op for n in result.model.graph.nodes]
    assert order.index("Add") < order.index("Slice")
    rng = np.random.default_rng(0)
    feeds = {"x": rng.normal(size=(2, 3, 8)), "u": rng.normal(size=(2, 1, 8)), "w": rng.normal(size=(8, 64))}
    assert_equal(text, result, **{k: v.astype(np.float32) for k, v in feeds.items()})
