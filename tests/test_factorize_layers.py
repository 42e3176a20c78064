"""Low rank in graphs: exact where the weights have that rank, near on samples where not, and stable ever after."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.analysis.factorable import MARK
from graphopt.data import load_samples
from graphopt.errors import SpecError
from graphopt.model import load
from graphopt.optimizer import CLEANUP
from graphopt.pipeline import Pipeline, Result, Settings
from graphopt.runtime import Session
from graphopt.text import to_text

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(0)

EXACT = 2e-5
"""Relative to the largest element: factors are rounded to float32 and their products added in another order."""


def of_rank(rank: int, rows: int, columns: int) -> Array:
    """A matrix of a rank; products with it are about of the size of what it meets."""
    first, second = RNG.standard_normal((rows, rank)), RNG.standard_normal((rank, columns))
    return np.asarray(first @ second / np.sqrt(rank * rows), np.float32)


def model_of(
    nodes: Sequence[onnx.NodeProto], weights: Mapping[str, Array], shape: Sequence[Any], out: int | None = None,
    opset: int = 17, kind: int = TensorProto.FLOAT,
) -> onnx.ModelProto:  # fmt: skip
    graph = helper.make_graph(
        list(nodes), "g", [helper.make_tensor_value_info("x", kind, list(shape))],
        [helper.make_tensor_value_info("y", kind, [None] * (out or len(shape)))],
        [numpy_helper.from_array(np.ascontiguousarray(values), name) for name, values in weights.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def run(pipeline: str, model: Any, feeds: list[dict[str, Array]] | None = None) -> Result:
    samples = None if feeds is None else load_samples(feeds, load(model))
    return Pipeline(pipeline).run(model, samples=samples, settings=Settings(verify="off", on_failure="stop"))


def ops(result: Result) -> list[str]:
    return [node.op for node in result.model.graph.nodes]


def distance(before: Any, after: Any, feeds: Sequence[dict[str, Array]]) -> float:
    """Largest difference relative to the largest element, as the graphs stand."""
    a, b = Session(before, optimization="off"), Session(after, optimization="off")
    worst = 0.0
    for feed in feeds:
        x, y = a.run(feed)["y"], b.run(feed)["y"]
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        worst = max(worst, float(np.abs(x.astype(np.float64) - y).max() / np.abs(x).max()))
    return worst


def feeds_of(shape: Sequence[int], count: int = 4, dtype: Any = np.float32) -> list[dict[str, Array]]:
    return [{"x": np.asarray(RNG.standard_normal(shape), dtype)} for _ in range(count)]


W, B = of_rank(3, 40, 30), np.asarray(RNG.standard_normal(30), np.float32)

PRODUCTS: dict[str, tuple[list[str], dict[str, Array], tuple[int, ...]]] = {
    "matmul": (["MatMul x w y"], {"w": W}, (4, 7, 40)),
    "with a bias": (["MatMul x w p", "Add p b y"], {"w": W, "b": B}, (4, 7, 40)),
    "with a bias before": (["MatMul x w p", "Add b p y"], {"w": W, "b": B.reshape(1, 1, 30)}, (4, 7, 40)),
    "with one number for a bias": (["MatMul x w p", "Add p b y"], {"w": W, "b": B[:1]}, (4, 7, 40)),
    "gemm": (["Gemm x w b y"], {"w": W, "b": B}, (5, 40)),
    "gemm without c": (["Gemm x w y"], {"w": W}, (5, 40)),
    "gemm transposed": (["Gemm x w b y transB=1"], {"w": W.T, "b": B}, (5, 40)),
    "gemm scaled": (["Gemm x w b y alpha=0.5 beta=2.0"], {"w": W, "b": B}, (5, 40)),
    "gemm of the transposed": (["Gemm x w b y transA=1"], {"w": W, "b": B}, (40, 5)),
    "gemm with a matrix for c": (
        ["Gemm x w c y beta=0.5"], {"w": W, "c": np.asarray(RNG.standard_normal((5, 30)), np.float32)}, (5, 40),
    ),
}  # fmt: skip


def parsed(lines: Sequence[str]) -> list[onnx.NodeProto]:
    """Return nodes of lines `Op inputs… output attribute=value…`."""
    found = []
    for line in lines:
        words = line.split()
        attrs = {name: json.loads(value) for name, _, value in (w.partition("=") for w in words if "=" in w)}
        names = [w for w in words[1:] if "=" not in w]
        found.append(helper.make_node(words[0], names[:-1], names[-1:], names[-1], **attrs))
    return found


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_that_rank_stay_what_they_are(name: str, sampled: bool) -> None:
    lines, weights, shape = PRODUCTS[name]
    model = model_of(parsed(lines), weights, shape)
    feeds = feeds_of(shape)
    result = run("factorize-layers{rank=3}, eliminate-dead", model, feeds if sampled else None)
    assert len([op for op in ops(result) if op in ("MatMul", "Gemm")]) == 2
    assert len(ops(result)) == len(lines) + 1, "a bias was added that costs a node"
    onnx.checker.check_model(result.proto, full_check=True)
    assert distance(model, result.proto, feeds_of(shape)) < EXACT
    assert result.model.weight_bytes() < 0.6 * load(model).weight_bytes()


def conv_weight(way: str, kernel: Sequence[int]) -> Array:
    """A kernel (20, 12, …) of rank 3 as a way has it."""
    taps = int(np.prod(kernel))
    if way == "wide":
        return of_rank(3, 20, 12 * taps).reshape(20, 12, *kernel)
    if way == "narrow":
        return np.moveaxis(of_rank(3, 12, taps * 20).reshape(12, *kernel, 20), -1, 0)
    flat = of_rank(3, 12 * kernel[0], kernel[1] * 20).reshape(12, kernel[0], kernel[1], 20)
    return np.asarray(flat.transpose(3, 0, 1, 2))


CONVS = [
    ("wide", (1, 1), "{}"),
    ("wide", (1, 1), '{"strides": [2, 2]}'),
    ("wide", (3, 3), '{"pads": [1, 1, 1, 1]}'),
    ("wide", (3,), '{"pads": [1, 1], "strides": [2]}'),
    ("wide", (3, 1, 3), '{"pads": [1, 0, 1, 1, 0, 1]}'),
    ("wide", (3, 3), '{"auto_pad": "SAME_UPPER", "strides": [2, 2]}'),
    ("narrow", (3, 3), '{"pads": [1, 1, 1, 1]}'),
    ("narrow", (5, 3), '{"pads": [2, 0, 1, 1], "strides": [2, 1], "dilations": [1, 2]}'),
    ("narrow", (3,), '{"pads": [1, 1]}'),
    ("spatial", (3, 3), '{"pads": [1, 1, 1, 1]}'),
    ("spatial", (5, 3), '{"pads": [2, 0, 1, 1], "strides": [2, 1], "dilations": [1, 2]}'),
    ("spatial", (3, 5), '{"auto_pad": "SAME_LOWER", "strides": [1, 2]}'),
]


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize(("way", "kernel", "attrs"), CONVS)
def test_convolutions_of_that_rank_stay_what_they_are(
    way: str, kernel: tuple[int, ...], attrs: str, sampled: bool, biased: bool
) -> None:
    weights = {"w": conv_weight(way, kernel)} | (
        {"b": np.asarray(RNG.standard_normal(20), np.float32)} if biased else {}
    )
    shape = (2, 12, *(13, 11, 9)[: len(kernel)])
    node = helper.make_node("Conv", ["x", *weights], ["y"], "conv", **json.loads(attrs))
    model = model_of([node], weights, ["N", *shape[1:]])
    feeds = feeds_of(shape)
    result = run(f"factorize-layers{{rank=3, way={way}}}, eliminate-dead", model, feeds if sampled else None)
    assert ops(result) == ["Conv", "Conv"]
    onnx.checker.check_model(result.proto, full_check=True)
    assert distance(model, result.proto, feeds_of((3, *shape[1:]))) < EXACT


def test_half_precision_stays_half_precision() -> None:
    model = model_of(parsed(["MatMul x w y"]), {"w": W.astype(np.float16)}, (4, 40), kind=TensorProto.FLOAT16)
    feeds = feeds_of((4, 40), dtype=np.float16)
    result = run("factorize-layers{rank=3}", model, feeds)
    assert ops(result) == ["MatMul", "MatMul"]
    assert distance(model, result.proto, feeds) < 0.01  # float16 has 11 bits


def correlated(count: int = 32, rows: int = 16) -> list[dict[str, Array]]:
    """Inputs with a mean that live near a few directions, not those of the weight."""
    mix = RNG.standard_normal((4, 40))
    return [
        {"x": np.asarray(RNG.standard_normal((rows, 4)) @ mix + 0.1 * RNG.standard_normal((rows, 40)) + 2, np.float32)}
        for _ in range(count)
    ]


def error(before: Any, after: Any, feeds: Sequence[dict[str, Array]]) -> float:
    a, b = Session(before), Session(after)
    pairs = [(a.run(feed)["y"], b.run(feed)["y"]) for feed in feeds]
    return float(np.sqrt(sum(np.square(x - y).sum() for x, y in pairs) / sum(np.square(x).sum() for x, _ in pairs)))


def test_samples_make_the_error_less_than_half() -> None:
    weight = np.asarray(RNG.standard_normal((40, 30)) / 6, np.float32)
    model = model_of(parsed(["Gemm x w b y"]), {"w": weight, "b": B}, ("N", 40))
    feeds, others = correlated(), correlated()
    by_weight = run("factorize-layers{rank=4, method=weights}", model, feeds)
    by_samples = run("factorize-layers{rank=4}", model, feeds)
    mixed = error(model, by_samples.proto, feeds)
    assert mixed < 0.5 * error(model, by_weight.proto, feeds)
    means = [Session(m).run({"x": np.concatenate([f["x"] for f in feeds])})["y"].mean(axis=0) for m in
             (model, by_samples.proto)]  # fmt: skip
    np.testing.assert_allclose(means[0], means[1], atol=1e-4)  # the bias carries the mean: float32 over 512 rows
    assert error(model, by_samples.proto, others) > 0.0


def test_what_flows_between_has_variance_one_on_the_samples() -> None:
    weight = np.asarray(RNG.standard_normal((40, 30)) / 6, np.float32)
    model = model_of(parsed(["Gemm x w b y"]), {"w": weight, "b": B}, ("N", 40))
    feeds = correlated()
    made = run("factorize-layers{rank=6}", model, feeds).model
    between = made.graph.nodes[0].outputs[0].name
    session = Session(made, extra_outputs=[between])
    values = np.concatenate([session.run(feed, [between])[between] for feed in feeds])
    np.testing.assert_allclose(values.var(axis=0), 1.0, rtol=0.05)  # the ridge


def deep(way: str = "Gemm") -> tuple[onnx.ModelProto, list[dict[str, Array]]]:
    """Three layers with activations between them."""
    sizes = [40, 64, 64, 30]
    weights: dict[str, Array] = {}
    lines = []
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        weights[f"w{i}"] = of_rank(6, a, b) + 0.01 * of_rank(20, a, b)
        weights[f"b{i}"] = np.asarray(RNG.standard_normal(b), np.float32)
        lines.append(f"{way} {'x' if i == 0 else f'r{i - 1}'} w{i} b{i} {'y' if i == 2 else f'h{i}'}")
        lines += [] if i == 2 else [f"Relu h{i} r{i}"]
    return model_of(parsed(lines), weights, ("N", 40)), correlated()


@pytest.mark.parametrize("options", ["rank=8", "energy=0.999", "error=0.05", 'ranks="h1=8"'])
def test_the_same_request_again_does_nothing(options: str) -> None:
    model, feeds = deep()
    once = run(f"factorize-layers{{{options}}}", model, feeds)
    assert once.report.passes[0].changes > 0
    again = run(f"factorize-layers{{{options}}}", once.proto, feeds)
    assert again.report.passes[0].status != "changed"
    other = run("factorize-layers{rank=4}", once.proto, feeds)
    assert all("it is a factor already" in b["why"] for b in other.report.passes[0].blocked)


def test_errors_and_energies_are_kept_by_each_layer() -> None:
    model, feeds = deep()
    for options, least in (("error=0.05", 0.05), ("energy=0.999", np.sqrt(0.001))):
        made = run(f"factorize-layers{{{options}, only=h0}}", model, feeds).proto
        a, b = (Session(m, extra_outputs=["h0"]) for m in (model, made))
        x, y = (np.concatenate([s.run(f, ["h0"])["h0"] for f in feeds]) for s in (a, b))
        assert np.linalg.norm(x - y) <= 1.01 * least * np.linalg.norm(x - x.mean(axis=0))  # all rows were taken


def test_layers_are_told_by_name() -> None:
    model, feeds = deep()
    made = run('factorize-layers{rank=8, only="h*", skip=h1}', model, feeds)
    assert [n.name for n in made.model.graph.nodes if n.op == "Gemm"] == ["h0", "h1", "y"]
    assert [bool(MARK in made.model.metadata(n)) for n in made.model.graph.nodes if n.op == "Gemm"] == [
        True, False, False,
    ]  # fmt: skip


def test_double_precision_is_no_reason_not_to() -> None:
    model = model_of(parsed(["MatMul x w y"]), {"w": W.astype(np.float64)}, (4, 40), kind=TensorProto.DOUBLE)
    feeds = feeds_of((4, 40), dtype=np.float64)
    assert distance(model, run("factorize-layers{rank=3}", model, feeds).proto, feeds) < EXACT


NEAR = {
    "it has 4 groups": (["Conv x w y group=4"], {"w": np.ones((8, 2, 3, 3), np.float32)}, (1, 8, 6, 6)),
    "its weight stands on the left": (["MatMul w x y"], {"w": W}, (40, 5)),
    "its weight has 3 dimensions, not 2": (["MatMul x w y"], {"w": np.ones((2, 6, 5), np.float32)}, (2, 4, 6)),
    "no rank would save work": (["MatMul x w y"], {"w": np.ones((6, 1), np.float32)}, (2, 6)),
    "rank 18 would be needed, and only up to 17 saves work": (["Gemm x w b y"], {"w": W, "b": B}, (5, 40)),
}


@pytest.mark.parametrize("why", NEAR)
def test_near_misses_say_why(why: str) -> None:
    lines, weights, shape = NEAR[why]
    model = model_of(parsed(lines), weights, shape)
    result = run("factorize-layers{rank=18}", model)
    assert [b["why"] for b in result.report.passes[0].blocked] == [why]
    assert to_text(result.model) == to_text(load(model))


@pytest.mark.parametrize(
    "options",
    ["rank=-1", "energy=1.0", "error=-0.1", "rank=3, energy=0.9", "way=deep", "method=guess", 'ranks="a=b"'],
)
def test_options_that_mean_nothing_are_refused(options: str) -> None:
    with pytest.raises(SpecError, match="factorize-layers"):
        Pipeline(f"factorize-layers{{{options}}}")


def test_shared_weights_get_factors_each() -> None:
    lines = ["MatMul x w p", "Relu p r", "MatMul r w y"]
    model = model_of(parsed(lines), {"w": of_rank(3, 40, 40)}, (6, 40))
    feeds = feeds_of((6, 40))
    result = run("factorize-layers{rank=3}, eliminate-dead", model, feeds)
    assert ops(result).count("MatMul") == 4
    assert distance(model, result.proto, feeds) < EXACT


@pytest.mark.parametrize("kind", ["product", "wide", "narrow", "spatial"])
def test_the_lossless_engine_leaves_factors_apart(kind: str) -> None:
    if kind == "product":
        model = model_of(parsed(["MatMul x w p", "Add p b y"]), {"w": W, "b": B}, (4, 7, 40))
        shape: tuple[int, ...] = (4, 7, 40)
    else:
        shape = (2, 12, 9, 9)
        node = helper.make_node("Conv", ["x", "w"], ["y"], "conv", pads=[1, 1, 1, 1])
        model = model_of([node], {"w": conv_weight(kind, (3, 3))}, shape)
    for rank in (3, 4):
        made = run(
            f"factorize-layers{{rank={rank}, way={'auto' if kind == 'product' else kind}}}", model, feeds_of(shape)
        )
        count = sum(op in ("Conv", "MatMul", "Gemm") for op in ops(made))
        after = run(f"repeat({CLEANUP})", made.proto)
        assert sum(op in ("Conv", "MatMul", "Gemm") for op in ops(after)) == count == 2
        again = run(f"factorize-layers{{rank={rank}}}", after.proto, feeds_of(shape))
        assert again.report.passes[0].changes == 0


@pytest.mark.parametrize(("rank", "left"), [(16, 2), (18, 1), (30, 1)])
def test_redundant_factors_of_others_become_one(rank: int, left: int) -> None:
    # 40 x 30: from rank 17.1 on the product takes less work
    weights = {"v": of_rank(rank, 40, rank), "w": of_rank(rank, rank, 30)}
    product = model_of(parsed(["MatMul x v z", "MatMul z w y"]), weights, (4, 7, 40))
    assert len(ops(run(f"repeat({CLEANUP})", product))) == left
    kernels = {name: values.T.reshape(*values.T.shape, 1, 1) for name, values in weights.items()}
    convs = model_of(parsed(["Conv x v z", "Conv z w y"]), kernels, (1, 40, 5, 5))
    assert len(ops(run(f"repeat({CLEANUP})", convs))) == left


@pytest.mark.parametrize("shape", [("N",), ("N", 5), ()])
def test_tables_get_factors_where_that_is_asked_for(shape: tuple[Any, ...]) -> None:
    table = of_rank(5, 300, 24)
    graph = helper.make_graph(
        [helper.make_node("Gather", ["t", "x"], ["y"], "table")], "g",
        [helper.make_tensor_value_info("x", TensorProto.INT64, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [*shape, 24])], [numpy_helper.from_array(table, "t")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert ops(run("factorize-layers{rank=5}", model)) == ["Gather"]
    made = run("factorize-layers{rank=5, embeddings=true}, eliminate-dead", model)
    assert ops(made) == ["Gather", "MatMul"]
    onnx.checker.check_model(made.proto, full_check=True)
    feeds = [{"x": RNG.integers(0, 300, [3 if d == "N" else d for d in shape])} for _ in range(3)]
    assert distance(model, made.proto, feeds) < EXACT
    assert made.model.weight_bytes() < 0.25 * load(model).weight_bytes()
    again = run("factorize-layers{rank=5, embeddings=true}", made.proto)
    assert again.report.passes[0].changes == 0
    refused = run("factorize-layers{rank=23, embeddings=true}", model).report.passes[0].blocked
    assert "only up to 22 saves" in refused[0]["why"]
