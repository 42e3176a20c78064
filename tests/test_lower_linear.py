"""The lowering of convolutions: one dimension as two, odd widths rounded up, means as pools."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from graphopt.base import Target
from graphopt.errors import SpecError
from graphopt.pipeline import Pipeline, Result, Settings
from graphopt.runtime import Session


def model(text: str, opset: int = 17, **weights: Any) -> onnx.ModelProto:
    """Return a model from its text form; `weights` (shapes or arrays) become initializers."""
    made = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]>\n{text}')
    for name, given in weights.items():
        rng = np.random.default_rng(len(name))
        values = np.asarray(rng.normal(size=given), np.float32) if isinstance(given, tuple) else np.asarray(given)
        made.graph.initializer.append(numpy_helper.from_array(values, name))
    return made


def run(pipeline: str, proto: onnx.ModelProto, target: Target | None = None) -> Result:
    settings = Settings(verify="off", on_failure="stop", target=target or Target())
    result = Pipeline(f"{pipeline}, eliminate-dead").run(proto, settings=settings)
    onnx.checker.check_model(result.proto, full_check=True)
    rng = np.random.default_rng(0)
    shapes = {i.name: [d.dim_value or 3 for d in i.type.tensor_type.shape.dim] for i in proto.graph.input}
    feeds = {name: np.asarray(rng.normal(size=shape), np.float32) for name, shape in shapes.items()}
    for mode in ("off", "all"):
        wanted, found = (Session(p, optimization=mode).run(feeds) for p in (proto, result.proto))
        for name in wanted:
            scale = float(np.abs(wanted[name]).max(initial=1e-30))
            np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=1e-5 * scale)  # the passes' promise
    return result


def ops(result: Result) -> Counter[str]:
    return Counter(node.op for node in result.model.graph.nodes)


def reasons(result: Result) -> str:
    return "\n".join(b["why"] for record in result.report.passes for b in record.blocked)


SEPARABLE = """g (float[N,16,20] x) => (float[N,16,20] y) {
    a = Conv<group=16, pads=[2,2]>(x, depth)  b = Conv(a, point, bias)  c = PRelu(b, slope)
    d = Add(c, x)  e = Mul(d, scale)  f = Conv<group=16, pads=[4,0], dilations=[2]>(e, three)  y = Add(f, rows) }"""
PARTS: dict[str, Any] = {
    "depth": (16, 1, 5), "point": (16, 16, 1), "bias": (16,), "slope": (16, 1), "scale": (1, 16, 1),
    "three": (16, 1, 3), "rows": (16, 20),
}  # fmt: skip


@pytest.mark.parametrize("opset", [11, 13, 21])
def test_a_chain_is_lifted_whole(opset: int) -> None:
    """The input is taken up once, the output let down once; every operator between has four axes."""
    result = run("lower-conv1d", model(SEPARABLE, opset, **PARTS))
    found = ops(result)
    assert found.pop("Unsqueeze") == found.pop("Squeeze") == 1
    assert found == {"Conv": 3, "PRelu": 1, "Add": 2, "Mul": 1}
    assert all(len(n.inputs[1].shape) == 4 for n in result.model.graph.nodes if n.op == "Conv")


def test_what_others_read_is_let_down() -> None:
    proto = model(
        """g (float[N,16,8] x) => (float[N,16,8] y, float[N,8,16] t, float[N,16,1,8] u) {
            a = Conv<group=16, pads=[1,1]>(x, w)  y = Relu(a)
            t = Transpose<perm=[0,2,1]>(a)  u = Unsqueeze(y, two) }""",
        w=(16, 1, 3), two=np.array([2]),
    )  # fmt: skip
    result = run("lower-conv1d", proto)
    assert ops(result) == {"Unsqueeze": 2, "Conv": 1, "Relu": 1, "Squeeze": 2, "Transpose": 1}


def test_pools_pads_and_concats_take_part() -> None:
    proto = model(
        """g (float[N,16,12] x) => (float[N,32,1] y) {
            p = Pad(x, pads)  a = Conv<group=16>(p, w)  b = Conv<group=16, auto_pad="SAME_UPPER">(x, w)
            ab = Concat<axis=-2>(a, b)  m = MaxPool<kernel_shape=[2], strides=[2], pads=[1,0]>(ab)
            c = Conv<group=32, pads=[1,1]>(m, v)  y = GlobalAveragePool(c) }""",
        w=(16, 1, 3), v=(32, 1, 3), pads=np.array([0, 0, 2, 0, 0, 0]),
    )  # fmt: skip
    result = run("lower-conv1d", proto)
    assert ops(result)["Squeeze"] == 1
    assert sum(len(t.outputs) for n in result.model.graph.nodes for t in n.outputs if n.op == "Unsqueeze") <= 2


STAYS = {
    "pointwise": "g (float[N,16,8] x) => (float[N,16,8] y) { y = Conv(x, w1) }",
    "waste": "g (float[N,16,8] x) => (float[N,20,6] y) { y = Conv(x, w20) }",
    "never blocked": "g (float[N,18,8] x) => (float[N,16,6] y) { y = Conv(x, w18) }",
    "odd depthwise": "g (float[N,15,8] x) => (float[N,15,6] y) { y = Conv<group=15>(x, w15) }",
}


@pytest.mark.parametrize("what", STAYS)
def test_convolutions_without_gain_stay(what: str) -> None:
    proto = model(STAYS[what], w1=(16, 16, 1), w20=(20, 16, 3), w15=(15, 1, 3), w18=(16, 18, 3))
    assert ops(run("lower-conv1d{seeds=all}", proto)) == {"Conv": 1}


def test_other_convolutions_are_lifted_when_asked_for() -> None:
    proto = model("g (float[N,16,8] x) => (float[N,16,6] y) { y = Conv(x, w) }", w=(16, 16, 3))
    assert ops(run("lower-conv1d", proto)) == {"Conv": 1}
    assert ops(run("lower-conv1d{seeds=all}", proto)) == {"Unsqueeze": 1, "Conv": 1, "Squeeze": 1}


def test_other_seeds_are_refused() -> None:
    with pytest.raises(SpecError, match="no seeds"):
        Pipeline("lower-conv1d{seeds=some}")


@pytest.mark.parametrize("name", ["lower-conv1d", "widen-channels"])
def test_other_providers_have_other_layouts(name: str) -> None:
    proto = model(SEPARABLE, **PARTS)
    assert run(name, proto, Target(provider="cuda")).report.passes[0].status != "changed"


ODD = """g (float[N,3,8,8] x) => (float[N,4,4,4] y) {
    a = Conv<pads=[1,1,1,1]>(x, w, b)  r = Relu(a)  n = BatchNormalization(r, s, b, b, s)
    d = Conv<group=30, pads=[1,1,1,1]>(n, depth, b)  g0 = GlobalAveragePool(d)  g1 = Conv(g0, gate)  g2 = Sigmoid(g1)
    m = Mul(d, g2)  c = Conv(m, mid)  z = Add(c, r)  k = Mul(z, per)  p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(k)
    y = Conv(p, out) }"""


def test_odd_widths_are_rounded_up_together() -> None:
    result = run(
        "widen-channels",
        model(
            ODD, w=(30, 3, 3, 3), b=(30,), s=np.full(30, 1.5, np.float32), depth=(30, 1, 3, 3), gate=(30, 30, 1, 1),
            mid=(30, 30, 1, 1), per=(30, 1, 1), out=(4, 30, 1, 1),
        ),
    )  # fmt: skip
    convs = [n for n in result.model.graph.nodes if n.op == "Conv"]
    assert [n.inputs[1].shape[0] for n in convs] == [32, 32, 32, 32, 4]
    assert [n.attrs.get("group", 1) for n in convs] == [1, 32, 1, 1, 1]


REFUSED = {
    "reads them": "a = Conv(x, w)  f = Flatten(a)  y = MatMul(f, flat)",
    "is an input or output of the graph": "y = Conv(x, w)",
    "has groups": "a = Conv(x, w)  y = Conv<group=2>(a, grouped)",
    "channels would be computed for each": "a = Conv(x, thin)  r = Relu(a)  y = Conv(r, back)",
}
SHAPES = {"reads them": "1,2"}


@pytest.mark.parametrize("reason", REFUSED)
def test_widths_that_stay(reason: str) -> None:
    proto = model(
        f"g (float[1,4,4,4] x) => (float[{SHAPES.get(reason, '1,K,4,4')}] y) {{ {REFUSED[reason]} }}",
        w=(30, 4, 1, 1), flat=(480, 2), grouped=(2, 15, 1, 1), thin=(26, 4, 1, 1), back=(4, 26, 1, 1),
    )  # fmt: skip
    result = run("widen-channels", proto)
    assert reason in reasons(result)
    assert result.report.passes[0].changes == 0


@pytest.mark.parametrize("keepdims", [0, 1])
def test_means_behind_convolutions_become_pools(keepdims: int) -> None:
    shape = "N,16,1,1" if keepdims else "N,16"
    proto = model(
        f"g (float[N,3,5,5] x) => (float[{shape}] y) {{"
        f" a = Conv(x, w)  r = Relu(a)  y = ReduceMean<axes=[-1,-2], keepdims={keepdims}>(r) }}",
        w=(16, 3, 1, 1),
    )
    found = ops(run("lower-pools", proto))
    assert found["GlobalAveragePool"] == 1
    assert found["Flatten"] == 1 - keepdims


def test_means_elsewhere_stay() -> None:
    proto = model("g (float[N,16,5,5] x) => (float[N,16,1,1] y) { r = Relu(x)  y = ReduceMean<axes=[2,3]>(r) }")
    assert "no convolution or pool before it" in reasons(run("lower-pools", proto))
