"""Layers on one input as one: which, where, and why not."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from graphopt.pipeline import Pipeline, Result, Settings
from graphopt.runtime import Session


def model(text: str, opset: int = 17, **weights: Any) -> onnx.ModelProto:
    """Return a model from its text form; `weights` (shapes or arrays) become initializers."""
    made = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]>\n{text}')
    for name, given in weights.items():
        rng = np.random.default_rng(len(name))
        values = rng.normal(size=given) if isinstance(given, tuple) else given
        made.graph.initializer.append(numpy_helper.from_array(np.asarray(values, np.float32), name))
    return made


def run(proto: onnx.ModelProto) -> Result:
    result = Pipeline("merge-parallel, eliminate-dead").run(proto, settings=Settings(verify="off", on_failure="stop"))
    onnx.checker.check_model(result.proto, full_check=True)
    rng = np.random.default_rng(0)
    shapes = {i.name: [d.dim_value or 3 for d in i.type.tensor_type.shape.dim] for i in proto.graph.input}
    feeds = {name: np.asarray(rng.normal(size=shape), np.float32) for name, shape in shapes.items()}
    for mode in ("off", "all"):
        wanted, found = (Session(p, optimization=mode).run(feeds) for p in (proto, result.proto))
        assert list(wanted) == list(found)
        for name in wanted:
            scale = float(np.abs(wanted[name]).max(initial=1e-30))
            np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=1e-5 * scale)  # the passes' promise
    return result


def ops(result: Result) -> Counter[str]:
    return Counter(node.op for node in result.model.graph.nodes)


def reasons(result: Result) -> str:
    return "\n".join(b["why"] for record in result.report.passes for b in record.blocked)


def test_neighbours_in_a_concat_become_one() -> None:
    proto = model(
        """g (float[N,8,5,5] x) => (float[N,K,5,5] y) {
            a = Conv(x, wa, ba)  b = Conv(x, wb)  c = Conv<pads=[1,1,1,1]>(x, wc)  d = Conv(x, wa, ba)
            ra = Relu(a) rb = Relu(b) rc = Relu(c) rd = Relu(d)  y = Concat<axis=1>(ra, rb, rc, rd) }""",
        wa=(3, 8, 1, 1), ba=(3,), wb=(2, 8, 1, 1), wc=(4, 8, 3, 3),
    )  # fmt: skip
    assert ops(run(proto)) == {"Conv": 3, "Relu": 3, "Concat": 1}


def test_a_whole_concat_goes() -> None:
    proto = model(
        """g (float[N,4,6] x) => (float[N,4,5] y) {
            a = MatMul(x, wa)  sa = Add(a, ba)  b = MatMul(x, wb)  y = Concat<axis=-1>(sa, b) }""",
        wa=(6, 3), ba=(3,), wb=(6, 2),
    )  # fmt: skip
    assert ops(run(proto)) == {"MatMul": 1, "Add": 1}


@pytest.mark.parametrize("opset", [11, 13, 21])
def test_narrow_heads_become_one_and_a_split(opset: int) -> None:
    proto = model(
        """g (float[N,8,5,5] x) => (float[N,2,5,5] y, float[N,1,5,5] z) {
            a = Conv<pads=[1,1,1,1]>(x, wa)  y = Sigmoid(a)  b = Conv<pads=[1,1,1,1]>(x, wb, bb)  z = Sigmoid(b) }""",
        opset, wa=(2, 8, 3, 3), wb=(1, 8, 3, 3), bb=(1,),
    )  # fmt: skip
    assert ops(run(proto)) == {"Conv": 1, "Sigmoid": 1, "Split": 1}


STAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "no block of output channels is saved": (
        "g (float[1,64,3,3] x) => (float[1,16,3,3] y, float[1,16,3,3] z) { y = Conv(x, wa)  z = Conv(x, wb) }",
        {"wa": (16, 64, 1, 1), "wb": (16, 64, 1, 1)},
    ),
    "too few inputs for each output": (
        "g (float[1,4,3,3] x) => (float[1,1,3,3] y, float[1,1,3,3] z) { y = Conv(x, wa)  z = Conv(x, wb) }",
        {"wa": (1, 4, 1, 1), "wb": (1, 4, 1, 1)},
    ),
    "no block of columns is saved": (
        "g (float[64,8] x) => (float[64,32] y, float[64,32] z) { y = MatMul(x, wa)  z = MatMul(x, wb) }",
        {"wa": (8, 32), "wb": (8, 32)},
    ),
    "only 3 rows are certain": (
        "g (float[N,3,8] x) => (float[N,3,2] y, float[N,3,2] z) { y = MatMul(x, wa)  z = MatMul(x, wb) }",
        {"wa": (8, 2), "wb": (8, 2)},
    ),
    "is used elsewhere, too": (
        "g (float[1,64,3,3] x, float[1,64,3,3] t) => (float[1,20,3,3] y, float[1,2,3,3] z, float[1,20,3,3] u)"
        "{ y = Conv(x, wa)  z = Conv(x, wb)  u = Conv(t, wa) }",
        {"wa": (20, 64, 1, 1), "wb": (2, 64, 1, 1)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", STAYS)
def test_layers_that_stay_apart(reason: str) -> None:
    text, weights = STAYS[reason]
    proto = model(text, **weights)
    result = run(proto)
    assert reason in reasons(result)
    assert "Split" not in ops(result)


UNLIKE = {
    "strides": "a = Conv<strides=[2,2]>(x, wa)  b = Conv<strides=[1,1]>(x, wa)",
    "groups": "a = Conv<group=2>(x, wg)  b = Conv<group=2>(x, wg)",
    "kernels": "a = Conv(x, wa)  b = Conv(x, wk)",
    "inputs": "t = Relu(x)  a = Conv(x, wa)  b = Conv(t, wa)",
}


@pytest.mark.parametrize("what", UNLIKE)
def test_layers_that_differ_are_no_group(what: str) -> None:
    proto = model(
        f"g (float[1,8,6,6] x) => (float[1,K,L,M] a, float[1,S,T,U] b) {{ {UNLIKE[what]} }}",
        wa=(2, 8, 1, 1), wg=(2, 4, 1, 1), wk=(2, 8, 3, 3),
    )  # fmt: skip
    assert ops(run(proto))["Conv"] == 2


def test_what_lies_between_must_be_the_same() -> None:
    proto = model(
        """g (float[1,8,6,6] x) => (float[1,4,6,6] y) { a = Conv(x, wa)  b = Conv(x, wa)
            ra = LeakyRelu<alpha=0.1>(a)  rb = LeakyRelu<alpha=0.2>(b)  y = Concat<axis=1>(ra, rb) }""",
        wa=(2, 8, 1, 1),
    )
    assert ops(run(proto))["Conv"] == 2


def test_thousands_of_neighbours_are_one_change() -> None:
    count = 3000
    lines = "".join(f" h{i} = MatMul(x, w)" for i in range(count))
    names = ", ".join(f"h{i}" for i in range(count))
    proto = model(f"g (float[N,4] x) => (float[N,{count}] y) {{ {lines} y = Concat<axis=1>({names}) }}", w=(4, 1))
    result = Pipeline("merge-parallel").run(proto, settings=Settings(verify="off", on_failure="stop"))
    assert ops(result) == {"MatMul": 1}
    assert [record.changes for record in result.report.passes] == [1]
