"""Attention: known spellings, masks of all kinds, rows of which nothing is left, near misses, random blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.runtime import Session

from .rewrites import assert_equal_outputs, ops, parsed, reasons, run
from .test_random_activations import renamed

PIPELINE = "lower-attention, eliminate-dead"
HEADS = "".join(f"{x}h = Reshape({{0}}, heads) {x}t = Transpose<perm=[0, 2, 1, 3]>({x}h) " for x in "qkv")
CHAIN = HEADS.replace("kt = Transpose<perm=[0, 2, 1, 3]>", "kt = Transpose<perm=[0, 2, 3, 1]>") + "a = MatMul(qt, kt) "
MERGE = " ct = Transpose<perm=[0, 2, 1, 3]>(c) y = Reshape(ct, rows)"
GUARD = " i = IsNaN(p) z = Where(i, zero, p) c = MatMul(z, vt)"
CONSTANTS: dict[str, Any] = {
    "heads": np.array([0, 0, 2, 3]), "rows": np.array([0, 0, 6]), "zero": 0.0, "half": 0.5, "minus": -0.5,
    "largest": -3.4028235e38, "infinite": -np.inf, "thousands": -1e4, "one": 1.0,
}  # fmt: skip

FLAT = "Reshape Reshape Reshape Reshape Reshape Reshape Attention Reshape Reshape"


def attention(core: str, *, opset: int = 23, inputs: str = "float[B,S,6] x") -> onnx.ModelProto:
    shape = inputs.split(" ", maxsplit=1)[0]
    return parsed(core.format("x"), opset=opset, inputs=inputs, outputs=f"{shape} y", constants=CONSTANTS)


@pytest.mark.parametrize("shape", ["float[B,S,6]", "float[1,1,6]", "float[2,5,6]"])
@pytest.mark.parametrize(
    "core",
    [
        CHAIN + "p = Softmax(a) c = MatMul(p, vt)",
        CHAIN + "p = Softmax<axis=3>(a) c = MatMul(p, vt)",
        CHAIN + "s = Mul(half, a) p = Softmax(s) c = MatMul(p, vt)",
        HEADS + "c = Attention(qt, kt, vt)",
        HEADS + "c = Attention<is_causal=1>(qt, kt, vt)",
        HEADS + "c = Attention<scale=0.3, softcap=2.0>(qt, kt, vt)",
    ],
)
def test_heads_are_read_where_they_lie(core: str, shape: str) -> None:
    before = attention(core + MERGE, inputs=f"{shape} x")
    after = run(before, PIPELINE)
    if "B" in shape and "Attention" not in core:
        assert reasons(after) == ["a size may be zero: the kernel refuses such tensors"]
        return
    assert ops(after) == FLAT
    assert_equal_outputs(before, after.model.proto, sizes=(1, 2, 5))


def test_one_attention_becomes_the_other() -> None:
    after = run(attention(HEADS + "c = Attention<is_causal=1>(qt, kt, vt)" + MERGE), PIPELINE).model
    [node] = [n for n in after.proto.graph.node if n.op_type == "Attention"]
    assert {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} == {
        "is_causal": 1, "q_num_heads": 2, "kv_num_heads": 2,
    }  # fmt: skip


def test_groups_of_heads_share_keys() -> None:
    body = "q = Reshape(x, many) k = Reshape(w, few) v = Reshape(u, few) " + "".join(
        f"{n}t = Transpose<perm=[0, 2, 1, 3]>({n}) " for n in "qkv"
    )
    before = parsed(
        body + "c = Attention(qt, kt, vt) y = Transpose<perm=[0, 2, 1, 3]>(c)",
        opset=23, inputs="float[B,5,12] x, float[B,7,6] w, float[B,7,6] u", outputs="float[B,5,4,3] y",
        constants={"many": np.array([0, 0, 4, 3]), "few": np.array([0, 0, 2, 3])},
    )  # fmt: skip
    after = run(before, PIPELINE)
    assert "Transpose" not in ops(after)
    for size in (1, 2):
        feeds = {i.name: np.random.default_rng(0).normal(size=(2, n, w)) for i, n, w in
                 zip(before.graph.input, (5, 7, 7), (12, 6, 6), strict=True)}  # fmt: skip
        same_for(before, after.model.proto, {k: v[:size].astype(np.float32) for k, v in feeds.items()})


def same_for(before: onnx.ModelProto, after: onnx.ModelProto, feeds: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Check that both make the same of `feeds`, ORT's own optimisations off and on, not-a-number included."""
    [wanted] = Session(before, optimization="off").run(feeds).values()
    for level in ("off", "all"):
        [found] = Session(after, optimization=level).run(feeds).values()
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.nanmax(np.abs(wanted)))
    return np.asarray(wanted)


