"""Gram matrices of layer inputs: the rows are what ORT's layers multiply, whatever the shapes, groups and budget."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from graphopt import layer_inputs
from graphopt.data import load_samples
from graphopt.errors import DataError
from graphopt.grams import Gram, GramRequest, collect, request_of, tappable
from graphopt.layer_inputs import row_chunks
from graphopt.model import load
from graphopt.runtime import evaluate

RNG = np.random.default_rng(4)
ROUNDING = 1e-4
"""Float32 sums of a few hundred products of unit size, in another order."""


def one_node(op: str, x: np.ndarray, weight: np.ndarray, **attrs: Any) -> onnx.ModelProto:
    nodes = [helper.make_node(op, ["x", "w"], ["y"], name="layer", **attrs)]
    info = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None] * x.ndim)]
    out = [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "g", info, out, [numpy_helper.from_array(weight, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def request_in(model: onnx.ModelProto) -> GramRequest:
    node = next(n for n in load(model).graph.nodes if n.name == "layer")
    request = request_of(node, node.inputs[1].shape)
    assert request is not None
    return request


def all_rows(request: GramRequest, x: np.ndarray) -> np.ndarray:
    return np.concatenate(list(row_chunks(request, x)))


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[onnx.ModelProto, np.ndarray, np.ndarray]:
    """A Conv of one to three spatial axes with any attributes, its input and weight."""
    axes, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel = draw(st.lists(st.integers(1, 3), min_size=axes, max_size=axes))
    attrs: dict[str, Any] = {
        name: draw(st.lists(st.integers(1, 2), min_size=axes, max_size=axes)) for name in ("strides", "dilations")
    }
    padding = draw(st.sampled_from(["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    if padding == "NOTSET":
        attrs["pads"] = draw(st.lists(st.integers(0, 2), min_size=2 * axes, max_size=2 * axes))
    else:
        attrs["auto_pad"] = padding
        if padding != "VALID":
            attrs["dilations"] = [1] * axes
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    x = rng.normal(size=(2, 2 * group, *(int(rng.integers(5, 8)) for _ in kernel))).astype(np.float32)
    weight = rng.normal(size=(3 * group, 2, *kernel)).astype(np.float32)
    return one_node("Conv", x, weight, group=group, **attrs), x, weight


@given(convolutions())
def test_patches_times_weight_is_conv(case: tuple[onnx.ModelProto, np.ndarray, np.ndarray]) -> None:
    model, x, weight = case
    request = request_in(model)
    rows = all_rows(request, x)
    by_group = weight.reshape(request.group, -1, request.width)
    made = np.einsum("rgd,god->rgo", rows, by_group).reshape(len(rows), -1)
    expected = np.moveaxis(evaluate(model, {"x": x})["y"], 1, -1).reshape(len(rows), -1)
    np.testing.assert_allclose(made, expected, atol=ROUNDING)


@pytest.mark.parametrize(("trans_a", "trans_b"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_rows_of_gemm(trans_a: int, trans_b: int) -> None:
    x, weight = RNG.normal(size=(6, 4)).astype(np.float32), RNG.normal(size=(4, 3)).astype(np.float32)
    given_x, given_w = x.T if trans_a else x, weight.T if trans_b else weight
    request = request_in(one_node("Gemm", given_x, np.ascontiguousarray(given_w), transA=trans_a, transB=trans_b))
    assert request.width == 4
    np.testing.assert_array_equal(all_rows(request, given_x)[:, 0], x)


def test_rows_of_transposed_convolution() -> None:
    x = RNG.normal(size=(2, 4, 5, 3)).astype(np.float32)
    request = request_in(one_node("ConvTranspose", x, RNG.normal(size=(4, 3, 2, 2)).astype(np.float32), group=2))
    rows = all_rows(request, x)
    assert rows.shape == (2 * 5 * 3, 2, 2)
    np.testing.assert_array_equal(rows.reshape(-1, 4), np.moveaxis(x, 1, -1).reshape(-1, 4))


TWO_LAYERS = onnx.parser.parse_model(
    '<ir_version: 8, opset_import: ["": 17]>'
    " g (float[n, t, 3] x, float[k] other) => (float[n, t, 2] y, float[k] z)"
    " <float[3, 4] a = {1, 2, 3, 4, 5, 6, -7, 8, 9, 1, 2, 3}, float[4, 2] b = {1, 2, 3, 4, 5, 6, 7, 8}>"
    " { h = MatMul(x, a) r = Relu(h) y = MatMul(r, b) z = Neg(other) }"
)
REQUESTS = {"first": GramRequest("x", 3), "second": GramRequest("r", 4), "again": GramRequest("r", 4)}


def ragged(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [
        {
            "x": rng.normal(size=(1 + i % 3, 2 + i % 5, 3)).astype(np.float32),
            "other": np.zeros(i % 2, np.float32),
        }
        for i in range(count)
    ]


@pytest.mark.parametrize("budget", [1 << 30, 1])
def test_ragged_samples_give_the_sum_over_all_rows(budget: int) -> None:
    model, feeds = load(TWO_LAYERS), ragged(7)
    before = model.proto
    grams = collect(model, load_samples(feeds, model), REQUESTS, budget=budget)
    hidden = np.concatenate([evaluate(TWO_LAYERS, f, ["r"])["r"].reshape(-1, 4) for f in feeds]).astype(np.float64)
    np.testing.assert_allclose(grams["second"].matrix, hidden.T @ hidden, rtol=1e-5)
    np.testing.assert_allclose(grams["second"].mean, hidden.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(grams["second"].covariance(), np.cov(hidden.T, bias=True), rtol=1e-4, atol=1e-4)
    assert grams["second"].count == len(hidden) == grams["first"].count
    assert grams["again"] is grams["second"]
    assert model.proto == before


def test_parts_add_up() -> None:
    model, feeds = load(TWO_LAYERS), ragged(6)
    whole, left, right = (
        collect(model, load_samples(part, model), REQUESTS)["second"] for part in (feeds, feeds[:2], feeds[2:])
    )
    both = left + right
    np.testing.assert_allclose(both.matrix, whole.matrix, rtol=1e-6)
    np.testing.assert_allclose(both.total, whole.total, rtol=1e-6)
    assert both.count == whole.count


def test_rows_that_are_not_finite_are_left_out() -> None:
    model = load(TWO_LAYERS)
    feeds = ragged(1)
    feeds[0]["x"][0, 0, 1] = np.inf
    gram = collect(model, load_samples(feeds, model), REQUESTS)["first"]
    assert (gram.dropped, gram.count) == (1, feeds[0]["x"].size // 3 - 1)
    assert np.isfinite(gram.matrix).all()


def test_rows_can_be_drawn() -> None:
    model = load(TWO_LAYERS)
    samples = load_samples(ragged(5), model)
    one, two = (collect(model, samples, REQUESTS, rows=2, seed=3)["second"] for _ in range(2))
    assert one.count == 10
    np.testing.assert_array_equal(one.matrix, two.matrix)


def test_chunks_do_not_change_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    request, x = GramRequest("x", 3), RNG.normal(size=(5, 7, 3)).astype(np.float32)
    whole, cut = Gram.empty(request), Gram.empty(request)
    whole.add(request, x)
    monkeypatch.setattr(layer_inputs, "CHUNK_BYTES", 4 * 3 * 2)
    assert [len(rows) for rows in row_chunks(request, x)] == [2] * 17 + [1]
    cut.add(request, x)
    np.testing.assert_allclose(cut.matrix, whole.matrix, rtol=1e-5)


def test_half_precision_rows_do_not_overflow() -> None:
    request = GramRequest("x", 2)
    gram = Gram.empty(request)
    gram.add(request, np.full((1000, 2), 300, np.float16))
    np.testing.assert_allclose(gram.matrix, np.full((2, 2), 9e7))


def test_wrong_width_is_a_clear_error() -> None:
    model = load(TWO_LAYERS)
    with pytest.raises(DataError, match="rows of 1 × 5 elements are expected, not of 3"):
        collect(model, load_samples(ragged(1), model), {"first": GramRequest("x", 5)})


def test_tensors_of_subgraphs_are_left_out_and_their_makers_still_run() -> None:
    body = onnx.parser.parse_graph("b () => (float[n, 3] o) { inner = Neg(x) o = Add(inner, h) }")
    other = onnx.parser.parse_graph("c () => (float[n, 3] p) { p = Identity(x) }")
    nodes = [
        helper.make_node("Abs", ["x"], ["h"]),
        helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=other),
        helper.make_node("Sqrt", ["h"], ["unused"]),
    ]
    inputs = [
        helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None, 3]),
        helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, []),
    ]
    outputs = [helper.make_tensor_value_info("unused", onnx.TensorProto.FLOAT, [None, 3])]
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    model = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    assert tappable(model) == {"x", "c", "h", "y", "unused"}
    x = RNG.normal(size=(4, 3)).astype(np.float32)
    samples = load_samples([{"x": x, "c": np.array(True)}], model)
    found = collect(model, samples, {"in": GramRequest("inner", 3), "out": GramRequest("y", 3)})
    assert list(found) == ["out"]
    rows = np.abs(x) - x
    np.testing.assert_allclose(found["out"].matrix, rows.T @ rows, rtol=1e-5)


def test_no_samples_is_a_clear_error() -> None:
    model = load(TWO_LAYERS)
    with pytest.raises(DataError, match="the samples are empty"):
        collect(model, load_samples([], model), REQUESTS)


@pytest.mark.parametrize("op", ["Add", "MatMul"])
def test_no_request_for_what_is_no_matrix(op: str) -> None:
    node = gs.Node(op, inputs=[gs.Variable("x"), gs.Variable("w")], outputs=[gs.Variable("y")])
    assert request_of(node, (2, 3, 4)) is None


def test_a_column_that_does_not_vary_has_no_covariance() -> None:
    request = GramRequest("x", 3)
    gram = Gram.empty(request)
    rows = np.random.default_rng(0).standard_normal((64, 3)).astype(np.float32)
    rows[:, 1] = 12345.678
    gram.add(request, rows)
    found = gram.covariance()
    assert not found[1].any()
    assert not found[:, 1].any()
    np.testing.assert_allclose(found[np.ix_([0, 2], [0, 2])], np.cov(rows[:, [0, 2]].T, bias=True), rtol=1e-4)
