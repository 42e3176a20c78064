"""quantize-static: where codes go, what ORT makes of it, and that the integers are right."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.compiled import inspect_layers
from graphopt.data import load_samples
from graphopt.errors import DataError
from graphopt.kernels import is_integer
from graphopt.model import Model, load
from graphopt.pipeline import Pipeline, Result, Settings
from graphopt.profile import optimized_graph
from graphopt.runtime import Session

Array = np.ndarray[Any, Any]


def parsed(body: str, **weights: Array) -> onnx.ModelProto:
    """Return a model from ONNX's text form; weights become initializers."""
    model = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]>\n' + body)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(w, n) for n, w in weights.items())
    return model


def normal(*shape: int) -> Array:
    """Return the same numbers for the same shape."""
    return (np.random.default_rng(shape).standard_normal(shape) * 0.2).astype(np.float32)


def feeds_of(model: onnx.ModelProto, count: int = 4, seed: int = 1) -> list[dict[str, Array]]:
    rng = np.random.default_rng(seed)
    shapes = {i.name: [d.dim_value or 2 for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
    return [{n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()} for _ in range(count)]


def quantized(model: onnx.ModelProto, spec: str = "quantize-static, eliminate-dead") -> Result:
    samples = load_samples(feeds_of(model), load(model))
    return Pipeline(spec).run(model, samples=samples, settings=Settings(verify="off", on_failure="stop"))


def kernels(model: Model) -> Counter[str]:
    graph = optimized_graph(model)
    assert graph is not None
    return Counter(n.op_type for n in graph.graph.node)


def steps_apart(model: Model, feeds: list[dict[str, Array]]) -> float:
    """Return how far ORT's kernels are from the QDQ form as written, in steps of the output's code."""
    scales = {n.output[0]: n.input[1] for n in model.proto.graph.node if n.op_type == "DequantizeLinear"}
    values = {i.name: onnx.numpy_helper.to_array(i) for i in model.proto.graph.initializer}
    plain, fused = Session(model, optimization="off"), Session(model)
    worst = 0.0
    for feed in feeds:
        for name, a in plain.run(feed).items():
            step = float(values[scales[name]]) if name in scales else float(np.abs(a).max()) / 255
            worst = max(worst, float(np.abs(a - fused.run(feed)[name]).max()) / step)
    return worst


CONVS = """
agraph (float[N,3,8,8] x) => (float[N,8,4,4] y) {
  a = Conv <pads = [1,1,1,1]> (x, w1, b1)
  r = Relu (a)
  c = Conv <pads = [1,1,1,1]> (r, w2, b2)
  s = Add (c, r)
  p = MaxPool <kernel_shape = [2,2], strides = [2,2]> (s)
  y = Conv (p, w3)
}
"""


def convs() -> onnx.ModelProto:
    return parsed(
        CONVS, w1=normal(16, 3, 3, 3), b1=normal(16), w2=normal(16, 16, 3, 3), b2=normal(16), w3=normal(8, 16, 1, 1)
    )


def test_a_residual_net_runs_on_integers_throughout() -> None:
    result = quantized(convs())
    assert inspect_layers(result.model, ["a", "c", "y"]).integer == {"a", "c", "y"}
    found = kernels(result.model)
    assert not found["Conv"]
    assert not found["Relu"]
    assert found["QuantizeLinear"] == found["DequantizeLinear"] == 1
    others = {op for op in found if not is_integer(op)}
    assert others <= {"QuantizeLinear", "DequantizeLinear", "NhwcMaxPool", "Transpose"}  # they move bytes


def test_the_integers_are_those_of_the_form_as_written() -> None:
    model = convs()
    result = quantized(model)
    # three roundings in a row may each fall on the other side of a tie
    assert steps_apart(result.model, feeds_of(model, seed=3)) <= 2.0


def test_close_to_float() -> None:
    model = convs()
    result = quantized(model)
    float_session, session = Session(model), Session(result.model)
    signal = noise = 0.0
    for feed in feeds_of(model, seed=5):
        a, b = float_session.run(feed)["y"], session.run(feed)["y"]
        signal, noise = signal + float((a * a).sum()), noise + float(((a - b) ** 2).sum())
    assert 10 * np.log10(signal / noise) > 25.0  # 8 bits give about 6 dB a bit, less the peak factor of each tensor


def test_what_only_moves_values_keeps_its_code() -> None:
    proto = quantized(convs()).proto
    pool = next(n for n in proto.graph.node if n.op_type == "MaxPool")
    before = next(n for n in proto.graph.node if pool.input[0] in n.output)
    after = next(n for n in proto.graph.node if pool.output[0] in n.input)
    assert before.op_type == "DequantizeLinear"
    assert after.op_type == "QuantizeLinear"
    assert list(before.input[1:]) == list(after.input[1:])


def test_bias_scale_is_the_product() -> None:
    proto = quantized(convs()).proto
    values = {i.name: onnx.numpy_helper.to_array(i) for i in proto.graph.initializer}
    made = {n.output[0]: n for n in proto.graph.node}
    checked = 0
    for node in proto.graph.node:
        if node.op_type == "Conv" and len(node.input) > 2:
            x, w, b = (values[made[name].input[1]] for name in node.input[:3])
            np.testing.assert_array_equal(b, np.float32(np.float64(x) * w.astype(np.float64)))
            checked += 1
    assert checked == 2


def test_a_skipped_layer_stays_float_in_ort() -> None:
    """ORT quantizes a Conv between codes with one scale by itself: what it reads of ours has a scale per channel."""
    result = quantized(convs(), "quantize-static{skip=c}, eliminate-dead")
    found = inspect_layers(result.model, ["a", "c", "y"])
    assert "c" not in found.integer
    assert {"a", "y"} <= found.integer
    assert kernels(result.model)["Conv"] == 1
    model = convs()
    weight = next(onnx.numpy_helper.to_array(i) for i in model.graph.initializer if i.name == "w2")
    kept = {i.name: onnx.numpy_helper.to_array(i) for i in result.proto.graph.initializer}
    np.testing.assert_array_equal(kept["w2"], weight)


def test_the_trap_is_still_there() -> None:
    """The fact that the test above stands on: with one scale, ORT would have taken the layer."""
    model = parsed(
        """agraph (uint8[1,16,8,8] q) => (uint8[1,16,8,8] r) {
          x = DequantizeLinear (q, s, z)
          y = Conv <pads = [1,1,1,1]> (x, w, b)
          r = QuantizeLinear (y, s, z)
        }""",
        s=np.array(0.05, np.float32), z=np.array(128, np.uint8), w=normal(16, 16, 3, 3), b=normal(16),
    )  # fmt: skip
    graph = optimized_graph(load(model))
    assert graph is not None
    made = {i.name: i for i in graph.graph.initializer}
    assert any(i.data_type == onnx.TensorProto.INT8 for i in made.values())


def test_products_return_floats_to_float_readers() -> None:
    model = parsed(
        """agraph (float[N,32] x) => (float[N,8] y) {
          h = MatMul (x, w1)
          g = Tanh (h)
          y = Gemm <transB = 1> (g, w2, b2)
        }""",
        w1=normal(32, 16), w2=normal(8, 16), b2=normal(8),
    )  # fmt: skip
    result = quantized(model)
    found = kernels(result.model)
    assert found["MatMulIntegerToFloat"] == 1
    assert found["QGemm"] == 1
    assert found["DequantizeLinear"] == 0
    assert steps_apart(result.model, feeds_of(model, seed=3)) <= 1.0


@pytest.mark.parametrize(
    ("body", "weights", "why"),
    [
        ("y = Conv (x, k)", {}, "its weight is computed"),
        ("y = Gemm <alpha = 2.0> (x, w)", {"w": normal(4, 4)}, "alpha or beta is not 1"),
        ("y = Gemm <transA = 1> (x, w)", {"w": normal(2, 4)}, "its first operand is transposed"),
        ("y = MatMul (x, w)", {"w": normal(3, 4, 4)}, "its weight has rank 3"),
        ("y = MatMul (w, x)", {"w": normal(4, 2)}, "its first operand is a constant"),
    ],
)
def test_refused_with_the_reason(body: str, weights: dict[str, Array], why: str) -> None:
    inputs = "float[1,4,4,4] x, float[4,4,1,1] k" if "Conv" in body else "float[2,4] x"
    result = quantized(parsed(f"agraph ({inputs}) => (float[a,b,c,d] y) {{ {body} }}", **weights))
    (record, _) = result.report.passes
    assert record.status == "unchanged"
    assert [miss["why"] for miss in record.blocked] == [why]


def test_half_models_and_old_opsets_are_refused() -> None:
    half = parsed(
        "agraph (float16[1,4,4,4] x) => (float16[1,4,4,4] y) { y = Conv (x, w) }",
        w=normal(4, 4, 1, 1).astype(np.float16),
    )
    samples = load_samples([{"x": np.ones((1, 4, 4, 4), np.float16)}], load(half))
    result = Pipeline("quantize-static").run(half, samples=samples, settings=Settings(verify="off"))
    assert "float16" in result.report.passes[0].blocked[0]["why"]
    old = convs()
    old.opset_import[0].version = 12
    assert "upgrade-opset" in quantized(old).report.passes[0].blocked[0]["why"]


def test_again_changes_nothing() -> None:
    model = convs()
    once = quantized(model)
    samples = load_samples(feeds_of(model), load(model))
    twice = Pipeline("quantize-static").run(once.model, samples=samples, settings=Settings(verify="off"))
    assert twice.report.passes[0].status == "unchanged"
    assert {miss["why"] for miss in twice.report.passes[0].blocked} == {"it is quantized already"}


def test_without_samples_one_clear_error() -> None:
    with pytest.raises(DataError, match="measured on samples"):
        Pipeline("quantize-static").run(convs(), settings=Settings(verify="off"))


def test_a_layer_in_a_subgraph_stays_float() -> None:
    model = parsed(
        """agraph (float[2,4] x, bool c) => (float[2,4] y) {
          y = If (c) <then_branch = a () => (float[2,4] p) { p = MatMul (x, w) },
                      else_branch = b () => (float[2,4] q) { q = Identity (x) }>
        }""",
        w=normal(4, 4),
    )
    samples = load_samples([{"x": normal(2, 4), "c": np.array(True)}], load(model))
    result = Pipeline("quantize-static").run(model, samples=samples, settings=Settings(verify="off"))
    assert [miss["why"] for miss in result.report.passes[0].blocked] == ["it stands in a subgraph"]


def test_a_large_bias_fits() -> None:
    """A channel of tiny weights with a large bias: the scale grows until the bias fits in 32 bits."""
    weight = normal(8, 4, 1, 1)
    weight[3] = 1e-9
    model = parsed(
        "agraph (float[1,4,4,4] x) => (float[1,8,4,4] y) { y = Conv (x, w, b) }", w=weight,
        b=np.full(8, 50.0, np.float32),
    )  # fmt: skip
    result = quantized(model)
    feed = feeds_of(model)[0]
    a, b = Session(model).run(feed)["y"], Session(result.model).run(feed)["y"]
    np.testing.assert_allclose(a[:, 3], b[:, 3], atol=0.5)  # one step of a code from 0 to about 52 is 0.2


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_random_nets_load_and_keep_close(seed: int) -> None:
    """Chains of convolutions, sums, pools, concatenations: ORT's kernels agree with the form as written."""
    rng = np.random.default_rng(seed)
    weights: dict[str, Array] = {}
    lines, made = [], ["x"]
    for i in range(int(rng.integers(2, 7))):
        source = made[-1] if rng.random() < 0.7 else str(rng.choice(made))
        kind = rng.choice(["conv", "depthwise", "relu", "add", "sigmoid", "leaky", "pool", "resize-free concat"])
        name = f"t{i}"
        if kind in {"conv", "depthwise"}:
            group = 16 if kind == "depthwise" else 1
            weights[f"w{i}"] = (rng.standard_normal((16, 16 // group, 3, 3)) * 0.2).astype(np.float32)
            lines.append(f"{name} = Conv <pads = [1,1,1,1], group = {group}> ({source}, w{i})")
        elif kind == "add":
            lines.append(f"{name} = Add ({source}, {rng.choice(made)})")
        elif kind == "relu":
            lines.append(f"{name} = Relu ({source})")
        elif kind == "sigmoid":
            lines.append(f"{name} = Sigmoid ({source})")
        elif kind == "leaky":
            lines.append(f"{name} = LeakyRelu ({source})")
        elif kind == "pool":
            lines.append(f"{name} = AveragePool <kernel_shape = [3,3], pads = [1,1,1,1]> ({source})")
        else:
            weights[f"w{i}"] = (rng.standard_normal((16, 32, 1, 1)) * 0.2).astype(np.float32)
            lines.append(f"c{i} = Concat <axis = 1> ({source}, {rng.choice(made)})")
            lines.append(f"{name} = Conv (c{i}, w{i})")
        made.append(name)
    body = "\n".join(lines) + f"\ny = Identity ({made[-1]})"
    model = parsed(f"agraph (float[1,16,8,8] x) => (float[a,b,c,d] y) {{ {body} }}", **weights)
    result = quantized(model, "canonicalize, eliminate-identity, quantize-static, eliminate-dead")
    onnx.checker.check_model(result.proto, full_check=True)
    feeds = feeds_of(model, seed=seed)
    plain, fused = Session(result.model, optimization="off"), Session(result.model)
    for feed in feeds:
        a, b = plain.run(feed)["y"], fused.run(feed)["y"]
        # every kernel may round one step the other way, and the next ones carry it on
        assert np.abs(a - b).max() <= 0.06 * max(1e-3, float(np.abs(a).max()))


def test_layers_at_values_that_no_code_suits_stay_float() -> None:
    """-inf before a Softmax, and a mask of -1e9: one code would have to stand for everything else."""
    model = parsed(
        """agraph (float[1,4,8] x, float[1,4,4] m) => (float[1,4,8] y) {
          h = MatMul (x, w1)
          t = Transpose <perm = [0,2,1]> (h)
          s = MatMul (h, t)
          a = Add (s, m)
          p = Softmax (a)
          o = MatMul (p, h)
          y = MatMul (o, w2)
        }""",
        w1=normal(8, 8), w2=normal(8, 8),
    )  # fmt: skip
    mask = np.zeros((1, 4, 4), np.float32)
    mask[0, 0, 3] = -np.inf
    for masked in (-np.inf, -1e9):
        mask[0, 0, 3] = masked
        feeds = [{"x": normal(1, 4, 8), "m": mask}, {"x": -normal(1, 4, 8), "m": mask}]
        samples = load_samples(feeds, load(model))
        result = Pipeline("quantize-static, eliminate-dead").run(
            model, samples=samples, settings=Settings(verify="off", on_failure="stop")
        )
        made = {n.op_type: n for n in result.proto.graph.node}
        assert made["Add"].input[1] == "m"
        assert made["Softmax"].input[0] == "a"
        a, b = Session(model).run(feeds[0])["y"], Session(result.model).run(feeds[0])["y"]
        assert np.isfinite(b).all()
        assert np.abs(a - b).max() < 0.05 * np.abs(a).max()  # a few steps of 1/255
