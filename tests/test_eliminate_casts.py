"""Which conversions cancel: a table of types against what NumPy says, movement between, and what loses something."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest

from graphopt.passes.fuse_casts import holds
from graphopt.pipeline import Pipeline, Result, Settings
from graphopt.runtime import Session

HEAD = '<ir_version: 8, opset_import: ["": 17]>\n'

TYPES = [
    np.dtype(t) for t in (bool, "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", ml_dtypes.bfloat16, "f4", "f8")
]


def samples(dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Return the ends of a type, and numbers of which a shorter one drops a bit."""
    if dtype == np.bool_:
        return np.array([False, True])
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        found = [info.min, info.max, info.max - 1, info.max // 2 + 1, info.max // 3, 0, 1]
        return np.array(found, dtype)
    limits = ml_dtypes.finfo(dtype)
    return np.array([limits.max, limits.smallest_subnormal, limits.smallest_normal, 1 + limits.eps, -1.5], dtype)


@pytest.mark.parametrize(("wide", "narrow"), list(itertools.product(TYPES, TYPES)), ids=str)
def test_holds_is_what_a_round_trip_says(wide: np.dtype[Any], narrow: np.dtype[Any]) -> None:
    values = samples(narrow)
    with np.errstate(all="ignore"):
        through = values.astype(wide)
        back = through.astype(narrow)
    exact = bool((back == values).all()) and bool((_number(through) == _number(values)).all())
    if holds(wide, narrow):
        assert exact
    elif wide != np.bool_ and (narrow.kind, wide.name) not in (("i", "float16"), ("u", "float16")):
        assert not exact


def _number(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return values as Python numbers, so that no comparison rounds."""
    return np.array([v.item() if v.dtype.kind in "iub" else float(v) for v in values], object)


def run(text: str) -> Result:
    model = onnx.parser.parse_model(HEAD + text)
    return Pipeline("repeat(eliminate-casts, fuse-movement, eliminate-identity, eliminate-dead)").run(
        model, settings=Settings(verify="off", on_failure="stop")
    )


def casts(result: Result) -> int:
    return Counter(n.op for n in result.model.graph.nodes)["Cast"]


HALF_EXPORT = """g (float16[N,4,6] x, float16[N,2,6] z) => (float16[N,6,6] y)
<int64[3] shape = {0, 3, 8}, int64[3] back = {0, 6, 4}, int64[1] a = {0}, int64[1] b = {3}, int64[1] two = {2}>
{
  x1 = Cast<to = 1>(x) x2 = Reshape(x1, shape) x3 = Cast<to = 10>(x2) x4 = Cast<to = 1>(x3)
  x5 = Reshape(x4, back) x6 = Transpose<perm = [0, 2, 1]>(x5) z1 = Cast<to = 1>(z)
  y1 = Concat<axis = 1>(x6, z1) y2 = Cast<to = 10>(y1) y = Identity(y2)
}"""


def test_a_half_export_moves_halves() -> None:
    result = run(HALF_EXPORT)
    assert casts(result) == 0
    rng = np.random.default_rng(0)
    feeds = {"x": rng.normal(size=(2, 4, 6)).astype(np.float16), "z": rng.normal(size=(2, 2, 6)).astype(np.float16)}
    a, b = (Session(m, optimization="off").run(feeds)["y"]
            for m in (onnx.parser.parse_model(HEAD + HALF_EXPORT), result.proto))  # fmt: skip
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("source", "middle", "last", "kept"),
    [
        ("float", 10, 1, 2),  # rounds to float16 between
        ("float", 11, 1, 0),
        ("float", 7, 1, 2),  # drops fractions
        ("float16", 1, 11, 1),
        ("int32", 7, 1, 1),
        ("int64", 6, 7, 2),  # wraps
        ("int32", 1, 7, 2),  # rounds above 2**24
        ("int32", 11, 6, 0),
        ("int32", 11, 2, 2),  # 300.0 to uint8 is not 300 to uint8
        ("int32", 7, 2, 1),
        ("int64", 1, 9, 2),  # float32 does not hold it
        ("int32", 11, 9, 1),
        ("bool", 1, 9, 0),
        ("uint8", 10, 2, 2),  # float16 has 11 bits, but nobody needs that
    ],
)
@pytest.mark.parametrize("move", ["", "Transpose"])
def test_pairs(source: str, middle: int, last: int, kept: int, move: str) -> None:
    names = {1: "float", 2: "uint8", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "double"}
    between = "b = Transpose<perm = [1, 0]>(a)" if move else "b = Identity(a)"
    text = f"""g ({source}[3,3] x) => ({names[last]}[3,3] y) {{ a = Cast<to = {middle}>(x) {between}
        c = Cast<to = {last}>(b) y = Identity(c) }}"""
    assert casts(run(text)) == kept


def test_constants_must_be_exact() -> None:
    text = """g (float16[2] x) => (float16[4] y) <float[2] c = {%s, 2}>
        { a = Cast<to = 1>(x) b = Concat<axis = 0>(a, c) y = Cast<to = 10>(b) }"""
    assert casts(run(text % "0.5")) == 0
    result = run(text % "0.1")
    assert casts(result) == 2
    assert "not exactly of type float16" in result.report.passes[0].blocked[0]["why"]


def test_other_readers_of_the_moved_values_block() -> None:
    result = run(
        """g (float16[2,3] x) => (float16[3,2] y, float[3,2] z)
        { a = Cast<to = 1>(x) b = Transpose<perm = [1, 0]>(a) y = Cast<to = 10>(b) z = Exp(b) }"""
    )
    assert casts(result) == 2
    assert result.report.passes[0].blocked[0]["why"] == "'b' is used elsewhere, too"
