"""External data: mapped, never copied; the attacks on it that the onnx project's security notes list are refused."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import convert_model_to_external_data

import graphopt.model
from graphopt.errors import ModelError
from graphopt.model import load
from graphopt.runtime import Session
from graphopt.tensors import LazyTensor, mappings, release

WEIGHT = np.arange(3000, dtype=np.float32).reshape(2, 1500)


def add_model(weight: TensorProto, shape: tuple[int, ...] = WEIGHT.shape) -> onnx.ModelProto:
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", info[:1], info[1:], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def external(shape: tuple[int, ...] = WEIGHT.shape, **entries: object) -> TensorProto:
    """A tensor whose data is elsewhere, with the entries given."""
    return elsewhere(entries, shape)


def elsewhere(entries: Mapping[str, object], shape: tuple[int, ...] = WEIGHT.shape) -> TensorProto:
    out = TensorProto(name="w", dims=shape, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        out.external_data.add(key=key, value=str(value))
    return out


def write(folder: Path, tensor: TensorProto, data: bytes | None = None) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(add_model(tensor).SerializeToString())
    if data is not None:
        (folder / "w.data").write_bytes(data)
    return path


def test_saved_by_onnx(tmp_path: Path) -> None:
    """Elsewhere saved models load mapped, with equal values; a copy saved again has equal values too."""
    proto = add_model(numpy_helper.from_array(WEIGHT, "w"))
    convert_model_to_external_data(proto, location="data/weights.bin", size_threshold=0)
    (tmp_path / "data").mkdir()
    onnx.save(proto, tmp_path / "model.onnx")
    model = load(tmp_path / "model.onnx")
    (weight,) = model.constants()
    lazy = weight._values
    assert isinstance(lazy, LazyTensor)
    assert lazy.data is not None
    np.testing.assert_array_equal(weight.values, WEIGHT)
    assert not weight.values.flags.writeable
    assert not weight.values.flags.owndata
    (tmp_path / "out").mkdir()
    model.save(tmp_path / "out/model.onnx")
    again = load(tmp_path / "out/model.onnx")
    np.testing.assert_array_equal(again.constants()[0].values, WEIGHT)
    x = np.ones_like(WEIGHT)
    np.testing.assert_array_equal(Session(tmp_path / "out/model.onnx").run({"x": x})["y"], WEIGHT + 1)


def test_offset_and_unknown_keys(tmp_path: Path) -> None:
    raw = WEIGHT.tobytes()
    entries = {"location": "w.data", "offset": 64, "length": len(raw), "checksum": "0" * 40, "basepath": "/etc"}
    model = load(write(tmp_path, elsewhere(entries), b"\0" * 64 + raw + b"tail"))
    np.testing.assert_array_equal(model.constants()[0].values, WEIGHT)


def test_attributes_subgraphs_and_functions_go_outside_and_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PaddlePaddle keeps its weights in Constant nodes; ONNX Runtime reads external data there too."""
    value = numpy_helper.from_array(WEIGHT, "")
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, WEIGHT.shape) for n in "xyz"]
    inner = helper.make_graph(
        [helper.make_node("Constant", [], ["k"], value=value), helper.make_node("Add", ["k", "v"], ["z"])],
        "inner", [], info[2:], [numpy_helper.from_array(WEIGHT * 2, "v")],
    )  # fmt: skip
    nodes = [
        helper.make_node("Constant", [], ["c"], value=value),
        helper.make_node("Add", ["x", "c"], ["y0"]),
        helper.make_node("If", ["t"], ["i"], then_branch=inner, else_branch=inner),
        helper.make_node("Add", ["y0", "i"], ["y"]),
    ]
    condition = helper.make_tensor_value_info("t", TensorProto.BOOL, [])
    graph = helper.make_graph(nodes, "g", [info[0], condition], info[1:2])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model = load(proto)
    assert model.weight_bytes() == 5 * WEIGHT.nbytes
    monkeypatch.setattr(graphopt.model, "INLINE_LIMIT", 1000)
    path = tmp_path / "m.onnx"
    model.save(path)
    assert path.stat().st_size < 2000
    again = load(path)
    assert again.weight_bytes() == model.weight_bytes()
    assert again.emit() == proto
    got = Session(path).run({"x": WEIGHT, "t": np.array(True)})["y"]
    np.testing.assert_array_equal(got, WEIGHT * 5)


