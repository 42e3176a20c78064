"""Codes and biases of quantized layers: correct-bias takes the mean's shift out, round-weights the variance."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.analysis.integer_layers import find_layers
from graphopt.base import Context
from graphopt.bias_correction import fast_shift, levels, measured_shift
from graphopt.data import load_samples
from graphopt.errors import SpecError
from graphopt.model import load
from graphopt.observation import Observer
from graphopt.pipeline import Pipeline, Result, Settings
from graphopt.registry import get
from graphopt.runtime import Session, evaluate

Array = np.ndarray[Any, Any]

CHANNELS, SIZE = 8, 10


def network(*, bias: bool = True, seed: int = 0) -> onnx.ModelProto:
    """A convolution, one per channel, a branch that joins again, a pool and a product; inputs are far from zero."""
    rng = np.random.default_rng(seed)
    inits: dict[str, Array] = {}

    def weight(name: str, *shape: int) -> str:
        inits[name] = np.asarray(rng.normal(size=shape) / np.sqrt(np.prod(shape[1:])) + 0.05, np.float32)
        return name

    def layer(op: str, x: str, name: str, *shape: int, **attrs: Any) -> onnx.NodeProto:
        inputs = [x, weight(f"{name}_w", *shape)]
        if bias:
            inits[f"{name}_b"] = np.asarray(rng.normal(size=shape[0]) * 0.1, np.float32)
            inputs.append(f"{name}_b")
        return helper.make_node(op, inputs, [f"{name}_y"], name=name, **attrs)

    wide = 3 * CHANNELS
    nodes = [
        layer("Conv", "x", "stem", CHANNELS, 4, 3, 3, pads=[1] * 4),
        helper.make_node("Relu", ["stem_y"], ["stem_r"]),
        layer("Conv", "stem_r", "each", CHANNELS, 1, 3, 3, pads=[1] * 4, group=CHANNELS),
        helper.make_node("Relu", ["each_y"], ["each_r"]),
        layer("Conv", "each_r", "left", wide, CHANNELS, 1, 1),
        layer("Conv", "stem_r", "right", wide, CHANNELS, 1, 1),
        helper.make_node("Add", ["left_y", "right_y"], ["sum"]),
        layer("Conv", "sum", "last", wide, wide // 2, 1, 1, group=2),
        helper.make_node("GlobalAveragePool", ["last_y"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        layer("Gemm", "flat", "head", 5, wide, transB=1),
    ]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4, SIZE, SIZE])],
        [helper.make_tensor_value_info("head_y", TensorProto.FLOAT, ["n", 5])],
        [numpy_helper.from_array(v, k) for k, v in inits.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def feeds(seed: int, count: int = 6) -> list[dict[str, Array]]:
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(4, 2))
    found = []
    for _ in range(count):
        hidden = rng.normal(size=(4, 2, SIZE, SIZE))
        x = np.einsum("cd,ndhw->nchw", mixing, hidden) + 1.0 + 0.1 * rng.normal(size=(4, 4, SIZE, SIZE))
        found.append({"x": np.asarray(x, np.float32)})
    return found


def run(pipeline: str, model: Any, seed: int = 1) -> Result:
    samples = load_samples(feeds(seed), load(model))
    return Pipeline(pipeline).run(model, samples=samples, settings=Settings(verify="off", on_failure="stop"))


def outputs(model: Any, tensors: list[str], seed: int) -> dict[str, Array]:
    """Return the values of inner tensors over all feeds, channels first: (channels, everything else)."""
    session = Session(model, optimization="off", extra_outputs=[t for t in tensors if t != "head_y"])
    parts: dict[str, list[Array]] = {t: [] for t in tensors}
    for feed in feeds(seed):
        values = session.run(feed)
        for t in tensors:
            parts[t].append(np.moveaxis(values[t], 1, 0).reshape(values[t].shape[1], -1))
    return {t: np.concatenate(p, axis=1) for t, p in parts.items()}


RAW = [f"{name}_y" for name in ("stem", "each", "left", "right", "last", "head")]


def shifts(reference: Any, model: Any, seed: int = 1) -> dict[str, float]:
    """Return how far the mean of each layer's worst channel is off, beside the spread of that channel in float."""
    wanted, found = outputs(reference, RAW, seed), outputs(model, RAW, seed)
    return {t: float(np.abs(wanted[t].mean(1) - found[t].mean(1)).max()) for t in RAW}


