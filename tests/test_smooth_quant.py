"""smooth-quant: the same function, channels of one size, less lost by the codes behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from graphopt.data import load_samples
from graphopt.errors import SpecError
from graphopt.model import load
from graphopt.passes.smooth_scales import ChannelStatistics, find_factors
from graphopt.pipeline import Pipeline, Result, Settings
from graphopt.profile import optimized_graph
from graphopt.runtime import Session

from .rewrites import ops, parsed, reasons

Array = np.ndarray[Any, Any]
WIDTH = 64
RNG = np.random.default_rng(0)
LOUD = np.where(np.arange(WIDTH) % 21 == 5, 20.0, 1.0)
"""Some channels are much larger than the others."""

NUMBERS: dict[str, Any] = {
    "w": RNG.normal(size=(WIDTH, 128)) / 8, "t": RNG.normal(size=(128, WIDTH)) / 8, "c": RNG.normal(size=128),
    "before": RNG.normal(size=(WIDTH, WIDTH)) / 8 * LOUD, "loud": LOUD, "shift": RNG.normal(size=WIDTH) * LOUD,
    "half": 0.5, "one": 1.0, "root": np.sqrt(2), "into": np.array([0, 64]),
    "turned": (RNG.normal(size=(WIDTH, WIDTH)) / 8 * LOUD).T,
}  # fmt: skip

NORM = "n = LayerNormalization(x, loud, shift)"
TAKEN = {
    "norm": f"{NORM} y = MatMul(n, w)",
    "norm without a shift": "n = LayerNormalization(x, loud) y = MatMul(n, w)",
    "two products": f"{NORM} y = MatMul(n, w) p = MatMul(n, w) z = Relu(p)",
    "product": "n = Mul(x, loud) y = MatMul(n, w)",
    "linear": "p = MatMul(x, before) n = Add(p, shift) y = MatMul(n, w)",
    "relu": "p = MatMul(x, before) q = Add(p, shift) n = Relu(q) y = MatMul(n, w)",
    "number": "p = MatMul(x, before) n = Mul(p, half) y = MatMul(n, w)",
    "gate": "p = MatMul(x, before) s = Sigmoid(x) n = Mul(s, p) y = MatMul(n, w)",
    "gemm": "n = Gemm<transB=1>(x, turned, shift) y = Gemm<transB=1, alpha=0.5>(n, t, c)",
}
GELU = "d = Div(x, root) e = Erf(d) f = Add(e, one) g = Mul(x, f) n = Mul(g, half) y = MatMul(n, w)"
INSERTED = {
    "input": ("y = MatMul(x, w)", "'x' is made elsewhere"),
    "sum around the block": (f"{NORM} y = MatMul(n, w) z = Relu(n)", "Relu 'z' reads it, too"),
    "gelu": (
        GELU,
        "Erf 'e' does not let factors through",
    ),
}


def model(body: str) -> onnx.ModelProto:
    rank2 = "Gemm" in body
    shape = f"N,{WIDTH}" if rank2 else f"N,32,{WIDTH}"
    outs = [f"float[{'N' if rank2 else 'N,32'},128] y"]
    if " z = " in body:
        outs.append(f"float[N,32,{WIDTH if 'z = Relu(n)' in body else 128}] z")
    return parsed(body, inputs=f"float[{shape}] x", outputs=", ".join(outs), constants=NUMBERS)


def feeds(proto: onnx.ModelProto, count: int = 4, seed: int = 0, loud: bool = False) -> list[dict[str, Array]]:
    rng = np.random.default_rng(seed)
    shape = [d.dim_value or 8 for d in proto.graph.input[0].type.tensor_type.shape.dim]
    factor = LOUD if loud else 1.0
    return [{"x": np.asarray(rng.normal(size=shape) * factor, np.float32)} for _ in range(count)]


def run(proto: onnx.ModelProto, pipeline: str, loud: bool = False) -> Result:
    samples = load_samples(feeds(proto, loud=loud), load(proto))
    return Pipeline(pipeline).run(proto, samples=samples, settings=Settings(verify="off", on_failure="stop"))


def error(before: onnx.ModelProto, after: onnx.ModelProto, loud: bool = False) -> float:
    """Return the mean square error over the mean square, on other data than the samples."""
    (feed,) = feeds(before, 1, seed=99, loud=loud)
    wanted, found = (Session(m, optimization="off").run(feed)["y"].astype(np.float64) for m in (before, after))
    return float(np.square(wanted - found).mean() / np.square(wanted).mean())


@pytest.mark.parametrize("case", TAKEN)
def test_what_is_before_takes_the_factors(case: str) -> None:
    before = model(TAKEN[case])
    after = run(before, "smooth-quant, eliminate-dead")
    assert ops(after) == " ".join(n.op_type for n in before.graph.node), "no node more"
    assert after.report.passes[0].changes >= 1
    assert error(before, after.model.proto) <= 1e-11, "float32 roundings: (1e-6)^2 is 1e-12"
    plain = run(before, "quantize-dynamic{any_size=true}")
    smooth = run(before, "smooth-quant, quantize-dynamic{any_size=true}")
    assert error(before, smooth.model.proto) < 0.6 * error(before, plain.model.proto)


@pytest.mark.parametrize("case", INSERTED)
def test_a_multiplication_goes_in_between(case: str) -> None:
    body, reason = INSERTED[case]
    before, loud = model(body), case in ("input", "gelu")
    after = run(before, "smooth-quant, eliminate-dead", loud=loud)
    assert ops(after).split().count("Mul") == sum(n.op_type == "Mul" for n in before.graph.node) + 1
    assert error(before, after.model.proto, loud) <= 1e-11
    plain = run(before, "quantize-dynamic{any_size=true}", loud=loud)
    smooth = run(before, "smooth-quant, quantize-dynamic{any_size=true}", loud=loud)
    assert error(before, smooth.model.proto, loud) < 0.5 * error(before, plain.model.proto, loud)
    refused = run(before, "smooth-quant{insert=false}", loud=loud)
    assert refused.report.passes[0].status != "changed"
    assert any(reason in why for why in reasons(refused))


def test_gelu_keeps_the_spelling_that_ort_fuses() -> None:
    before = model(INSERTED["gelu"][0])
    made = optimized_graph(run(before, "smooth-quant, eliminate-dead", loud=True).model)
    assert made is not None
    assert [n.op_type for n in made.graph.node] == ["Gelu", "Mul", "MatMul"]


def test_products_share_one_multiplication_and_one_quantization() -> None:
    before = model(f"{NORM} y = MatMul(n, w) r = Relu(n) z = MatMul(n, w)")
    before.graph.output.append(onnx.helper.make_tensor_value_info("r", 1, ["N", 32, WIDTH]))
    found = ops(run(before, "smooth-quant, eliminate-dead")).split()
    assert sorted(found) == ["LayerNormalization", "MatMul", "MatMul", "Mul", "Relu"]
    found = ops(run(before, "smooth-quant, quantize-dynamic{any_size=true}, eliminate-dead")).split()
    assert found.count("DynamicQuantizeLinear") == 1


def test_again_changes_nothing() -> None:
    once = run(model(TAKEN["norm"]), "smooth-quant, eliminate-dead").model.proto
    again = run(once, "smooth-quant")
    assert again.report.passes[0].status != "changed"
    assert reasons(again) == ["it was seen to before"]


def test_channels_of_one_size_stay() -> None:
    found = run(model("p = Sigmoid(x) n = Tanh(p) y = MatMul(n, w)"), "smooth-quant")
    assert found.report.passes[0].status != "changed"
    assert "of one size already" in reasons(found)[0]


def test_without_samples_it_says_so() -> None:
    found = Pipeline("smooth-quant").run(model(TAKEN["norm"]), settings=Settings(verify="off", on_failure="stop"))
    assert reasons(found) == ["the sizes of channels are measured on samples, and there are none (--data)"]


def test_values_that_are_not_finite_are_told_of() -> None:
    before = model("l = Log(x) y = MatMul(l, w)")
    (why,) = reasons(run(before, "smooth-quant"))
    assert "NaN" in why


def test_only_skip_and_options() -> None:
    before = model(TAKEN["norm"])
    before.graph.node[1].name = "block/fc"
    assert reasons(run(before, 'smooth-quant{skip=["*/fc"]}')) == ["to be skipped"]
    assert reasons(run(before, 'smooth-quant{only=["other"]}')) == ["not among those asked for"]
    with pytest.raises(SpecError, match="alpha is 0 to 1"):
        Pipeline("smooth-quant{alpha=1.5}")


def test_alpha_is_the_published_formula() -> None:
    rng = np.random.default_rng(3)
    size, weight = rng.uniform(1, 3, 16), rng.normal(size=(16, 8))
    found = find_factors(ChannelStatistics(-size, size, size**2 / 3), [weight], alpha=0.5).values
    largest = np.maximum(np.abs(weight).max(axis=1), 0.1 * np.median(np.abs(weight).max(axis=1)))
    wanted = np.sqrt(size / largest)
    np.testing.assert_allclose(found / found[0], wanted / wanted[0], rtol=1e-9)


def test_the_measure_tells_the_error() -> None:
    """Of uniform data the estimate is right within a factor of 1.5, with the factors and without."""
    rng = np.random.default_rng(4)
    size = np.where(np.arange(96) % 32 == 3, 30.0, 1.0)
    x, w = rng.uniform(-1, 1, (2000, 96)) * size, rng.normal(size=(96, 48))
    found = find_factors(ChannelStatistics(x.min(0), x.max(0), np.square(x).mean(0)), [w])

    def lost(s: Array) -> float:
        a, b = x / s, w * s[:, None]
        step, steps = (a.max() - a.min()) / 255, np.abs(b).max(axis=0) / 127
        approximate = (np.rint(a / step) * step) @ (np.rint(b / steps) * steps)
        return float(np.square(approximate - x @ w).mean() / np.square(x @ w).mean())

    assert found.ratio < 0.5
    assert found.before / 1.5 < lost(np.ones(96)) < found.before * 1.5
    assert found.after / 1.5 < lost(found.values) < found.after * 1.5


def test_dead_channels_get_factors_of_usual_size() -> None:
    size = np.where(np.arange(32) % 4 == 0, 0.0, 1.0) * np.linspace(1, 9, 32)
    found = find_factors(ChannelStatistics(-size, size, size**2 / 3), [np.ones((32, 8))])
    assert np.isfinite(found.values).all()
    assert found.values.max() / found.values.min() < 200
