"""Weight-only codes: what ORT makes of each form, sizes on disk, and every way that models hold their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.codes import weight_code
from graphopt.data import load_samples
from graphopt.errors import GraphoptError
from graphopt.model import load
from graphopt.models import zoo
from graphopt.models.tasks import minilm_pairs
from graphopt.pipeline import Pipeline, Result, Settings
from graphopt.runtime import Session, evaluate

Array = np.ndarray[Any, Any]
INPUTS, OUTPUTS, ROWS = 96, 64, 300


def weight(*shape: int, seed: int = 0) -> Array:
    return (np.random.default_rng(seed).normal(size=shape) * 0.1).astype(np.float32)


def model_of(
    nodes: list[onnx.NodeProto], weights: Mapping[str, Array], inputs: Mapping[str, tuple[int, Sequence[Any]]],
    opset: int = 21, outputs: tuple[str, ...] = ("y",), kind: int = TensorProto.FLOAT,
) -> onnx.ModelProto:  # fmt: skip
    rank = 3 if nodes[-1].op_type == "Gather" else 2
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info(name, *info) for name, info in inputs.items()],
        [helper.make_tensor_value_info(name, kind, [None] * rank) for name in outputs],
        [numpy_helper.from_array(np.ascontiguousarray(values), name) for name, values in weights.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10 if opset > 20 else 8)


X = {"x": (TensorProto.FLOAT, ["n", INPUTS])}
IDS = {"ids": (TensorProto.INT64, ["n", "t"])}


def matmul(opset: int = 21, name: str = "w") -> onnx.ModelProto:
    node = helper.make_node("MatMul", ["x", name], ["y"], name="layer")
    return model_of([node], {name: weight(INPUTS, OUTPUTS)}, X, opset)


def gather(opset: int = 21, width: int = INPUTS) -> onnx.ModelProto:
    return model_of(
        [helper.make_node("Gather", ["table", "ids"], ["y"], name="layer")], {"table": weight(ROWS, width)}, IDS, opset
    )


def quantized(model: onnx.ModelProto, samples: Any = None, **options: Any) -> Result:
    given = ",".join(f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in options.items())
    loaded = load(model)
    found = Pipeline(f"quantize-weights{{{given}}}" if given else "quantize-weights").run(
        loaded,
        samples=None if samples is None else load_samples(samples, loaded),
        settings=Settings(verify="off", on_failure="stop"),
    )
    onnx.checker.check_model(found.proto, full_check=True)
    return found


def compiled(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    path = folder / "compiled.onnx"
    Session(model, optimized_path=path)
    return onnx.load(path)


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def blocked(result: Result) -> list[str]:
    return [str(b["why"]) for b in result.report.passes[0].blocked]


def relative(found: Array, expected: Array) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


FEED = {"x": np.random.default_rng(1).normal(size=(7, INPUTS)).astype(np.float32)}
LOOKED_UP = {"ids": np.random.default_rng(1).integers(0, ROWS, (3, 5))}
NOISE = {8: 0.01, 4: 0.12}
"""Relative error of Gaussian weights: half a step of 255 or 15, over the root of three, per block's largest element."""


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("block", [0, 16, 32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_ort_makes_one_kernel_of_a_matmul(bits: int, block: int, symmetric: bool, tmp_path: Path) -> None:
    result = quantized(matmul(), bits=bits, block=block, symmetric=symmetric).proto
    assert ops(compiled(result, tmp_path)) == ["MatMulNBits"]
    expected = evaluate(matmul(), FEED)["y"]
    assert relative(evaluate(result, FEED)["y"], expected) < NOISE[bits] * (1.5 if symmetric else 1.2)
    off, on = evaluate(result, FEED)["y"], evaluate(result, FEED, optimization="all")["y"]
    assert relative(on, off) < 0.015  # the kernel rounds activations to 8 bits


@pytest.mark.parametrize("attrs", [{}, {"transB": 1}, {"transA": 1}, {"transA": 1, "transB": 1, "alpha": 2.0}])
@pytest.mark.parametrize(("bits", "block"), [(8, 0), (4, 32)])
def test_gemm(attrs: dict[str, Any], bits: int, block: int, tmp_path: Path) -> None:
    values = weight(INPUTS, OUTPUTS)
    weights = {"w": values.T if attrs.get("transB") else values, "b": weight(OUTPUTS)}
    inputs = {"x": (TensorProto.FLOAT, [INPUTS, "n"])} if attrs.get("transA") else X
    model = model_of([helper.make_node("Gemm", ["x", "w", "b"], ["y"], **attrs)], weights, inputs)
    result = quantized(model, bits=bits, block=block).proto
    feed = {"x": FEED["x"].T.copy()} if attrs.get("transA") else FEED
    assert relative(evaluate(result, feed)["y"], evaluate(model, feed)["y"]) < 1.2 * NOISE[bits]
    if not attrs.get("transA"):
        assert ops(compiled(result, tmp_path)) == ["MatMulNBits"]


@pytest.mark.parametrize("opset", [13, 17, 21])
def test_codes_are_those_of_the_calibrated_code(opset: int) -> None:
    result = quantized(matmul(opset), method="rtn", symmetric=True).proto
    values = weight(INPUTS, OUTPUTS)
    code = weight_code(values, 1)
    stored = {t.name: numpy_helper.to_array(t) for t in result.graph.initializer}
    steps = np.abs(stored["w/codes"].astype(int) - code.quantize(values).astype(int))
    assert steps.max() <= 1  # scales are stored as float16 where there are many
    assert "w" not in stored


@pytest.mark.parametrize(("bits", "block", "limit"), [(8, 0, 0.27), (4, 32, 0.16), (4, 16, 0.19)])
@pytest.mark.parametrize("kind", ["matmul", "gather"])
def test_codes_are_packed_on_disk(bits: int, block: int, limit: float, kind: str, tmp_path: Path) -> None:
    big = weight(2048, 512)
    node = helper.make_node("MatMul", ["x", "w"], ["y"]) if kind == "matmul" else None
    inputs: Mapping[str, tuple[int, Sequence[Any]]] = {"x": (TensorProto.FLOAT, ["n", 2048])} if node else IDS
    model = model_of([node or helper.make_node("Gather", ["w", "ids"], ["y"])], {"w": big}, inputs)
    quantized(model, bits=bits, block=block).save(tmp_path / "small.onnx")
    assert (tmp_path / "small.onnx").stat().st_size < limit * big.nbytes


@pytest.mark.parametrize(("bits", "block"), [(8, 0), (8, 32), (4, 0), (4, 32)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_are_decoded_after_the_look_up(bits: int, block: int, symmetric: bool, tmp_path: Path) -> None:
    result = quantized(gather(), bits=bits, block=block, symmetric=symmetric).proto
    found, expected = evaluate(result, LOOKED_UP)["y"], evaluate(gather(), LOOKED_UP)["y"]
    assert found.shape == expected.shape
    assert relative(found, expected) < 1.3 * NOISE[bits]
    held = compiled(result, tmp_path)
    floats = [t for t in held.graph.initializer if t.data_type == TensorProto.FLOAT and np.prod(t.dims) > 1]
    assert not floats  # neither decoded at load, nor as a whole on each run
    assert "DequantizeLinear" not in ops(held)
    assert evaluate(result, LOOKED_UP, optimization="all")["y"] == pytest.approx(found, abs=1e-6)


def test_rows_of_odd_width_take_bytes() -> None:
    model = gather(width=33)
    result = quantized(model, bits=4, block=0).proto
    assert relative(evaluate(result, LOOKED_UP)["y"], evaluate(model, LOOKED_UP)["y"]) < NOISE[8]


def test_embeddings_can_be_left_out() -> None:
    assert quantized(gather(), embeddings=False).report.passes[0].status != "changed"


@pytest.mark.parametrize("model", [matmul(), gather()], ids=["matmul", "gather"])
@pytest.mark.parametrize(("bits", "block"), [(8, 0), (4, 32)])
def test_again_does_nothing(model: onnx.ModelProto, bits: int, block: int) -> None:
    once = quantized(model, bits=bits, block=block)
    assert once.report.passes[0].status == "changed"
    for other in (4, 8):
        twice = quantized(once.proto, bits=other, block=32)
        assert twice.report.passes[0].changes == 0


def test_one_code_for_layers_that_share_a_weight(tmp_path: Path) -> None:
    """ONNX Runtime makes no MatMulNBits of these, which the report says."""
    nodes = [helper.make_node("MatMul", [x, "w"], [y]) for x, y in (("x", "y"), ("r", "z"))]
    model = model_of(
        [helper.make_node("Relu", ["x"], ["r"]), *nodes], {"w": weight(INPUTS, OUTPUTS)}, X, outputs=("y", "z")
    )
    whys: list[str] = []
    watched = Settings(verify="off", on_failure="stop", watch=lambda _, change: whys.append(change.why))
    result = Pipeline("quantize-weights").run(model, settings=watched).proto
    assert ops(result).count("DequantizeLinear") == 1
    assert "MatMulNBits" not in ops(compiled(result, tmp_path))
    assert whys == ["8 bits instead of 32; 2 layers share it, and ONNX Runtime decodes it for each on every run"]
    found, expected = evaluate(result, FEED), evaluate(model, FEED)
    assert all(relative(found[name], expected[name]) < NOISE[8] for name in "yz")


@pytest.mark.parametrize("head", ["gemm", "transpose"])
@pytest.mark.parametrize("bits", [8, 4])
def test_tied_table_and_head_are_stored_once(head: str, bits: int, tmp_path: Path) -> None:
    table = weight(ROWS, INPUTS)
    nodes = [helper.make_node("Gather", ["table", "ids"], ["rows"])]
    if head == "gemm":
        nodes.append(helper.make_node("Gemm", ["rows", "table"], ["y"], transB=1))
    else:
        nodes.append(helper.make_node("Transpose", ["table"], ["turned"]))
        nodes.append(helper.make_node("MatMul", ["rows", "turned"], ["y"]))
    model = model_of(nodes, {"table": table}, {"ids": (TensorProto.INT64, ["n"])})
    result = quantized(model, bits=bits, block=32 if bits == 4 else 0)
    feed = {"ids": LOOKED_UP["ids"][0]}
    assert relative(evaluate(result.proto, feed)["y"], evaluate(model, feed)["y"]) < 2 * NOISE[8]
    result.save(tmp_path / "tied.onnx")
    assert (tmp_path / "tied.onnx").stat().st_size < table.size * 1.1
    assert "MatMulNBits" in ops(compiled(result.proto, tmp_path))
    assert quantized(result.proto).report.passes[0].changes == 0


def test_weight_in_a_constant_node() -> None:
    nodes = [
        helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(weight(INPUTS, OUTPUTS))),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    model = model_of(nodes, {}, X)
    result = quantized(model).proto
    assert "Constant" not in ops(result)
    assert relative(evaluate(result, FEED)["y"], evaluate(model, FEED)["y"]) < NOISE[8]


def test_subgraphs_and_function_bodies() -> None:
    body = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["inner"])], "then",
        [], [helper.make_tensor_value_info("inner", TensorProto.FLOAT, [None, None])],
    )  # fmt: skip
    other = helper.make_graph(
        [helper.make_node("Project", ["x"], ["made"], domain="own")], "else",
        [], [helper.make_tensor_value_info("made", TensorProto.FLOAT, [None, None])],
    )  # fmt: skip
    node = helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=other)
    model = model_of([node], {"w": weight(INPUTS, OUTPUTS)}, {**X, "c": (TensorProto.BOOL, [])})
    held = helper.make_node("Constant", [], ["v"], value=numpy_helper.from_array(weight(INPUTS, OUTPUTS, seed=2)))
    inside = [held, helper.make_node("MatMul", ["a", "v"], ["b"])]
    model.functions.append(helper.make_function("own", "Project", ["a"], ["b"], inside, model.opset_import))
    model.opset_import.append(helper.make_opsetid("own", 1))
    result = quantized(model)
    assert result.report.passes[0].changes == 2
    assert len(result.proto.SerializeToString()) < 0.35 * len(model.SerializeToString())
    for choice in (True, False):
        feed = {**FEED, "c": np.array(choice)}
        assert relative(evaluate(result.proto, feed)["y"], evaluate(model, feed)["y"]) < NOISE[8]