OUTSIDE = [
    "../w.data", "a/../../w.data", "a/b/../../../w.data", "..", "/etc/passwd", "//etc/passwd", "\\\\server\\share\\w",
    "..\\w.data", "a\\..\\..\\w.data", "C:\\w.data", "C:w.data", "file:///etc/passwd", "~/w.data",
]  # fmt: skip


@pytest.mark.parametrize("location", OUTSIDE)
def test_outside_the_folder(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    (tmp_path / "w.data").write_bytes(WEIGHT.tobytes())
    with pytest.raises(ModelError, match="outside the model"):
        load(write(folder, external(location=location)))


@pytest.mark.parametrize("location", ["", ".", "./", "\0", "a\0b", "x" * 2000])
def test_no_location(tmp_path: Path, location: str) -> None:
    with pytest.raises(ModelError, match="no usable location"):
        load(write(tmp_path, external(location=location)))
    with pytest.raises(ModelError, match="no usable location"):
        load(write(tmp_path, external(offset=0)))


def test_file_name_too_long(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot read external data"):
        load(write(tmp_path, external(location="x" * 500)))


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"data file 'w\.data' is missing") as caught:
        load(write(tmp_path, external(location="w.data")))
    assert caught.value.hint == f"put it into {tmp_path}"


@pytest.mark.parametrize("link", ["file", "folder"])
def test_symbolic_links(tmp_path: Path, link: str) -> None:
    secret, folder = tmp_path / "secret", tmp_path / "models"
    secret.mkdir()
    folder.mkdir()
    (secret / "w.data").write_bytes(WEIGHT.tobytes())
    if link == "file":
        (folder / "w.data").symlink_to(secret / "w.data")
    else:
        (folder / "sub").symlink_to(secret)
    location = "w.data" if link == "file" else "sub/w.data"
    with pytest.raises(ModelError, match="symbolic link"):
        load(write(folder, external(location=location)))


def test_hard_link(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(WEIGHT.tobytes())
    os.link(tmp_path / "secret", tmp_path / "w.data")
    with pytest.raises(ModelError, match="hard link"):
        load(write(tmp_path, external(location="w.data")))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_named_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "w.data")
    with pytest.raises(ModelError, match="not an ordinary file"):
        load(write(tmp_path, external(location="w.data")))


def test_folder_as_data(tmp_path: Path) -> None:
    (tmp_path / "w.data").mkdir()
    with pytest.raises(ModelError, match=r"not an ordinary file|cannot read external data"):
        load(write(tmp_path, external(location="w.data")))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"offset": 4}, "its file has 12000"),
        ({"offset": 2**40}, "its file has 12000"),
        ({"offset": -4}, "impossible offset"),
        ({"offset": "1e3"}, "impossible offset"),
        ({"offset": "9" * 50}, "impossible offset"),
        ({"length": -1}, "impossible length"),
        ({"length": "9" * 50}, "impossible length"),
        ({"length": 11999}, "11999 bytes where 12000 belong"),
        ({"length": 2**40}, "where 12000 belong"),
        ({"length": ""}, "impossible length"),
    ],
)
def test_ranges(tmp_path: Path, entries: dict[str, object], message: str) -> None:
    tensor = elsewhere({"location": "w.data", **entries})
    with pytest.raises(ModelError, match=message):
        load(write(tmp_path, tensor, WEIGHT.tobytes()))


@pytest.mark.parametrize("shape", [(2**40, 2**40), (2**20, 2**20), (-1, 4), (2**62, 4), (1,) * 70])
def test_absurd_shapes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match=r"declares|dimension|impossible shape|external data ends"):
        load(write(tmp_path, external(shape, location="w.data"), WEIGHT.tobytes()))


