"""What `inspect` finds in small models whose every number is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.errors import DataError, ModelError
from graphopt.inspect import inspect
from graphopt.model import load

FLOAT = TensorProto.FLOAT


def info(name: str, shape: list[int | str | None], dtype: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def small() -> onnx.ModelProto:
    """MatMul, then an If with a product in one branch; one function; a dynamic batch."""
    branch = helper.make_graph(
        [helper.make_node("MatMul", ["h", "v"], ["p"], name="inner")],
        "then",
        [],
        [info("p", ["n", 2])],
        [numpy_helper.from_array(np.ones((4, 2), np.float32), "v")],
    )
    other = helper.make_graph(
        [helper.make_node("Slice", ["h", "lo", "hi", "ax"], ["q"])], "else", [], [info("q", ["n", 2])]
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="product"),
        helper.make_node("If", ["c"], ["i"], name="choice", then_branch=branch, else_branch=other),
        helper.make_node("Twice", ["i"], ["y"], domain="my", name="call"),
    ]
    function = helper.make_function(
        "my", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 17)]
    )
    constants = {"w": np.ones((3, 4), np.float32), "lo": np.array([0]), "hi": np.array([2]), "ax": np.array([1])}
    graph = helper.make_graph(
        nodes,
        "g",
        [info("x", ["n", 3]), info("c", [], TensorProto.BOOL)],
        [info("y", ["n", 2])],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("my", 1)]
    model = helper.make_model(
        graph, functions=[function], opset_imports=opsets, ir_version=9, producer_name="us", producer_version="3"
    )
    onnx.checker.check_model(model)
    return model


def test_counts() -> None:
    found = inspect(small(), shapes={"x": (5, 3)})
    assert found.ops == {"MatMul": 2, "If": 1, "my::Twice": 1, "Slice": 1, "Add": 1}
    assert found.nodes == 6
    assert found.subgraphs == 2
    assert found.functions == {"my::Twice": 1}
    assert found.weights.parameters == 12 + 8 + 3
    assert found.weights.bytes_by_dtype == {"float32": 80, "int64": 24}
    assert (found.weights.tensors, found.weights.bytes) == (5, 104)
    assert found.opsets == {"": 17, "my": 1}
    assert found.producer == "us 3"
    assert found.dynamic == {"n": ("x[0]", "y[0]")}
    assert found.name == "g"
    assert found.file_bytes is None


def test_rows_follow_the_graphs() -> None:
    rows = inspect(small(), samples=[{"x": np.ones((5, 3), np.float32), "c": np.array(True)}]).rows
    assert [(row.name, row.op, row.graph) for row in rows] == [
        ("product", "MatMul", ""),
        ("choice", "If", ""),
        ("", "Slice", "choice.else_branch"),
        ("inner", "MatMul", "choice.then_branch"),
        ("call", "my::Twice", ""),
        ("", "Add", "function my::Twice"),
    ]
    assert rows[0].outputs == ((5, 4),)
    assert (rows[0].macs, rows[0].parameters) == (60, 12)
    assert rows[1].macs == 5 * 4 * 2
    assert rows[4].macs is None


def test_macs_are_a_lower_bound_with_unknowns_named() -> None:
    found = inspect(small(), samples=[{"x": np.ones((5, 3), np.float32), "c": np.array(True)}])
    assert found.macs == 60 + 40
    assert found.unknown_macs == {"my::Twice": 1}
    assert found.at == {"x": (5, 3), "c": ()}


def test_dynamic_models_are_sized_by_a_run_that_is_stated() -> None:
    found = inspect(small())
    assert found.at["x"][1] == 3
    assert any("random feed" in note for note in found.notes)
    assert found.rows[0].macs == found.at["x"][0] * 12


def test_static_models_are_not_run() -> None:
    node = helper.make_node("Gemm", ["x", "w"], ["y"])
    weight = numpy_helper.from_array(np.ones((3, 4), np.float32), "w")
    graph = helper.make_graph([node], "g", [info("x", [2, 3])], [info("y", [2, 4])], [weight])
    found = inspect(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))
    assert found.notes == ()
    assert found.macs == 24
    assert found.moved_bytes == 4 * (6 + 12 + 8)


def test_a_model_that_does_not_run_is_inspected_all_the_same() -> None:
    node = helper.make_node("Unheard", ["x"], ["y"], domain="some.where")
    graph = helper.make_graph([node], "g", [info("x", ["n"])], [info("y", ["n"])])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("some.where", 1)]
    found = inspect(helper.make_model(graph, opset_imports=opsets, ir_version=9))
    assert found.unknown_macs == {"some.where::Unheard": 1}
    assert any("a run failed" in note for note in found.notes)


def test_files_and_external_data(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [info("x", [2, 64])], [info("y", [2, 64])], [weight]
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path = tmp_path / "m.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="m.data", size_threshold=0)
    found = inspect(path)
    assert found.name == "m.onnx"
    assert found.file_bytes == path.stat().st_size
    assert found.weights.external_files == ("m.data",)
    assert found.weights.bytes == 64 * 64 * 4


def test_as_plain_values() -> None:
    found = inspect(small(), shapes={"x": (5, 3)})
    document = json.loads(json.dumps(found.to_dict()))
    assert document["inputs"][0] == {"name": "x", "dtype": "float32", "shape": ["n", 3], "kind": "tensor"}
    assert len(document["per_node"]) == document["nodes"] == 6


def test_the_model_given_is_untouched() -> None:
    model = load(small())
    before = model.proto
    inspect(model)
    assert model.proto == before


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no input 'z'"):
        inspect(small(), shapes={"z": (1,)})
    with pytest.raises(DataError, match="where the model takes"):
        inspect(small(), shapes={"x": (1, 7)})
    with pytest.raises(DataError):
        inspect(small(), samples=[])
    with pytest.raises(ModelError):
        inspect(tmp_path / "no.onnx")
