"""`Model`: what it says of itself, lazy weights, snapshots, saving."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper

import graphopt.model
from graphopt.model import Model, ValueSpec, load
from graphopt.order import sort_nodes
from graphopt.runtime import evaluate
from graphopt.tensors import LazyTensor

Array = np.ndarray[Any, Any]


def info(name: str, shape: Any = (2, 3), kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def model_of(
    nodes: list[onnx.NodeProto],
    weights: dict[str, Array],
    *,
    inputs: tuple[str, ...] = ("x",),
    ir: int = 8,
    shape: Any = (2, 3),
) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(v, k) for k, v in weights.items()]
    graph = helper.make_graph(nodes, "g", [info(n, shape) for n in inputs], [info("y", shape)], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=ir)


def add(weights: dict[str, Array] | None = None, **kwargs: Any) -> onnx.ModelProto:
    weights = weights or {"w": np.ones((2, 3), np.float32)}
    return model_of([helper.make_node("Add", ["x", "w"], ["y"])], weights, **kwargs)


# --- what a model says of itself ---------------------------------------------------------------------------


def test_signature() -> None:
    model = load(add(shape=("N", None, 3)))
    assert model.inputs == [ValueSpec("x", np.dtype("float32"), ("N", None, 3))]
    assert str(model.inputs[0]) == "x: float32[N,?,3]"
    assert [o.name for o in model.outputs] == ["y"]
    assert (model.opset, model.ir_version, model.opsets) == (17, 8, {"": 17})


@pytest.mark.parametrize(("ir", "fed", "optional"), [(3, ["x"], []), (4, ["x"], ["w"])])
def test_initializers_that_are_inputs_too(ir: int, fed: list[str], optional: list[str]) -> None:
    """Before IR 4 they are constants that had to be listed; since then callers may feed another value."""
    proto = add(inputs=("x", "w"), ir=ir)
    model = load(proto)
    assert [i.name for i in model.inputs] == fed
    assert [i.name for i in model.optional_inputs] == optional
    assert [c.name for c in model.constants()] == ([] if optional else ["w"])
    assert model.weight_bytes() == 24
    assert model.proto == proto


def test_kinds_other_than_tensors() -> None:
    proto = model_of([helper.make_node("SequenceAt", ["x", "i"], ["y"])], {"i": np.array(0)})
    proto.graph.input[0].CopyFrom(
        helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, [2, 3]),
    )
    assert load(proto).inputs == [ValueSpec("x", None, None, "sequence")]


def test_the_callers_objects_are_never_touched() -> None:
    proto = add()
    kept = onnx.ModelProto()
    kept.CopyFrom(proto)
    model = load(proto)
    other = load(model)
    model.constants()[0].values = np.zeros((2, 3), np.float32)
    model.graph.nodes[0].name = "changed"
    assert proto == kept
    assert other.proto == kept


def test_nodes_and_graphs_reach_subgraphs_and_functions() -> None:
    inner = helper.make_graph([helper.make_node("Identity", ["x"], ["b"])], "inner", [], [info("b")])
    nodes = [helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)]
    proto = model_of(nodes, {"c": np.array(True)})
    body = [helper.make_node("If", ["p"], ["q"], then_branch=helper.make_graph(
        [helper.make_node("Identity", ["a"], ["r"])], "in function", [], [info("r")]))]  # fmt: skip
    imports = [helper.make_opsetid("", 13)]
    proto.functions.append(helper.make_function("d", "F", ["a", "p"], ["q"], body, imports))
    proto.opset_import.append(helper.make_opsetid("d", 1))
    model = load(proto)
    assert [(g.name, g.opset) for g in model.graphs()] == [
        ("g", 17), ("inner", 17), ("inner", 17), ("F", 13), ("in function", 13),
    ]  # fmt: skip
    assert [n.op for n in model.nodes()] == ["If", "Identity", "Identity", "If", "Identity"]


def test_metadata_of_nodes() -> None:
    proto = add()
    proto.graph.node[0].metadata_props.add(key="a", value="1")
    model = load(proto)
    node = model.graph.nodes[0]
    model.metadata(node)["b"] = "2"
    new = gs.Node("Relu", inputs=list(node.outputs), outputs=[gs.Variable("z", np.float32)])
    model.graph.nodes.append(new)
    model.metadata(new)["c"] = "3"
    emitted = model.proto.graph.node
    assert [{e.key: e.value for e in n.metadata_props} for n in emitted] == [{"a": "1", "b": "2"}, {"c": "3"}]


# --- weights -------------------------------------------------------------------------------------------------


def test_values_are_read_only_and_lazy(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(add({"w": np.ones((2, 300), np.float32)}, shape=(2, 300)), path)
    model = load(path)
    (constant,) = model.constants()
    assert isinstance(constant._values, LazyTensor)
    assert (constant.shape, constant.dtype) == ((2, 300), np.float32)
    with pytest.raises(ValueError, match="read-only"):
        constant.values[0] = 2
    constant.values = constant.values * 2
    np.testing.assert_array_equal(numpy_helper.to_array(model.proto.graph.initializer[0]), 2)


@pytest.mark.parametrize("dtype", sorted(set(TensorProto.DataType.values()) - {0, TensorProto.STRING}))
def test_every_element_type(tmp_path: Path, dtype: int) -> None:
    """Values come out right from the typed field, from raw data, and mapped; edited ones go back in as well."""
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    values = np.arange(4000).reshape(4, 1000) % 2 == 1
    values = values.astype(np.float32).astype(kind)
    raw = numpy_helper.from_array(values, "w")
    typed = helper.make_tensor("w", dtype, values.shape, values.reshape(-1))
    for tensor in (raw, typed):
        proto = add()
        proto.graph.node[0].op_type, proto.graph.node[0].domain = "Op", "d"
        proto.opset_import.append(helper.make_opsetid("d", 1))
        proto.graph.initializer[0].CopyFrom(tensor)
        onnx.save(proto, tmp_path / "m.onnx")
        for source in (proto, tmp_path / "m.onnx"):
            model = load(source)
            (constant,) = model.constants()
            assert constant.dtype == kind
            assert constant.values.tobytes() == values.tobytes()
            assert model.proto == proto
            constant.values = constant.values.copy()
            again = numpy_helper.to_array(model.proto.graph.initializer[0])
            assert again.dtype == kind
            assert again.tobytes() == values.tobytes()


def test_strings(tmp_path: Path) -> None:
    proto = add()
    strings = [text.encode() for text in ["é", "b", ""] * 200]
    proto.graph.initializer[0].CopyFrom(
        TensorProto(name="w", data_type=TensorProto.STRING, dims=[600], string_data=strings)
    )
    model = load(proto)
    (constant,) = model.constants()
    assert constant.values.tolist() == ["é", "b", ""] * 200
    constant.values = np.array(["x", "ü"] * 300, object)
    emitted = model.proto.graph.initializer[0]
    assert list(emitted.string_data) == [b"x", "ü".encode()] * 300
    model.copy().save(tmp_path / "m.onnx")
    assert load(tmp_path / "m.onnx").proto.graph.initializer[0] == emitted


def resident() -> int:
    """Return the resident memory of this process that no file backs, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


