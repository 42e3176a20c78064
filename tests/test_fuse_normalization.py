"""Normalisations: known spellings become one operator, near misses say why not, outputs stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from graphopt.model import load
from graphopt.models import zoo
from graphopt.optimizer import optimize
from graphopt.profile import optimized_graph

from .rewrites import assert_equal_outputs, ops, parsed, reasons, run

PIPELINE = "canonicalize, fuse-normalization, eliminate-dead"

NUMBERS: dict[str, Any] = {
    "two": 2.0, "one": 1.0, "minus_half": -0.5, "eps": 1e-5, "sixth": 1 / 6, "fifth": 1 / 5, "seventh": 1 / 7,
    "w": np.linspace(0.5, 1.5, 6), "b": np.linspace(-1, 1, 6), "rows": np.linspace(0.5, 2, 4).reshape(4, 1),
    "cw": np.linspace(0.5, 2, 4).reshape(4, 1, 1), "cb": np.linspace(-0.5, 2, 4).reshape(1, 4, 1, 1),
    "last": np.array([-1]), "plain": np.ones(6), "channels": np.ones(4), "none": np.zeros(2), "unit": np.ones(2),
    "into": np.array([0, 2, -1]), "back": np.array([0, 4, 3, 5]),
}  # fmt: skip

MEAN = "m = ReduceMean<axes=[-1]>(x) d = Sub(x, m)"
VARIANCE = "p = Pow(d, two) v = ReduceMean<axes=[-1]>(p) e = Add(v, eps)"
SPELLINGS = {
    "torch": f"{MEAN} {VARIANCE} s = Sqrt(e) q = Div(d, s) g1 = Mul(q, w) y = Add(g1, b)",
    "subtracted twice": f"{MEAN} d2 = Sub(x, m) p = Pow(d2, two) v = ReduceMean<axes=[2]>(p) e = Add(eps, v) "
    "s = Sqrt(e) q = Div(d, s) g1 = Mul(w, q) y = Add(b, g1)",
    "product": f"{MEAN} p = Mul(d, d) v = ReduceMean<axes=[-1]>(p) e = Add(v, eps) s = Sqrt(e) q = Div(d, s) "
    "g1 = Mul(q, w) y = Add(g1, b)",
    "reciprocal": f"{MEAN} {VARIANCE} s = Sqrt(e) i = Reciprocal(s) q = Mul(i, d) g1 = Mul(q, w) y = Add(g1, b)",
    "one over": f"{MEAN} {VARIANCE} s = Sqrt(e) i = Div(one, s) q = Mul(i, d) g1 = Mul(q, w) y = Add(g1, b)",
    "power": f"{MEAN} {VARIANCE} i = Pow(e, minus_half) q = Mul(i, d) g1 = Mul(q, w) y = Add(g1, b)",
    "weight on the reciprocal": f"{MEAN} {VARIANCE} s = Sqrt(e) i = Reciprocal(s) j = Mul(i, w) q = Mul(d, j) "
    "y = Add(q, b)",
    "sums": "m0 = ReduceSum(x, last) m = Mul(m0, sixth) d = Sub(x, m) p = Mul(d, d) v0 = ReduceSum(p, last) "
    "v = Mul(v0, sixth) e = Add(v, eps) s = Sqrt(e) q = Div(d, s) g1 = Mul(q, w) y = Add(g1, b)",
    "moments": "m = ReduceMean<axes=[-1]>(x) d = Sub(x, m) p = Mul(x, x) v0 = ReduceMean<axes=[-1]>(p) mm = Mul(m, m) "
    "vv = Sub(v0, mm) v = Relu(vv) e = Add(v, eps) s = Sqrt(e) i = Reciprocal(s) j = Mul(i, w) q = Mul(d, j) "
    "y = Add(q, b)",
    "no affine": f"{MEAN} {VARIANCE} s = Sqrt(e) y = Div(d, s)",
    "affine behind": "q = LayerNormalization(x, plain) g1 = Mul(q, w) y = Add(g1, b)",
}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_layer_norm(spelling: str, dtype: str) -> None:
    kind = "float" if dtype == "float32" else "float16"
    numbers = NUMBERS if dtype == "float32" else {**NUMBERS, "eps": 1e-3}
    body = SPELLINGS[spelling]
    before = parsed(body, inputs=f"{kind}[N,4,6] x", outputs=f"{kind}[N,4,6] y", constants=numbers, dtype=dtype)
    after = run(before, PIPELINE)
    if not (dtype == "float16" and spelling == "sums"):  # 1/6 in float16 is not one over the length
        assert ops(after) == "LayerNormalization"
    assert_equal_outputs(before, after.model.proto, tolerance=1e-5 if dtype == "float32" else 1e-2)


OVER = "m = ReduceMean<axes={0}>(x) d = Sub(x, m) p = Pow(d, two) v = ReduceMean<axes={0}>(p) e = Add(v, eps) "
OVER += "s = Sqrt(e) q = Div(d, s) "


@pytest.mark.parametrize(
    ("axes", "shape", "behind", "wanted"),
    [
        ("[1]", "N,4,6,5", "g1 = Mul(q, cw) y = Add(g1, cb)", "Transpose LayerNormalization Transpose"),
        ("[-3]", "N,4,H,W", "g1 = Mul(q, cw) y = Add(g1, cb)", "Transpose LayerNormalization Transpose"),
        ("[2, 3]", "N,4,H,W", "g1 = Mul(q, cw) y = Add(g1, cb)", "InstanceNormalization Mul Add"),
        ("[1, 2]", "N,4,6", "y = Mul(q, w)", "LayerNormalization"),
        ("[-1]", "N,4,6", "y = Mul(q, rows)", "LayerNormalization Mul"),
    ],
)
def test_other_axes(axes: str, shape: str, behind: str, wanted: str) -> None:
    body = OVER.format(axes) + behind
    before = parsed(body, inputs=f"float[{shape}] x", outputs=f"float[{shape}] y", constants=NUMBERS)
    after = run(before, PIPELINE)
    assert ops(after) == wanted
    assert_equal_outputs(before, after.model.proto, sizes=(2, 5))


NEAR = [
    ("N,4,6", OVER.format("[-1]").replace("v = ReduceMean<axes=[-1]>", "v = ReduceMean<axes=[1]>") + "y = Mul(q, w)",
     "the means are not over the same axes"),
    ("N,4,K", OVER.format("[-1]") + "y = Mul(q, rows)", "or their sizes are unknown"),
    ("N,4,6,5", OVER.format("[1, 3]") + "y = Mul(q, cw)", "no operator normalises over axes [1, 3]"),
    ("N,4,6", SPELLINGS["sums"].replace("sixth", "fifth"), "which is not known to be one over its length"),
    ("N,4,6", "q = LayerNormalization(x, w) y = Mul(q, rows)", "varies over axes that are not normalised"),
    ("N,4,6", SPELLINGS["torch"].replace("y = Add(g1, b)", "y0 = Add(g1, b) y = Add(y0, m)"), "is read by node"),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "body", "reason"), NEAR)
def test_near_misses(shape: str, body: str, reason: str) -> None:
    before = parsed(body, inputs=f"float[{shape}] x", outputs=f"float[{shape}] y", constants=NUMBERS)
    after = run(before, PIPELINE)
    assert any(reason in r for r in reasons(after)), reasons(after)
    assert_equal_outputs(before, after.model.proto, sizes=(6,))


RMS = {
    "torch": "p = Pow(x, two) v = {} e = Add(v, eps) s = Sqrt(e) q = Div(x, s) y = Mul(q, w)",
    "product": "p = Mul(x, x) v = {} e = Add(v, eps) s = Sqrt(e) q = Div(x, s) y = Mul(q, w)",
    "reciprocal": "p = Pow(x, two) v = {} e = Add(v, eps) s = Sqrt(e) i = Reciprocal(s) q = Mul(x, i) y = Mul(w, q)",
    "power": "p = Pow(x, two) v = {} e = Add(v, eps) i = Pow(e, minus_half) q = Mul(x, i) y = Mul(w, q)",
}


@pytest.mark.parametrize("spelling", RMS)
def test_rms_norm_of_opset_23(spelling: str) -> None:
    before = parsed(RMS[spelling].format("ReduceMean(p, last)"), opset=23, constants=NUMBERS)
    after = run(before, PIPELINE)
    assert ops(after) == "RMSNormalization"
    assert_equal_outputs(before, after.model.proto)


@pytest.mark.parametrize("spelling", ["torch", "product", "reciprocal"])
def test_rms_norm_below_is_spelled_for_ort(spelling: str) -> None:
    before = parsed(RMS[spelling].format("ReduceMean<axes=[-1]>(p)"), constants=NUMBERS)
    after = run(before, "lower-normalization")
    assert ops(after) == "Pow ReduceMean Add Sqrt Div Mul"
    assert_equal_outputs(before, after.model.proto)
    assert run(after.model.proto, "lower-normalization").report.passes[0].status != "changed"


@pytest.mark.parametrize("quotient", ["y = Div(x, s)", "i = Reciprocal(s) y = Mul(x, i)"])
def test_rms_norm_without_a_weight_gets_one(quotient: str) -> None:
    body = f"p = Mul(x, x) v = ReduceMean<axes=[-1]>(p) e = Add(v, eps) s = Sqrt(e) {quotient}"
    before = parsed(body, constants=NUMBERS)
    after = run(before, "lower-normalization")
    assert ops(after) == "Pow ReduceMean Add Sqrt Div Mul"
    assert_equal_outputs(before, after.model.proto)
    assert run(after.model.proto, "lower-normalization").report.passes[0].status != "changed"


def test_group_norm_of_opset_21() -> None:
    body = "y0 = GroupNormalization<num_groups=2>(x, gw, gb) y = Relu(y0)"
    numbers = {"gw": np.linspace(0.5, 2, 4), "gb": np.linspace(-1, 1, 4)}
    before = parsed(body, opset=21, inputs="float[N,4,3,5] x", outputs="float[N,4,3,5] y", constants=numbers)
    after = run(before, "lower-normalization")
    assert ops(after) == "Reshape InstanceNormalization Reshape BatchNormalization Relu"
    assert_equal_outputs(before, after.model.proto, sizes=(1, 3))


@pytest.mark.parametrize("shape", ["N,4,3,W", "N,C,3,5"])
def test_group_norm_of_unknown_size_stays(shape: str) -> None:
    body = "y = GroupNormalization<num_groups=2>(x, gw, gb)"
    numbers = {"gw": np.linspace(0.5, 2, 4), "gb": np.linspace(-1, 1, 4)}
    before = parsed(body, opset=21, inputs=f"float[{shape}] x", outputs=f"float[{shape}] y", constants=numbers)
    after = run(before, "lower-normalization")
    assert ops(after) == "GroupNormalization"
    assert "an axis behind the batch is of unknown size" in reasons(after)


def test_group_norm_of_torch() -> None:
    body = "r = Reshape(x, into) i = InstanceNormalization(r, unit, none) k = Reshape(i, back) "
    body += "g1 = Mul(k, cw) y = Add(g1, cb)"
    before = parsed(body, inputs="float[N,4,3,5] x", outputs="float[N,4,3,5] y", constants=NUMBERS)
    after = run(before, "lower-normalization")
    assert ops(after) == "Reshape InstanceNormalization Reshape BatchNormalization"
    assert_equal_outputs(before, after.model.proto)


def test_sums_before_a_norm_keep_from_the_slow_kernel() -> None:
    """ORT fuses the Add, and computes what it fuses element by element."""
    before = parsed("s = Add(x, x2) y = LayerNormalization(s, w, b)", inputs="float[N,4,6] x, float[N,4,6] x2",
                    constants=NUMBERS)  # fmt: skip
    after = run(before, "lower-normalization")
    assert ops(after) == "Sum LayerNormalization"
    assert_equal_outputs(before, after.model.proto)
    assert run(after.model.proto, "lower-normalization").report.passes[0].status != "changed"
    assert _runs(load(before)) == ["SkipLayerNormalization"]
    assert _runs(after.model) == ["Sum", "LayerNormalization"]


def test_a_sum_with_a_constant_stays() -> None:
    before = parsed("s = Add(x, w) y = LayerNormalization(s, w, b)", constants=NUMBERS)
    after = run(before, "lower-normalization")
    assert ops(after) == "Add LayerNormalization"
    assert "one side is constant: ORT does not fuse it" in reasons(after)


def _runs(model: Any) -> list[str]:
    """Return the kernels that ORT runs."""
    made = optimized_graph(model)
    assert made is not None
    return [node.op_type for node in made.graph.node]


@pytest.mark.zoo
def test_layer_norms_of_paddle() -> None:
    pipeline = f"upgrade-opset{{to=17}}, {PIPELINE}"
    result = optimize(zoo.fetch("ppocr-rec"), pipeline=pipeline, measure=False, verify="off")
    found = [n.op_type for n in result.model.proto.graph.node]
    assert found.count("LayerNormalization") == 5
    assert "Sqrt" not in found