@pytest.mark.parametrize("bias", [True, False])
def test_full_correction_takes_the_shift_out_of_every_layer(bias: bool) -> None:
    model = network(bias=bias)
    plain = run("quantize-static", model)
    corrected = run("quantize-static, correct-bias{mode=full}", model)
    onnx.checker.check_model(corrected.proto, full_check=True)
    before, after = shifts(model, plain.proto), shifts(model, corrected.proto)
    steps = {t: bias_step(corrected, t.removesuffix("_y")) for t in RAW}
    for t in RAW:
        # half a step of the bias's own code, and float32 sums of some thousand values
        assert after[t] <= steps[t] / 2 + 2e-5, (t, before[t], after[t])
    assert sum(after.values()) < 0.05 * sum(before.values())


def bias_step(result: Result, name: str) -> float:
    node = next(n for n in result.model.graph.nodes if n.name == name)
    return float(node.inputs[2].inputs[0].inputs[1].values.max())


def test_fast_correction_takes_most_of_the_shift_out() -> None:
    model = network()
    plain, fast = run("quantize-static", model), run("quantize-static, correct-bias{mode=fast}", model)
    before, after = shifts(model, plain.proto), shifts(model, fast.proto)
    assert sum(after.values()) < 0.5 * sum(before.values())
    changed = next(p for p in fast.report.passes if p.name == "correct-bias")
    assert changed.changes == len(RAW)


def test_rounding_and_correction_bring_the_output_nearer_on_other_samples() -> None:
    model = network()
    texts = ("quantize-static", "quantize-static, round-weights, correct-bias")
    plain, better = (run(text, model).proto for text in texts)
    wanted = outputs(model, RAW, seed=7)

    def variance(found: dict[str, Array]) -> float:
        return float(sum(np.var(found[t] - wanted[t], axis=1).sum() / np.var(wanted[t], axis=1).sum() for t in RAW))

    def error(found: dict[str, Array]) -> float:
        return float(np.square(found["head_y"] - wanted["head_y"]).sum())

    before, after = outputs(plain, RAW, seed=7), outputs(better, RAW, seed=7)
    assert variance(after) < variance(before)
    assert error(after) < error(before)


@pytest.mark.parametrize("text", ["round-weights", "correct-bias", "correct-bias{mode=full}"])
def test_the_same_request_again_changes_nothing(text: str) -> None:
    once = run(f"quantize-static, {text}", network())
    twice = run(f"quantize-static, {text}, {text}", network())
    assert twice.report.passes[1].status == "changed"
    assert twice.report.passes[2].status != "changed"
    assert once.proto.SerializeToString() == twice.proto.SerializeToString()


def test_what_was_quantized_before_is_refused_with_the_reason() -> None:
    quantized = run("quantize-static", network()).proto
    found = run("round-weights, correct-bias, correct-bias{mode=full}", quantized)
    for record in found.report.passes:
        assert record.changes == 0
        assert len(record.blocked) == len(RAW)
        assert all("what it was in float is not known" in c["why"] for c in record.blocked)


def test_only_and_skip_choose_layers_and_float_graphs_are_left_alone() -> None:
    found = run("quantize-static, correct-bias{only=[left, right, head], skip=[right]}", network())
    record = found.report.passes[1]
    assert record.changes == 2
    whys = {c["where"]: c["why"] for c in record.blocked}
    assert whys == {
        "stem": "not among those asked for", "each": "not among those asked for", "last": "not among those asked for",
        "right": "to be skipped",
    }  # fmt: skip
    assert run("round-weights, correct-bias", network()).report.passes[0].changes == 0


def test_a_mode_that_is_none_is_refused() -> None:
    with pytest.raises(SpecError, match="mode is one of fast, full"):
        Pipeline("correct-bias{mode=slow}")