def test_half_precision() -> None:
    half = weight(INPUTS, OUTPUTS).astype(np.float16)
    node, kind = helper.make_node("MatMul", ["x", "w"], ["y"]), TensorProto.FLOAT16
    model = model_of([node], {"w": half}, {"x": (kind, ["n", INPUTS])}, kind=kind)
    result = quantized(model, bits=4, block=32).proto
    feed = {"x": FEED["x"].astype(np.float16)}
    found = evaluate(result, feed)["y"]
    assert found.dtype == np.float16
    assert relative(found.astype(float), evaluate(model, feed)["y"].astype(float)) < 1.2 * NOISE[4]


def test_scales_too_small_for_half_precision() -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    model = model_of([node], {"w": weight(INPUTS, 600) * np.float32(1e-6)}, X)
    result = quantized(model).proto
    assert "Cast" not in ops(result)
    assert relative(evaluate(result, FEED)["y"], evaluate(model, FEED)["y"]) < NOISE[8]


@pytest.mark.parametrize(
    ("nodes", "why"),
    [
        (["y = MatMul(x, w)", "z = Neg(w)"], "Neg 'z' reads it, too"),
        (["y = MatMul(x, w)", "z = MatMul(w, o)"], "MatMul 'z' reads it, too"),
        (["y = MatMul(x, w)", "z = Gemm<transB = 1>(x, w)"], "it is read transposed and as it is"),
        (["y = MatMul(x, w)", "z = Gather(w, ids)"], "it is a factor whose columns are looked up"),
    ],
)
def test_near_misses(nodes: list[str], why: str) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 21]> g (float[n, 64] x, float[64, 1] o, int64[k] ids)'
        " => (float[a, b] y, float[c, d] z) <float[64, 64] w> { " + " ".join(nodes) + " }"
    )
    del model.graph.initializer[:]
    model.graph.initializer.append(numpy_helper.from_array(weight(64, 64), "w"))
    kept = [value for value in model.graph.input if value.name != "w"]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    result = quantized(model)
    assert result.report.passes[0].changes == 0
    assert blocked(result) == [why]


