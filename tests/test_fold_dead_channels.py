"""Constant channels go into biases and channels that nobody reads are cut, exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.edit import label
from graphopt.errors import SpecError
from graphopt.pipeline import Pipeline, Result, Settings
from graphopt.runtime import Session

Array = np.ndarray[Any, Any]
DEAD = [1, 4, 5, 6]


def network(bias: float, *, pads: int = 0) -> onnx.ModelProto:
    """Two convolutions and a Gemm; four channels of the first have no weight, and this bias."""
    rng = np.random.default_rng(0)
    first = rng.normal(size=(8, 3, 3, 3)).astype(np.float32)
    first[DEAD] = 0
    held = rng.normal(size=8).astype(np.float32)
    held[DEAD] = bias
    inits = {
        "a_w": first, "a_b": held, "b_w": rng.normal(size=(4, 8, 3, 3)).astype(np.float32),
        "c_w": rng.normal(size=(4, 5)).astype(np.float32),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "a_w", "a_b"], ["a"], name="first"),
        helper.make_node("HardSwish" if bias > 0 else "Relu", ["a"], ["r"], name="act"),
        helper.make_node("Conv", ["r", "b_w"], ["b"], name="second", pads=[pads] * 4),
        helper.make_node("GlobalAveragePool", ["b"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flat"),
        helper.make_node("Gemm", ["f", "c_w"], ["y"], name="third"),
    ]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 9, 9])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 5])],
        [numpy_helper.from_array(v, k) for k, v in inits.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def run(model: onnx.ModelProto, text: str = "fold-dead-channels") -> Result:
    return Pipeline(text).run(model, settings=Settings(verify="off", on_failure="stop"))


def width(result: Result) -> int:
    node = next(n for n in result.model.graph.nodes if label(n) == "first")
    return int(node.inputs[1].shape[0])


def same(result: Result, model: onnx.ModelProto) -> None:
    x = {"x": np.random.default_rng(3).normal(size=(2, 3, 9, 9)).astype(np.float32)}
    onnx.checker.check_model(result.proto, full_check=True)
    now, then = (Session(m, optimization="off").run(x)["y"] for m in (result.model, model))
    # the same products summed in another order: float32 leaves some 1e-6 of sums of this size
    np.testing.assert_allclose(now, then, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("bias", "pads"), [(0.7, 0), (-0.7, 0), (-0.7, 1)])
def test_constant_channels_are_folded_and_cut(bias: float, pads: int) -> None:
    model = network(bias, pads=pads)
    found = run(model)
    assert width(found) == 4
    same(found, model)


def test_a_constant_beside_padding_stays() -> None:
    model = network(0.7, pads=1)
    found = run(model)
    assert width(found) == 8
    assert "pads with zeros" in found.report.passes[0].blocked[0]["why"]
    same(found, model)


def test_what_nobody_reads_is_cut() -> None:
    model = network(0.7, pads=1)
    weight = next(i for i in model.graph.initializer if i.name == "b_w")
    values = numpy_helper.to_array(weight).copy()
    values[:, [0, 2, 3, 7]] = 0
    weight.CopyFrom(numpy_helper.from_array(values, "b_w"))
    found = run(model)
    assert width(found) == 4
    same(found, model)


def test_steps_are_whole() -> None:
    assert width(run(network(-0.7), "fold-dead-channels{round_to=8}")) == 8
    assert width(run(network(-0.7), "fold-dead-channels{round_to=3}")) == 6


def test_the_same_request_again_does_nothing() -> None:
    found = run(network(0.7), "fold-dead-channels, fold-dead-channels")
    assert found.report.passes[0].changes == 2
    assert found.report.passes[1].changes == 0


def test_a_model_without_dead_channels_is_left() -> None:
    model = network(0.7)
    for i in model.graph.initializer:
        if i.name == "a_w":
            i.CopyFrom(numpy_helper.from_array(np.ones((8, 3, 3, 3), np.float32), "a_w"))
    found = run(model)
    assert found.report.passes[0].changes == 0


def test_options_are_checked() -> None:
    with pytest.raises(SpecError, match="round_to"):
        Pipeline("fold-dead-channels{round_to=-1}")