def masks(kind: str, rng: np.random.Generator, batch: int, size: int) -> np.ndarray[Any, Any]:
    """Return a mask: padding, causal, one for each head; always with a row (or a sample) of which nothing is left."""
    if kind == "padding":
        kept = rng.random((batch, 1, 1, size)) < 0.6
        kept[0] = False
    elif kind == "causal":
        kept = np.tril(np.ones((1, 1, size, size), bool), -1)  # the first row sees nothing
    else:
        kept = rng.random((batch, 2, size, size)) < 0.5
        kept[0, 1, 0] = False
    return np.asarray(kept, np.bool_)


SHAPES = {"padding": "B,1,1,S", "causal": "1,1,S,S", "heads": "B,2,S,S"}


@pytest.mark.parametrize("opset", [17, 23])
@pytest.mark.parametrize("low", ["infinite", "largest", "thousands"])
@pytest.mark.parametrize("kind", SHAPES)
def test_guarded_masks(kind: str, low: str, opset: int) -> None:
    core = CHAIN + f"m = Where(keep, zero, {low}) s = Add(a, m) p = Softmax(s)" + GUARD + MERGE
    before = attention(core, opset=opset, inputs=f"float[B,S,6] x, bool[{SHAPES[kind]}] keep")
    after = run(before, PIPELINE)
    assert ops(after).endswith("Add Softmax MatMul IsNaN Where Transpose Reshape")
    rng = np.random.default_rng(1)
    for batch, size in ((1, 1), (2, 5), (3, 9)):
        x = rng.normal(size=(batch, size, 6)).astype(np.float32)
        found = same_for(before, after.model.proto, {"x": x, "keep": masks(kind, rng, batch, size)})
        assert np.isfinite(found).all()
        if low == "infinite":
            assert (found == 0).any()
    assert run(after.model.proto, PIPELINE).report.passes[0].status != "changed"


@pytest.mark.parametrize("kind", ["causal", "heads"])
@pytest.mark.parametrize("low", ["infinite", "largest", "thousands"])
def test_masks_of_attention(kind: str, low: str) -> None:
    core = HEADS + f"m = Where(keep, zero, {low}) c = Attention(qt, kt, vt, m)" + MERGE
    before = attention(core, inputs=f"float[B,S,6] x, bool[{SHAPES[kind]}] keep")
    truth = attention(
        HEADS + "c = Attention(qt, kt, vt, keep)" + MERGE, inputs=f"float[B,S,6] x, bool[{SHAPES[kind]}] keep"
    )
    rng = np.random.default_rng(1)
    for model in (before, truth):
        after = run(model, PIPELINE)
        assert ops(after).endswith(FLAT.removeprefix("Reshape Reshape Reshape "))
        for batch, size in ((1, 1), (2, 5), (3, 9)):
            x = rng.normal(size=(batch, size, 6)).astype(np.float32)
            same_for(model, after.model.proto, {"x": x, "keep": masks(kind, rng, batch, size)})


def test_where_the_kernel_differs_from_the_chain() -> None:
    """Why chains with a mask stay: of a row of lowest numbers the kernel makes zeros, softmax equal parts."""
    chain = CHAIN + "m = Where(keep, zero, largest) s = Add(a, m) p = Softmax(s) c = MatMul(p, vt)" + MERGE
    kernel = HEADS + "m = Where(keep, zero, largest) c = Attention<scale=1.0>(qt, kt, vt, m)" + MERGE
    made = [attention(core, inputs="float[B,S,6] x, bool[1,1,S,S] keep") for core in (chain, kernel)]
    x = np.random.default_rng(0).normal(size=(1, 4, 6)).astype(np.float32)
    feeds = {"x": x, "keep": np.tril(np.ones((1, 1, 4, 4), bool), -1)}
    parts, zeros = (Session(model).run(feeds)["y"][0, 0] for model in made)
    assert np.abs(parts).min() > 0.01
    assert (zeros == 0).all()
    assert "Attention" not in ops(run(made[0], PIPELINE))


