"""quantize-dynamic: which kernels ORT makes of it, how far from float it is, what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from graphopt.codes import weight_code
from graphopt.errors import SpecError
from graphopt.model import load
from graphopt.pipeline import Pipeline, Result, Settings
from graphopt.profile import optimized_graph
from graphopt.runtime import Session

from .rewrites import ops, parsed, reasons, run

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(0)
WIDTH = 64
NUMBERS: dict[str, Any] = {
    "w": RNG.normal(size=(WIDTH, WIDTH)) / 8, "v": RNG.normal(size=(WIDTH, 128)) / 8, "b": RNG.normal(size=WIDTH),
    "t": RNG.normal(size=(128, WIDTH)) / 8, "c": RNG.normal(size=128), "batch": RNG.normal(size=(2, WIDTH, WIDTH)),
    "zero": np.concatenate([np.zeros((WIDTH, 1)), RNG.normal(size=(WIDTH, WIDTH - 1))], axis=1),
    "tiny": RNG.normal(size=(8, 8)), "bad": np.where(np.eye(WIDTH) > 0, np.nan, 1.0), "vector": RNG.normal(size=WIDTH),
}  # fmt: skip
ROWS = "float[N,128,64] x"
SLOWER = "the integer kernel would be slower"
ALWAYS = "quantize-dynamic, eliminate-dead"


def model(body: str, inputs: str = ROWS, outputs: str = "float[N,128,64] y", **options: Any) -> onnx.ModelProto:
    return parsed(body, inputs=inputs, outputs=outputs, constants=NUMBERS, **options)


def kernels(result: Result) -> list[str]:
    """Return what ORT runs."""
    made = optimized_graph(result.model)
    assert made is not None
    return sorted(node.op_type for node in made.graph.node)


def outputs(proto: onnx.ModelProto, seed: int = 0, scale: float = 2.0, rows: int = 3) -> list[Array]:
    rng = np.random.default_rng(seed)
    feeds = {}
    for info in proto.graph.input:
        shape = [d.dim_value if d.HasField("dim_value") else rows for d in info.type.tensor_type.shape.dim]
        feeds[info.name] = np.asarray(rng.normal(size=shape) * scale, np.float32)
    return list(Session(proto).run(feeds).values())


def assert_close(before: onnx.ModelProto, result: Result) -> None:
    """Compare with float: two roundings to 8 bits leave about one percent (normal values: range / 255 / sqrt 12)."""
    for wanted, found in zip(outputs(before), outputs(result.model.proto), strict=True):
        assert wanted.shape == found.shape
        assert np.square(wanted - found).mean() <= 4e-4 * np.square(wanted).mean()


def test_one_product_is_one_kernel() -> None:
    before = model("p = MatMul(x, w) y = Add(p, b)")
    after = run(before, ALWAYS)
    assert kernels(after) == ["DynamicQuantizeMatMul"]
    assert_close(before, after)


def test_products_of_one_input_quantize_it_once() -> None:
    before = model("p = MatMul(x, w) q = MatMul(x, v) z = Add(q, c) y = Add(p, b)",
                   outputs="float[N,128,64] y, float[N,128,128] z")  # fmt: skip
    after = run(before, ALWAYS)
    assert kernels(after) == ["DynamicQuantizeLinear", "MatMulIntegerToFloat", "MatMulIntegerToFloat"]
    assert_close(before, after)


@pytest.mark.parametrize("body", ["y = Gemm<transB=1, alpha=0.5>(x, t, c)", "y = Gemm(x, v, c)", "y = Gemm(x, v)"])
def test_gemm(body: str) -> None:
    before = model(body, inputs="float[128,64] x", outputs="float[128,128] y")
    after = run(before, ALWAYS)
    assert kernels(after) == ["DynamicQuantizeMatMul"]
    assert_close(before, after)


def test_a_bias_that_is_computed() -> None:
    before = model("y = Gemm(x, v, u)", inputs="float[128,64] x, float[128] u", outputs="float[128,128] y")
    after = run(before, ALWAYS)
    assert ops(after) == "DynamicQuantizeLinear MatMulInteger Cast Mul Mul Add"
    assert_close(before, after)


def test_a_shared_weight_is_stored_once() -> None:
    before = model("p = MatMul(x, w) r = Relu(p) y = MatMul(r, w)")
    after = run(before, ALWAYS)
    stored = [t for t in after.model.proto.graph.initializer if t.data_type == onnx.TensorProto.INT8]
    assert len(stored) == 1
    assert kernels(after) == ["DynamicQuantizeMatMul", "DynamicQuantizeMatMul", "Relu"]
    assert_close(before, after)


def test_a_column_of_zeros_stays_zero() -> None:
    after = run(model("y = MatMul(x, zero)"), ALWAYS)
    (found,) = outputs(after.model.proto)
    assert not found[..., 0].any()


def test_kernel_against_numpy() -> None:
    """ORT's fused kernel rounds as the operators' definitions say: within one step of the activation's code."""
    proto = run(model("p = MatMul(x, w) y = Add(p, b)"), ALWAYS).model.proto
    x = np.asarray(np.random.default_rng(7).normal(size=(2, 128, WIDTH)) * 3, np.float32)
    found = Session(proto).run({"x": x})["y"]
    w, b = np.asarray(NUMBERS["w"], np.float32), np.asarray(NUMBERS["b"], np.float32)
    code = weight_code(w, 1, narrow=True)
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = np.float32((high - low) / 255)
    zero = np.clip(np.rint(-low / scale), 0, 255)
    codes = np.clip(np.rint(x / scale) + zero, 0, 255) - zero
    wanted = (codes @ code.quantize(w).astype(np.float64)) * (scale * code.scale.astype(np.float64)) + b
    step = scale * np.abs(code.quantize(w)).max() * code.scale.max()
    assert np.abs(found - wanted).max() <= step
    assert np.abs(found - wanted).mean() <= 0.01 * step, "a different rounding everywhere, not here and there"


