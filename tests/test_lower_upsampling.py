"""Convolutions of enlarged images, phase by phase."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from graphopt import Pipeline, Settings
from graphopt.runtime import Session

PIPELINE = "lower-upsampling, eliminate-dead"


def decoder(channels: int, scale: int = 2, kernel: int = 3, activation: str = "Relu", seed: int = 0) -> onnx.ModelProto:
    """Return Conv(Resize(x)) with an activation behind, dynamic in batch and size."""
    rng = np.random.default_rng(seed)
    pad = kernel // 2
    nodes = [
        helper.make_node("Resize", ["x", "", "scales"], ["big"], "up", mode="nearest", nearest_mode="floor",
                         coordinate_transformation_mode="asymmetric"),
        helper.make_node("Conv", ["big", "w", "b"], ["c"], "conv", pads=[pad] * 4),
        helper.make_node(activation, ["c"], ["y"], "act"),
    ]  # fmt: skip
    weights = {
        "w": rng.normal(size=(4, channels, kernel, kernel)).astype(np.float32),
        "b": rng.normal(size=4).astype(np.float32),
        "scales": np.array([1, 1, scale, scale], np.float32),
    }
    graph = helper.make_graph(
        nodes, "decoder",
        [helper.make_tensor_value_info("x", 1, ["n", channels, "h", "v"])],
        [helper.make_tensor_value_info("y", 1, ["n", 4, "p", "q"])],
        [numpy_helper.from_array(v, k) for k, v in weights.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def test_phases_with_their_activation_replace_the_enlarged_convolution() -> None:
    result = Pipeline(PIPELINE).run(decoder(64))
    assert sorted(n.op for n in result.model.graph.nodes) == ["Concat", *["Conv"] * 4, "DepthToSpace", *["Relu"] * 4]
    kernels = [n.inputs[1].shape for n in result.model.graph.nodes if n.op == "Conv"]
    assert kernels == [(4, 64, 2, 2)] * 4
    assert result.report.verification is not None
    assert result.report.verification["ok"]


def test_few_channels_do_not_pay_and_the_report_says_so() -> None:
    result = Pipeline(PIPELINE).run(decoder(16))
    assert [n.op for n in result.model.graph.nodes] == ["Resize", "Conv", "Relu"]
    [blocked] = result.report.passes[0].blocked
    assert blocked["where"] == "conv"
    assert blocked["why"] == "80 products saved for each output are too few (256)"


@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_other_interpolations_stay(mode: str) -> None:
    model = decoder(64)
    next(a for a in model.graph.node[0].attribute if a.name == "mode").s = mode.encode()
    assert [n.op for n in Pipeline(PIPELINE).run(model).model.graph.nodes] == ["Resize", "Conv", "Relu"]


@settings(max_examples=200, deadline=None)
@given(
    scale=st.integers(2, 4), kernel=st.sampled_from([1, 3, 5]), seed=st.integers(0, 1 << 16),
    activation=st.sampled_from(["Relu", "HardSwish", "Sigmoid", "Neg"]),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 5)),
)  # fmt: skip
def test_random_decoders_keep_their_outputs(
    scale: int, kernel: int, seed: int, activation: str, shape: tuple[int, int, int]
) -> None:
    model = decoder(64, scale, kernel, activation, seed)
    x = np.random.default_rng(seed).normal(size=(shape[0], 64, *shape[1:])).astype(np.float32)
    changed = Pipeline(PIPELINE).run(model, settings=Settings(verify="off")).proto
    for mode in ("off", "all"):
        before = Session(model, optimization=mode).run({"x": x})["y"]
        after = Session(changed, optimization=mode).run({"x": x})["y"]
        # sums of up to 25 weights are rounded once more: some last digits of the largest output
        assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()
