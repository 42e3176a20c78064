"""Layers behind a cut, fitted again: the algebra, what is chosen, and the pass in a pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt import registry
from graphopt.analysis.shapes import Shapes
from graphopt.base import Change, Context, Pass
from graphopt.data import load_samples
from graphopt.edit import Edit, label
from graphopt.errors import DataError, SpecError
from graphopt.kept import record
from graphopt.layer_inputs import row_chunks
from graphopt.linear_layer import LinearLayer, linear_layers
from graphopt.model import Model, load
from graphopt.passes.reconstruct_weights import targets
from graphopt.pipeline import Pipeline, Result, Settings
from graphopt.reconstruct import solve
from graphopt.runtime import Session, evaluate
from graphopt.sparse_marks import Mark, write_mark
from graphopt.sweep import Fit, Moments, Split

Array = np.ndarray[Any, Any]
CUT = {"stem": [0, 2, 3, 5, 6, 7], "wide": [0, 1, 2, 4, 5, 6, 7, 9, 10, 11]}


def network(seed: int = 0) -> onnx.ModelProto:
    """A residual block of a plain and a grouped convolution and one per channel; a Gemm and two products behind it."""
    rng = np.random.default_rng(seed)
    inits: dict[str, Array] = {}

    def layer(op: str, x: str, name: str, *shape: int, bias: int = 0, **attrs: Any) -> onnx.NodeProto:
        inits[f"{name}_w"] = np.asarray(rng.normal(size=shape) / np.sqrt(np.prod(shape[1:])), np.float32)
        inputs = [x, f"{name}_w"]
        if bias:
            inits[f"{name}_b"] = np.asarray(rng.normal(size=bias) * 0.3, np.float32)
            inputs.append(f"{name}_b")
        return helper.make_node(op, inputs, [f"{name}_y"], name=name, **attrs)

    inits["last_c"] = np.asarray(rng.normal(size=7), np.float32)
    nodes = [
        layer("Conv", "x", "stem", 8, 3, 3, 3, bias=8, pads=[1] * 4),
        helper.make_node("Relu", ["stem_y"], ["stem_r"], "stem_relu"),
        layer("Conv", "stem_r", "wide", 12, 8, 1, 1, bias=12),
        helper.make_node("Relu", ["wide_y"], ["wide_r"], "wide_relu"),
        layer("Conv", "wide_r", "each", 12, 1, 3, 3, pads=[1] * 4, group=12),
        layer("Conv", "each_y", "back", 8, 12, 1, 1, bias=8),
        helper.make_node("Add", ["back_y", "stem_r"], ["sum"], "sum"),
        helper.make_node("GlobalAveragePool", ["sum"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        layer("Gemm", "flat", "gemm", 8, 6, bias=6, alpha=0.5, beta=2.0),
        layer("MatMul", "gemm_y", "free", 6, 6),
        layer("MatMul", "free_y", "last", 6, 7),
        helper.make_node("Add", ["last_y", "last_c"], ["y"], "last_add"),
    ]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 7])],
        [numpy_helper.from_array(v, k) for k, v in inits.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@dataclass(frozen=True)
class CutByHand(Pass):
    """Cut two groups of channels by hand."""

    name: ClassVar[str] = "cut-by-hand"
    exactness: ClassVar[Any] = "lossy"
    loses: ClassVar[Any] = "structure"
    scope: ClassVar[Any] = "model"

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        yield Change("stem, wide", "cut", "", lambda: cut(graph, ctx))


def cut(graph: gs.Graph, ctx: Context) -> None:
    """Cut channels out of what makes, holds and reads them: (layer, input) -> (group, axis)."""
    places = {
        ("stem", 1): ("stem", 0), ("stem", 2): ("stem", 0), ("wide", 1): ("stem", 1), ("back", 1): ("stem", 0),
        ("back", 2): ("stem", 0), ("gemm", 1): ("stem", 0),
    }  # fmt: skip
    inner = {("wide", 1): ("wide", 0), ("wide", 2): ("wide", 0), ("each", 1): ("wide", 0), ("back", 1): ("wide", 1)}
    nodes = {label(node): node for node in graph.nodes}
    for table in (places, inner):
        for (name, port), (group, axis) in table.items():
            with Edit(graph) as edit:
                values = np.take(nodes[name].inputs[port].values, CUT[group], axis=axis)
                edit.set_input(nodes[name], port, ctx.constant(f"{name}_{port}", values))
    nodes["each"].attrs["group"] = len(CUT["wide"])
    for name, group, width in (("stem", "stem", 8), ("back", "stem", 8), ("wide", "wide", 12), ("each", "wide", 12)):
        record(nodes[name], width, np.array(CUT[group]))


@pytest.fixture(autouse=True)
def _cutting() -> Iterator[None]:
    registry.all_passes()
    held = dict(registry._passes)
    registry.register(CutByHand)
    yield
    registry._passes.clear()
    registry._passes.update(held)


def feeds(seed: int, count: int = 20) -> list[dict[str, Array]]:
    """Pictures whose channels and pixels hang together, so that something is left to be made up for."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(3, 2))
    found: list[dict[str, Array]] = []
    for _ in range(count):
        hidden = rng.normal(size=(4, 2, 6, 6)).cumsum(axis=-1)
        x = np.einsum("cd,ndhw->nchw", mixing, hidden) + 0.1 * rng.normal(size=(4, 3, 6, 6))
        found.append({"x": np.asarray(x, np.float32)})
    return found