@pytest.mark.parametrize(
    ("body", "inputs", "reason"),
    [
        ("y = MatMul(x, u)", f"{ROWS}, float[64,64] u", "it has no constant weight"),
        ("y = MatMul(w, x)", "float[N,64,64] x", "its weight is on the left"),
        ("y = MatMul(x, batch)", "float[2,128,64] x", "its weight is of shape [2, 64, 64], no matrix"),
        ("y = MatMul(x, vector)", ROWS, "its weight is of shape [64], no matrix"),
        ("y = MatMul(x, w)", "float[64] x", "its input is a vector"),
        ("y = Gemm<transA=1>(x, w)", "float[64,128] x", "its input is transposed"),
        ("y = Gemm<beta=0.5>(x, w, b)", "float[128,64] x", "its bias has a factor: canonicalize before"),
        ("y = MatMul(x, bad)", ROWS, "its weight has values that are not finite"),
        ("y = MatMul(x, tiny)", "float[N,1024,8] x", "a weight of 64 elements is too small for 1024 rows: " + SLOWER),
        ("y = MatMul(x, w)", "float[N,1,64] x", "a weight of 4096 elements is too small for 16 rows: " + SLOWER),
        ("y = MatMul(x, w)", "float[1,64] x", "a weight of 4096 elements is too small for 1 rows: " + SLOWER),
    ],
)  # fmt: skip
def test_refused(body: str, inputs: str, reason: str) -> None:
    before = parsed(body, inputs=inputs, outputs="float[] y", constants=NUMBERS)
    del before.graph.output[0].type.tensor_type.shape.dim[:]
    before.graph.output[0].type.tensor_type.ClearField("shape")
    after = run(before, "quantize-dynamic")
    assert reasons(after) == [reason]
    assert after.report.passes[0].status != "changed"