def test_low_opset_is_a_reason() -> None:
    assert blocked(quantized(matmul(17), bits=4, block=32)) == [
        "it needs opset 21, and the model has 17: upgrade-opset{to=21} first"
    ]
    assert blocked(quantized(gather(17), bits=4)) == [
        "it needs opset 18, and the model has 17: upgrade-opset{to=18} first"
    ]
    assert quantized(gather(17)).report.passes[0].changes == 1


def test_weights_that_are_not_finite_stay() -> None:
    values = weight(INPUTS, OUTPUTS)
    values[3, 4] = np.nan
    result = quantized(model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": values}, X))
    assert blocked(result) == ["the weight has NaN or infinite elements"]


def test_small_and_batched_weights_stay() -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    assert quantized(model_of([node], {"w": weight(INPUTS, 1)}, X)).report.passes[0].changes == 0
    batched = model_of([node], {"w": weight(3, INPUTS, OUTPUTS)}, {"x": (TensorProto.FLOAT, [3, "n", INPUTS])})
    batched.graph.output[0].type.tensor_type.shape.dim.add()
    assert blocked(quantized(batched)) == ["it has 3 dimensions, not 2"]


def test_layers_by_name() -> None:
    nodes = [helper.make_node("MatMul", ["x", f"w{i}"], [y], name=f"layer.{i}") for i, y in enumerate("yz")]
    weights = {f"w{i}": weight(INPUTS, OUTPUTS, seed=i) for i in range(2)}
    model = model_of(nodes, weights, X, outputs=("y", "z"))
    for options in ({"only": '["*.1"]'}, {"skip": '["layer.0"]'}):
        result = quantized(model, **options).proto
        assert {t.name for t in result.graph.initializer} >= {"w0", "w1/codes"}


def correlated(count: int) -> list[dict[str, Array]]:
    rng = np.random.default_rng(7)
    mix = rng.normal(size=(8, INPUTS))
    return [
        {"x": (rng.normal(size=(40, 8)) @ mix + 0.2 * rng.normal(size=(40, INPUTS))).astype(np.float32)}
        for _ in range(count)
    ]


@pytest.mark.parametrize("sequential", [True, False])
def test_gptq_lowers_the_error_of_the_output(sequential: bool) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "v"], ["y"], transB=1),
    ]
    model = model_of(nodes, {"w": weight(INPUTS, OUTPUTS), "v": weight(48, OUTPUTS, seed=3)}, X)
    feeds = correlated(8)
    expected = evaluate(model, feeds[-1])["y"]
    error = {}
    for method in ("mse", "gptq"):
        extra = {"sequential": True} if sequential and method == "gptq" else {}
        result = quantized(model, feeds[:-1], bits=4, block=32, method=method, **extra)
        assert result.report.passes[0].changes == 2
        error[method] = relative(evaluate(result.proto, feeds[-1])["y"], expected)
    assert error["gptq"] < 0.7 * error["mse"]


