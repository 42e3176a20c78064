"""Sparse tensors in files: what ONNX's checker and ONNX Runtime take, and what is written and read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import SparseTensorProto, TensorProto, helper, numpy_helper

from graphopt.errors import GraphoptError
from graphopt.model import load
from graphopt.pipeline import Pipeline, Settings
from graphopt.runtime import Session
from graphopt.sparse_marks import Mark, marks, write_mark
from graphopt.tensors import LazySparse, sparse_form

Array = np.ndarray[Any, Any]

LAYERS = {
    "MatMul": ([3, 8], (8, 16), [3, 16]),
    "Gemm": ([3, 8], (8, 16), [3, 16]),
    "Conv": ([1, 8, 5, 5], (16, 8, 3, 3), [1, 16, 3, 3]),
    "ConvTranspose": ([1, 8, 5, 5], (8, 4, 3, 3), [1, 4, 7, 7]),
}
"""Operator -> shapes of input, weight and output."""


def thinned(shape: tuple[int, ...], dtype: Any = np.float32, density: float = 0.2, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    return np.where(rng.random(shape) < density, rng.normal(size=shape), 0.0).astype(dtype)


def coo(values: Array, name: str, *, wide: bool = False, turned: bool = False) -> SparseTensorProto:
    """Return the plain sparse form of an array, written without graphopt."""
    places = np.flatnonzero(values)[:: -1 if turned else 1].copy()
    out = SparseTensorProto(dims=values.shape)
    out.values.CopyFrom(numpy_helper.from_array(values.reshape(-1)[places], name))
    indices = np.stack(np.unravel_index(places, values.shape), axis=1) if wide else places
    out.indices.CopyFrom(numpy_helper.from_array(indices.astype(np.int64)))
    return out


def one_layer(op: str, form: str, dtype: Any = np.float32, **how: Any) -> tuple[onnx.ModelProto, Array]:
    """Return a model of one layer whose weight is in the form named, and the weight."""
    read, shape, made = LAYERS[op]
    weight = thinned(shape, dtype)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes = [helper.make_node(op, ["x", "w"], ["y"])]
    dense, sparse = [], []
    if form == "dense":
        dense = [numpy_helper.from_array(weight, "w")]
    elif form == "initializer":
        sparse = [coo(weight, "w", **how)]
    else:
        nodes.insert(0, helper.make_node("Constant", [], ["w"], sparse_value=coo(weight, "", **how)))
    graph = helper.make_graph(
        nodes, "one", [helper.make_tensor_value_info("x", kind, read)],
        [helper.make_tensor_value_info("y", kind, made)], dense, sparse_initializer=sparse,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), weight


def outputs(model: onnx.ModelProto, optimization: Any, seed: int = 1) -> Array:
    info = model.graph.input[0].type.tensor_type
    shape = [d.dim_value for d in info.shape.dim]
    x = np.random.default_rng(seed).normal(size=shape).astype(helper.tensor_dtype_to_np_dtype(info.elem_type))
    return np.asarray(Session(model, optimization=optimization).run({"x": x})["y"])


@pytest.mark.parametrize("op", LAYERS)
def test_fact_the_checker_with_type_inference_takes_sparse_constants_and_no_sparse_initializers(op: str) -> None:
    onnx.checker.check_model(one_layer(op, "initializer")[0])
    with pytest.raises(onnx.shape_inference.InferenceError):
        onnx.checker.check_model(one_layer(op, "initializer")[0], full_check=True)
    onnx.checker.check_model(one_layer(op, "constant")[0], full_check=True)


@pytest.mark.parametrize("optimization", ["off", "all"])
@pytest.mark.parametrize("form", ["initializer", "constant"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_fact_ort_takes_both_in_every_float_type(form: str, dtype: Any, optimization: Any) -> None:
    expected = outputs(one_layer("MatMul", "dense", dtype)[0], optimization)
    np.testing.assert_array_equal(outputs(one_layer("MatMul", form, dtype)[0], optimization), expected)


@pytest.mark.parametrize("form", ["initializer", "constant"])
@pytest.mark.parametrize("op", LAYERS)
@pytest.mark.parametrize("how", [{}, {"wide": True}, {"turned": True}])
def test_fact_ort_takes_both_kinds_of_indices_in_any_order(op: str, form: str, how: dict[str, bool]) -> None:
    expected = outputs(one_layer(op, "dense")[0], "all")
    np.testing.assert_array_equal(outputs(one_layer(op, form, **how)[0], "all"), expected)


def test_fact_ort_runs_the_dense_kernel(tmp_path: Path) -> None:
    path = tmp_path / "loaded.onnx"
    Session(one_layer("Conv", "constant")[0], optimization="all", optimized_path=path)
    dense = tmp_path / "dense.onnx"
    Session(one_layer("Conv", "dense")[0], optimization="all", optimized_path=dense)
    kernels = [[(n.domain, n.op_type) for n in onnx.load(file).graph.node] for file in (path, dense)]
    assert kernels[0] == kernels[1]


@given(
    hnp.arrays(
        st.sampled_from([np.float16, np.float32, np.float64]), hnp.array_shapes(max_dims=4, max_side=12),
        elements=st.sampled_from([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -0.0, 1.5, np.inf, np.nan]),
    )
)  # fmt: skip
@settings(max_examples=60)
def test_the_sparse_form_holds_the_values_and_is_smaller(values: Array) -> None:
    found = sparse_form(values, "w")
    if found is None:
        return
    assert found.ByteSize() < values.nbytes
    back = LazySparse(found).load()
    assert back.dtype == values.dtype
    np.testing.assert_array_equal(back, values)
    assert not np.signbit(back[back == 0]).any()


@pytest.mark.parametrize(("dtype", "share"), [(np.float32, 1 / 3), (np.float16, 1 / 5), (np.float64, 1 / 2)])
def test_the_sparse_form_is_used_below_the_density_where_it_pays(dtype: Any, share: float) -> None:
    for density, pays in ((share - 0.01, True), (share + 0.01, False)):
        values = np.zeros(20_000, dtype)
        values[: int(density * values.size)] = 1
        assert (sparse_form(values, "w") is not None) == pays


def test_two_of_four_is_stored_dense() -> None:
    values = np.tile(np.array([1, 0, 0, 1], np.float32), 1000)
    assert sparse_form(values, "w") is None


def marked(density: float = 0.1, storage: str = "sparse", opset: int = 17) -> onnx.ModelProto:
    """Return x @ w whose node says that w is sparse."""
    weight = thinned((32, 64), density=density)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="fc")], "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 64])], [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    model = load(proto)
    write_mark(model.metadata(model.graph.nodes[0]), 1, Mark(1 - density, "", "0.9 magnitude global", storage))
    return model.proto


def saved(proto: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    load(proto).save(path)
    return onnx.load(path)


def test_saving_writes_marked_weights_as_sparse_constants_and_they_come_back(tmp_path: Path) -> None:
    proto = marked()
    found = saved(proto, tmp_path / "a.onnx")
    onnx.checker.check_model(found, full_check=True)
    assert [node.op_type for node in found.graph.node] == ["Constant", "MatMul"]
    assert not found.graph.initializer
    assert (tmp_path / "a.onnx").stat().st_size < len(proto.SerializeToString()) / 2
    x = np.random.default_rng(3).normal(size=(5, 32)).astype(np.float32)
    np.testing.assert_array_equal(Session(found).run({"x": x})["y"], Session(proto).run({"x": x})["y"])
    again = saved(found, tmp_path / "b.onnx")
    assert again == found
    canonical = Pipeline("canonicalize").run(found, settings=Settings(verify="off", on_failure="stop")).model
    assert canonical.proto.graph.initializer[0].raw_data == proto.graph.initializer[0].raw_data
    canonical.save(tmp_path / "c.onnx")
    third = onnx.load(tmp_path / "c.onnx")
    assert third.graph.node[0].attribute[0].sparse_tensor == found.graph.node[0].attribute[0].sparse_tensor


@pytest.mark.parametrize(
    "proto", [marked(density=0.5), marked(storage="dense"), marked(opset=9)], ids=["larger", "dense", "old opset"]
)
def test_saving_leaves_weights_dense(proto: onnx.ModelProto, tmp_path: Path) -> None:
    found = saved(proto, tmp_path / "a.onnx")
    assert found == proto


def test_weights_that_nobody_marked_are_saved_as_they_are(tmp_path: Path) -> None:
    proto = marked()
    del proto.graph.node[0].metadata_props[:]
    assert saved(proto, tmp_path / "a.onnx") == proto


def test_sparse_constants_of_others_stay_as_they_came(tmp_path: Path) -> None:
    proto = one_layer("Gemm", "constant")[0]
    result = Pipeline("canonicalize").run(proto, settings=Settings(verify="off", on_failure="stop"))
    result.save(tmp_path / "a.onnx")
    assert onnx.load(tmp_path / "a.onnx").graph.node[0].attribute[0].sparse_tensor.dims == [8, 16]


def test_marks_are_read_as_they_were_written_and_nonsense_is_no_mark() -> None:
    metadata: dict[str, str] = {}
    first, second = Mark(0.8, "", "0.8 magnitude global"), Mark(0.5, "2:4", "0.5 wanda pattern", "dense")
    write_mark(metadata, 2, second)
    write_mark(metadata, 1, first)
    assert marks(metadata) == {1: first, 2: second}
    assert first.amount == 0.8
    for text in ("", "1", "[]", '{"1": 3}', '{"1": {"share": 1}}', '{"x": {}}'):
        assert marks({"graphopt.sparse": text}) == {}


def test_a_damaged_sparse_constant_is_one_error(tmp_path: Path) -> None:
    proto = one_layer("Gemm", "constant")[0]
    proto.graph.node[0].attribute[0].sparse_tensor.indices.raw_data = np.array([10**6], np.int64).tobytes()
    proto.graph.node[0].attribute[0].sparse_tensor.indices.dims[:] = [1]
    with pytest.raises(GraphoptError, match="values with indices"):
        Pipeline("sparsify-weights").run(proto, settings=Settings(verify="off", on_failure="stop"))