def run(pipeline: str, model: Any) -> Result:
    samples = load_samples(feeds(1), load(model))
    settings = Settings(verify="off", on_failure="stop")
    return Pipeline(pipeline).run(model, samples=samples, settings=settings)


def error(found: Any, reference: Any) -> float:
    """Return the squared error of the output on other samples, as part of its variance."""
    now, then = Session(load(found)), Session(load(reference))
    y, wanted = (np.concatenate([s.run(f)["y"] for f in feeds(7, 10)]) for s in (now, then))
    return float(np.square(y - wanted).sum() / np.square(wanted - wanted.mean(axis=0)).sum())


def split_of(x: Array, y: Array, group: int = 1) -> Split:
    """Return moments of rows (rows, columns), every fifth held out."""
    x, y = (
        v.reshape(len(v), group, v[:1].size // group if len(v) else v.shape[-1] // group).astype(np.float64)
        for v in (x, y)
    )
    origins = np.zeros(x.shape[1:]), np.zeros(y.shape[1:])
    split = Split(Moments.empty(*origins), Moments.empty(*origins))
    held = np.arange(len(x)) % 5 == 4
    split.train.add(x[~held], y[~held])
    split.held_out.add(x[held], y[held])
    return split


@pytest.mark.parametrize("group", [1, 3])
def test_a_linear_map_is_found_again(group: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, group, 5)) + 3
    weight, bias = rng.normal(size=(group, 5, 2)), rng.normal(size=(group, 2))
    y = np.einsum("rgw,gwo->rgo", x, weight) + bias
    found = solve(split_of(x, y, group), np.zeros_like(weight), np.zeros_like(bias), ridges=(1e-9,))
    assert found.method == "least-squares"
    # sums of float32 products leave about 1e-6 of each number
    np.testing.assert_allclose(found.weight, weight, atol=1e-4)
    np.testing.assert_allclose(found.bias, bias, atol=1e-3)


def test_least_squares_are_those_of_numpy() -> None:
    rng = np.random.default_rng(1)
    x, noise = rng.normal(size=(300, 6)) @ rng.normal(size=(6, 6)) + 1, rng.normal(size=(300, 2))
    y = x @ rng.normal(size=(6, 2)) + noise + 5
    found = solve(split_of(x, y), np.zeros((1, 6, 2)), np.zeros((1, 2)), ridges=(1e-12,))
    wanted = np.linalg.lstsq(np.c_[x, np.ones(300)], y, rcond=None)[0]
    np.testing.assert_allclose(found.weight[0], wanted[:6], atol=1e-3)
    np.testing.assert_allclose(found.bias[0], wanted[6], atol=1e-3)


def test_without_a_bias_the_map_goes_through_zero() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(300, 4)) + 2
    y = x @ rng.normal(size=(4, 3)) + rng.normal(size=(300, 3)) + 1
    found = solve(split_of(x, y), np.zeros((1, 4, 3)), None, ridges=(1e-12,))
    np.testing.assert_allclose(found.weight[0], np.linalg.lstsq(x, y, rcond=None)[0], atol=1e-3)
    assert not found.bias.any()


def test_noise_is_not_fitted() -> None:
    rng = np.random.default_rng(2)
    x, weight = rng.normal(size=(30, 20)), rng.normal(size=(1, 20, 3))
    y = x @ weight[0] + rng.normal(size=(30, 3))  # 24 rows to fit on: 20 inputs would explain most of the noise
    found = solve(split_of(x, y), weight, np.zeros((1, 3)))
    assert found.error <= found.before
    assert np.abs(found.weight - weight).max() < 0.5


def test_a_layer_that_gives_what_it_should_is_left() -> None:
    rng = np.random.default_rng(3)
    x, weight = rng.normal(size=(100, 4)), rng.normal(size=(1, 4, 2))
    found = solve(split_of(x, x @ weight[0] + 1), weight, np.ones((1, 2)))
    assert found.method == "nothing"
    assert found.weight is weight


