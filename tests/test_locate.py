"""Where a difference begins: small models with known culprits, and thirty corruptions of zoo models."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.data import load_samples
from graphopt.flatten import flatten
from graphopt.locate import Location, difference, locate
from graphopt.model import load
from graphopt.models import zoo
from graphopt.models.digits import demo_model
from graphopt.runtime import evaluate
from graphopt.validate import PLAIN, Reference, Validation
from tests.corruptions import CORRUPTIONS, Corruption, break_model

FLOAT = TensorProto.FLOAT
FEEDS = {"x": np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)}


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(
        op, inputs.split(), outputs.split(), name=f"make_{outputs.split(maxsplit=1)[0]}", **attributes
    )


def branch(name: str, *nodes: onnx.NodeProto) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), name, [], [helper.make_tensor_value_info(nodes[-1].output[0], FLOAT, None)])


def model(*nodes: onnx.NodeProto, **constants: Any) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    graph = helper.make_graph(
        list(nodes), "test", [helper.make_tensor_value_info("x", FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", FLOAT, None)], tensors,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def found(a: onnx.ModelProto, b: onnx.ModelProto) -> Location:
    place = locate(a, b, FEEDS)
    assert place is not None
    return place


WEIGHT = np.random.default_rng(1).standard_normal((4, 4)).astype(np.float32)
CHAIN = (
    node("MatMul", "x w", "a"),
    node("Relu", "a", "b"),
    node("LeakyRelu", "b", "c", alpha=0.1),
    node("Exp", "c", "y"),
)


def test_equal_models() -> None:
    assert locate(model(*CHAIN, w=WEIGHT), model(*CHAIN, w=WEIGHT), FEEDS) is None


def test_a_weight() -> None:
    other = WEIGHT.copy()
    other[1, 2] += 0.01
    place = found(model(*CHAIN, w=WEIGHT), model(*CHAIN, w=other))
    assert (place.node, place.tensor) == ("make_a", "a")
    assert place.what == "input 1 ('w'): 1 of 16 values differ"


def test_a_weight_in_a_constant_node_names_its_reader() -> None:
    def with_constant(value: float) -> onnx.ModelProto:
        tensor = numpy_helper.from_array(np.full((4, 4), value, np.float32))
        return model(node("Constant", "", "w", value=tensor), *CHAIN)

    assert found(with_constant(1), with_constant(2)).node == "make_a"


def test_an_attribute() -> None:
    negative = (CHAIN[0], node("LeakyRelu", "a", "c", alpha=0.1), CHAIN[3])
    wrong = (CHAIN[0], node("LeakyRelu", "a", "c", alpha=0.2), CHAIN[3])
    place = found(model(*negative, w=WEIGHT), model(*wrong, w=WEIGHT))
    assert (place.node, place.what) == ("make_c", "alpha 0.2 instead of 0.1")
    assert place.error > 1e-3


def test_a_node_left_out_names_the_one_that_reads_past_it() -> None:
    without = (CHAIN[0], node("LeakyRelu", "a", "c", alpha=0.1), CHAIN[3])
    place = found(model(*CHAIN, w=WEIGHT), model(*without, w=WEIGHT))
    assert (place.node, place.what) == ("make_c", "input 0 is 'a' instead of 'b'")


def test_a_new_node() -> None:
    other = (node("MatMul", "x w", "before"), node("Neg", "before", "a"), *CHAIN[1:])
    place = found(model(*CHAIN, w=WEIGHT), model(*other, w=WEIGHT))
    assert place.tensor == "a"
    assert place.node in ("make_before", "make_a")


def test_rounding_in_rewritten_nodes_is_not_named() -> None:
    """A rewrite that is off by float noise stands before the culprit; the culprit is named."""
    scaled = (node("Mul", "x third", "s"), *[node("MatMul", "s w", "a")], node("Neg", "a", "b"), CHAIN[2], CHAIN[3])
    rewritten = (node("Div", "x three", "s"), *scaled[1:2], node("Abs", "a", "b"), *scaled[3:])
    a = model(*scaled, w=WEIGHT, third=np.float32(1 / 3))
    b = model(*rewritten, w=WEIGHT, three=np.float32(3))
    assert found(a, b).node == "make_b"


def test_renamed_tensors() -> None:
    """The first tensor that both have is the output; the culprit is the first node before it that is another one."""

    def chain(*names: str) -> list[onnx.NodeProto]:
        nodes = [helper.make_node("MatMul", ["x", "w"], [names[0]], name="one")]
        nodes.append(helper.make_node("Relu", [names[0]], [names[1]], name="two"))
        return [*nodes, helper.make_node("LeakyRelu", [names[1]], ["y"], name="three", alpha=float(names[2]))]

    a, b = model(*chain("a", "b", "0.1"), w=WEIGHT), model(*chain("a2", "b2", "0.1"), w=WEIGHT * 2)
    place = found(a, b)
    assert (place.node, place.tensor) == ("one", "y")


def test_a_name_given_to_another_value_is_no_difference() -> None:
    """The rewrite folds a scale into the weight and keeps the tensor's name: only the corrupted node is named."""
    scale = np.float32(3)

    def chain(weight: np.ndarray[Any, Any], alpha: float, *, folded: bool) -> onnx.ModelProto:
        nodes = [node("MatMul", "x w", "a"), node("Mul", "a scale", "b")]
        if folded:
            nodes = nodes[:1]
        nodes.append(node("Tanh", "a" if folded else "b", "c"))
        nodes += [node("LeakyRelu", "c", "d", alpha=alpha), node("Exp", "d", "y")]
        return model(*nodes, w=weight, **({} if folded else {"scale": scale}))

    original = chain(WEIGHT, 0.1, folded=False)
    place = found(original, chain(WEIGHT * scale, 0.2, folded=True))
    assert (place.node, place.what) == ("make_d", "alpha 0.2 instead of 0.1")


