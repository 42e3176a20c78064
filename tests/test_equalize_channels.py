"""equalize-channels: the same to the bit, channels of one size, at rest after one run; refused with the reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from graphopt.data import load_samples
from graphopt.equalization import LARGEST, balanced, filled, within_reach
from graphopt.errors import SpecError
from graphopt.model import load
from graphopt.pipeline import Pipeline, Result, Settings
from graphopt.runtime import Optimization, Session

Array = np.ndarray[Any, Any]


class Net:
    """Grows a graph node by node; weights have channels of very different sizes, some of them zero."""

    def __init__(self, seed: int, channels: int = 4) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.inits: dict[str, Array] = {}
        self.last, self.channels, self.count = "x", channels, 0

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.inits)}"
        values = self.rng.normal(size=shape) * np.exp2(self.rng.integers(-6, 7, (shape[0],) + (1,) * (len(shape) - 1)))
        if self.rng.random() < 0.3:
            values[int(self.rng.integers(shape[0]))] = 0
        self.inits[name] = values.astype(np.float32)
        return name

    def add(self, op: str, *more: str, **attrs: Any) -> str:
        self.count += 1
        out = f"t{self.count}"
        self.nodes.append(helper.make_node(op, [self.last, *more], [out], name=f"n{self.count}", **attrs))
        self.last = out
        return out

    def conv(self, outputs: int, group: int = 1, size: int = 1) -> str:
        weight = self.weight(outputs, self.channels // group, size, size)
        self.channels = outputs
        return self.add("Conv", weight, self.weight(outputs), group=group, pads=[size // 2] * 4)

    def model(self) -> onnx.ModelProto:
        rank = 2 if any(n.op_type == "Flatten" for n in self.nodes) else 4
        graph = helper.make_graph(
            self.nodes, "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4, 6, 6])],
            [helper.make_tensor_value_info(self.last, TensorProto.FLOAT, [None] * rank)],
            [numpy_helper.from_array(v, k) for k, v in self.inits.items()],
        )  # fmt: skip
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def x(seed: int = 0) -> dict[str, Array]:
    return {"x": np.asarray(np.random.default_rng(seed).normal(size=(2, 4, 6, 6)), np.float32)}


def run(text: str, model: Any, *, data: bool = False) -> Result:
    samples = load_samples([x(s) for s in range(3)], load(model)) if data else None
    return Pipeline(text).run(model, samples=samples, settings=Settings(verify="off", on_failure="stop"))


def assert_same(before: Any, after: Any) -> None:
    modes: tuple[tuple[Optimization, float], ...] = (("off", 0.0), ("all", 1e-6))  # fused kernels may sum otherwise
    for mode, tolerance in modes:
        wanted, found = (next(iter(Session(m, optimization=mode).run(x(9)).values())) for m in (before, after))
        largest = float(np.abs(wanted).max())
        assert float(np.abs(wanted - found).max()) <= tolerance * largest


def grow(seed: int) -> onnx.ModelProto:
    """Return a random chain of layers and what may stand between them."""
    net = Net(seed)
    for _ in range(int(net.rng.integers(2, 6))):
        kind = net.rng.integers(0, 4)
        if kind == 0:
            net.conv(net.channels, group=net.channels, size=3)
        elif kind == 1:
            net.conv(8, group=2 if net.channels % 2 == 0 else 1, size=1)
        else:
            net.conv(int(net.rng.choice([4, 6, 8])))
        between = net.rng.integers(0, 6)
        if between < 2:
            net.add("Relu")
        elif between == 2:
            net.add("LeakyRelu", alpha=0.1)
        elif between == 3:
            net.inits["slope"] = np.asarray(net.rng.uniform(0, 1, (1,)), np.float32)
            net.add("PRelu", "slope")
        elif between == 4:
            net.add("MaxPool" if net.rng.random() < 0.5 else "AveragePool", kernel_shape=[3, 3], pads=[1] * 4)
    if net.rng.random() < 0.5:
        net.add("Flatten")
        net.add("Gemm", net.weight(5, net.channels * 36), transB=1)
    return net.model()


@settings(max_examples=60)
@given(st.integers(0, 100_000), st.sampled_from(["weights", "samples"]))
def test_random_chains_compute_the_same_and_come_to_rest(seed: int, by: str) -> None:
    model = grow(seed)
    text = f"equalize-channels{{by={by}}}"
    once = run(text, model, data=True)
    onnx.checker.check_model(once.proto, full_check=True)
    assert_same(model, once.proto)
    assert run(text, once.proto, data=True).report.passes[0].status != "changed"


def ranges(model: Any) -> tuple[Array, Array]:
    """Return the largest weight of each row of the first layer, and of each column of the second."""
    nodes = [n for n in load(model).graph.nodes if n.op == "Conv"]
    first, second = (np.abs(n.inputs[1].values) for n in nodes)
    return first.max(axis=(1, 2, 3)), second.max(axis=(0, 2, 3))


def test_rows_and_columns_become_equally_large() -> None:
    net = Net(0)
    net.conv(16)
    net.add("Relu")
    net.conv(4)
    model = net.model()
    first, second = ranges(run("equalize-channels", model).proto)
    alive = (first > 0) & (second > 0)
    before = np.log2((ranges(model)[0] / ranges(model)[1])[alive])
    after = np.log2((first / second)[alive])
    assert np.abs(before).max() > 4
    assert np.abs(after).max() <= 1  # factors are powers of two, of which rows take one and columns the other


def test_channels_before_a_depthwise_layer_fill_the_range() -> None:
    net = Net(1)
    net.conv(8)
    net.add("Relu")
    net.conv(8, group=8, size=3)
    model = net.model()
    found = run("equalize-channels{by=samples}", model, data=True)
    values = [
        np.max([Session(m, extra_outputs=["t2"]).run(x(s))["t2"].max(axis=(0, 2, 3)) for s in range(3)], axis=0)
        for m in (model, found.proto)
    ]
    alive = values[0] > 0
    assert (values[0][alive] < values[0].max() / 8).any()
    dead = ~load(model).graph.nodes[2].inputs[1].values.any(axis=(1, 2, 3))
    assert (values[1][alive & ~dead] > values[1].max() / 2.001).all()
    assert values[1].max() == values[0].max()


def blocked(text: str, **inits: Array) -> dict[str, str]:
    """Return why nothing was done at each layer of a graph."""
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g (float[1, 4, 6, 6] x) => (float y) {text}'
    )
    given = {"w": np.ones((4, 4, 1, 1)), "v": np.ones((4, 4, 1, 1)), **inits}
    names = {i for n in model.graph.node for i in n.input}
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(v, np.float32), k) for k, v in given.items() if k in names
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    found = run("equalize-channels", model)
    assert found.report.passes[0].changes == 0
    return {c["where"]: c["why"] for c in found.report.passes[0].blocked}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{ a = Conv(x, w) b = Sigmoid(a) y = Conv(b, v) }", "Sigmoid 'b' reads it"),
        ("{ a = Conv(x, w) b = Clip(a, lo, hi) y = Conv(b, v) }", "Clip 'b' reads it"),
        ("{ a = Conv(x, w) b = Conv(a, v) y = Add(a, b) }", "Add 'y' reads it"),
        ("{ a = Conv(x, w) y = Conv(a, w) }", "several nodes read the weight"),
        ("{ a = Conv(x, w) b = Abs(w) c = Conv(a, v) y = Mul(c, b) }", "several nodes read the weight"),
        ("{ a = Conv(x, w) b, i = MaxPool <kernel_shape = [1, 1]> (a) c = Conv(b, v)"
         " d = Cast <to = 1> (i) y = Add(c, d) }", "has several results"),
        ("{ a = Conv(x, w) v2 = Neg(v) y = Conv(a, v2) }", "is no float32 initializer"),
        ("{ y = Conv(x, w) }", "is an output of the graph"),
    ],
)  # fmt: skip
def test_what_cannot_be_rescaled_is_named(text: str, reason: str) -> None:
    found = blocked(text, lo=np.array(0.0), hi=np.array(6.0))
    assert any(reason in why for where, why in found.items() if where in ("a", "y")), found


def test_a_shared_bias_stays_as_it_is_for_others() -> None:
    net = Net(3)
    net.conv(4)
    net.add("Relu")
    net.conv(4)
    model = net.model()
    model.graph.node[2].input[2] = model.graph.node[0].input[2]
    del model.graph.initializer[3]
    found = run("equalize-channels", model)
    assert found.report.passes[0].changes == 1
    assert_same(model, found.proto)


def test_exponents() -> None:
    first, second = np.array([16.0, 1.0, 0.0, np.nan, 1e30]), np.array([1.0, 16.0, 1.0, 1.0, 1e-30])
    assert balanced(first, second).tolist() == [2, -2, 0, 0, LARGEST]
    assert filled(np.array([8.0, 4.0, 4.1, 0.1, 0.0])).tolist() == [0, -1, 0, -6, 0]
    assert filled(np.zeros(2)).tolist() == [0, 0]
    values = np.array([[1e-29, 0.0], [1.0, 2.0], [0.0, 0.0], [1e29, 0.0]])
    assert within_reach(values, np.array([-8, 3, 12, 8])).tolist() == [False, True, True, False]


def test_what_is_no_choice_is_refused() -> None:
    with pytest.raises(SpecError, match="by is one of weights, samples"):
        Pipeline("equalize-channels{by=magic}")
