"""Quantized models in torch: operators as ONNX Runtime has them, codes and scales trained and written back."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper

pytest.importorskip("torch")
import torch

from graphopt.bridge import ops_quant, quantized
from graphopt.bridge.graph import TrainableGraph
from graphopt.bridge.recover import distill
from graphopt.data import load_samples
from graphopt.errors import ModelError
from graphopt.model import Model, load
from graphopt.pipeline import Pipeline, Settings
from graphopt.runtime import Session
from graphopt.training import DistillSettings

torch.set_num_threads(1)

Array = np.ndarray[Any, Any]


def _model(nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: dict[str, Array], opset: int) -> Any:
    tensors = [onnx.numpy_helper.from_array(values, name) for name, values in constants.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10 if opset > 20 else 8)


def _ort(model: Any, feeds: dict[str, Array], optimize: bool = False) -> list[Array]:
    return list(Session(model, optimization="all" if optimize else "off", threads=1).run(feeds).values())


CASES = [
    # opset, type of codes, shape of x, shape of scale, axis, block
    (10, "uint8", (3, 5), (), None, 0),
    (10, "int8", (3, 5), (), None, 0),
    (13, "int8", (4, 3, 2), (3,), 1, 0),
    (13, "uint8", (4, 3, 2), (2,), -1, 0),
    (19, "uint8", (2, 6), (), None, 0),
    (21, "int4", (5, 8), (5,), 0, 0),
    (21, "uint4", (8, 6), (2, 6), 0, 4),
    (21, "int8", (3, 7), (3, 2), 1, 4),
    (21, "int16", (3, 4), (), None, 0),
    (21, "uint16", (3, 4), (4,), 1, 0),
    (23, "int4", (6, 4), (3, 4), 0, 2),
    (23, "uint8", (2, 3, 4), (3,), 1, 0),
]


@pytest.mark.parametrize(("opset", "kind", "shape", "scales", "axis", "block"), CASES)
def test_codes_and_values_are_those_of_ort(
    opset: int, kind: str, shape: tuple[int, ...], scales: tuple[int, ...], axis: int | None, block: int
) -> None:
    """Bit for bit: both divide in float32, round half to even and cut off."""
    rng = np.random.default_rng(opset)
    dtype = np.dtype(getattr(ml_dtypes, kind, None) or kind)
    low, high = ops_quant.limits_of(kind)
    scale = np.asarray(2.0 ** rng.integers(-6, 1, scales), np.float32)  # x / scale is exact, so ties are ties
    zero = np.asarray(rng.integers(low, high + 1, scales)).astype(dtype)
    x = (rng.integers(-3 * high, 3 * high, shape) / 2 * 0.25).astype(np.float32)
    attrs: dict[str, Any] = {"axis": axis} if axis is not None else {}
    attrs |= {"block_size": block} if block else {}
    model = _model(
        [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attrs),
         helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **attrs)],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", 1, shape)],
        {"s": scale, "z": zero}, opset,
    )  # fmt: skip
    (values,) = _ort(model, {"x": x})
    s, z = torch.tensor(scale), torch.tensor(zero.astype(np.int32))
    codes = ops_quant.quantize_linear(torch.tensor(x), s, z, code=kind, **attrs)
    assert low <= codes.min() <= codes.max() <= high
    assert np.array_equal(ops_quant.dequantize_linear(codes, s, z, code=kind, **attrs), values)


def test_scales_get_the_gradient_of_lsq() -> None:
    """Inside round(v) - v, beyond the codes the code itself; x passes inside only."""
    x = torch.tensor([0.26, -0.4, 3.0, -5.0], requires_grad=True)
    scale = torch.tensor(0.1, requires_grad=True)
    zero = torch.tensor(0, dtype=torch.int8)
    codes = ops_quant.quantize_linear(x, scale, zero, code="int4")
    ops_quant.dequantize_linear(codes, scale, zero, code="int4").sum().backward()
    assert x.grad is not None
    assert scale.grad is not None
    assert x.grad.tolist() == pytest.approx([1.0, 1.0, 0.0, 0.0])
    wanted = (3 - 2.6) + (-4 - -4.0) + 7 - 8
    assert float(scale.grad) == pytest.approx(wanted / np.sqrt(4 * 7), abs=1e-5)


def test_eight_bit_floats_are_refused() -> None:
    x, scale = torch.ones(2), torch.ones(())
    with pytest.raises(ModelError, match="integer codes"):
        ops_quant.quantize_linear(x, scale, output_dtype=TensorProto.FLOAT8E4M3FN)


# --- whole models

NETWORK = """network (float[n, 3, 10, 10] x) => (float[n, 10] y) {
    a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
    b = Relu (a)
    c = Conv <pads = [1, 1, 1, 1], group = 16> (b, w2, b2)
    d = Relu (c)
    e = Conv (d, w3, b3)
    f = Add (b, e)
    g = GlobalAveragePool (f)
    h = Flatten (g)
    y = Gemm (h, w4, b4)
}"""

SHAPES = {
    "w1": (16, 3, 3, 3), "b1": (16,), "w2": (16, 1, 3, 3), "b2": (16,), "w3": (16, 16, 1, 1), "b3": (16,),
    "w4": (16, 10), "b4": (10,),
}  # fmt: skip


def network() -> onnx.ModelProto:
    """Return a float model whose ten outputs are of one size, so that their largest is none of a few."""
    rng = np.random.default_rng(5)
    model = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]>\n' + NETWORK)
    weights = {n: (rng.standard_normal(s) / np.sqrt(np.prod(s[1:]) if len(s) > 2 else 4)) for n, s in SHAPES.items()}
    weights["w4"] *= 4.0
    tensors = [onnx.numpy_helper.from_array(w.astype(np.float32), n) for n, w in weights.items()]
    model.graph.initializer.extend(tensors)
    return model


def images(count: int, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, 3, 10, 10)) * rng.uniform(0.3, 2, (count, 3, 1, 1))).astype(np.float32)


def int8(options: str = "", model: onnx.ModelProto | None = None, tail: str = "") -> Model:
    model = model or network()
    samples = load_samples([{"x": images(64, 1)}], load(model))
    pipeline = Pipeline(f"quantize-static{options}, eliminate-dead{tail}")
    return pipeline.run(model, samples=samples, settings=Settings(verify="off", on_failure="stop")).model


def answers(model: Any, x: Array, optimize: bool = False) -> Array:
    return np.asarray(Session(model, optimization="all" if optimize else "off", threads=1).run({"x": x})["y"])


def forward(bridge: TrainableGraph, x: Array) -> Array:
    with torch.no_grad():
        return np.asarray(bridge.module({"x": x})["y"].numpy())


def distilled(bridge: TrainableGraph, steps: int = 30, rate: float = 2e-3) -> TrainableGraph:
    """Train on what the float model says, by hand."""
    x = images(64, 2)
    wanted = torch.tensor(answers(network(), x))
    return fit(bridge, x, wanted, steps, rate)


def fit(bridge: TrainableGraph, x: Array, wanted: Any, steps: int, rate: float) -> TrainableGraph:
    """Train by hand; the rate falls to nothing."""
    optimizer = torch.optim.Adam(bridge.parameters.values(), lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for _ in range(steps):
        loss = (bridge.module({"x": x})["y"] - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return bridge


def error(model: Any, x: Array, optimize: bool = False) -> float:
    """Return the size of the error against the float model, relative to its answers."""
    wanted = answers(network(), x)
    return float(np.linalg.norm(answers(model, x, optimize) - wanted) / np.linalg.norm(wanted))


def constants(model: Model) -> dict[str, Array]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in model.proto.graph.initializer}


def test_forward_is_that_of_ort() -> None:
    """Sums differ in the last digit, which flips single codes: outputs are averages of 100 codes of the last Add."""
    model = int8()
    x = images(256, 3)
    ours, theirs = forward(TrainableGraph(model), x), answers(model, x)
    step = max(float(v) for n, v in constants(model).items() if v.ndim == 0 and v.dtype == np.float32)
    assert np.abs(ours - theirs).max() < step
    assert np.mean(np.abs(ours - theirs) > 1e-4 * np.abs(theirs).max()) < 0.1


def test_exact_scales_give_the_same_codes_everywhere() -> None:
    """Bit for bit in torch and ORT, which computes on floats or on integers; before training and after."""
    model = int8("{exact=true}")
    x = images(256, 3)
    bridge = TrainableGraph(model, learn_scales=True)
    assert np.array_equal(forward(bridge, x), answers(model, x))
    assert np.array_equal(forward(bridge, x), answers(model, x, optimize=True))
    distilled(bridge, rate=1e-2)
    trained = bridge.write_back()
    assert np.array_equal(forward(bridge, x), answers(trained, x))
    assert np.array_equal(forward(bridge, x), answers(trained, x, optimize=True))
    assert not np.array_equal(answers(model, x), answers(trained, x))


@pytest.mark.parametrize("learn_scales", [False, True])
def test_trained_codes_are_valid_and_better(learn_scales: bool) -> None:
    """A model whose codes were moved by up to a tenth of their range is brought back."""
    model = int8()
    slot, rng = TrainableGraph(model)._slots["w3_quantized"], np.random.default_rng(9)
    slot.write(np.clip(slot.read() + rng.integers(-12, 13, slot.shape), -128, 127).astype(np.int8))
    x = images(1000, 4)
    trained = distilled(TrainableGraph(model, learn_scales=learn_scales)).write_back()
    onnx.checker.check_model(trained.proto, full_check=True)
    assert error(trained, x) < 0.6 * error(model, x)
    assert error(trained, x, optimize=True) < 0.6 * error(model, x)
    plain, fused = (answers(trained, x, optimize) for optimize in (False, True))
    assert np.mean(plain.argmax(1) == fused.argmax(1)) >= 0.995
    before, after = constants(model), constants(trained)
    changed = {name for name, values in after.items() if not np.array_equal(values, before[name])}
    assert {name for name in changed if "zero_point" in name} == set()
    assert any(after[name].dtype == np.int8 for name in changed)
    assert any(after[name].dtype == np.int32 for name in changed)
    scales = {n for n, v in after.items() if v.dtype == np.float32}
    assert all((after[name] > 0).all() for name in scales)
    assert bool(scales & changed) == learn_scales
    assert all(after[n].dtype == before[n].dtype and after[n].shape == before[n].shape for n in before)


def test_bias_scales_are_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Integer kernels take them for that: the control, whose bias scales stay as they were, is another model there."""
    x = images(500, 4)
    trained = distilled(TrainableGraph(int8(), learn_scales=True), rate=2e-2).write_back()
    monkeypatch.setattr(quantized._Finder, "_tie", lambda *_: None)
    loose = distilled(TrainableGraph(int8(), learn_scales=True), rate=2e-2).write_back()
    tied_gap, loose_gap = (
        float(np.linalg.norm(answers(m, x) - answers(m, x, optimize=True))) for m in (trained, loose)
    )
    assert loose_gap > 5 * tied_gap


