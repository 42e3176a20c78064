"""Softmax and LogSoftmax: known spellings, near misses, and the rows that ORT computes fastest."""

from __future__ import annotations

import numpy as np
import pytest

from .rewrites import assert_equal_outputs, feeds, ops, parsed, reasons, run

PIPELINE = "canonicalize, fuse-softmax, eliminate-dead"
AXES = {"last": np.array([-1]), "first": np.array([1]), "both": np.array([1, 2])}

TOP = "m = ReduceMax<axes=[-1]>(x) d = Sub(x, m) e = Exp(d)"
SPELLINGS = [
    (f"{TOP} s = ReduceSum(e, last) y = Div(e, s)", "Softmax"),
    (f"{TOP} s = ReduceSum(e, last) r = Reciprocal(s) y = Mul(r, e)", "Softmax"),
    ("e = Exp(x) s = ReduceSum(e, first) y = Div(e, s)", "Softmax"),
    ("m = ReduceMax<axes=[1, 2]>(x) d = Sub(x, m) e = Exp(d) s = ReduceSum(e, last) y = Div(e, s)", "Softmax"),
    (f"{TOP} s = ReduceSum(e, last) l = Log(s) y = Sub(d, l)", "LogSoftmax"),
    (f"{TOP} s = ReduceSum(e, last) l = Log(s) n = Add(m, l) y = Sub(x, n)", "LogSoftmax"),
    ("l = ReduceLogSumExp<axes=[-1]>(x) y = Sub(x, l)", "LogSoftmax"),
    ("s = Softmax<axis=1>(x) y = Log(s)", "LogSoftmax"),
]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("body", "wanted"), SPELLINGS)
def test_spellings(body: str, wanted: str, dtype: str) -> None:
    kind = "float" if dtype == "float32" else "float16"
    before = parsed(body, inputs=f"{kind}[N,4,6] x", outputs=f"{kind}[N,4,6] y", constants=AXES)
    after = run(before, PIPELINE)
    assert ops(after) == wanted
    assert_equal_outputs(before, after.model.proto, tolerance=1e-5 if dtype == "float32" else 4e-3)


NEAR = [
    (f"{TOP} s = ReduceSum(e, both) y = Div(e, s)", "the sum is not over one axis"),
    ("e = Exp(x) s = ReduceSum(e) y = Div(e, s)", "the sum is not over one axis"),
]


@pytest.mark.parametrize(("body", "reason"), NEAR)
def test_near_misses(body: str, reason: str) -> None:
    before = parsed(body, constants=AXES)
    after = run(before, PIPELINE)
    assert any(reason in r for r in reasons(after)), reasons(after)
    assert_equal_outputs(before, after.model.proto)


def test_a_maximum_along_another_axis_stays() -> None:
    before = parsed(f"{TOP} s = ReduceSum(e, first) y = Div(e, s)", constants=AXES)
    after = run(before, PIPELINE)
    assert sorted(n.op for n in after.model.graph.nodes) == ["ReduceMax", "Softmax", "Sub"]
    assert_equal_outputs(before, after.model.proto)


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize(("axis", "wanted"), [(-1, True), (2, True), (1, False)])
def test_arg_max(op: str, axis: int, wanted: bool) -> None:
    body = f"s = {op}(x) y = ArgMax<axis={axis}, keepdims=0>(s)"
    before = parsed(body, outputs="int64[N,A] y")
    after = run(before, PIPELINE)
    assert (ops(after) == "ArgMax") is wanted
    if not wanted:
        assert "softmax is along axis 2, argmax along 1" in reasons(after)
    assert_equal_outputs(before, after.model.proto)


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize(
    ("shape", "axis", "wanted"),
    [
        ("2,5,4,6", 1, "Reshape {} Reshape"),
        ("N,5,4,6", 1, "Reshape {} Reshape"),
        ("2,5,H,W", 1, "Reshape {} Shape Reshape"),
        ("N,5,H,W", -3, "Shape Shape ReduceProd Concat Reshape {} Shape Reshape"),
        ("2,3,5,4,6", 2, "Reshape {} Reshape"),
        ("2,5,4,6", -1, "{}"),
        ("2,5,4,6", 2, "{}"),
        ("N,5,1,6", 1, "{}"),
    ],
)
def test_rows(shape: str, axis: int, wanted: str, op: str) -> None:
    before = parsed(f"y = {op}<axis={axis}>(x)", inputs=f"float[{shape}] x", outputs=f"float[{shape}] y")
    after = run(before, "lower-softmax")
    assert sorted(ops(after).split()) == sorted(wanted.format(op).split())
    assert_equal_outputs(before, after.model.proto, tolerance=1e-7, sizes=(1, 3, 7))
    if any(letter in shape for letter in "NHW"):
        empty = feeds(before, size=0)
        from graphopt.runtime import Session

        found = Session(after.model.proto).run(empty)["y"]
        assert found.shape == empty["x"].shape
    assert run(after.model.proto, "lower-softmax").report.passes[0].status != "changed"