def test_a_shift_is_left_to_the_bias() -> None:
    rng = np.random.default_rng(3)
    x, weight = rng.normal(size=(100, 4)), rng.normal(size=(1, 4, 2))
    found = solve(split_of(x, x @ weight[0] + 1), weight, np.zeros((1, 2)), method="bias")
    assert found.method == "bias"
    np.testing.assert_allclose(found.bias, 1, atol=1e-4)


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_dead_inputs_and_few_rows_do_no_harm(rows: int) -> None:
    x = np.ones((rows, 6))
    weight = np.random.default_rng(4).normal(size=(1, 6, 2))
    found = solve(split_of(x, np.full((rows, 2), 3.0)), weight, np.zeros((1, 2)))
    assert np.isfinite(found.weight).all()
    assert np.isfinite(found.bias).all()
    if rows:  # the input is constant: the bias does it all
        np.testing.assert_allclose(x @ found.weight[0] + found.bias[0], 3.0, atol=1e-5)


def test_layers_are_put_back_as_they_were() -> None:
    model = load(network())
    before = model.copy()
    ctx = Context(model, evaluate)
    layers = [layer for layer in linear_layers(model.graph) if isinstance(layer, LinearLayer)]
    assert [layer.label for layer in layers] == ["stem", "wide", "each", "back", "gemm", "free", "last"]
    for layer in layers:
        with Edit(model.graph) as edit:
            layer.put(edit, ctx, layer.weight(), layer.bias())
    assert error(model, before) < 1e-10  # each number is rounded once more


def test_rows_times_weight_is_the_layer() -> None:
    model = load(network())
    names = [t for layer in layers_of(model) for t in (layer.request.tensor, layer.output.name)]
    values = evaluate(model.proto, feeds(3)[0], names)
    for layer in layers_of(model):
        rows = np.concatenate(list(row_chunks(layer.request, values[layer.request.tensor])))
        y = np.einsum("rgw,gwo->rgo", rows, layer.weight()) + layer.bias()
        wanted = np.moveaxis(values[layer.output.name], layer.axis, -1).reshape(len(y), -1)
        np.testing.assert_allclose(y.reshape(len(y), -1), wanted, atol=1e-4)  # float32 products


def layers_of(model: Model) -> list[LinearLayer]:
    return [layer for layer in linear_layers(model.graph) if isinstance(layer, LinearLayer)]


def test_what_a_cut_cost_comes_back() -> None:
    model = network()
    texts = ("cut-by-hand", "cut-by-hand, reconstruct-weights{method=bias}", "cut-by-hand, reconstruct-weights")
    raw, bias, fitted = (error(run(text, model).model, model) for text in texts)
    assert fitted < bias < raw
    assert fitted < 0.1 * raw


def test_layers_keep_their_element_type() -> None:
    proto = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 17]> g (float16[n,2] x) => (float16[n,2] y)
        <float16[2,2] w = {15360, 0, 0, 15360}, float16[2] b = {15360, 16384}> { m = MatMul(x, w)  y = Add(m, b) }""")
    model = load(proto)
    (layer,) = layers_of(model)
    with Edit(model.graph) as edit:
        layer.put(edit, Context(model, evaluate), layer.weight() * 2, layer.bias() * 2)
    product, add = model.graph.nodes
    assert [t.values.dtype for t in (product.inputs[1], add.inputs[1])] == [np.dtype(np.float16)] * 2
    assert add.inputs[1].values.tolist() == [2.0, 4.0]
    onnx.checker.check_model(model.proto, full_check=True)


def test_the_same_request_again_does_nothing() -> None:
    once = run("cut-by-hand, reconstruct-weights", network())
    twice = run("cut-by-hand, reconstruct-weights, reconstruct-weights", network())
    assert [p.changes for p in twice.report.passes][2] == 0
    assert twice.proto == once.proto
    other = run("cut-by-hand, reconstruct-weights{method=bias}, reconstruct-weights", network())
    assert [p.changes for p in other.report.passes][2] > 0


def test_a_layer_before_a_sum_is_fitted_to_the_sum() -> None:
    model = load(network())
    found = {
        fit.label: fit
        for fit in targets(model.graph, model.graph, layers_of(model), Shapes(model))
        if isinstance(fit, Fit)
    }
    assert (found["back"].target, found["back"].minus) == ("sum", "stem_r")
    assert (found["last"].target, found["last"].minus) == ("y", "")  # what is added is its own bias
    alone = [f for f in targets(model.graph, model.graph, layers_of(model), None) if isinstance(f, Fit)]
    assert not any(fit.minus for fit in alone)


def test_what_is_added_must_be_settled_before() -> None:
    proto = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 17]> g (float[n,2] x) => (float[n,2] y)
        <float[2,2] v = {1, 2, 3, 4}, float[2,2] w = {1, 0, 0, 1}> {
        a = MatMul(x, v)  b = MatMul(x, w)  y = Add(a, b) }""")
    model = load(proto)
    found = [f for f in targets(model.graph, model.graph, layers_of(model), Shapes(model)) if isinstance(f, Fit)]
    assert [(fit.target, fit.minus) for fit in found] == [("a", ""), ("y", "a")]


