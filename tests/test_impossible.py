"""Ifs of which one branch leads to an error: what ORT refuses, and what fold-if makes of that."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from graphopt import Pipeline, Settings
from graphopt.analysis.impossible import RULES
from graphopt.errors import GraphoptError
from graphopt.runtime import Session

F = np.float32
REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "LSTM": ("y, h, c = LSTM <hidden_size = 2> (x, w, r)", {"x": (3, 4)}, {"w": (1, 8, 4), "r": (1, 8, 2)}),
    "GRU": ("y, h = GRU <hidden_size = 2> (x, w, r)", {"x": (3, 4)}, {"w": (1, 6, 4), "r": (1, 6, 2)}),
    "RNN": ("y, h = RNN <hidden_size = 2> (x, w, r)", {"x": (3, 4)}, {"w": (1, 2, 4), "r": (1, 2, 2)}),
    "Gemm": ("y = Gemm(x, w)", {"x": (2, 3, 4)}, {"w": (4, 5)}),
    "Conv": ("y = Conv(x, w)", {"x": (1, 4, 6)}, {"w": (2, 4, 1, 1)}),
    "ConvTranspose": ("y = ConvTranspose(x, w)", {"x": (1, 4, 6)}, {"w": (4, 2, 1, 1)}),
    "Concat": ("y = Concat <axis = 0> (x, w)", {"x": (2, 3)}, {"w": (2, 3, 1)}),
    "Transpose": ("y = Transpose <perm = [1, 0]> (x)", {"x": (2, 3, 4)}, {}),
}
"""Operator -> node, and shapes of inputs and weights that it must not take."""


def test_every_rule_has_its_refusal() -> None:
    assert set(RULES) == set(REFUSED)


@pytest.mark.parametrize("op", sorted(REFUSED))
@pytest.mark.parametrize("mode", ["off", "all"])
def test_onnxruntime_refuses_those_ranks(op: str, mode: Any) -> None:
    """The rank is known only at run time, as behind an If."""
    node, inputs, weights = REFUSED[op]
    unranked = ", ".join(f"int64[{len(s)}] {n}_shape" for n, s in inputs.items()) or ""
    reshapes = "\n".join(f"{n} = Reshape({n}_flat, {n}_shape)" for n in inputs)
    flat = ", ".join(f"float[N_{n}] {n}_flat" for n in inputs)
    given = ", ".join(x for x in (flat, unranked, *(f"float{list(s)} {n}" for n, s in weights.items())) if x)
    text = f'<ir_version: 9, opset_import: ["" : 17]> g ({given}) => (float y) {{ {reshapes}\n {node} }}'
    model = onnx.parser.parse_model(text)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    feeds: dict[str, Any] = {n: np.ones(s, F) for n, s in weights.items()}
    feeds.update({f"{n}_flat": np.ones(int(np.prod(s)), F) for n, s in inputs.items()})
    feeds.update({f"{n}_shape": np.array(s, np.int64) for n, s in inputs.items()})
    with pytest.raises(GraphoptError):
        Session(model, optimization=mode).run(feeds)


SQUEEZED = """<ir_version: 9, opset_import: ["" : 17]>
    g (float[2,4,L] x) => (float y)
    <float[4,5] w = {{0,1,2,3,4,5,6,7,8,9,0,1,2,3,4,5,6,7,8,9}}, int64[1] one = {{1}}, int64[1] two = {{2}},
     int64[1] zero = {{0}}> {{
        size = Shape <start = 2> (x)
        single = Equal(size, one)
        s = If(single) <then_branch = a () => (float[2,4] p) {{ p = Squeeze(x, two) }},
                        else_branch = b () => (float[2,4,L] q) {{ q = Identity(x) }}>
        y = {reader}
    }}"""


def squeezed(reader: str) -> onnx.ModelProto:
    model = onnx.parser.parse_model(SQUEEZED.format(reader=reader))
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return model


def test_the_branch_that_can_go_on_takes_the_place_of_its_if() -> None:
    model = squeezed("Gemm(s, w)")
    result = Pipeline("fold-if, eliminate-dead").run(model, settings=Settings(verify="off"))
    assert [n.op for n in result.model.graph.nodes] == ["Squeeze", "Gemm"]
    x = np.random.default_rng(0).normal(size=(2, 4, 1)).astype(F)
    before, after = Session(model).run({"x": x})["y"], Session(result.proto).run({"x": x})["y"]
    assert np.array_equal(before, after)
    for proto in (model, result.proto):  # what stopped the model before stops it now
        with pytest.raises(GraphoptError):
            Session(proto).run({"x": np.ones((2, 4, 3), F)})


@pytest.mark.parametrize("reader", ["Neg(s)", "Relu(s)", "Flatten(s)"])
def test_where_both_branches_can_go_on_the_if_stays(reader: str) -> None:
    model = squeezed(reader)
    result = Pipeline("fold-if").run(model, settings=Settings(verify="off"))
    assert "If" in [n.op for n in result.model.graph.nodes]


def test_what_is_impossible_in_a_loop_that_may_not_run_proves_nothing() -> None:
    model = squeezed("Relu(s)")
    body = onnx.parser.parse_graph(
        "body (int64 i, bool c) => (bool d, float[2,5] z) { d = Identity(c) z = Gemm(s, w) }"
    )
    node = onnx.helper.make_node("Loop", ["trips", ""], ["y"], "loop", body=body)
    del model.graph.node[-1:]
    model.graph.node.append(node)
    model.graph.input.append(onnx.helper.make_tensor_value_info("trips", onnx.TensorProto.INT64, []))
    result = Pipeline("fold-if").run(model, settings=Settings(verify="off"))
    assert "If" in [n.op for n in result.model.graph.nodes]