def test_truncated_data_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="data file is truncated"):
        load(write(tmp_path, external(location="w.data"), WEIGHT.tobytes()[:-1]))
    with pytest.raises(ModelError, match="data file is truncated"):
        load(write(tmp_path, external(location="w.data"), b""))


def test_sparse_tensors_lists_and_training_may_not_reach_other_files(tmp_path: Path) -> None:
    sparse = onnx.SparseTensorProto(values=external((1,), location="w.data"), dims=[9])
    sparse.indices.CopyFrom(helper.make_tensor("", TensorProto.INT64, [1], [0]))
    node = helper.make_node("Many", ["x"], ["z"], domain="d")
    node.attribute.add(name="t", type=onnx.AttributeProto.TENSORS).tensors.append(external(location="w.data"))
    cases = []
    for place in ("sparse", "list", "training"):
        proto = add_model(numpy_helper.from_array(WEIGHT, "w"))
        proto.opset_import.append(helper.make_opsetid("d", 1))
        if place == "sparse":
            sparse.values.name = "s"
            proto.graph.sparse_initializer.append(sparse)
        elif place == "list":
            proto.graph.node.append(node)
        else:
            proto.training_info.add().algorithm.initializer.append(external(location="w.data"))
        cases.append(proto)
    (tmp_path / "w.data").write_bytes(WEIGHT.tobytes())
    for proto in cases:
        (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
        with pytest.raises(ModelError, match="external data"):
            load(tmp_path / "m.onnx")


def test_model_in_memory_does_not_read_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("w.data").write_bytes(WEIGHT.tobytes())
    with pytest.raises(ModelError, match="model in memory"):
        load(add_model(external(location="w.data")))


def test_our_own_mark_in_a_strangers_file(tmp_path: Path) -> None:
    for tensor in (elsewhere({"graphopt.mapped": 0}), elsewhere({"graphopt.mapped": "-1", "location": "w.data"})):
        with pytest.raises(ModelError, match="region that does not exist"):
            load(write(tmp_path, tensor, WEIGHT.tobytes()))


def test_raw_and_external_data_at_once(tmp_path: Path) -> None:
    """What the tensor's location says counts, whatever else it holds, large or small."""
    tensor = external(location="w.data")
    tensor.raw_data = (WEIGHT * 3).tobytes()
    model = load(write(tmp_path, tensor, WEIGHT.tobytes()))
    np.testing.assert_array_equal(model.constants()[0].values, WEIGHT)


def test_saving_writes_only_beside_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a model says its data lies is where it is read, never where anything is written."""
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    target.mkdir()
    path = write(source, external(location="w.data"), WEIGHT.tobytes())
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in source.iterdir()}
    model = load(path)
    model.save(target / "m.onnx")
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in source.iterdir()} == before
    names = sorted(p.name for p in target.iterdir())
    assert len(names) == 2
    assert all(n.startswith("m.onnx") for n in names)
    weight = model.constants()[0]
    monkeypatch.setattr(graphopt.model, "INLINE_LIMIT", 1000)
    for i in range(3):
        weight.values = WEIGHT + i
        model.save(path)  # over the model it came from: the data it maps stays, ours lies beside it
        np.testing.assert_array_equal(load(path).constants()[0].values, WEIGHT + i)
    assert (source / "w.data").read_bytes() == WEIGHT.tobytes()
    assert len(list(source.iterdir())) == 3  # the data of the versions before is gone


def test_pages_given_back_are_read_again(tmp_path: Path) -> None:
    model = load(write(tmp_path, external(location="w.data"), WEIGHT.tobytes()))
    (constant,) = model.constants()
    before = constant.values
    mapped = mappings(model.weights())
    assert len(mapped) == 1
    release(mapped)
    np.testing.assert_array_equal(before, WEIGHT)
    model.save(tmp_path / "again.onnx")
    np.testing.assert_array_equal(load(tmp_path / "again.onnx").constants()[0].values, WEIGHT)