@pytest.mark.parametrize(
    ("place", "columns"), [("initializer", 250_000), ("Constant node", 80_000), ("optional input", 80_000)]
)
def test_a_large_file_is_mapped_not_copied(tmp_path: Path, place: str, columns: int) -> None:
    """200 (64) MB of weights: loading, copying, taking snapshots, reading them all take none of it."""
    path = tmp_path / "large.onnx"
    count = 4
    weights = {f"w{i}": np.full((50, columns), i, np.float32) for i in range(count)}
    nodes = [helper.make_node("Sum", [*weights, "x"], ["y"])]
    if place == "Constant node":
        constants = [
            helper.make_node("Constant", [], [k], value=numpy_helper.from_array(v)) for k, v in weights.items()
        ]
        proto = model_of([*constants, *nodes], {}, shape=(50, columns))
    else:
        proto = model_of(nodes, weights, shape=(50, columns))
    if place == "optional input":
        proto.graph.input.extend(info(name, (50, columns)) for name in weights)
    path.write_bytes(proto.SerializeToString())
    del proto, nodes, weights
    gc.collect()
    before = resident()
    tracemalloc.start()
    model = load(path)
    copies = [model.copy(), model.copy()]
    snapshot = model.snapshot()
    model.restore(snapshot)
    assert model.weight_bytes() == count * 50 * columns * 4
    total = sum(float(values.load()[0, 0]) for values in model.weights() if isinstance(values, LazyTensor))
    assert total == sum(range(count))
    python_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert python_peak < 20_000_000
    assert resident() - before < 20_000_000
    assert len(copies) == 2


# --- snapshots -----------------------------------------------------------------------------------------------


def test_restore_gives_back_the_very_same_model() -> None:
    proto = model_of(
        [helper.make_node("Add", ["x", "w"], ["t"]), helper.make_node("Mul", ["t", "big"], ["y"])],
        {"w": np.ones((2, 3), np.float32), "big": np.ones((500, 2, 3), np.float32)},
    )
    model = load(proto)
    snapshot = model.snapshot()
    for constant in model.constants():
        constant.values = constant.values * 7
    model.graph.nodes.pop()
    assert model.proto != proto
    model.restore(snapshot)
    assert model.proto == proto
    assert model.snapshot().proto == snapshot.proto


def test_edited_weights_survive_a_copy() -> None:
    model = load(add({"w": np.ones((500, 3), np.float32)}, shape=(500, 3)))
    model.constants()[0].values = np.full((500, 3), 5, np.float32)
    copy = model.copy()
    model.constants()[0].values = np.zeros((500, 3), np.float32)
    x = np.zeros((500, 3), np.float32)
    np.testing.assert_array_equal(evaluate(copy, {"x": x})["y"], 5)


# --- saving and order ----------------------------------------------------------------------------------------


def test_above_the_limit_weights_go_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphopt.model, "INLINE_LIMIT", 5000)
    model = load(add({"w": np.ones((500, 3), np.float32)}, shape=(500, 3)))
    path = tmp_path / "m.onnx"
    model.save(path)
    assert path.stat().st_size < 500
    again = load(path)
    assert again.proto.graph.initializer[0].data_location == TensorProto.EXTERNAL
    x = np.zeros((500, 3), np.float32)
    np.testing.assert_array_equal(evaluate(again, {"x": x})["y"], 1)
    first = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    again.save(path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == first


def chain(length: int) -> Model:
    nodes = [helper.make_node("Relu", [f"t{i}" if i else "x"], [f"t{i + 1}"]) for i in range(length)]
    proto = model_of([*reversed(nodes)], {})
    proto.graph.output[0].name = f"t{length}"
    return load(proto)


def test_a_long_reversed_chain_is_sorted() -> None:
    model = chain(5000)
    assert [n.outputs[0].name for n in model.graph.nodes[:3]] == ["t1", "t2", "t3"]
    assert sort_nodes(model.graph) is False
