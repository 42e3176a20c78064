"""Denormal weights become zeros: which, how far, and where a tiny number must stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from graphopt.passes.flush_denormals import threshold
from graphopt.pipeline import Pipeline, Result, Settings
from graphopt.runtime import Session

TINY = float(np.finfo(np.float32).tiny)


def model(text: str, **weights: Any) -> onnx.ModelProto:
    made = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]>\n{text}')
    made.graph.initializer.extend(numpy_helper.from_array(np.asarray(w), n) for n, w in weights.items())
    return made


def run(proto: onnx.ModelProto) -> Result:
    return Pipeline("flush-denormals").run(proto, settings=Settings(verify="off", on_failure="stop"))


def held(result: Result, name: str) -> np.ndarray[Any, Any]:
    found = {c.name: np.asarray(c.values) for c in result.model.constants()}
    return found[name]


@settings(max_examples=100)
@given(
    values=st.lists(st.floats(-(10.0**6), 10.0**6, width=32, allow_subnormal=True), min_size=1, max_size=20),
    small=st.lists(st.integers(-45, -20), max_size=5),
)
def test_what_goes_is_nothing_beside_what_stays(values: list[float], small: list[int]) -> None:
    array = np.asarray([*values, *(10.0**e for e in small)], np.float32)
    limit = threshold(array)
    gone = array[(np.abs(array) < (limit or 0.0)) & (array != 0)]
    assert (limit is None) == (gone.size == 0)
    largest = float(np.abs(array).max())
    assert all(abs(g) < TINY or (abs(g) < 1e-30 and abs(g) <= largest * 2.0**-80) for g in gone.astype(np.float64))
    denormal = (np.abs(array) < TINY) & (array != 0)
    assert set(array[denormal].tolist()) <= set(gone.tolist())


def test_weights_and_biases_are_flushed() -> None:
    weight = np.full((4, 3), 0.5, np.float32)
    weight[0] = 1e-41
    weight[1, 2] = 1e-36
    bias = np.array([1e-40, 1.0, -1e-44, 2.0], np.float32)
    proto = model("g (float[N,3] x) => (float[N,4] y) { y = Gemm<transB=1>(x, w, b) }", w=weight, b=bias)
    result = run(proto)
    assert not held(result, "w")[0].any()
    assert held(result, "w")[1].tolist() == [0.5, 0.5, 0.0]
    assert held(result, "b").tolist() == [0.0, 1.0, 0.0, 2.0]
    feeds = {"x": np.ones((2, 3), np.float32)}
    wanted, found = (Session(p, optimization="off").run(feeds)["y"] for p in (proto, result.proto))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-35)  # three times the largest number dropped
    assert run(result.proto).report.passes[0].status != "changed"


def test_small_numbers_stay_where_all_are_small() -> None:
    weight = np.full((2, 2), 1e-33, np.float32)
    result = run(model("g (float[N,2] x) => (float[N,2] y) { y = MatMul(x, w) }", w=weight))
    assert (held(result, "w") == weight).all()


@pytest.mark.parametrize(
    "text",
    [
        "g (float[N,2] x) => (float[N,2] y) { a = Abs(x)  s = Add(a, w)  y = Log(s) }",
        "g (float[N,2] x) => (float[N,2] y) { a = Max(x, w)  y = Reciprocal(a) }",
        "g (float[N,2] x) => (float[N,2] y, float[N,2] z) { y = Gemm(x, v, w)  z = Div(x, w) }",
    ],
)
def test_guards_against_zero_stay(text: str) -> None:
    weight = np.array([1e-40, 1.0], np.float32)
    result = run(model(text, w=weight, v=np.eye(2, dtype=np.float32)))
    assert (held(result, "w") == weight).all()


def test_other_types_stay() -> None:
    """The smallest float16 numbers are weights like others."""
    weight = np.array([[1e-7, 1.0]], np.float16)
    result = run(model("g (float16[N,1] x) => (float16[N,2] y) { y = MatMul(x, w) }", w=weight))
    assert (held(result, "w") == weight).all()