def test_a_fault_right_after_a_rewritten_node_is_found_by_mending() -> None:
    def chain(weight: np.ndarray[Any, Any], op: str, *, folded: bool) -> onnx.ModelProto:
        nodes = [node("MatMul", "x w", "a"), node("Mul", "a scale", "b")][: 1 if folded else 2]
        nodes += [node(op, "a" if folded else "b", "c"), node("Exp", "c", "y")]
        return model(*nodes, w=weight, **({} if folded else {"scale": np.float32(3)}))

    place = found(chain(WEIGHT, "Tanh", folded=False), chain(WEIGHT * 3, "Sin", folded=True))
    assert (place.node, place.op) == ("make_c", "Sin")


def conditional(then: str, other: str, *, swapped: bool = False) -> onnx.ModelProto:
    branches = {
        "then_branch": branch("then", node("Neg", "x", "t1"), node(then, "t1", "t2")),
        "else_branch": branch("else", node(other, "x", "e1")),
    }
    if swapped:
        branches = dict(zip(branches, reversed(branches.values()), strict=True))
    return model(
        node("ReduceSum", "x", "sum", keepdims=0), node("Mul", "sum sum", "square"),
        node("GreaterOrEqual", "square zero", "positive"), node("If", "positive", "i", **branches),
        node("Exp", "i", "y"), zero=np.float32(0),
    )  # fmt: skip


def test_inside_a_branch() -> None:
    place = found(conditional("Exp", "Abs"), conditional("Sigmoid", "Abs"))
    assert (place.node, place.op, place.path) == ("make_t2", "Sigmoid", ("make_i",))


def test_the_branch_not_taken_is_no_difference() -> None:
    assert locate(conditional("Exp", "Abs"), conditional("Exp", "Sin"), FEEDS) is None


def test_swapped_branches_are_the_fault_of_the_if() -> None:
    place = found(conditional("Exp", "Abs"), conditional("Exp", "Abs", swapped=True))
    assert (place.node, place.what, place.path) == ("make_i", "its branches are swapped", ())


