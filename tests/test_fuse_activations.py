"""Activations: every known spelling becomes one operator, near misses say why not, outputs stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from graphopt.models import zoo
from graphopt.optimizer import optimize

from .rewrites import assert_equal_outputs, ops, parsed, reasons, run

PIPELINE = "canonicalize, fuse-activations, fuse-gelu, eliminate-dead"

NUMBERS: dict[str, Any] = {
    "zero": 0.0, "half": 0.5, "one": 1.0, "two": 2.0, "three": [3.0], "six": 6.0, "sixth": 1 / 6, "twenty": 20.0,
    "tenth": 0.1, "fifth": 0.2, "minus": -1.0, "root": np.sqrt(2.0), "iroot": np.sqrt(0.5), "cubic": 0.044715,
    "slope": np.sqrt(2 / np.pi), "channel": [[0.1], [-0.2], [0.3], [1.0]], "steep": [[0.1], [1.5], [0.3], [1.0]],
}  # fmt: skip

SPELLINGS = [
    # bounds
    ("y = Max(x, zero)", "Relu"),
    ("a = Max(zero, x) y = Min(six, a)", "Clip"),
    ("a = Relu(x) b = Clip(a, , six) c = Relu(b) y = Clip(c, zero, three0)", "Clip"),
    ("a = Clip(x, three0) y = Clip(a, zero, one)", "Clip"),
    ("y = Clip(x, zero)", "Relu"),
    ("a = Relu(x) y = Relu(a)", "Relu"),
    # hard sigmoid
    ("a = Mul(x, fifth) b = Add(a, half) y = Clip(b, zero, one)", "HardSigmoid"),
    ("a = Div(x, six) b = Add(half, a) c = Max(b, zero) y = Min(c, one)", "HardSigmoid"),
    ("a = Add(x, three) b = Clip(a, zero, six) y = Div(b, six)", "HardSigmoid"),
    ("a = Add(x, three) b = Relu(a) c = Min(b, six) y = Mul(sixth, c)", "HardSigmoid"),
    ("a = Add(x, three) b = Clip(a, zero, six) y = Mul(b, half)", "HardSigmoid Mul"),
    # hard swish
    ("a = Add(x, three) b = Clip(a, zero, six) c = Mul(x, b) y = Div(c, six)", "HardSwish"),
    ("a = Add(x, three) b = Clip(a, zero, six) c = Div(b, six) y = Mul(x, c)", "HardSwish"),
    ("a = Add(x, three) b = Clip(a, zero, six) c = Div(x, six) y = Mul(b, c)", "HardSwish"),
    ("a = Add(three, x) b = Max(a, zero) c = Min(b, six) d = Mul(c, x) y = Mul(sixth, d)", "HardSwish"),
    ("a = Add(three, x) b = Relu(a) c = Min(b, six) d = Mul(c, sixth) y = Mul(d, x)", "HardSwish"),
    ("a = HardSigmoid<alpha=0.1666667, beta=0.5>(x) y = Mul(x, a)", "HardSwish"),
    ("a = Add(x, three) b = Clip(a, zero, six) y = Mul(x, b)", "HardSwish Mul"),
    ("a = Add(x, three) b = Clip(a, zero, six) c = Mul(x, b) d = Mul(c, half) y = Mul(d, sixth)", "HardSwish Mul"),
    # sigmoid, tanh and their kin
    ("a = Neg(x) b = Exp(a) c = Add(one, b) y = Div(one, c)", "Sigmoid"),
    ("a = Mul(x, minus) b = Exp(a) c = Add(b, one) y = Reciprocal(c)", "Sigmoid"),
    ("a = Exp(x) b = Add(a, one) y = Div(a, b)", "Sigmoid"),
    ("a = Neg(x) b = Exp(a) c = Add(b, one) y = Div(x, c)", "Sigmoid Mul"),
    ("a = Mul(x, two) b = Sigmoid(a) c = Mul(b, two) y = Sub(c, one)", "Tanh"),
    ("a = Exp(x) m = Neg(x) b = Exp(m) c = Sub(a, b) d = Add(a, b) y = Div(c, d)", "Tanh"),
    ("a = Abs(x) b = Add(one, a) y = Div(x, b)", "Softsign"),
    # slopes
    ("a = Mul(x, tenth) y = Max(a, x)", "LeakyRelu"),
    ("y = PRelu(x, tenth)", "LeakyRelu"),
    ("a = Relu(x) b = Neg(x) c = Relu(b) d = Mul(tenth, c) e = Neg(d) y = Add(a, e)", "Relu Neg Relu Mul Neg Add"),
    ("a = Relu(x) b = Neg(x) c = Relu(b) d = Neg(c) e = Mul(channel, d) y = Add(e, a)", "Mul Max"),
    ("a = Relu(x) b = Neg(x) c = Relu(b) e = Mul(channel, c) y = Add(e, a)", "Mul Max"),
    ("a = Relu(x) b = Min(x, zero) c = Mul(b, channel) y = Add(a, c)", "Mul Max"),
    ("a = Relu(x) b = Abs(x) c = Sub(x, b) d = Mul(c, channel) e = Mul(d, half) y = Add(a, e)", "Mul Max"),
    ("a = Relu(x) b = Abs(x) c = Sub(x, b) d = Mul(c, tenth) y = Add(a, d)", "LeakyRelu"),
    # elu
    ("a = Greater(x, zero) b = Exp(x) c = Sub(b, one) y = Where(a, x, c)", "Elu"),
    ("a = Greater(x, zero) l = Where(a, zero, x) b = Exp(l) c = Sub(b, one) y = Where(a, x, c)", "Elu"),
    ("a = Greater(x, zero) b = Exp(x) c = Sub(b, one) d = Mul(c, half) y = Where(a, x, d)", "Elu"),
    # gelu below opset 20
    ("a = Div(x, root) b = Erf(a) c = Add(b, one) d = Mul(x, c) y = Mul(d, half)", "Mul Erf Mul Add Mul"),
    ("a = Mul(x, iroot) b = Erf(a) c = Add(one, b) d = Mul(half, c) y = Mul(d, x)", "Mul Erf Mul Add Mul"),
    ("h = Mul(x, half) a = Div(x, root) b = Erf(a) c = Add(b, one) y = Mul(h, c)", "Mul Erf Mul Add Mul"),
    # what ORT runs well stays
    ("a = Sigmoid(x) y = Mul(x, a)", "Sigmoid Mul"),
    ("a = Exp(x) b = Add(a, one) y = Log(b)", "Exp Add Log"),
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("body", "wanted"), SPELLINGS)
def test_spellings(body: str, wanted: str, dtype: str) -> None:
    kind = "float" if dtype == "float32" else "float16"
    body = body.replace("three0", "three_")
    constants = {**NUMBERS, "three_": 3.0}
    before = parsed(body, inputs=f"{kind}[N,4,6] x", outputs=f"{kind}[N,4,6] y", constants=constants, dtype=dtype)
    after = run(before, PIPELINE)
    if not (dtype == "float16" and "a = Div(x, six)" in body):  # 1/6 is not exact there: the division stays
        assert ops(after) == wanted
    assert_equal_outputs(before, after.model.proto, tolerance=1e-5 if dtype == "float32" else 4e-3)
    assert ops(run(after.model.proto, PIPELINE)) == ops(after)


CUBES = {
    "Pow": "p = Pow(x, three) q = Mul(p, cubic) s = Add(x, q) t = Mul(s, slope)",
    "x*x*x": "o = Mul(x, x) p = Mul(o, x) q = Mul(cubic, p) s = Add(q, x) t = Mul(slope, s)",
    "nested": "o = Mul(cubic, x) p = Mul(x, o) q = Mul(x, p) s = Add(x, q) t = Mul(slope, s)",
    "factored": "o = Mul(x, x) p = Mul(o, cubic) q = Add(p, one) s = Mul(x, slope) t = Mul(s, q)",
}
HALVES = {
    "last": "v = Add(u, one) w = Mul(x, v) y = Mul(w, half)",
    "first": "h = Mul(half, x) v = Add(one, u) y = Mul(h, v)",
    "middle": "v = Add(u, one) w = Mul(v, half) y = Mul(w, x)",
}


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("cube", CUBES)
@pytest.mark.parametrize("opset", [17, 20])
def test_tanh_gelu(opset: int, cube: str, half: str) -> None:
    body = f"{CUBES[cube]} u = Tanh(t) {HALVES[half]}"
    before = parsed(body, opset=opset, constants=NUMBERS)
    after = run(before, PIPELINE)
    assert ops(after) == ("Gelu" if opset >= 20 else "Mul Mul Add Mul Sigmoid Mul")
    assert_equal_outputs(before, after.model.proto)


@pytest.mark.parametrize("half", HALVES)
def test_gelu_of_opset_20(half: str) -> None:
    before = parsed(f"t = Div(x, root) u = Erf(t) {HALVES[half]}", opset=20, constants=NUMBERS)
    after = run(before, PIPELINE)
    assert ops(after) == "Gelu"
    assert_equal_outputs(before, after.model.proto)


NEAR = [
    ("a = HardSigmoid(x) y = Mul(x, a)", None),
    ("a = Add(x, three) b = Clip(a, zero, six) c = Mul(w, b) y = Div(c, six)", None),
    ("a = Add(x, three) b = Clip(a, zero, six) z = Identity(b) c = Mul(x, b) y = Div(c, six)", "inner value 'b' is"),
    ("a = Mul(x, two) y = Max(a, x)", "the slope is 2.0, above 1"),
    ("a = Relu(x) b = Neg(x) c = Relu(b) d = Mul(steep, c) e = Neg(d) y = Add(a, e)", None),
    ("a = Relu(x) b = Min(x, zero) c = Mul(b, steep) y = Add(a, c)", "a slope is above 1"),
    ("a = Softplus(x) b = Tanh(a) y = Mul(x, b)", "the graph is of opset 17, the rule is for 18"),
    ("a = Clip(x, w1) y = Clip(a, zero, six)", "a bound is computed, or not a number"),
    ("a = Clip(x, zero) y = Max(w1, a)", None),
]


@pytest.mark.parametrize(("body", "reason"), NEAR)
def test_near_misses(body: str, reason: str | None) -> None:
    outputs = "float[N,4,6] y" + (", float[N,4,6] z" if "z =" in body else "")
    before = parsed(body, inputs="float[N,4,6] x, float[N,4,6] w, float w1", outputs=outputs, constants=NUMBERS)
    after = run(before, PIPELINE)
    assert "HardSwish" not in ops(after)
    if reason is not None:
        assert any(reason in r for r in reasons(after)), reasons(after)
    assert_equal_outputs(before, after.model.proto)


LOWERED = [
    ("y = Mish(x)", 18, "Clip Exp Add Mul Add Div Mul"),
    ("a = Softplus(x) b = Tanh(a) y = Mul(x, b)", 17, "Clip Exp Add Mul Add Div Mul"),
    ("y = Softplus(x)", 17, "Clip Exp Add Log Sub Sub Div Sub Max"),
    ("y = Elu(x)", 17, "Clip Exp Sub Max"),
    ("y = Elu<alpha=0.4>(x)", 17, "Relu Clip Exp Sub Mul Add"),
    ("y = Selu(x)", 17, "Relu Mul Clip Exp Sub Mul Add"),
    ("y = Celu<alpha=2.0>(x)", 17, "Relu Clip Mul Exp Sub Mul Add"),
    ("y = PRelu(x, channel)", 17, "Mul Max"),
    ("y = PRelu(x, steep)", 17, "PRelu"),
    ("y = Swish<alpha=1.5>(x)", 24, "Mul Sigmoid Mul"),
    ("a = Mul(x, iroot) b = Erf(a) c = Mul(b, half) d = Add(c, half) y = Mul(x, d)", 17, "Div Erf Add Mul Mul"),
]


@pytest.mark.parametrize(("body", "opset", "wanted"), LOWERED)
def test_lowered(body: str, opset: int, wanted: str) -> None:
    """Equal from the smallest inputs to those at which exp would overflow."""
    before = parsed(body, opset=opset, constants=NUMBERS)
    after = run(before, "lower-activations")
    assert sorted(ops(after).split()) == sorted(wanted.split())
    tiny = () if "lu" in body else (1e-4,)  # ORT's Elu is exp(x) - 1, too: exact to 6e-8, not relative to x
    assert_equal_outputs(before, after.model.proto, scales=(*tiny, 0.1, 2.0, 30.0, 1000.0))


@pytest.mark.parametrize("product", ["y = MatMul(d, weight)", "f = Flatten(d) y = Gemm(f, flat, bias)"])
def test_a_half_that_went_into_weights_comes_back(product: str) -> None:
    """ORT has a kernel for the whole Gelu only; a power of two moves without rounding."""
    rng = np.random.default_rng(0)
    constants = {**NUMBERS, "weight": rng.normal(size=(6, 5)), "bias": np.ones(5), "flat": rng.normal(size=(24, 5))}
    flat = "Flatten" in product
    body = f"a = Div(x, root) b = Erf(a) c = Add(b, one) d = Mul(x, c) {product}"
    if flat:
        body = "f0 = Flatten(x) " + body.replace("(x", "(f0").replace("f = Flatten(d) ", "").replace("(f,", "(d,")
    before = parsed(body, outputs="float[N,K] y" if flat else "float[N,4,5] y", constants=constants)
    after = run(before, "canonicalize, lower-activations, eliminate-dead")
    kind = "Gemm" if flat else "MatMul"
    assert ops(after).endswith(f"Div Erf Add Mul Mul {kind}")
    assert_equal_outputs(before, after.model.proto)


def test_a_half_that_went_into_a_convolution_comes_back() -> None:
    constants = {**NUMBERS, "filter": np.random.default_rng(0).normal(size=(3, 4, 3, 3)), "bias": np.ones(3)}
    body = "a = Div(x, root) b = Erf(a) c = Add(b, one) d = Mul(x, c) y = Conv<pads=[1, 1, 1, 1]>(d, filter, bias)"
    before = parsed(body, inputs="float[N,4,6,6] x", outputs="float[N,3,6,6] y", constants=constants)
    after = run(before, "lower-activations")
    assert ops(after) == "Div Erf Add Mul Mul Conv"
    assert_equal_outputs(before, after.model.proto)


@pytest.mark.parametrize("shift", [-80.0, -15.0, -5.0, 25.0, 90.0])
@pytest.mark.parametrize("body", ["y = Softplus(s)", "y = Mish(s)"])
def test_tails_keep_their_digits(body: str, shift: float) -> None:
    """Relative to the largest output, even where all outputs are tiny."""
    before = parsed(f"s = Add(x, shift) {body}", opset=18, constants={"shift": shift})
    assert_equal_outputs(before, run(before, "lower-activations").model.proto, scales=(0.5,))


def test_lowering_is_for_cpu() -> None:
    from graphopt.base import Target
    from graphopt.pipeline import Pipeline, Settings

    settings = Settings(verify="off", target=Target("cuda", 1))
    result = Pipeline("lower-activations").run(parsed("y = Softplus(x)"), settings=settings)
    assert ops(result) == "Softplus"


@pytest.mark.zoo
@pytest.mark.parametrize(("name", "count"), [("ppocr-det", 24), ("ppocr-rec", 28), ("ppocr-cls", 18)])
def test_hard_swish_of_paddle(name: str, count: int) -> None:
    result = optimize(zoo.fetch(name), pipeline=f"upgrade-opset{{to=17}}, {PIPELINE}", measure=False, verify="off")
    found = [n.op_type for n in result.model.proto.graph.node]
    assert found.count("HardSwish") == count
    assert "Clip" not in found


@pytest.mark.zoo
def test_gelu_of_minilm() -> None:
    """TorchScript's erf form of Gelu is six times what `lower-activations` makes fusible for ORT."""
    pipeline = f"{PIPELINE}, lower-activations"
    result = optimize(zoo.fetch("minilm-torchscript"), pipeline=pipeline, measure=False, verify="off")
    assert sum(r.changes for r in result.report.passes if r.name == "lower-activations") == 6
