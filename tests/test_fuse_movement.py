"""Views with dynamic sizes, cuts against Python's own slices, pads of pools, and what ORT makes of the result."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib import NumpyVersion

from graphopt.passes.fuse_cuts import OPEN, as_cut, as_range, composed
from graphopt.passes.fuse_views import inserted, product, quotient, reshaped
from graphopt.pipeline import Pipeline, Result, Settings
from graphopt.runtime import Session

HEAD = '<ir_version: 8, opset_import: ["": 17]>\n'

CHAIN = "repeat(canonicalize, fuse-movement, fuse-parts, eliminate-identity, eliminate-common, eliminate-dead)"


def parse(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(HEAD + text)


def run(text: str, pipeline: str = CHAIN) -> Result:
    return Pipeline(pipeline).run(parse(text), settings=Settings(verify="off", on_failure="stop"))


def ops(result: Result) -> list[str]:
    return [n.op for n in result.model.graph.nodes]


def assert_equal(text: str, result: Result, **feeds: Any) -> None:
    """Elements are only moved: all must be equal, ORT's optimisations off."""
    a, b = (Session(m, optimization="off").run(feeds) for m in (parse(text), result.proto))
    for name, x in a.items():
        np.testing.assert_array_equal(b[name], x, err_msg=name)


CUTS = st.tuples(st.integers(-9, 9), st.integers(-9, 9) | st.just(OPEN), st.integers(-3, 3).filter(bool))


@settings(max_examples=500)
@given(inner=CUTS, outer=CUTS, size=st.integers(1, 9), known=st.booleans())
def test_one_cut_for_two(inner: tuple[int, int, int], outer: tuple[int, int, int], size: int, known: bool) -> None:
    """Where a cut is found without the size, it holds for every size."""
    made = composed(inner, outer, size if known else "N")
    if made is None:
        return
    taken = as_range(inner, size)
    assert [taken[i] for i in as_range(outer, len(taken))] == list(as_range(made, size))


@given(cut=CUTS, size=st.integers(1, 9))
def test_a_range_is_a_cut(cut: tuple[int, int, int], size: int) -> None:
    taken = as_range(cut, size)
    made = as_cut(taken)
    assert (made is None) == (len(taken) == 0)
    assert made is None or list(as_range(made, size)) == list(taken)


def test_sizes_are_monomials() -> None:
    n, m, six = (1, (0,)), (1, (1,)), (6, ())
    assert product([n, six, m, n]) == (6, (0, 0, 1))
    assert quotient((6, (0, 1)), n) == (6, (1,))
    assert quotient((6, (0,)), m) is None
    assert quotient(six, (4, ())) is None
    assert reshaped([0, -1], [n, m, six], allowzero=False) == [n, (6, (1,))]
    assert reshaped([-1, 4], [n, six], allowzero=False) is None
    assert inserted([n, six], [(1, ()), n, (1, ()), six]) == [0, 2]
    assert inserted([n, six], [six, n]) is None


@pytest.mark.parametrize(
    ("body", "rank", "left"),
    [
        ("a = Flatten<axis = 2>(x) y = Reshape(a, four)", 4, ["Reshape"]),
        ("a = Unsqueeze(x, one) b = Unsqueeze(a, three) y = Squeeze(b, one)", 4, ["Unsqueeze"]),
        ("a = Unsqueeze(x, one) y = Reshape(a, same)", 3, ["Identity"]),
        ("a = Reshape(x, four) b = Reshape(a, back) y = Relu(b)", 3, ["Relu"]),
        ("a = Reshape(x, four) b = Unsqueeze(a, one) c = Flatten(b) y = Relu(c)", 2, ["Flatten", "Relu"]),
    ],
)
def test_chains_of_views_with_a_dynamic_batch(body: str, rank: int, left: list[str]) -> None:
    text = f"""g (float[N,6,4] x) => (float[{",".join("ABCD"[:rank])}] y)
        <int64[1] one = {{1}}, int64[1] three = {{3}}, int64[4] four = {{-1, 3, 2, 4}}, int64[3] same = {{0, 6, 4}},
         int64[3] back = {{-1, 6, 4}}> {{ {body} }}"""
    result = run(text)
    assert ops(result) == left
    for batch in (1, 3):
        assert_equal(text, result, x=np.random.default_rng(0).normal(size=(batch, 6, 4)).astype(np.float32))