def test_nothing_changes_where_nothing_was_trained() -> None:
    model = int8()
    assert TrainableGraph(model, learn_scales=True).write_back().proto == model.proto


def test_frozen_biases_follow_the_scales_of_their_layers() -> None:
    model = int8()
    bridge = distilled(TrainableGraph(model, learn_scales=True, freeze=["b?_quantized"]), rate=1e-2)
    assert not any(name.startswith("b") for name in bridge.parameters if name.endswith("quantized"))
    before, after = constants(model), constants(bridge.write_back())
    for name in ("b1", "b2", "b3", "b4"):
        old, new = (c[f"{name}_quantized"] * c[f"{name}_scale"].astype(np.float64) for c in (before, after))
        assert np.abs(old - new).max() <= float(after[f"{name}_scale"].max())  # one step of the code
        assert not np.array_equal(before[f"{name}_scale"], after[f"{name}_scale"])


def test_seven_bits_stay_seven() -> None:
    """Codes that fit into 7 bits were made for processors that saturate: they are not used beyond."""
    model = int8()
    coded = TrainableGraph(model)._slots["w3_quantized"]
    coded.write((coded.read() // 2).astype(np.int8))
    bridge = TrainableGraph(model)
    with torch.no_grad():
        bridge.parameters["w3_quantized"].mul_(8.0)
        bridge.parameters["w1_quantized"].mul_(8.0)
    after = constants(bridge.write_back())
    assert (after["w3_quantized"].min(), after["w3_quantized"].max()) == (-64, 63)
    assert (after["w1_quantized"].min(), after["w1_quantized"].max()) == (-128, 127)


def test_roles() -> None:
    """Weights decay, biases and scales do not."""
    bridge = TrainableGraph(int8(), learn_scales=True)
    held = {name: bridge.roles[name] for name in bridge.parameters}
    assert held["w1_quantized"] == "codes"
    assert held["b1_quantized"] == "bias"
    assert {held[name] for name in held if "scale" in name} == {"scale"}
    assert bridge.channel_axis("w1_quantized") == 0
    assert bridge.channel_axis("w4_quantized") == 1


WEIGHT_ONLY = [
    "quantize-weights{bits=8}",
    "quantize-weights{bits=8, symmetric=true}",
    "quantize-weights{bits=4}",
    "quantize-weights{bits=4, symmetric=true, block=32}",
    "quantize-weights{bits=4, block=16}",
]


def linear(noise: float = 0.0) -> onnx.ModelProto:
    """Return two products, the first of which has enough weights for scales in float16; with noise, a neighbour."""
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 21]>
        network (float[n, 64] x) => (float[n, 10] y) {
            a = MatMul (x, w)
            b = Relu (a)
            y = MatMul (b, v)
        }""")
    rng = np.random.default_rng(6)
    for name, shape in (("w", (64, 512)), ("v", (512, 10))):
        values = rng.standard_normal(shape) / 8
        values += noise * np.random.default_rng(60).standard_normal(shape)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values.astype(np.float32), name))
    return model


@pytest.mark.parametrize("form", WEIGHT_ONLY)
@pytest.mark.parametrize("learn_scales", [False, True])
def test_weight_only_forms_are_trained(form: str, learn_scales: bool) -> None:
    """What is learned are the weights of a neighbouring model."""
    model = Pipeline(form).run(linear(), settings=Settings(verify="off", on_failure="stop")).model
    rng = np.random.default_rng(7)
    x, new = (rng.standard_normal((200, 64)).astype(np.float32) for _ in range(2))
    wanted = torch.tensor(answers(linear(noise=0.02), x))
    bridge = TrainableGraph(model, learn_scales=learn_scales)
    assert np.allclose(forward(bridge, x), answers(model, x), atol=1e-4)  # order of 512 sums
    assert bridge.write_back().proto == model.proto
    fit(bridge, x, wanted, steps=60, rate=1e-3 if "bits=8" in form else 4e-3)
    trained = bridge.write_back()
    onnx.checker.check_model(trained.proto, full_check=True)
    assert np.allclose(forward(bridge, new), answers(trained, new), atol=1e-3)
    gap = [float(np.square(answers(m, x) - wanted.numpy()).mean()) for m in (model, trained)]
    assert gap[1] < 0.6 * gap[0]


@pytest.mark.parametrize("levels", ["nf4", "kmeans"])
def test_codebooks_train_their_levels(levels: str) -> None:
    """Numbers of levels stay; levels and scales are floats that gradients reach."""
    form = f"compress-weights{{levels={levels}, bits=4, light=0}}"
    model = Pipeline(form).run(linear(), settings=Settings(verify="off", on_failure="stop")).model
    bridge = TrainableGraph(model)
    bridge.module({"x": np.ones((2, 64), np.float32)})["y"].square().sum().backward()
    assert bridge.parameters
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in bridge.parameters.values())


def test_sparse_weights_stay_sparse() -> None:
    model = int8()
    mask = np.random.default_rng(8).random(SHAPES["w3"]) < 0.5
    slot = TrainableGraph(model)._slots["w3_quantized"]
    slot.write((slot.read() * mask).astype(np.int8))
    layer = next(n for n in model.graph.nodes if n.outputs[0].name.startswith("e"))
    model.metadata(layer)["graphopt.sparse"] = '{"1": {"share": 0.5, "pattern": "", "request": "0.5 l2 layer"}}'
    bridge = distilled(TrainableGraph(model))
    after = constants(bridge.write_back())["w3_quantized"]
    assert not after[~mask].any()
    assert np.count_nonzero(after) > 0.3 * after.size
    assert np.count_nonzero(constants(distilled(TrainableGraph(model, masks={})).write_back())["w3_quantized"][~mask])


@pytest.mark.parametrize("op", ["DynamicQuantizeLinear", "ConvInteger", "QLinearConv", "MatMulInteger"])
def test_integer_operators_are_refused_with_what_helps(op: str) -> None:
    schema = onnx.defs.get_schema(op, 17)
    names = [f"i{n}" for n in range(schema.min_input)]
    node = helper.make_node(op, names, [f"o{n}" for n in range(schema.min_output)])
    kinds = [TensorProto.FLOAT if op.startswith("Dynamic") or "scale" in i.name else TensorProto.UINT8
             for i in schema.inputs[: len(names)]]  # fmt: skip
    inputs = [helper.make_tensor_value_info(n, kind, None) for n, kind in zip(names, kinds, strict=True)]
    outputs = [helper.make_tensor_value_info("o0", TensorProto.UINT8, None)]
    with pytest.raises(ModelError, match=op) as caught:
        TrainableGraph(_model([node], inputs, outputs, {}, 17))
    assert "graphopt quantize" in (caught.value.hint or "")


def test_batch_normalization_that_is_not_folded_is_noted() -> None:
    """The layer before it has no code behind it, so no integer kernel takes it."""
    text = NETWORK.replace("e = Conv (d, w3, b3)", "p = Conv (d, w3, b3) e = BatchNormalization (p, m, m, b3, v)")
    model = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]>\n' + text)
    model.graph.initializer.extend(network().graph.initializer)
    for name in ("m", "v"):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(16, np.float32), name))
    made = int8(model=model)
    (note,) = TrainableGraph(made).quantized.notes
    assert "--stage canonical" in note
    canonical = int8(model=Pipeline("fold-affine").run(model, settings=Settings(verify="off")).model.proto)
    assert not TrainableGraph(canonical).quantized.notes


def test_what_is_not_trained_is_said() -> None:
    proto = int8().proto
    quantizer = next(node for node in proto.graph.node if node.op_type == "QuantizeLinear")
    proto.graph.node.append(helper.make_node("Identity", [quantizer.input[1]], ["scale_again"]))
    proto.graph.output.append(helper.make_tensor_value_info("scale_again", TensorProto.FLOAT, []))
    model = load(proto)
    settings = DistillSettings(steps=1, rate=1e-4)
    samples = [{"x": images(8, seed)} for seed in range(4)]
    found = distill(model, model, samples, settings, held_out=0.0)
    said = next(note for note in found.notes if note.startswith("not trained: "))
    assert f"'{quantizer.input[1]}'" in said
    assert said.endswith("other nodes read it, too")
    assert quantizer.input[1] in TrainableGraph(model, learn_scales=True).quantized.untrained
