"""hoist-loop-invariants: what moves, what stays and why, and that loops give the same, run no time included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from graphopt.pipeline import Pipeline, Result, Settings
from graphopt.runtime import Session

PASS = "hoist-loop-invariants"


def run(model: onnx.ModelProto, pipeline: str = PASS) -> Result:
    return Pipeline(pipeline).run(model, settings=Settings(verify="off", on_failure="stop"))


def value(name: str, kind: int = TensorProto.FLOAT, shape: list[int | str] | None = None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def loop(
    nodes: list[onnx.NodeProto],
    *,
    trips: int | None = None,
    outer: list[onnx.NodeProto] | None = None,
    w: list[int | str] | None = None,
    handed_on: bool = False,
    inner_constants: Mapping[str, Any] | None = None,
) -> onnx.ModelProto:
    """Return a loop over `v` [4] whose body computes `v_out`; `w` is an input from outside."""
    constants = [numpy_helper.from_array(np.asarray(c, np.float32), n) for n, c in (inner_constants or {}).items()]
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), *nodes],
        "body",
        [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, []), value("v")] + [value("u")] * handed_on,
        [value("go_on", TensorProto.BOOL, []), value("v_out")] + [value("u")] * handed_on,
        constants,
    )
    inputs = [value("x", shape=[4]), value("w", shape=w or [4]), value("n", TensorProto.INT64, [])]
    initializers = [] if trips is None else [numpy_helper.from_array(np.array(trips, np.int64), "trips")]
    node = helper.make_node(
        "Loop", ["n" if trips is None else "trips", "", "x", *["w"] * handed_on], ["y", *["z"] * handed_on], body=body
    )
    graph = helper.make_graph([*(outer or []), node], "g", inputs, [value("y", shape=[4])], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def bodies(result: Result) -> list[list[str]]:
    return [[n.op for n in g.nodes] for g in result.model.graphs()]


def reasons(result: Result) -> list[str]:
    return [b["why"] for r in result.report.passes for b in r.blocked]


def assert_same(model: onnx.ModelProto, result: Result, sizes: dict[str, int] | None = None) -> None:
    rng = np.random.default_rng(0)
    for trips in (0, 1, 3):
        feeds = {"x": rng.normal(size=4), "w": rng.uniform(1, 2, size=(sizes or {}).get("w", 4))}
        given = {name: np.asarray(v, np.float32) for name, v in feeds.items()} | {"n": np.array(trips)}
        for mode in ("off", "all"):
            a = Session(model, optimization=mode).run(given)
            b = Session(result.proto, optimization=mode).run(given)
            for name in a:
                np.testing.assert_array_equal(b[name], a[name])  # the same operators on the same numbers


ROOT = helper.make_node("Sqrt", ["w"], ["c"])


def test_what_reads_outer_values_only_moves() -> None:
    model = loop([ROOT, helper.make_node("Neg", ["c"], ["d"]), helper.make_node("Mul", ["v", "d"], ["v_out"])])
    result = run(model)
    assert bodies(result) == [["Sqrt", "Neg", "Loop"], ["Identity", "Mul"]]
    assert_same(model, result)


def test_constants_of_the_body_move_along() -> None:
    nodes = [helper.make_node("Add", ["w", "k"], ["c"]), helper.make_node("Mul", ["c", "v"], ["t"]),
             helper.make_node("Mul", ["t", "k"], ["v_out"])]  # fmt: skip
    model = loop(nodes, inner_constants={"k": 2.0})
    result = run(model)
    assert bodies(result) == [["Add", "Loop"], ["Identity", "Mul", "Mul"]]
    assert_same(model, result)


def test_what_may_fail_stays_unless_the_loop_surely_runs() -> None:
    nodes = [helper.make_node("Add", ["w", "k"], ["c"]), helper.make_node("ReduceSum", ["c"], ["d"], keepdims=0),
             helper.make_node("Mul", ["v", "d"], ["v_out"])]  # fmt: skip
    constants = {"k": np.ones(4)}
    open_size = loop(nodes, w=["m"], inner_constants=constants)
    result = run(open_size)
    assert bodies(result)[0] == ["Loop"]
    assert "it might fail, and the loop might not run" in reasons(result)
    never = {"x": np.zeros(4, np.float32), "w": np.zeros(3, np.float32), "n": np.array(0)}
    Session(result.proto, optimization="off").run(never)  # 3 and 4 do not broadcast: only a body that runs would fail
    fits = run(loop(nodes, inner_constants=constants))
    assert bodies(fits)[0] == ["Add", "Loop"]
    runs = run(loop(nodes, trips=2, w=["m"], inner_constants=constants))
    assert bodies(runs)[0] == ["Add", "ReduceSum", "Loop"]
    assert_same(loop(nodes, trips=2, w=["m"], inner_constants=constants), runs)


def test_integer_division_stays() -> None:
    nodes = [helper.make_node("Div", ["n", "n"], ["q"]), helper.make_node("Cast", ["q"], ["f"], to=TensorProto.FLOAT),
             helper.make_node("Add", ["v", "f"], ["v_out"])]  # fmt: skip
    result = run(loop(nodes))
    assert bodies(result)[0] == ["Loop"]
    assert "it might fail, and the loop might not run" in reasons(result)


def test_what_the_body_returns_stays() -> None:
    result = run(loop([helper.make_node("Sqrt", ["w"], ["v_out"])]))
    assert bodies(result)[0] == ["Loop"]
    assert "the body returns it" in reasons(result)


def test_random_numbers_stay() -> None:
    nodes = [helper.make_node("RandomNormalLike", ["w"], ["c"]), helper.make_node("Add", ["v", "c"], ["v_out"])]
    result = run(loop(nodes))
    assert result.report.passes[0].status == "unchanged"


def test_a_variable_that_is_handed_on_is_read_from_outside() -> None:
    nodes = [helper.make_node("Sqrt", ["u"], ["c"]), helper.make_node("Mul", ["v", "c"], ["v_out"])]
    model = loop(nodes, handed_on=True)
    result = run(model, f"repeat({PASS}, eliminate-dead)")
    assert bodies(result) == [["Sqrt", "Loop"], ["Identity", "Mul"]]
    node = next(n for n in result.model.graph.nodes if n.op == "Loop")
    assert (len(node.inputs), len(node.outputs)) == (3, 1)
    assert_same(model, result)


def test_names_of_the_body_do_not_clash_outside() -> None:
    """Two bodies may use one name for two values."""
    first = loop([ROOT, helper.make_node("Mul", ["v", "c"], ["v_out"])])
    second = loop([helper.make_node("Exp", ["w"], ["c"]), helper.make_node("Mul", ["v", "c"], ["v_out"])])
    again = second.graph.node[0]
    again.input[2], again.output[0] = "y", "y2"
    first.graph.node.append(again)
    first.graph.output[0].name = "y2"
    result = run(first)
    assert bodies(result)[0] == ["Sqrt", "Loop", "Exp", "Loop"]
    made = [t.name for n in result.model.graph.nodes for t in n.outputs]
    assert len(set(made)) == len(made)
    assert_same(first, result)


def scan(length: int | str) -> onnx.ModelProto:
    body = helper.make_graph(
        [helper.make_node("ReduceSum", ["w"], ["c"], keepdims=0), helper.make_node("Mul", ["row", "c"], ["out"])],
        "body", [value("row")], [value("out")],
    )  # fmt: skip
    node = helper.make_node("Scan", ["x"], ["y"], body=body, num_scan_inputs=1)
    graph = helper.make_graph([node], "g", [value("x", shape=[length, 2]), value("w", shape=[4])], [value("y")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(("length", "moves"), [(3, True), ("t", False)])
def test_scan(length: int | str, moves: bool) -> None:
    model = scan(length)
    result = run(model)
    assert bodies(result)[0] == (["ReduceSum", "Scan"] if moves else ["Scan"])
    given = {"x": np.ones((3, 2), np.float32), "w": np.arange(4, dtype=np.float32)}
    a, b = (Session(m, optimization="off").run(given)["y"] for m in (model, result.proto))
    np.testing.assert_array_equal(a, b)


@settings(max_examples=200)
@given(st.integers(0, 1 << 32))
def test_random_bodies(seed: int) -> None:
    rng = np.random.default_rng(seed)
    nodes, known = [], ["v", "w", "w", "k"]
    for place in range(int(rng.integers(2, 9))):
        op = str(rng.choice(["Sigmoid", "Tanh", "Neg", "Abs", "Mul", "Add", "Sub", "Max"]))
        operands = [str(rng.choice(known)) for _ in range(1 if op in ("Sigmoid", "Tanh", "Neg", "Abs") else 2)]
        nodes.append(helper.make_node(op, operands, [f"t{place}"]))
        known.append(f"t{place}")
    nodes.append(helper.make_node("Tanh", [known[-1]], ["mild"]))
    nodes.append(helper.make_node("Add", ["mild", "v"], ["v_out"]))
    model = loop(nodes, handed_on=bool(rng.random() < 0.3), inner_constants={"k": rng.normal(size=4)})
    result = run(model, f"repeat({PASS}, eliminate-dead)")
    outside = {t.name for n in result.model.graph.nodes for t in n.outputs}
    invariant, needed = _invariant(nodes)
    assert invariant & needed <= outside
    assert_same(model, result)


def _invariant(nodes: list[onnx.NodeProto]) -> tuple[set[str], set[str]]:
    """Return what does not depend on the loop's variable, and what the result depends on."""
    invariant: set[str] = set()
    for node in nodes:
        if all(name in ("w", "k") or name in invariant for name in node.input):
            invariant.update(node.output)
    needed = {"v_out"}
    for node in reversed(nodes):
        if node.output[0] in needed:
            needed.update(node.input)
    return invariant, needed