def test_weights_are_rows_and_come_back() -> None:
    layers, blocked = find_layers(run("quantize-static", network()).model.graph)
    assert not blocked
    for layer in layers.values():
        rows = layer.rows(layer.codes)
        np.testing.assert_array_equal(layer.from_rows(rows), layer.codes)
        full = layer.codes * layer.spread_scale
        np.testing.assert_allclose(layer.rows(full), rows * layer.row_scale[..., None], rtol=1e-7)  # one product each


def test_fast_shift_is_the_mean_of_what_rounding_adds() -> None:
    rng = np.random.default_rng(0)
    weight, rounded = rng.normal(size=(2, 3, 8)), rng.normal(size=(2, 3, 8))
    mean = rng.normal(size=4)  # two groups of two channels, a window of four
    found = fast_shift(weight, rounded, mean)
    for group, row in np.ndindex(2, 3):
        spread = np.repeat(mean[2 * group : 2 * group + 2], 4)
        assert found[3 * group + row] == pytest.approx(float((weight - rounded)[group, row] @ spread))


def test_means_that_are_no_numbers_move_nothing() -> None:
    bad = np.array([np.nan, np.inf, 1.0])
    np.testing.assert_array_equal(measured_shift(bad, np.zeros(3)), [0, 0, 1])
    np.testing.assert_array_equal(measured_shift(bad, bad), [0, 0, 0])
    assert fast_shift(np.ones((1, 1, 2)), np.zeros((1, 1, 2)), np.array([np.nan, 2.0])) == 2


def test_levels_put_layers_behind_all_that_they_depend_on() -> None:
    graph = load(network()).graph
    chosen = [n for n in graph.nodes if n.op in ("Conv", "Gemm")]
    found = [[n.name for n in level] for level in levels(graph, chosen)]
    assert found == [["stem"], ["each", "right"], ["left"], ["last"], ["head"]]
    assert levels(gs.Graph(), []) == []


@pytest.mark.parametrize(("op", "attrs"), [("MatMul", {}), ("Gemm", {}), ("Gemm", {"transB": 1})])
def test_products_are_rounded_whichever_way_their_weight_lies(op: str, attrs: dict[str, Any]) -> None:
    rng = np.random.default_rng(3)
    mixing = rng.normal(size=(6, 24))
    weight = np.asarray(rng.normal(size=(24, 10)), np.float32)
    stored = weight.T.copy() if attrs else weight
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", c]) for n, c in (("x", 24), ("y", 10))]
    nodes = [helper.make_node(op, ["x", "w"], ["y"], name="layer", **attrs)]
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:], [numpy_helper.from_array(stored, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    batches = [{"x": np.asarray(rng.normal(size=(64, 6)) @ mixing, np.float32)} for _ in range(8)]
    samples = load_samples(batches[:4], load(model))
    weights = []
    for text in ("quantize-static", "quantize-static, round-weights"):
        found = Pipeline(text).run(model, samples=samples, settings=Settings(verify="off", on_failure="stop"))
        layer = find_layers(found.model.graph)[0]["layer"]
        values = layer.codes * layer.spread_scale
        weights.append(values.T if attrs else values)
    other = np.concatenate([b["x"] for b in batches[4:]])
    nearest, rounded = (float(np.square(other @ (w - weight)).sum()) for w in weights)
    assert rounded < 0.5 * nearest  # inputs of rank 6 leave 18 directions of 24 free


def test_codes_stay_within_those_that_are_used() -> None:
    model = network()
    result = run("quantize-static", model).model
    for layer in find_layers(result.graph)[0].values():
        half = np.asarray(layer.codes // 2, np.int8)
        layer.dequantize.inputs[0].values = half
        layer.dequantize.inputs[1].values = np.asarray(layer.scale * 2, np.float32)

    context = Context(result, evaluate)
    context.observer = Observer(result, load_samples(feeds(1), load(model)))
    context.reference = lambda: load(model)
    used = {name: np.abs(layer.codes.astype(int)).max() for name, layer in find_layers(result.graph)[0].items()}
    for change in get("round-weights")().run(result.graph, context):
        assert change.apply is not None
        change.apply()
    for name, layer in find_layers(result.graph)[0].items():
        assert np.abs(layer.codes.astype(int)).max() <= used[name] <= 64
