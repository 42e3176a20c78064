"""fold-affine where a golden text would be long: many nodes, half precision, functions, shared weights, the zoo."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.analysis.affine import Affine, fits, reshape_groups, reshaped
from graphopt.pipeline import Pipeline, Result, Settings
from graphopt.runtime import Session

Array = np.ndarray[Any, Any]


def run(model: onnx.ModelProto, pipeline: str = "fold-affine") -> Result:
    return Pipeline(pipeline).run(model, settings=Settings(verify="off", on_failure="stop"))


def model_of(
    nodes: list[onnx.NodeProto], constants: dict[str, Array], *, shape: list[Any], out: list[Any], dtype: int = 1,
    functions: list[onnx.FunctionProto] | None = None,
) -> onnx.ModelProto:  # fmt: skip
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", dtype, shape)],
        [helper.make_tensor_value_info("y", dtype, out)],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=functions or [])


def ops(result: Result) -> list[str]:
    return [node.op for node in result.model.graph.nodes]


def reasons(result: Result) -> str:
    return "\n".join(b["why"] for record in result.report.passes for b in record.blocked)


def outputs(model: onnx.ModelProto, x: Array) -> Array:
    return np.asarray(Session(model, optimization="off").run({"x": x})["y"])


def test_a_long_chain_becomes_two_nodes() -> None:
    """No recursion, and one change for all of it."""
    count = 20_000
    nodes = [
        helper.make_node(("Mul", "Add")[i % 2], [f"t{i}" if i else "x", ("m", "a")[i % 2]], [f"t{i + 1}"])
        for i in range(count)
    ]
    nodes[-1].output[0] = "y"
    constants = {"m": np.array(1.0001, np.float32), "a": np.array(0.01, np.float32)}
    result = run(model_of(nodes, constants, shape=[3], out=[3]))
    assert ops(result) == ["Mul", "Add"]
    assert result.report.passes[0].changes == 1


def test_alternating_activations_are_gone_through_once() -> None:
    """Scales move to the next one, and the last into the Conv."""
    nodes, name = [], "x"
    for i in range(2_000):
        nodes += [helper.make_node("Mul", [name, "m"], [f"p{i}"]), helper.make_node("Relu", [f"p{i}"], [f"q{i}"])]
        name = f"q{i}"
    nodes.append(helper.make_node("Conv", [name, "w"], ["y"]))
    constants = {"m": np.array(1.001, np.float32), "w": np.ones((2, 2, 1, 1), np.float32)}
    result = run(model_of(nodes, constants, shape=["N", 2, 4, 4], out=["N", 2, 4, 4]))
    assert ops(result).count("Mul") <= 2_000 // 20  # a search looks some 30 nodes far


def test_weights_are_rounded_once_however_many_maps_come() -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(8, 8, 1, 1)).astype(np.float32)
    scales = {name: rng.uniform(0.5, 2, (8, 1, 1)).astype(np.float32) for name in ("a", "b", "c", "d")}
    nodes = [
        helper.make_node("Mul", ["x", "a"], ["t1"]),
        helper.make_node("Relu", ["t1"], ["t2"]),
        helper.make_node("Mul", ["t2", "b"], ["t3"]),
        helper.make_node("Conv", ["t3", "w"], ["t4"]),
        helper.make_node("Mul", ["t4", "c"], ["t5"]),
        helper.make_node("Relu", ["t5"], ["t6"]),
        helper.make_node("Mul", ["t6", "d"], ["y"]),
    ]
    result = run(model_of(nodes, {**scales, "w": weight}, shape=[1, 8, 4, 4], out=[1, 8, 4, 4]))
    assert ops(result) == ["Relu", "Conv", "Relu"]
    wide = {k: v.astype(np.float64) for k, v in scales.items()}
    wanted = weight.astype(np.float64) * (wide["c"] * wide["d"])[..., None] * (wide["a"] * wide["b"])[None]
    found = next(n for n in result.model.graph.nodes if n.op == "Conv").inputs[1].values
    np.testing.assert_array_equal(found, wanted.astype(np.float32))


@pytest.mark.parametrize(("size", "copied"), [(64, True), (640, False)])
def test_a_shared_weight_is_copied_only_while_small(size: int, copied: bool) -> None:
    """640 x 640 floats are 1.6 MB."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("Mul", ["p", "s"], ["q"]),
        helper.make_node("Relu", ["q"], ["r"]),
        helper.make_node("MatMul", ["r", "w"], ["y"]),
    ]
    constants = {"w": np.eye(size, dtype=np.float32), "s": np.full(size, 2.0, np.float32) + np.eye(size)[0]}
    constants["s"] = constants["s"].astype(np.float32) * np.where(np.arange(size) % 2, 1, -1).astype(np.float32)
    result = run(model_of(nodes, constants, shape=["N", size], out=["N", size]))
    assert ("Mul" not in ops(result)) == copied
    assert ("is used elsewhere, too" in reasons(result)) != copied