def test_gptq_without_samples_is_a_clear_error() -> None:
    with pytest.raises(GraphoptError, match="there are none"):
        quantized(matmul(), method="gptq")


@pytest.mark.parametrize("option", [{"bits": 3}, {"block": 48}, {"method": "best"}])
def test_settings_without_a_kernel_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(GraphoptError, match=f"{next(iter(option))} is one of"):
        quantized(matmul(), **option)


@pytest.mark.parametrize(
    ("spec", "size", "cosine"),
    [
        ("quantize-weights", 0.27, 0.999),
        ("upgrade-opset{to=21},quantize-weights{bits=4,block=32}", 0.18, 0.968),
        ("compress-weights", 0.27, 0.999),
        ("compress-weights{bits=4,block=32}", 0.18, 0.968),
    ],
)
@pytest.mark.zoo
def test_minilm_keeps_its_sentences(spec: str, size: float, cosine: float, tmp_path: Path) -> None:
    """Embeddings included; on 96 of the task's 2,000 sentences (docs have the figures on all of them)."""
    source = zoo.fetch("minilm-torchscript")
    Pipeline(spec).run(source, settings=Settings(verify="off", on_failure="stop")).save(tmp_path / "small.onnx")
    assert (tmp_path / "small.onnx").stat().st_size <= size * source.stat().st_size
    texts = [sentence for _, sentence in minilm_pairs.sentences("test", 96)]
    before, after = (minilm_pairs.embed(Session(path).run, texts) for path in (source, tmp_path / "small.onnx"))
    assert float((before * after).sum(axis=1).mean()) >= cosine
