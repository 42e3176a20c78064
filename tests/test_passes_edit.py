"""Edits that keep a graph well formed, and what passes may rely on for shapes and old file formats."""

from __future__ import annotations

import cProfile
import pstats

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.analysis.shapes import Shapes
from graphopt.edit import Edit, make_node, nested_graphs
from graphopt.model import Model, load
from graphopt.pipeline import Pipeline, Result, Settings
from graphopt.runtime import Session


def parse(text: str, opset: int = 17, ir: int = 8) -> Model:
    return load(onnx.parser.parse_model(f'<ir_version: {ir}, opset_import: ["": {opset}]>\n{text}'))


def run(pipeline: str, model: Model | onnx.ModelProto) -> Result:
    return Pipeline(pipeline).run(model, settings=Settings(verify="off", on_failure="stop"))


def node(model: Model, output: str) -> gs.Node:
    return next(n for n in model.nodes() if any(t.name == output for t in n.outputs))


def test_sweep_removes_inserts_and_relinks() -> None:
    model = parse("g (float[2] x) => (float[2] y) { a = Neg(x) b = Abs(a) c = Exp(a) y = Add(b, c) }")
    first, second = node(model, "a"), node(model, "b")
    with Edit(model.graph) as edit:
        relu = make_node("Relu", [first.inputs[0]], [gs.Variable("r")])
        edit.insert_after(first, [relu])
        edit.set_input(second, 0, relu.outputs[0])
        assert edit.consumers(first.outputs[0]) == [node(model, "c")]
        assert edit.bypass(node(model, "c").outputs[0], first.outputs[0])
        edit.remove(node(model, "c"))
    assert [n.op for n in model.graph.nodes] == ["Neg", "Relu", "Abs", "Add"]
    assert [n.op for n in first.outputs[0].outputs] == ["Add"]
    onnx.checker.check_model(model.proto, full_check=True)


def test_bypass_gives_the_output_to_the_producer_or_says_why_not() -> None:
    model = parse("g (float[2] x) => (float[2] y, float[2] z) { a = Neg(x) y = Identity(a) z = Identity(x) }")
    with Edit(model.graph) as edit:
        identity, other = node(model, "y"), node(model, "z")
        assert edit.bypass(identity.outputs[0], identity.inputs[0])
        edit.remove(identity)
        assert edit.why_not_bypass(other.outputs[0], other.inputs[0]) == "it joins a graph input to an output"
        assert not edit.bypass(other.outputs[0], other.inputs[0])
    assert [(n.op, n.outputs[0].name) for n in model.graph.nodes] == [("Neg", "y"), ("Identity", "z")]


def test_bypass_refuses_names_that_a_subgraph_takes() -> None:
    inner = helper.make_graph(
        [helper.make_node("Neg", ["b"], ["a"]), helper.make_node("Add", ["a", "b"], ["p"])],
        "inner", [], [helper.make_tensor_value_info("p", TensorProto.FLOAT, [2])],
    )  # fmt: skip
    other = helper.make_graph(
        [helper.make_node("Neg", ["b"], ["q"])],
        "other",
        [],
        [helper.make_tensor_value_info("q", TensorProto.FLOAT, [2])],
    )
    nodes = [
        helper.make_node("Abs", ["x"], ["a"]),  # shadowed inside: invalid ONNX, but files have it
        helper.make_node("Identity", ["a"], ["b"]),
        helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=other),
    ]
    condition = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2]), condition],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
    )  # fmt: skip
    model = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    identity = node(model, "b")
    assert "another tensor" in (Edit(model.graph).why_not_bypass(identity.outputs[0], identity.inputs[0]) or "")


def test_removing_control_flow_takes_its_subgraphs_off_outer_tensors() -> None:
    model = parse(
        "g (float[2] x, bool b) => (float[2] y) { h = Neg(x) i = If(b) <then_branch = t () => (float[2] p)"
        " { p = Abs(h) }, else_branch = e () => (float[2] q) { q = Exp(h) }> y = Relu(h) }"
    )
    inner = list(nested_graphs(model.graph.nodes))
    with Edit(model.graph) as edit:
        edit.remove(node(model, "i"))
    assert [n.op for n in node(model, "h").outputs[0].outputs] == ["Relu"]
    assert not any(g.nodes for g in inner)