NEAR = [
    (17, CHAIN + "p = Softmax(a) c = MatMul(p, vt)", "the graph is of opset 17, the rule is for 23"),
    (23, CHAIN + "p = Softmax<axis=2>(a) c = MatMul(p, vt)", "the softmax is along another axis"),
    (23, CHAIN + "s = Mul(a, minus) p = Softmax(s) c = MatMul(p, vt)", "the scale is not positive"),
    (17, CHAIN + "p = Softmax<axis=2>(a)" + GUARD, "the softmax is not known to be along the last axis"),
]


@pytest.mark.parametrize(("opset", "core", "reason"), NEAR)
def test_near_misses(opset: int, core: str, reason: str) -> None:
    before = attention(core + MERGE, opset=opset)
    after = run(before, PIPELINE)
    assert any(reason in r for r in reasons(after)), reasons(after)
    assert_equal_outputs(before, after.model.proto)


def test_batches_that_may_broadcast_stay() -> None:
    split = " ".join(f"{n}t = Transpose<perm={perm}>({n})" for n, perm in
                     (("q", "[0, 2, 1, 3]"), ("k", "[0, 2, 3, 1]"), ("v", "[0, 2, 1, 3]")))  # fmt: skip
    before = parsed(
        split + " a = MatMul(qt, kt) p = Softmax(a) c = MatMul(p, vt) y = Transpose<perm=[0, 2, 1, 3]>(c)",
        opset=23, inputs="float[2,5,2,3] q, float[1,5,2,3] k, float[1,5,2,3] v", outputs="float[2,5,2,3] y",
    )  # fmt: skip
    after = run(before, PIPELINE)
    assert "queries, keys and values may be of sizes that do not go together" in reasons(after)
    assert_equal_outputs(before, after.model.proto)


def test_fewer_scores_than_values_stay() -> None:
    before = parsed(
        "p = Softmax(x) i = IsNaN(p) z = Where(i, zero, p) y = MatMul(z, v)",
        inputs="float[4,6] x, float[6,8] v", outputs="float[4,8] y", constants=CONSTANTS,
    )  # fmt: skip
    after = run(before, PIPELINE)
    assert reasons(after) == ["the product has no fewer elements"]
    assert_equal_outputs(before, after.model.proto)


CORES = (
    CHAIN + "p = Softmax(a) c = MatMul(p, vt)",
    CHAIN + "s = Mul(a, half) p = Softmax<axis=3>(s) c = MatMul(p, vt)",
    CHAIN + "s = Mul(a, half) w = Add(s, thousands) p = Softmax(w)" + GUARD,
    CHAIN + "t = Trilu<upper=1>(a) p = Softmax(t)" + GUARD,
    CHAIN + "p = Softmax<axis=2>(a)" + GUARD,
    CHAIN + "s = Mul(a, minus) p = Softmax(s) c = MatMul(p, vt)",
    CHAIN + "p = Softmax(a) i = IsNaN(p) z = Where(i, one, p) c = MatMul(z, vt)",
    HEADS + "c = Attention(qt, kt, vt)",
    HEADS + "c = Attention<is_causal=1, scale=0.7>(qt, kt, vt)",
)
STEPS = ("y = Tanh(x)", "y = Add(x, one)")


@st.composite
def models(draw: Callable[..., Any]) -> onnx.ModelProto:
    """Blocks of attention in a row, with residuals and values that are outputs, too."""
    value, texts, outputs = "x", [], []
    opset = draw(st.sampled_from((18, 23)))
    pool = [c for c in CORES if opset == 23 or "Attention" not in c]
    for number in range(draw(st.integers(1, 4))):
        body = (
            draw(st.sampled_from(pool)).format("x") + MERGE if draw(st.integers(0, 3)) else draw(st.sampled_from(STEPS))
        )
        text, made = renamed(body, number, value)
        texts.append(text)
        if draw(st.booleans()):
            texts.append(f"sum_{number} = Add({made}, {value})")
            made = f"sum_{number}"
        if draw(st.integers(0, 4)) == 0:
            outputs.append(made)
        value = made
    batch, rows = draw(st.sampled_from(("B", "2"))), draw(st.sampled_from(("S", "5", "2")))
    return parsed(
        " ".join(texts), opset=opset, inputs=f"float[{batch},{rows},6] x", constants=CONSTANTS,
        outputs=", ".join(f"float[{batch},{rows},6] {n}" for n in dict.fromkeys([*outputs, value])),
    )  # fmt: skip


@settings(max_examples=220)
@given(models())
def test_outputs_stay(model: onnx.ModelProto) -> None:
    after = run(model, PIPELINE)
    assert_equal_outputs(model, after.model.proto, sizes=(1, 4))
    onnx.checker.check_model(after.model.proto, full_check=True)