def test_half_precision_folds_but_keeps_its_range() -> None:
    w = np.ones((1, 1, 1, 1), np.float16)

    def folded(factor: float) -> Result:
        nodes = [helper.make_node("Mul", ["x", "s"], ["t"]), helper.make_node("Conv", ["t", "w"], ["y"])]
        constants = {"s": np.array(factor, np.float16), "w": w}
        return run(model_of(nodes, constants, shape=[1, 1, 2, 2], out=[1, 1, 2, 2], dtype=TensorProto.FLOAT16))

    assert ops(folded(0.5)) == ["Conv"]
    refused = folded(0.01)
    assert ops(refused) == ["Mul", "Conv"]
    assert "range of float16" in reasons(refused)


def test_integers_are_left_alone() -> None:
    nodes = [helper.make_node("Mul", ["x", "c"], ["t"]), helper.make_node("Add", ["t", "c"], ["u"]),
             helper.make_node("Mul", ["u", "c"], ["y"])]  # fmt: skip
    result = run(model_of(nodes, {"c": np.array(3)}, shape=[2], out=[2], dtype=TensorProto.INT64))
    assert ops(result) == ["Mul", "Add", "Mul"]


def test_function_bodies_take_part() -> None:
    constant = numpy_helper.from_array(np.array([2.0], np.float32))
    weight = numpy_helper.from_array(np.ones((2, 2, 1, 1), np.float32))
    body = [
        helper.make_node("Constant", [], ["c"], value=constant),
        helper.make_node("Constant", [], ["w"], value=weight),
        helper.make_node("Conv", ["a", "w"], ["p"]),
        helper.make_node("Relu", ["p"], ["q"]),
        helper.make_node("Sigmoid", ["q"], ["s"]),
        helper.make_node("Conv", ["s", "w"], ["t"]),
        helper.make_node("Mul", ["t", "c"], ["b"]),
    ]
    function = helper.make_function("own", "f", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
    model = model_of(
        [helper.make_node("f", ["x"], ["y"], domain="own")], {}, shape=[1, 2, 3, 3], out=[1, 2, 3, 3],
        functions=[function],
    )  # fmt: skip
    result = run(model)
    assert [n.op for n in result.model.functions[0].nodes if n.op != "Constant"] == ["Conv", "Relu", "Sigmoid", "Conv"]
    x = np.random.default_rng(0).normal(size=(1, 2, 3, 3)).astype(np.float32)
    np.testing.assert_allclose(outputs(result.proto, x), outputs(model, x), rtol=1e-6)
    onnx.checker.check_model(result.proto, full_check=True)


def test_a_constant_of_an_unproved_dimension_is_no_map() -> None:
    """It might be what makes the tensor larger: [N, D] with D = 1."""
    nodes = [helper.make_node("Mul", ["x", "c"], ["t"]), helper.make_node("MatMul", ["t", "w"], ["y"])]
    constants = {"c": np.array([1.0, 2.0, 3.0], np.float32), "w": np.ones((3, 2), np.float32)}
    assert ops(run(model_of(nodes, constants, shape=["N", 3], out=["N", 2]))) == ["MatMul"]
    model = model_of(nodes, constants, shape=["N", "D"], out=["N", 2])
    result = run(model)
    assert ops(result) == ["Mul", "MatMul"]
    np.testing.assert_array_equal(outputs(result.proto, np.ones((1, 1), np.float32)), [[6.0, 6.0]])


@pytest.mark.zoo
@pytest.mark.parametrize(("name", "left"), [("ppocr-det", 25), ("ppocr-rec", 45), ("ppocr-cls", 3), ("resnet50", 0)])
def test_what_is_left_in_real_models(name: str, left: int) -> None:
    """Scales and shifts by constants that remain: before padded Convs, behind MatMuls, in LayerNorms."""
    from graphopt.models import zoo
    from graphopt.optimizer import default_pipeline

    result = default_pipeline(stage="canonical").run(zoo.fetch(name), settings=Settings(verify="off"))
    constants = {id(c) for c in result.model.constants()}
    maps = [
        n
        for n in result.model.graph.nodes
        if n.op in ("Mul", "Add", "Sub", "Div", "BatchNormalization") and any(id(t) in constants for t in n.inputs)
    ]
    assert len(maps) <= left
    assert not [r.failure for r in result.report.passes if r.failure]


def test_reshapes_carry_maps_of_axes() -> None:
    given = Affine.of(np.arange(1.0, 7.0).reshape(1, 6, 1, 1))
    after = reshaped(given, ("N", 6, "H", "W"), ("N", 2, 3, "H", "W"))
    assert after is not None
    np.testing.assert_array_equal(after.scale, np.arange(1.0, 7.0).reshape(1, 2, 3, 1, 1))
    flat = reshaped(given, ("N", 6, "H", "W"), ("N", 6, None))
    assert flat is not None
    assert flat.scale.shape == (1, 6, 1)
    assert reshaped(given, ("N", 6, "H", "W"), ("N", None)) is None
    assert reshape_groups((2, 3, 4, 5), (6, 20)) == [(range(2), range(1)), (range(2, 4), range(1, 2))]


def test_constants_that_would_enlarge_do_not_fit() -> None:
    assert fits((), None)
    assert fits((4, 1, 1), ("N", 4, None, None))
    assert not fits((1,), None)
    assert not fits((4,), ("N", "D"))
    assert not fits((1, 1, 1), (2, 2))


def test_maps_compose_in_order() -> None:
    both = Affine.of(2.0, 1.0).then(Affine.of(3.0, -1.0))
    assert (float(both.scale), float(both.shift)) == (6.0, 2.0)
