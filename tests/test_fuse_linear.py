"""Convolutions and products as one: the algebra itself, what is refused and why, exported kinds of networks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from graphopt.passes.conv_kernels import Window, hull
from graphopt.pipeline import Pipeline, Result, Settings
from graphopt.registry import all_passes
from graphopt.runtime import Session

FUSE = "repeat(canonicalize, fold-constants, expand-einsum, fuse-convs, fuse-linear, eliminate-dead)"
TOLERANCE = 1e-5
"""Relative to the largest element: what the passes promise."""

Weights = Mapping[str, np.ndarray[Any, Any]]


def model(text: str, weights: Weights | None = None, opset: int = 17) -> onnx.ModelProto:
    """Return a model from its text form; `weights` become initializers."""
    made = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]>\n{text}')
    made.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(w, np.float32 if w.dtype.kind == "f" else w.dtype), n)
        for n, w in (weights or {}).items()
    )
    return made


def run(pipeline: str, proto: onnx.ModelProto) -> Result:
    return Pipeline(pipeline).run(proto, settings=Settings(verify="off", on_failure="stop"))


def ops(result: Result) -> Counter[str]:
    return Counter(node.op for node in result.model.graph.nodes)


def reasons(result: Result) -> str:
    return "\n".join(b["why"] for record in result.report.passes for b in record.blocked)


def assert_same(before: onnx.ModelProto, after: onnx.ModelProto, **feeds: np.ndarray[Any, Any]) -> None:
    for mode in ("off", "all"):
        wanted = Session(before, optimization=mode).run(feeds)
        found = Session(after, optimization=mode).run(feeds)
        for name, values in wanted.items():
            assert values.shape == found[name].shape, name
            largest = float(np.abs(values).max(initial=1e-30))
            assert float(np.abs(values - found[name]).max(initial=0.0)) <= TOLERANCE * largest, (name, mode)


def normal(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng((seed, *shape))
    return np.asarray(rng.normal(size=shape) / max(np.sqrt(np.prod(shape[1:])), 1), np.float32)


@settings(max_examples=120)
@given(
    seed=st.integers(0, 1 << 32),
    sizes=st.tuples(*[st.integers(1, 5)] * 4),
    pads=st.tuples(*[st.integers(0, 4)] * 4),
    strides=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    dilations=st.tuples(*[st.integers(1, 2)] * 4),
    groups=st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4])),
)
def test_a_sum_of_any_two_convolutions(
    seed: int, sizes: Any, pads: Any, strides: Any, dilations: Any, groups: Any
) -> None:
    """Windows of all kinds: either they become one, or they are left alone; the sum stays."""
    first, second = sizes[:2], sizes[2:]
    nodes, weights = [], []
    for name, size, at, dilation, group in (
        ("a", first, pads[:2], dilations[:2], groups[0]),
        ("b", second, pads[2:], dilations[2:], groups[1]),
    ):
        end = [(k - 1) * d - p for k, d, p in zip(size, dilation, at, strict=True)]
        if min(end) < 0:
            end = [abs(e) for e in end]
        weights.append(numpy_helper.from_array(normal(4, 4 // group, *size, seed=seed), f"w{name}"))
        nodes.append(
            helper.make_node(
                "Conv", ["x", f"w{name}"], [name], pads=[*at, *end], strides=strides, dilations=dilation, group=group
            )
        )
    info = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 9, 9])]
    nodes.append(helper.make_node("Add", ["a", "b"], ["y"]))
    graph = helper.make_graph(nodes, "g", info, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], weights)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    feeds = {"x": np.asarray(np.random.default_rng(seed).normal(size=(1, 4, 9, 9)), np.float32)}
    try:
        Session(proto, optimization="off").run(feeds)
    except Exception:  # noqa: BLE001  (the two outputs may not fit each other)
        return
    assert_same(proto, run("fuse-convs", proto).proto, **feeds)


@pytest.mark.parametrize(
    ("one", "other", "kernel", "pads"),
    [
        (((3, 3), (1, 1, 1, 1), 1), ((1, 1), (0, 0, 0, 0), 1), [3, 3], [1, 1, 1, 1]),
        (((3, 3), (1, 1, 1, 1), 1), ((1, 3), (0, 1, 0, 1), 1), [3, 3], [1, 1, 1, 1]),
        (((5, 5), (2, 2, 2, 2), 1), ((3, 3), (2, 1, 0, 1), 1), [5, 5], [2, 2, 2, 2]),
        (((3, 3), (2, 2, 2, 2), 2), ((1, 1), (0, 0, 0, 0), 1), [3, 3], [2, 2, 2, 2]),
        (((3, 3), (2, 2, 0, 0), 1), ((1, 1), (0, 0, 0, 0), 1), [3, 3], [2, 2, 0, 0]),
        (((3, 3), (2, 2, 2, 2), 2), ((3, 3), (1, 1, 1, 1), 1), None, None),
    ],
)
def test_windows_that_fit(one: Any, other: Any, kernel: Any, pads: Any) -> None:
    windows = []
    for size, at, dilation in (one, other):
        windows.append(Window(size, (1, 1), (dilation, dilation), at[:2], at[2:]))
    found = hull(*windows)
    if kernel is None:
        assert isinstance(found, str)
        return
    assert isinstance(found, Window)
    assert [list(found.size), [*found.before, *found.after]] == [kernel, pads]


CONV_CASES = {
    "the padding between them does not see the bias": (
        "g (float[1,4,6,6] x) => (float[1,2,6,6] y) { u = Conv(x, up, bias)  y = Conv<pads=[1,1,1,1]>(u, down) }",
        {"up": normal(6, 4, 1, 1), "bias": normal(6), "down": normal(2, 6, 3, 3)},
    ),
    "MACs for each place instead of": (
        "g (float[1,8,6,6] x) => (float[1,8,6,6] y) { u = Conv(x, squeeze)  y = Conv(u, expand) }",
        {"squeeze": normal(2, 8, 1, 1), "expand": normal(8, 2, 1, 1)},
    ),
    "neither is 1x1": (
        "g (float[1,2,9,9] x) => (float[1,2,5,5] y) { u = Conv(x, w)  y = Conv(u, w) }", {"w": normal(2, 2, 3, 3)},
    ),
    "inner value 'u' is read by node": (
        "g (float[1,4,6,6] x) => (float[1,2,6,6] y, float[1,6,6,6] z) { u = Conv(x, up)  y = Conv(u, down)"
        "  z = Relu(u) }",
        {"up": normal(6, 4, 1, 1), "down": normal(2, 6, 1, 1)},
    ),
    "auto_pad is SAME_UPPER and the stride is not 1": (
        'g (float[1,4,6,6] x) => (float[1,2,3,3] y) { u = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, up)'
        "  y = Conv(u, down) }",
        {"up": normal(6, 4, 3, 3), "down": normal(2, 6, 1, 1)},
    ),
    "strides [2, 2] and [1, 1] differ": (
        "g (float[1,2,1,1] x) => (float[1,2,1,1] y) { a = Conv<strides=[2,2]>(x, w)  b = Conv(x, w)  y = Add(a, b) }",
        {"w": normal(2, 2, 1, 1)},
    ),
    "the outputs differ in size": (
        "g (float[1,2,3,3] x) => (float[1,2,3,3] y) { a = Conv(x, w)  b = Conv(x, k)  y = Add(a, b) }",
        {"w": normal(2, 2, 1, 1), "k": normal(2, 2, 3, 3)},
    ),
    "BatchNormalization is in training mode": (
        "g (float[1,2,3,3] x) => (float[1,2,3,3] y) { a = Conv(x, w)"
        "  b, m, v = BatchNormalization<training_mode=1>(x, s, s, s, s)  y = Add(a, b) }",
        {"w": normal(2, 2, 1, 1), "s": np.ones(2, np.float32)},
    ),
    "it makes 3 channels of 1": (
        "g (float[1,1,3,3] x) => (float[1,3,3,3] y) { a = Conv(x, w)  y = Add(a, x) }", {"w": normal(3, 1, 1, 1)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", CONV_CASES)
def test_convolutions_that_stay(reason: str) -> None:
    text, weights = CONV_CASES[reason]
    proto = model(text, weights)
    result = run("fuse-convs", proto)
    assert reason in reasons(result)
    assert ops(result)["Conv"] == sum(node.op_type == "Conv" for node in proto.graph.node)


LINEAR_CASES = {
    "MACs for each row instead of": (
        "g (float[3,8] x) => (float[3,8] y) { u = MatMul(x, down)  y = MatMul(u, up) }",
        {"down": normal(8, 2), "up": normal(2, 8)},
    ),
    "the bias is not one number per output": (
        "g (float[3,4] x) => (float[3,2] y) { u = Gemm(x, w, b)  y = MatMul(u, v) }",
        {"w": normal(4, 4), "b": normal(3, 4), "v": normal(4, 2)},
    ),
    "the input does not have two axes": (
        "g (float[2,3,4] x) => (float[2,3,4] y) { u = MatMul(x, w)  y = Add(u, b) }",
        {"w": normal(4, 4), "b": normal(4)},
    ),
    "the table would grow by": (
        "g (int64[N] i) => (float[N,64] y) { e = Gather(table, i)  y = MatMul(e, w) }",
        {"table": normal(4000, 8), "w": normal(8, 64)},
    ),
    "is used elsewhere, too": (
        "g (float[3,32] x) => (float[3,2] y, float[3,32] z) { u = MatMul(x, w)  y = MatMul(u, v)  z = MatMul(x, w) }",
        {"w": normal(32, 32), "v": normal(32, 16)[:, :16]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", LINEAR_CASES)
def test_products_that_stay(reason: str) -> None:
    text, weights = LINEAR_CASES[reason]
    proto = model(text, weights)
    result = run("fuse-linear", proto)
    assert reason in reasons(result)
    assert len(result.model.graph.nodes) == len(proto.graph.node)


@pytest.mark.parametrize("kind", ["convs", "linear"])
def test_products_of_weights_are_bounded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = {
        "convs": "g (float[1,4,6,6] x) => (float[1,2,6,6] y) { u = Conv(x, a)  y = Conv(u, b) }",
        "linear": "g (float[3,4] x) => (float[3,2] y) { u = MatMul(x, a)  y = MatMul(u, b) }",
    }[kind]
    shapes = ((6, 4, 1, 1), (2, 6, 1, 1)) if kind == "convs" else ((4, 6), (6, 2))
    module = __import__(f"graphopt.passes.{'conv_kernels' if kind == 'convs' else 'fuse_linear'}", fromlist=["LARGEST"])
    proto = model(text, {"a": normal(*shapes[0]), "b": normal(*shapes[1])})
    assert len(run(f"fuse-{kind}", proto).model.graph.nodes) == 1
    monkeypatch.setattr(module, "LARGEST", 47)
    result = run(f"fuse-{kind}", proto)
    assert "too much work" in reasons(result)
    assert len(result.model.graph.nodes) == 2


def repvgg(depthwise: bool) -> onnx.ModelProto:
    """Two blocks as torch exports them in training form, batch norms folded or not: 3x3 + 1x1 + identity."""
    group = 8 if depthwise else 1
    text, weights = "g (float[N,8,7,7] x0) => (float[N,8,7,7] x2) {", {}
    for i in range(2):
        weights[f"k{i}"], weights[f"p{i}"] = normal(8, 8 // group, 3, 3, seed=i), normal(8, 8 // group, 1, 1, seed=i)
        for s in "sbmv":
            weights[f"{s}{i}"] = np.abs(normal(8, seed=ord(s) + i)) + 0.5
        text += f"""
            a{i} = Conv<pads=[1,1,1,1], group={group}>(x{i}, k{i})  b{i} = Conv<group={group}>(x{i}, p{i})
            c{i} = BatchNormalization(x{i}, s{i}, b{i}_, m{i}, v{i})
            d{i} = Add(a{i}, b{i})  e{i} = Add(d{i}, c{i})  x{i + 1} = Relu(e{i})"""
        weights[f"b{i}_"] = weights.pop(f"b{i}")
    return model(text + "}", weights)


@pytest.mark.parametrize("depthwise", [False, True])
def test_reparametrised_blocks_become_one_convolution_each(depthwise: bool) -> None:
    proto = repvgg(depthwise)
    result = run(FUSE, proto)
    assert ops(result) == {"Conv": 2, "Relu": 2}
    assert_same(proto, result.proto, x0=normal(3, 8, 7, 7))


def test_unmerged_adapters_go_into_their_layer() -> None:
    """x·W + b + (x·A)·B·2, as adapters of low rank are exported without being merged."""
    proto = model(
        """g (float[N,5,16] x) => (float[N,5,16] y) {
            base = MatMul(x, w)  biased = Add(b, base)  down = MatMul(x, a)  up = MatMul(down, c)
            total = Add(biased, up)  y = Relu(total) }""",
        {"w": normal(16, 16), "b": normal(16), "a": normal(16, 2), "c": normal(2, 16)},
    )
    result = run(FUSE, proto)
    assert ops(result)["MatMul"] == 1
    assert_same(proto, result.proto, x=normal(2, 5, 16))


def test_a_factorised_embedding_becomes_one_table() -> None:
    proto = model(
        "g (int64[N,3] i) => (float[N,3,16] y) { e = Gather(table, i)  p = MatMul(e, w)  y = Add(p, b) }",
        {"table": normal(20, 4), "w": normal(4, 16), "b": normal(16)},
    )
    result = run(FUSE, proto)
    assert ops(result) == {"Gather": 1}
    assert_same(proto, result.proto, i=np.array([[0, 5, 19], [-1, 2, 3]]))


def test_half_precision_rounds_once() -> None:
    """Weights are multiplied in float64: the result is the exact product, rounded to float16."""
    a, b = normal(4, 6).astype(np.float16), normal(6, 2).astype(np.float16)
    proto = model("g (float16[3,4] x) => (float16[3,2] y) { u = MatMul(x, a)  y = MatMul(u, b) }")
    proto.graph.initializer.extend([numpy_helper.from_array(a, "a"), numpy_helper.from_array(b, "b")])
    node = run("fuse-linear", proto).model.graph.nodes[0]
    exact = a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_array_equal(np.asarray(node.inputs[1].values), exact.astype(np.float16))


def test_all_are_registered() -> None:
    names = {"fuse-convs", "fuse-linear", "expand-einsum", "merge-parallel", "lower-conv1d", "widen-channels"}
    assert names | {"lower-pools", "flush-denormals"} <= set(all_passes())