FOCUS = """g (float[1,3,16,16] x) => (float[1,12,8,8] y)
<int64[1] zero = {0}, int64[1] one = {1}, int64[1] end = {9223372036854775807}, int64[1] h = {2}, int64[1] w = {3},
 int64[1] two = {2}>
{
  a = Slice(x, zero, end, h, two) a0 = Slice(a, zero, end, w, two) b = Slice(x, one, end, h, two)
  b0 = Slice(b, zero, end, w, two) a1 = Slice(a, one, end, w, two) b1 = Slice(b, one, end, w, two)
  y = Concat<axis = 1>(a0, b0, a1, b1)
}"""


def test_ort_knows_focus_by_slices_of_two_axes(tmp_path: Path) -> None:
    """YOLO's Focus, as torch exports it, is taken for SpaceToDepth by ORT < 1.32 only once each pair of Slices is one.

    ORT 1.32 finds it in both forms.
    """
    result = run(FOCUS)
    assert Counter(ops(result)) == {"Slice": 4, "Concat": 1}
    found = []
    for i, model in enumerate((parse(FOCUS), result.proto)):
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / f"{i}.onnx")
        options.log_severity_level = 4
        ort.InferenceSession(model.SerializeToString(), options)
        found.append({n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node})
    assert ("SpaceToDepth" in found[0]) == (NumpyVersion(ort.__version__) >= "1.32.0")
    assert "SpaceToDepth" in found[1]
    assert_equal(FOCUS, result, x=np.random.default_rng(0).normal(size=(1, 3, 16, 16)).astype(np.float32))


@pytest.mark.parametrize(("above", "value"), list(itertools.product(["Relu", "Neg"], ["zero", "lowest", "one"])))
def test_padding_that_a_maximum_never_sees(above: str, value: str) -> None:
    text = f"""g (float[1,2,6,6] x) => (float[1,2,6,6] y)
        <int64[8] p = {{0, 0, 1, 1, 0, 0, 1, 1}}, float zero = {{0}}, float lowest = {{-inf}}, float one = {{1}}>
        {{ a = {above}(x) b = Pad(a, p, {value}) y = MaxPool<kernel_shape = [3, 3]>(b) }}"""
    gone = value == "lowest" or (value == "zero" and above == "Relu")
    result = run(text, "fuse-movement")
    assert ("Pad" not in ops(result)) == gone
    assert_equal(text, result, x=np.random.default_rng(0).normal(size=(1, 2, 6, 6)).astype(np.float32))


@pytest.mark.parametrize(
    ("attributes", "gone"),
    [
        ("pads = [0, 0, 0, 0]", True),
        ("count_include_pad = 1, pads = [1, 1, 1, 1]", True),
        ("pads = [1, 1, 1, 1]", False),
        ("ceil_mode = 1", False),
        ('auto_pad = "SAME_UPPER"', False),
        ('auto_pad = "VALID"', True),
    ],
)
def test_padding_that_a_mean_counts(attributes: str, gone: bool) -> None:
    text = f"""g (float[1,2,6,6] x) => (float[a,b,c,d] y) <int64[8] p = {{0, 0, 1, 0, 0, 0, 1, 1}}>
        {{ b = Pad(x, p) y = AveragePool<kernel_shape = [3, 3], {attributes}>(b) }}"""
    result = run(text, "fuse-movement")
    assert ("Pad" not in ops(result)) == gone
    x = np.random.default_rng(0).normal(size=(1, 2, 6, 6)).astype(np.float32)
    a, b = (Session(m, optimization="off").run({"x": x})["y"] for m in (parse(text), result.proto))
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)  # the order of a sum of nine


SHUFFLED = """g (float[N,8,4,4] x) => (float[N,5,4,4] y)
<int64[5] parts = {0, 2, 4, 4, 4}, int64[4] whole = {0, 8, 4, 4}>
{
  a = Reshape(x, parts) b = Transpose<perm = [0, 2, 1, 3, 4]>(a) c = Reshape(b, whole) y = Conv(c, w)
}"""


def test_a_channel_shuffle_before_a_convolution_goes_into_its_weight() -> None:
    model = parse(SHUFFLED)
    weight = np.random.default_rng(0).normal(size=(5, 8, 1, 1)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    result = Pipeline("fuse-movement").run(model, settings=Settings(verify="off", on_failure="stop"))
    assert ops(result) == ["Conv"]
    x = np.random.default_rng(1).normal(size=(2, 8, 4, 4)).astype(np.float32)
    a, b = (Session(m, optimization="off").run({"x": x})["y"] for m in (model, result.proto))
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)  # sums of eight products in another order