def test_removing_one_reader_of_many_is_linear() -> None:
    def calls(count: int) -> int:
        """How many functions the two passes call, the unit of time that no other process disturbs."""
        nodes = [helper.make_node("Sub", ["x", "c"], [f"t{i}"]) for i in range(count)]
        nodes.append(helper.make_node("Sum", [f"t{i}" for i in range(count)], ["y"]))
        info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in "xy"]
        c = numpy_helper.from_array(np.array(2, np.float32), "c")
        proto = helper.make_model(helper.make_graph(nodes, "g", info[:1], info[1:], [c]))
        model = load(proto)
        profile = cProfile.Profile()
        profile.runcall(run, "canonicalize, eliminate-common", model)
        return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]

    calls(10)  # what is imported or read once
    assert calls(4000) < 11 * calls(400)  # quadratic would be 100 times


STALE = """g (float[N,4] x) => (float[2,4] y)
<int64[1] zero = {0}, int64[1] four = {4}, float[2,4] r>
{ r = Relu(x) s = Shape(r) f = Gather(s, zero) t = Concat<axis = 0>(f, four) y = Reshape(r, t) }"""


def test_stated_shapes_of_inner_values_are_not_relied_on() -> None:
    """An export at batch 2 whose input was made dynamic later still states 2 everywhere else."""
    model = parse(STALE)
    r = node(model, "r").outputs[0]
    shapes = Shapes(model)
    assert shapes.of(r).static == (2, 4)
    assert shapes.proved(r).shape == ("N", 4)
    result = run("repeat(fold-constants, eliminate-identity)", model)
    assert "Shape" in [n.op for n in result.model.graph.nodes]
    x = np.ones((5, 4), np.float32)
    assert Session(result.proto, optimization="off").run({"x": x})["y"].shape == (5, 4)


def test_ir_3_models_keep_their_subgraphs_free_of_initializers() -> None:
    model = parse(
        "g (float[2] x, bool b) => (float[2] y) { k = Constant<value = float[2] {1.0, 2.0}>() h = Add(x, k)"
        " y = If(b) <then_branch = t () => (float[2] p) { w = Constant<value = float[2] {3.0, 4.0}>() v = Neg(w)"
        " p = Mul(h, v) }, else_branch = e () => (float[2] q) { q = Abs(h) }> }",
        opset=9, ir=3,
    )  # fmt: skip
    result = run("repeat(canonicalize, fold-constants, eliminate-common, eliminate-dead)", model)
    onnx.checker.check_model(result.proto, full_check=True)
    assert [i.name for i in result.proto.graph.initializer] == ["k"]
    feeds = {"x": np.ones(2, np.float32), "b": np.array(True)}
    wanted = Session(model, optimization="off").run(feeds)["y"]
    np.testing.assert_array_equal(Session(result.proto, optimization="off").run(feeds)["y"], wanted)


@pytest.mark.parametrize("dtype", [TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN, TensorProto.INT4])
def test_types_that_numpy_lacks_fold_exactly(dtype: int) -> None:
    values = numpy_helper.from_array(np.array([[1.0, 2.0], [-3.0, 0.0]], np.float32), "w")
    nodes = [
        helper.make_node("Cast", ["w"], ["n"], to=dtype),
        helper.make_node("Transpose", ["n"], ["t"], perm=[1, 0]),
        helper.make_node("Cast", ["t"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["x", "f"], ["y"]),
    ]
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 2]) for n in "xy"]
    kept = helper.make_tensor_value_info("t", dtype, [2, 2])
    graph = helper.make_graph(nodes, "g", info[:1], [info[1], kept], [values])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    result = run("fold-constants", proto)
    made = {t.name: t for t in result.proto.graph.initializer}
    assert [n.op for n in result.model.graph.nodes] == ["Add"]
    assert made["t"].data_type == dtype
    np.testing.assert_array_equal(numpy_helper.to_array(made["t"]).astype(np.float32), [[1, -3], [2, 0]])


def test_equal_weights_are_merged_but_not_read_needlessly() -> None:
    same, other = np.ones((64, 64), np.float32), np.ones((64, 64), np.float32)
    other[0, 0] = 2
    inits = [numpy_helper.from_array(a, n) for a, n in ((same, "a"), (same, "b"), (other, "c"))]
    nodes = [helper.make_node("Sum", ["x", "a", "b", "c"], ["y"])]
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [64, 64]) for n in "xy"]
    result = run("eliminate-common", helper.make_model(helper.make_graph(nodes, "g", info[:1], info[1:], inits)))
    assert [t.name for t in result.proto.graph.initializer] == ["a", "c"]
    assert list(result.proto.graph.node[0].input) == ["x", "a", "a", "c"]
