"""refine-ranges: outputs come nearer, codes stay consistent, rest after one run; and the trials that it stands on."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.data import load_samples
from graphopt.errors import DataError, SpecError
from graphopt.model import load
from graphopt.pipeline import Pipeline, Result, Settings
from graphopt.runtime import Session
from graphopt.samples import Samples
from graphopt.trials import output_noise

Array = np.ndarray[Any, Any]


def network(seed: int = 0) -> onnx.ModelProto:
    """Two layers and a sum; one channel between is loud, and nothing comes of it."""
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(8, 4, 1, 1)), rng.normal(size=(6, 8, 1, 1))
    first[0] *= 30
    second[:, 0] = 0
    last = rng.normal(size=(6, 6, 1, 1))
    inits = {"w": first, "b": rng.normal(size=8), "v": second, "c": rng.normal(size=6), "u": last}
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["a"], name="one"),
        helper.make_node("Relu", ["a"], ["r"], name="relu"),
        helper.make_node("Conv", ["r", "v", "c"], ["d"], name="two"),
        helper.make_node("Conv", ["d", "u"], ["e"], name="three"),
        helper.make_node("Add", ["d", "e"], ["y"], name="sum"),
    ]
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", c, 5, 5]) for n, c in (("x", 4), ("y", 6))]
    inits_ = [numpy_helper.from_array(np.asarray(v, np.float32), k) for k, v in inits.items()]
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:], inits_)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def feeds(seed: int = 1) -> list[dict[str, Array]]:
    rng = np.random.default_rng(seed)
    return [{"x": np.asarray(rng.normal(size=(8, 4, 5, 5)), np.float32)} for _ in range(3)]


def run(text: str, model: Any) -> Result:
    samples = load_samples(feeds(), load(model))
    return Pipeline(text).run(model, samples=samples, settings=Settings(verify="off", on_failure="stop"))


def noise(reference: Any, model: Any, seed: int) -> float:
    sessions = Session(reference), Session(model)
    pairs = [[s.run(feed)["y"] for s in sessions] for feed in feeds(seed)]
    return float(sum(np.square(a - b).sum() for a, b in pairs) / sum(np.square(a).sum() for a, _ in pairs))


def test_a_range_that_a_silent_channel_made_wide_is_made_smaller() -> None:
    model = network()
    plain, refined = run("quantize-static", model), run("quantize-static, refine-ranges", model)
    onnx.checker.check_model(refined.proto, full_check=True)
    assert noise(model, refined.proto, seed=5) < 0.5 * noise(model, plain.proto, seed=5)


def test_biases_follow_the_scales_that_they_are_made_of() -> None:
    graph = run("quantize-static, refine-ranges", network()).model.graph
    refined = 0
    for node in graph.nodes:
        if node.op != "Conv" or len(node.inputs) < 3:
            continue
        x, w, b = (t.inputs[0].inputs[1] for t in node.inputs)
        expected = float(x.values) * np.asarray(w.values, np.float64)
        np.testing.assert_allclose(b.values, expected, rtol=1e-6)  # one float32 rounding each
        refined += x.name.endswith("_refined")
    assert refined


def test_a_bias_keeps_its_value() -> None:
    held = []
    for text in ("quantize-static", "quantize-static, refine-ranges"):
        node = next(n for n in run(text, network()).model.graph.nodes if n.name == "two")
        codes, scale = (np.asarray(t.values, np.float64) for t in node.inputs[2].inputs[0].inputs[:2])
        held.append((codes * scale, scale))
    (before, _), (after, scale) = held
    assert (np.abs(after - before) <= scale / 2 * 1.001).all()  # rounded to the new step


def test_the_same_request_again_changes_nothing() -> None:
    twice = run("quantize-static, refine-ranges, refine-ranges", network())
    assert twice.report.passes[1].status == "changed"
    assert twice.report.passes[2].status != "changed"


def test_float_graphs_and_graphs_quantized_before_are_left_alone() -> None:
    assert run("refine-ranges", network()).report.passes[0].changes == 0
    quantized = run("quantize-static", network()).proto
    before = load(quantized)
    after = run("refine-ranges", quantized).model
    scales = [[n.inputs[1].values for n in m.graph.nodes if n.op == "QuantizeLinear"] for m in (before, after)]
    np.testing.assert_array_equal(scales[0], scales[1])


def test_measure_is_the_noise_of_the_model_with_these_values() -> None:
    model = network()
    loaded, samples = load(model), load_samples(feeds(), load(model))
    measure = output_noise(loaded, load(model), samples, ["c"])
    assert measure({}) < 1e-12  # a bias that is no constant is added by another kernel: float32 rounding, squared
    changed = onnx.ModelProto.FromString(model.SerializeToString())
    other = next(i for i in changed.graph.initializer if i.name == "c")
    other.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(other) + np.float32(0.5), "c"))
    value = numpy_helper.to_array(other)
    assert measure({"c": value}) == pytest.approx(noise(model, changed, seed=1), rel=1e-4)  # float32 sums
    assert measure({}) < 1e-12
    one = output_noise(loaded, load(model), samples, ["c"], limit=1)({"c": value})
    assert one != measure({"c": value})
    assert "c" not in [t.name for t in loaded.graph.inputs]


def test_bad_input() -> None:
    with pytest.raises(DataError, match="no samples"):
        output_noise(load(network()), load(network()), Samples(lambda: iter(()), "none"), ["c"])
    with pytest.raises(SpecError, match="samples is a number"):
        Pipeline("refine-ranges{samples=-1}")