def test_what_is_spread_over_a_layer_is_no_branch() -> None:
    proto = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 17]> g (float[n,2] x, float[1] s)
        => (float[n,2] y) <float[2,2] v = {1, 2, 3, 4}> { a = MatMul(x, v)  y = Add(a, s) }""")
    model = load(proto)
    (fit,) = targets(model.graph, model.graph, layers_of(model), Shapes(model))
    assert isinstance(fit, Fit)
    assert (fit.target, fit.minus) == ("a", "")


def test_layers_that_no_cut_reaches_are_left() -> None:
    found = run("cut-by-hand, reconstruct-weights", network())
    report = found.report.passes[1]
    assert report.changes == 7
    only = run("cut-by-hand, reconstruct-weights{only=[back, gemm], skip=[gemm]}", network())
    blocked = {b["where"]: b["why"] for b in only.report.passes[1].blocked}
    assert only.report.passes[1].changes == 1
    assert blocked["gemm"] == "to be skipped"
    assert blocked["free"] == "not among those asked for"


def test_weights_that_are_replaced_are_gone() -> None:
    cut, fitted = (run(text, network()).proto for text in ("cut-by-hand", "cut-by-hand, reconstruct-weights"))
    read = {name for node in fitted.graph.node for name in node.input}
    before = {name for node in cut.graph.node for name in node.input}
    left = {i.name for i in cut.graph.initializer} - before  # the hand leaves these
    assert {i.name for i in fitted.graph.initializer} - read <= left


def test_nothing_to_do_without_a_cut() -> None:
    found = run("reconstruct-weights", network())
    assert found.report.passes[0].changes == 0
    assert not found.report.passes[0].blocked


def test_zeros_of_sparse_weights_stay() -> None:
    model = load(network())
    back = next(node for node in model.graph.nodes if label(node) == "back")
    values = np.array(back.inputs[1].values)
    values[:, ::2] = 0
    back.inputs[1].values = values
    write_mark(model.metadata(back), 1, Mark(0.5, "free", "0.5 magnitude"))
    found = run("cut-by-hand, reconstruct-weights", model)
    now = next(node for node in found.model.graph.nodes if label(node) == "back")
    np.testing.assert_array_equal(now.inputs[1].values, values[CUT["stem"]][:, CUT["wide"]])
    assert not np.array_equal(now.inputs[2].values, np.asarray(back.inputs[2].values)[CUT["stem"]])


def test_samples_are_needed() -> None:
    with pytest.raises(DataError, match="--data"):
        Pipeline("cut-by-hand, reconstruct-weights").run(network(), settings=Settings(verify="off"))


def test_reasons_name_what_cannot_be_fitted() -> None:
    model = network()
    shared = next(n for n in model.graph.node if n.name == "free")
    shared.input[1] = "shared_w"
    last = helper.make_node("MatMul", ["shared_y", "last_w"], ["last_y"], name="last")
    again = helper.make_node("MatMul", ["free_y", "shared_w"], ["shared_y"], name="again")
    place = next(i for i, n in enumerate(model.graph.node) if n.name == "last")
    del model.graph.node[place]
    model.graph.node.insert(place, again)
    model.graph.node.insert(place + 1, last)
    model.graph.initializer.append(numpy_helper.from_array(np.eye(6, dtype=np.float32), "shared_w"))
    blocked = {b["where"]: b["why"] for b in run("cut-by-hand, reconstruct-weights", model).report.passes[1].blocked}
    assert "share its weight 'shared_w'" in blocked["free"]
    assert "share its weight" in blocked["again"]


@pytest.mark.parametrize("options", ["{method=most}", "{rows=-1}"])
def test_options_are_checked(options: str) -> None:
    with pytest.raises(SpecError, match="reconstruct-weights"):
        Pipeline(f"reconstruct-weights{options}")


def test_moments_of_groups_are_their_own() -> None:
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(50, 2, 3)), rng.normal(size=(50, 2, 1))
    both = split_of(x, y, 2).whole
    for g in range(2):
        one = split_of(x[:, g], y[:, g]).whole
        np.testing.assert_allclose(both.xy[g], one.xy[0], atol=1e-4)