def test_inside_a_loop() -> None:
    def looped(op: str) -> onnx.ModelProto:
        def info(name: str, kind: int, shape: list[int] | None) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, kind, shape)

        taken = [info("i", TensorProto.INT64, []), info("go", TensorProto.BOOL, []), info("state", FLOAT, None)]
        given = [info("go_on", TensorProto.BOOL, []), info("next", FLOAT, None)]
        body = helper.make_graph([node("Identity", "go", "go_on"), node(op, "state", "next")], "body", taken, given)
        return model(node("Loop", "count true x", "y", body=body), count=np.int64(2), true=np.bool_(True))

    place = found(looped("Sin"), looped("Cos"))
    assert (place.node, place.op, place.path) == ("make_next", "Cos", ("make_y",))


def test_inside_a_function() -> None:
    def with_function(op: str) -> onnx.ModelProto:
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
        body = helper.make_function("own", "F", ["p"], ["q"], [node("Neg", "p", "n"), node(op, "n", "q")], opsets[:1])
        proto = model(helper.make_node("F", ["x"], ["y"], name="call", domain="own"))
        proto.opset_import.append(opsets[1])
        proto.functions.append(body)
        return proto

    place = found(with_function("Sin"), with_function("Cos"))
    assert (place.node, place.path) == ("make_q", ("call",))


def test_a_model_that_does_not_run_is_judged_by_structure() -> None:
    a = model(node("Concat", "x x", "a", axis=0), node("MatMul", "a w", "y"), w=WEIGHT)
    b = model(node("Concat", "x x", "a", axis=1), node("MatMul", "a w", "y"), w=WEIGHT)
    place = found(a, b)
    assert place.node == "make_a"
    assert "axis 1 instead of 0" in place.what
    assert json.dumps(place.to_dict())


@pytest.mark.zoo
def test_flat_models_compute_the_same() -> None:
    """Inlining changes no arithmetic: outputs are equal to the last bit."""
    nested = load(zoo.fetch("silero-vad"))
    for feeds in load_samples(None, nested):
        flat = flatten(nested, feeds).model
        assert not any(n.op == "If" for n in flat.graph.nodes)
        expected, computed = evaluate(nested, feeds), evaluate(flat, feeds)
        assert all(np.array_equal(expected[name], computed[name]) for name in expected)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (np.array([1.0, 2.0]), np.array([1.0, 2.5]), 0.25),
        (np.zeros(2), np.zeros(2), 0.0),
        (np.array([np.nan, 1.0]), np.array([np.nan, 1.0]), 0.0),
        (np.array([np.nan, 1.0]), np.array([0.0, 1.0]), float("inf")),
        (np.ones(2), np.ones(3), float("inf")),
        (np.array([1, 2]), np.array([1, 3]), 0.5),
        ([np.ones(2)], [np.ones(2), np.ones(2)], float("inf")),
        (None, None, 0.0),
    ],
)
def test_difference(a: Any, b: Any, expected: float) -> None:
    assert difference(a, b) == expected


@cache
def reference(name: str) -> Reference:
    original = load(demo_model() if name == "digits" else zoo.fetch(name))
    return Reference(original, load_samples(None, original))


def validated(corruption: Corruption) -> tuple[Validation, str]:
    checked = reference(corruption.model)
    broken, culprit = break_model(checked.model, corruption)
    return checked.check(broken, ceiling=checked.floor(PLAIN), locate=True), culprit


@pytest.mark.zoo
@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda c: f"{c.model}-{c.name}".replace(" ", "-"))
def test_corruptions_are_caught_and_located(corruption: Corruption) -> None:
    """All thirty are caught with the default random feeds at the default tolerance, and the right node is named."""
    result, culprit = validated(corruption)
    assert not result.ok
    assert result.location is not None
    assert result.location.node == culprit, str(result.location)


def test_there_are_thirty() -> None:
    assert len(CORRUPTIONS) == 30
    assert len({(c.model, c.name) for c in CORRUPTIONS}) == 30
    assert len({c.model for c in CORRUPTIONS}) >= 10