def test_half_precision_and_old_opsets_are_refused() -> None:
    before = model("y = MatMul(x, w)", inputs="float16[N,128,64] x", outputs="float16[N,128,64] y", dtype="float16")
    assert reasons(run(before, "quantize-dynamic")) == ["its weight is float16, not float32"]
    before = model("y = MatMul(x, w)", opset=10)
    assert "opset 10 has no DynamicQuantizeLinear" in reasons(run(before, "quantize-dynamic"))[0]


def test_what_is_quantized_already_stays() -> None:
    body = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = MatMul(d, w)"
    numbers = {**NUMBERS, "s": 0.1}
    before = parsed(body, inputs="float[N,128,64] x", outputs="float[N,128,64] y", constants=numbers)
    before.graph.initializer.append(onnx.numpy_helper.from_array(np.array(128, np.uint8), "z"))
    assert reasons(run(before, "quantize-dynamic")) == ["its input is quantized already"]
    once = run(model("y = MatMul(x, w)"), ALWAYS)
    assert run(once.model.proto, "quantize-dynamic").report.passes[0].status != "changed"


def test_only_and_skip() -> None:
    before = model("r = MatMul(x, w) y = MatMul(r, w)")
    before.graph.node[0].name, before.graph.node[1].name = "first/fc", "last/fc"
    assert ops(run(before, 'quantize-dynamic{skip=["last*"]}')).endswith("Mul Mul MatMul")
    assert ops(run(before, 'quantize-dynamic{only=["last*"]}')).startswith("MatMul DynamicQuantizeLinear")
    assert "to be skipped" in reasons(run(before, 'quantize-dynamic{skip=["last*"]}'))


def test_options_out_of_range() -> None:
    with pytest.raises(SpecError, match="bits is 2 to 8"):
        Pipeline("quantize-dynamic{bits=9}")
    with pytest.raises(SpecError, match="weights is one of absmax, mse"):
        Pipeline("quantize-dynamic{weights=best}")


def test_seven_bits_cannot_saturate_in_16() -> None:
    """Two products of 255 and 63, added in 16 bits, stay below 32,768."""
    after = run(model("y = MatMul(x, w)"), "quantize-dynamic{bits=7}, eliminate-dead")
    (codes,) = [onnx.numpy_helper.to_array(t) for t in after.model.proto.graph.initializer if t.data_type == 3]
    assert np.abs(codes).max() == 63


def test_subgraphs() -> None:
    body = """
        y = If (flag) <
            then_branch = yes () => (float[N,128,64] a) { a = MatMul(x, w) },
            else_branch = no () => (float[N,128,64] b1) { b1 = Relu(x) }>"""
    before = model(body, inputs="float[N,128,64] x, bool flag")
    before.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(NUMBERS["w"], np.float32), "w"))
    after = Pipeline("quantize-dynamic").run(before, settings=Settings(verify="off", on_failure="stop"))
    onnx.checker.check_model(after.model.proto, full_check=True)
    x = np.asarray(np.random.default_rng(1).normal(size=(2, 128, WIDTH)), np.float32)
    for flag in (True, False):
        wanted, found = (Session(m).run({"x": x, "flag": np.array(flag)})["y"] for m in (before, after.model.proto))
        assert np.square(wanted - found).mean() <= 4e-4 * np.square(wanted).mean()
    assert "MatMulInteger" in str(after.model.proto)


def test_weights_that_others_read_are_told_of() -> None:
    before = model("p = MatMul(x, w) i = Gather(w, one) y = Add(p, i)")
    before.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1], np.int64), "one"))
    after = run(before, ALWAYS)
    assert_close(before, after)
    assert sum(t.data_type == 1 and len(t.dims) == 2 for t in after.model.proto.graph.initializer) == 1


def test_the_caller_keeps_his_model() -> None:
    original = load(model("y = MatMul(x, w)"))
    before = original.emit().SerializeToString()
    Pipeline("quantize-dynamic").run(original, settings=Settings(verify="off", on_failure="stop"))
    assert original.emit().SerializeToString() == before
