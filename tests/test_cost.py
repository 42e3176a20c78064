"""Cost against numbers worked out by hand, and what is unknown staying unknown."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from graphopt.analysis.cost import Costs, NodeCost, Sizes, costs
from graphopt.analysis.shapes import Shapes
from graphopt.model import Model, load
from graphopt.profile import observe

FLOAT = TensorProto.FLOAT


def one(
    op: str,
    inputs: list[tuple[int | str, ...] | np.ndarray[Any, Any] | None],
    outputs: int = 1,
    domain: str = "",
    dtype: int = FLOAT,
    result: int = FLOAT,
    opset: int = 17,
    **attrs: Any,
) -> Model:
    """Return a model of one node: arrays become initializers, shapes become inputs, None is left out."""
    names = ["" if x is None else f"i{k}" for k, x in enumerate(inputs)]
    given = [
        helper.make_tensor_value_info(n, dtype, list(x))
        for n, x in zip(names, inputs, strict=True)
        if isinstance(x, tuple)
    ]
    constants = [
        onnx.numpy_helper.from_array(x, n) for n, x in zip(names, inputs, strict=True) if isinstance(x, np.ndarray)
    ]
    made = [f"o{k}" for k in range(outputs)]
    node = helper.make_node(op, names, made, domain=domain, name="it", **attrs)
    results = [helper.make_tensor_value_info(n, result, None) for n in made]
    graph = helper.make_graph([node], "g", given, results, constants)
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return load(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def zeros(*shape: int, dtype: type = np.float32) -> np.ndarray[Any, Any]:
    return np.zeros(shape, dtype)


def cost_of(model: Model, **more: Any) -> NodeCost:
    return costs(model, **more).of(model.graph.nodes[0])


@pytest.mark.parametrize(
    ("model", "macs"),
    [
        # 16 filters of 3·3·3 at 8·8 places, twice
        (one("Conv", [(2, 3, 8, 8), zeros(16, 3, 3, 3)], pads=[1, 1, 1, 1]), 2 * 16 * 8 * 8 * 27),
        (one("Conv", [(1, 8, 10), zeros(8, 1, 3)], group=8, strides=[2]), 8 * 4 * 3),
        # each of 4·5·5 inputs goes through 6 filters of 2·2
        (one("ConvTranspose", [(1, 4, 5, 5), zeros(4, 6, 2, 2)]), 4 * 25 * 6 * 4),
        (one("Gemm", [(3, 5), zeros(5, 7), zeros(7)]), 3 * 5 * 7),
        (one("Gemm", [(5, 3), zeros(7, 5)], transA=1, transB=1), 3 * 5 * 7),
        (one("MatMul", [(2, 1, 3, 5), (4, 5, 7)]), 2 * 4 * 3 * 5 * 7),
        (one("MatMul", [(5,), (5,)]), 5),
        (one("MatMul", [(3, 5), (5,)]), 15),
        (one("MatMulInteger", [(3, 5), (5, 7)], dtype=TensorProto.UINT8, result=TensorProto.INT32), 105),
        (one("Einsum", [(2, 3, 5), (2, 5, 7)], equation="bij,bjk->bik"), 2 * 3 * 5 * 7),
        (one("Einsum", [(3, 5)], equation="ij->ji"), 0),
        (one("LSTM", [(10, 2, 3), zeros(1, 16, 3), zeros(1, 16, 4)], outputs=3, hidden_size=4), 20 * 16 * 7),
        (
            one("GRU", [(10, 2, 3), zeros(2, 12, 3), zeros(2, 12, 4)], hidden_size=4, direction="bidirectional"),
            20 * 2 * 12 * 7,
        ),
        (one("Attention", [(2, 4, 6, 8), (2, 2, 9, 8), (2, 2, 9, 5)], opset=23), 2 * 4 * 6 * 9 * (8 + 5)),
        (one("Attention", [(2, 6, 32), (2, 9, 16), (2, 9, 10)], opset=23, q_num_heads=4, kv_num_heads=2),
         2 * 4 * 6 * 9 * (8 + 5)),
        (one("Relu", [(4, 4)]), 0),
        (one("Softmax", [(4, 4)]), 0),
        (one("MaxPool", [(1, 4, 8, 8)], kernel_shape=[2, 2]), 0),
    ],
)  # fmt: skip
def test_macs(model: Model, macs: int) -> None:
    assert cost_of(model).macs == macs


@pytest.mark.parametrize(
    "model",
    [
        one("Conv", [("n", 3, 8, 8), zeros(16, 3, 3, 3)]),
        one("MatMul", [(2, "k"), ("k", 3)]),
        one("Einsum", [(2, 3), (3, 4), (4, 5)], equation="ij,jk,kl->il"),
        one("STFT", [(1, 64, 1), np.array(16), zeros(32)], onesided=1),
        one("Anything", [(2, 3)], domain="my.domain"),
        one("NobodyKnows", [(2, 3)], domain="com.microsoft"),
    ],
)
def test_what_is_not_known_is_none_and_counted(model: Model) -> None:
    found = costs(model)
    assert found.of(model.graph.nodes[0]).macs is None
    assert [node.name for node in found.unknown] == ["it"]
    assert found.macs == 0


def test_given_inputs_close_open_dimensions() -> None:
    model = one("Conv", [("n", 3, "h", "w"), zeros(16, 3, 3, 3)])
    assert cost_of(model, inputs={"i0": (2, 3, 10, 12)}).macs == 2 * 16 * 8 * 10 * 27


def test_bytes_are_read_once_and_written() -> None:
    conv = one("Conv", [(1, 3, 8, 8), zeros(4, 3, 1, 1), zeros(4)])
    found = cost_of(conv)
    assert found.bytes == 4 * (3 * 64 + 12 + 4 + 4 * 64)
    assert (found.parameters, found.parameter_bytes) == (16, 64)
    square = one("Mul", [(5, 5)])
    square.graph.nodes[0].inputs.append(square.graph.nodes[0].inputs[0])
    assert cost_of(square).bytes == 4 * (25 + 25)


@pytest.mark.parametrize(
    ("model", "moved"),
    [
        (one("Reshape", [(4, 6), np.array([24])]), 0),
        (one("Shape", [(4, 6)], result=TensorProto.INT64), 2 * 8),
        # of a table of 1000 rows three are read and written, and their indices read
        (one("Gather", [zeros(1000, 8), np.array([1, 2, 3])]), 4 * 24 * 2 + 3 * 8),
    ],
)
def test_views_and_picks(model: Model, moved: int) -> None:
    assert cost_of(model).bytes == moved


def test_small_integers_take_part_of_a_byte() -> None:
    weight = helper.make_tensor("w", TensorProto.INT4, [16], bytes(8), raw=True)
    scale = onnx.numpy_helper.from_array(np.array(1, np.float32), "s")
    graph = helper.make_graph(
        [helper.make_node("DequantizeLinear", ["w", "s"], ["y"])],
        "g",
        [],
        [helper.make_tensor_value_info("y", FLOAT, [16])],
        [weight, scale],
    )
    model = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
    found = cost_of(model)
    assert found.parameter_bytes == 8 + 4
    assert found.bytes == 8 + 4 + 64


def test_constant_nodes_are_parameters() -> None:
    nodes = [
        helper.make_node("Constant", [], ["w"], value=onnx.numpy_helper.from_array(zeros(5, 7))),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, [3, 5])],
        [helper.make_tensor_value_info("y", FLOAT, [3, 7])],
    )
    model = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))
    product = model.graph.nodes[1]
    assert costs(model).of(product) == NodeCost(105, 4 * (15 + 35 + 21), 35, 140)


def info(name: str, shape: list[int], dtype: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def branching() -> Model:
    """If: one branch is a product of 2·3·4, the other of 2·3·1."""
    dear = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["p"])], "dear", [], [info("p", [2, 4])], [tensor("w", zeros(3, 4))]
    )
    cheap = helper.make_graph(
        [helper.make_node("MatMul", ["x", "v"], ["q"])], "cheap", [], [info("q", [2, 1])], [tensor("v", zeros(3, 1))]
    )
    node = helper.make_node("If", ["c"], ["y"], then_branch=dear, else_branch=cheap)
    graph = helper.make_graph(
        [node],
        "g",
        [info("c", [], TensorProto.BOOL), info("x", [2, 3])],
        [helper.make_tensor_value_info("y", FLOAT, None)],
    )
    return load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))


def tensor(name: str, values: np.ndarray[Any, Any]) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(values, name)


def test_a_branch_costs_as_the_dearer_or_as_seen() -> None:
    model = branching()
    node = model.graph.nodes[0]
    assert costs(model).of(node).macs == 2 * 3 * 4

    def seen(choice: bool) -> Costs:
        feed = {"c": np.array(choice), "x": np.ones((2, 3), np.float32)}
        return costs(model, Sizes(Shapes(model), observe(model, feed)))

    assert seen(choice=True).of(node).macs == 2 * 3 * 4
    assert seen(choice=False).of(node).macs == 2 * 3 * 1
    assert seen(choice=False).macs == 6


def looping(*, fixed: bool) -> Model:
    """A Loop whose body multiplies 2×2 matrices, run as often as input or initializer `n` says."""
    body = helper.make_graph(
        [helper.make_node("MatMul", ["s", "s"], ["t"]), helper.make_node("Identity", ["k"], ["k2"])],
        "body",
        [info("i", [], TensorProto.INT64), info("k", [], TensorProto.BOOL), info("s", [2, 2])],
        [info("k2", [], TensorProto.BOOL), info("t", [2, 2])],
    )
    node = helper.make_node("Loop", ["n", "", "x"], ["y"], body=body)
    inputs = [info("x", [2, 2])] + ([] if fixed else [info("n", [], TensorProto.INT64)])
    constants = [tensor("n", np.array(5))] if fixed else []
    graph = helper.make_graph([node], "g", inputs, [info("y", [2, 2])], constants)
    return load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))


def test_a_loop_costs_its_turns() -> None:
    model = looping(fixed=True)
    assert costs(model).of(model.graph.nodes[0]).macs == 5 * 8
    model = looping(fixed=False)
    assert costs(model).of(model.graph.nodes[0]).macs is None
    observed = observe(model, {"x": np.eye(2, dtype=np.float32), "n": np.array(3)})
    assert costs(model, Sizes(Shapes(model), observed)).of(model.graph.nodes[0]).macs == 3 * 8


def test_a_function_call_is_unknown() -> None:
    function = helper.make_function(
        "my", "Twice", ["x"], ["y"], [helper.make_node("Add", ["x", "x"], ["y"])], [helper.make_opsetid("", 17)]
    )
    graph = helper.make_graph(
        [helper.make_node("Twice", ["a"], ["b"], domain="my")], "g", [info("a", [2])], [info("b", [2])]
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("my", 1)]
    model = load(helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=9))
    assert len(costs(model).unknown) == 1
    assert costs(model).of(model.functions[0].nodes[0]) == NodeCost(None, None)


def test_observed_shapes_fill_what_inference_leaves() -> None:
    """The output of NonZero is as long as its values say; a run tells."""
    nodes = [
        helper.make_node("NonZero", ["x"], ["i"]),
        helper.make_node("Cast", ["i"], ["f"], to=FLOAT),
        helper.make_node("Transpose", ["f"], ["t"]),
        helper.make_node("MatMul", ["f", "t"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [info("x", [4])],
        [helper.make_tensor_value_info("y", FLOAT, None)],
    )
    model = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))
    assert costs(model).of(model.graph.nodes[3]).macs is None
    observed = observe(model, {"x": np.array([1, 0, 2, 3], np.float32)})
    assert costs(model, Sizes(Shapes(model), observed)).of(model.graph.nodes[3]).macs == 3


@pytest.mark.zoo
@pytest.mark.parametrize(
    ("name", "macs"),
    # millions, as published for 224 × 224 images (SqueezeNet is 1.1)
    [("resnet50", 4089), ("vgg19", 19632), ("squeezenet", 349), ("efficientnet-lite0-torchscript", 385)],
)
def test_known_architectures(name: str, macs: int) -> None:
    from graphopt.inspect import inspect
    from graphopt.models import zoo

    found = inspect(zoo.fetch(name))
    assert not found.unknown_macs
    assert found.macs / 1e6 == pytest.approx(macs, rel=0.01)
