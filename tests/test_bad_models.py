"""Bad input gets a clear error and nothing is lost: damaged, hostile and impossible models, failing writes."""

from __future__ import annotations

import errno
import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import SparseTensorProto, TensorProto, helper, numpy_helper

import graphopt.model
from graphopt.errors import GraphoptError, ModelError
from graphopt.model import Model, load
from graphopt.text import to_text

from .protos import models

Edit = Callable[[onnx.ModelProto], object]


def base() -> onnx.ModelProto:
    """Two nodes, two weights, one of them large enough to be mapped."""
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 300]) for n in "xy"]
    weights = [numpy_helper.from_array(np.full((2, 300), i, np.float32), f"w{i}") for i in range(2)]
    nodes = [helper.make_node("Add", ["x", "w0"], ["t"], name="first"), helper.make_node("Mul", ["t", "w1"], ["y"])]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


# --- files that are no models ------------------------------------------------------------------------------

FILES = {
    "empty": (b"", "the file is empty"),
    "zeros": (b"\0" * 100, "not an ONNX model"),
    "text": (b"hello, world\n" * 10, "not an ONNX model"),
    "zip": (b"PK\x03\x04" + bytes(100), "zip archive"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "html": (b"<!DOCTYPE html><html></html>", "download went wrong"),
    "json": (b'{"ir_version": 8}', "JSON"),
    "ort": (b"\x20\0\0\0ORTM" + bytes(50), "ORT-format"),
    "no graph": (b"\x08\x08", "it has no graph"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_models(tmp_path: Path, name: str) -> None:
    content, message = FILES[name]
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        load(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model file"):
        load(tmp_path / "nothing.onnx")
    with pytest.raises(ModelError, match="this is a folder"):
        load(tmp_path)
    with pytest.raises(ModelError, match="cannot read the model"):
        load(tmp_path / ("x" * 300))


# --- models that say impossible things -----------------------------------------------------------------------


def tensor(**fields: Any) -> Edit:
    def edit(proto: onnx.ModelProto) -> None:
        out = proto.graph.initializer[0]
        for name, value in fields.items():
            out.ClearField(name)
            if isinstance(value, list):
                getattr(out, name).extend(value)
            elif value is not None:
                setattr(out, name, value)

    return edit


def sparse(dims: list[int], indices: list[int], shape: list[int], values: int = 1) -> Edit:
    def edit(proto: onnx.ModelProto) -> None:
        proto.graph.sparse_initializer.append(
            SparseTensorProto(
                dims=dims,
                values=helper.make_tensor("s", TensorProto.FLOAT, [values], [1.0] * values),
                indices=TensorProto(data_type=TensorProto.INT64, dims=shape, int64_data=indices),
            )
        )

    return edit


def opset(domain: str, version: int) -> Edit:
    def edit(proto: onnx.ModelProto) -> None:
        del proto.opset_import[:]
        proto.opset_import.append(helper.make_opsetid(domain, version))

    return edit


def add_node(op: str, inputs: list[str], outputs: list[str], **attrs: Any) -> Edit:
    return lambda proto: proto.graph.node.append(helper.make_node(op, inputs, outputs, **attrs))


def cycle(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].input[0] = "y"


def self_cycle(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].input[0] = "t"


def cycle_through_subgraph(proto: onnx.ModelProto) -> None:
    inner = helper.make_graph([helper.make_node("Identity", ["y"], ["q"])], "b", [], [onnx.ValueInfoProto(name="q")])
    proto.graph.node.append(helper.make_node("If", ["w0"], ["z"], then_branch=inner, else_branch=inner))
    proto.graph.node[0].input[1] = "z"


def attribute_twice(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].attribute.extend([helper.make_attribute("a", 1), helper.make_attribute("a", 2)])


def deep(proto: onnx.ModelProto) -> None:
    graph = proto.graph
    for i in range(200):
        attribute = graph.node.add(op_type="If", input=["x"], output=[f"d{i}"]).attribute.add(name="then_branch")
        attribute.type = onnx.AttributeProto.GRAPH
        graph = attribute.g


IMPOSSIBLE: dict[str, tuple[Edit, str]] = {
    "future IR": (lambda p: setattr(p, "ir_version", 9999), "IR version 9999 is newer"),
    "no IR": (lambda p: p.ClearField("ir_version"), "not an ONNX model"),
    "future opset": (opset("", 10**6), "opset 1000000 is not known"),
    "opset 0": (opset("", 0), "opset 0 is not known"),
    "negative opset": (opset("", -3), "opset -3 is not known"),
    "no standard opset": (opset("my.domain", 1), "imports no standard operator set"),
    "unknown operator": (add_node("Realu", ["x"], ["z"]), "did you mean 'Relu'"),
    "operator too new": (add_node("Gelu", ["x"], ["z"]), "'Gelu' does not exist in opset 17"),
    "which opset it needs": (add_node("Gelu", ["x"], ["z"]), "it came with opset 20"),
    "cycle": (cycle, "the graph has a cycle"),
    "node that reads itself": (self_cycle, "the graph has a cycle"),
    "cycle through a subgraph": (cycle_through_subgraph, "the graph has a cycle"),
    "undefined input": (add_node("Relu", ["nowhere"], ["z"]), "'nowhere' is used but never produced"),
    "undefined output": (lambda p: p.graph.output.add(name="nowhere"), "'nowhere' is not produced"),
    "two outputs of a name": (add_node("Relu", ["x"], ["t"]), "'t' is defined twice"),
    "output named as an input": (add_node("Relu", ["x"], ["x"]), "'x' is defined twice"),
    "output named as a weight": (add_node("Relu", ["x"], ["w0"]), "'w0' is defined twice"),
    "two inputs of a name": (lambda p: p.graph.input.add(name="x"), "'x' is defined twice"),
    "two weights of a name": (lambda p: p.graph.initializer.append(p.graph.initializer[0]), "'w0' is defined twice"),
    "an attribute twice": (attribute_twice, "an attribute is given twice"),
    "deep nesting": (deep, "nested too deeply"),
    "raw data too short": (tensor(raw_data=b"\0" * 2399), "holds 2399 bytes where 2400 belong"),
    "raw data too long": (tensor(raw_data=b"\0" * 2404), "holds 2404 bytes where 2400 belong"),
    "no data": (tensor(raw_data=None), "holds 0 elements where 600 belong"),
    "wrong field": (tensor(raw_data=None, int64_data=[0] * 600), "holds 0 elements where 600 belong"),
    "negative dimension": (tensor(dims=[-1, 300]), "negative dimension"),
    "shape that overflows": (tensor(dims=[2**62, 2**62]), "impossible shape"),
    "empty, yet too large": (tensor(dims=[0, 2**62], raw_data=b""), "impossible shape"),
    "too many dimensions": (tensor(dims=[1] * 65), "65 dimensions"),
    "a terabyte and more": (tensor(dims=[2**39]), "declares"),
    "unknown element type": (tensor(data_type=4711), "unknown element type: 4711"),
    "undefined element type": (tensor(data_type=0), "unknown element type: 0"),
    "raw strings": (tensor(data_type=TensorProto.STRING), "strings cannot be raw data"),
    "too few strings": (tensor(data_type=TensorProto.STRING, raw_data=None, string_data=[b"a"]), "holds 1 elements"),
    "packed type, wrong size": (tensor(data_type=TensorProto.INT4), "holds 2400 bytes where 300 belong"),
    "segment": (lambda p: setattr(p.graph.initializer[0].segment, "begin", 1), "split into segments"),
    "sparse, absurd shape": (sparse([2**40, 2**40], [0], [1]), "impossible shape"),
    "sparse, index too large": (sparse([4, 4], [16], [1]), "an index lies outside"),
    "sparse, index negative": (sparse([4, 4], [-1, 0], [1, 2]), "an index lies outside"),
    "sparse, shapes disagree": (sparse([4, 4], [0, 0, 0], [3]), "1 values with indices of shape [3]"),
    "sparse, indices short": (sparse([4, 4], [0], [1, 2]), "holds 1 elements where 2 belong"),
}


@pytest.mark.parametrize("in_file", [True, False], ids=["file", "memory"])
@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_models(tmp_path: Path, name: str, in_file: bool) -> None:
    edit, message = IMPOSSIBLE[name]
    proto = base()
    edit(proto)
    path = tmp_path / "m.onnx"
    if in_file and name != "deep nesting":  # protobuf itself refuses to read that
        path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError) as caught:
        load(path if path.exists() else proto)
    assert message in str(caught.value)
    if path.exists():
        assert str(path) in str(caught.value)


def test_sparse_tensor_too_large_to_be_made_dense() -> None:
    """It loads, is kept, and costs nothing until its dense form is asked for."""
    proto = base()
    sparse([2**36], [5], [1])(proto)
    model = load(proto)
    assert model.proto == proto
    assert model.weight_bytes() < 10_000
    (constant,) = [c for c in model.constants() if c.name == "s"]
    with pytest.raises(ModelError, match="in dense form"):
        _ = constant.values


def test_long_strings_are_cut_in_texts_and_messages() -> None:
    proto = base()
    bomb = "x" * 5_000_000
    proto.graph.node[0].attribute.append(helper.make_attribute("text", bomb))
    proto.graph.node[0].attribute.append(helper.make_attribute("many", [bomb] * 3))
    model = load(proto)
    assert len(to_text(model)) < 2000
    assert model.proto == proto


# --- damage --------------------------------------------------------------------------------------------------


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Let this process grow by two gigabytes at most, so that a giant allocation fails the test."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def try_to_use(path: Path) -> bool:
    """Load, emit, copy and print: all of it works, or a GraphoptError says why not; return whether it worked.

    Any other exception fails the test that calls this, as does a hang or a giant allocation.
    """
    try:
        model = load(path)
        model.copy().proto.SerializeToString()
        to_text(model)
    except GraphoptError:
        return False
    return True


@pytest.mark.usefixtures("little_memory")
@given(st.data())
@settings(max_examples=60)
def test_truncated_files(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from([base()]) | models()).SerializeToString()
    path = tmp_path_factory.getbasetemp() / "truncated.onnx"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try_to_use(path)


@pytest.mark.usefixtures("little_memory")
def test_every_truncation_of_one_file(tmp_path: Path) -> None:
    whole = base().SerializeToString()
    weights = range(60, len(whole) - 200, 97)  # inside the weights every cut is the same
    worked = []
    for length in [*range(60), *weights, *range(len(whole) - 200, len(whole) + 1)]:
        (tmp_path / "m.onnx").write_bytes(whole[:length])
        if try_to_use(tmp_path / "m.onnx"):
            worked.append(length)
    assert worked == [len(whole)]


@pytest.mark.usefixtures("little_memory")
@given(st.data())
@settings(max_examples=150)
def test_damaged_files(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Bytes changed, removed, repeated, and numbers that claim to be huge."""
    content = bytearray(data.draw(st.sampled_from([base()]) | models()).SerializeToString())
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["flip", "set", "drop", "huge", "copy"]))
        if kind == "flip":
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "set":
            content[at] = data.draw(st.integers(0, 255))
        elif kind == "drop" and len(content) > 9:
            del content[at : at + data.draw(st.integers(1, 8))]
        elif kind == "huge":
            content[at:at] = data.draw(st.sampled_from([b"\xff" * 9 + b"\x01", b"\xff\xff\xff\xff\x07"]))
        elif kind == "copy":
            content[at:at] = content[: data.draw(st.integers(1, 40))]
    path = tmp_path_factory.getbasetemp() / "damaged.onnx"
    path.write_bytes(bytes(content))
    try_to_use(path)


# --- writing fails -------------------------------------------------------------------------------------------


@pytest.fixture(params=["inline", "external"])
def saved(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Model, Path]:
    """A model that was edited, and the file that it came from."""
    path = tmp_path / "m.onnx"
    path.write_bytes(base().SerializeToString())
    if request.param == "external":
        monkeypatch.setattr(graphopt.model, "INLINE_LIMIT", 100)
        load(path).save(path)
    model = load(path)
    weight = model.constants()[0]
    weight.values = weight.values + 1
    return model, path


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def fail_after(function: Callable[..., Any], calls: int, error: BaseException) -> Callable[..., Any]:
    """Return `function`, raising from call number `calls` on."""
    count = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count > calls:
            raise error
        return function(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize("calls", [0, 1])
@pytest.mark.parametrize("name", ["fsync", "fdopen"])
def test_disk_full(saved: tuple[Model, Path], monkeypatch: pytest.MonkeyPatch, name: str, calls: int) -> None:
    """Nothing is left behind, and the old file is whole; the second call is that of the model beside its weights."""
    model, path = saved
    before = contents(path.parent)
    writes = 2 if len(before) > 1 else 1
    if calls >= writes:
        pytest.skip("a single file is written by one call")
    error = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail_after(getattr(os, name), calls, error))
        with pytest.raises(ModelError, match="No space left") as caught:
            model.save(path)
    assert caught.value.hint == "free some space"
    assert contents(path.parent) == before
    model.save(path)
    np.testing.assert_array_equal(load(path).constants()[0].values, model.constants()[0].values)


@pytest.mark.parametrize("calls", [0, 1])
def test_interrupted(saved: tuple[Model, Path], monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    model, path = saved
    before = contents(path.parent)
    if calls >= (2 if len(before) > 1 else 1):
        pytest.skip("a single file is written by one call")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail_after(os.fsync, calls, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            model.save(path)
    assert contents(path.parent) == before


def test_unwritable_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(base())
    with pytest.raises(ModelError, match="folder does not exist"):
        model.save(tmp_path / "no/such/m.onnx")
    with pytest.raises(ModelError, match="is a folder"):
        model.save(tmp_path)
    refuse = OSError(errno.EACCES, "Permission denied")  # tests may run as root, whom nothing refuses
    monkeypatch.setattr(tempfile, "mkstemp", fail_after(os.open, 0, refuse))
    with pytest.raises(ModelError, match="Permission denied") as caught:
        model.save(tmp_path / "m.onnx")
    assert "permissions" in str(caught.value)
    assert contents(tmp_path) == {}


def test_permissions_and_odd_names(tmp_path: Path) -> None:
    model = load(base())
    path = tmp_path / f"[odd] *na?me* {'x' * 200}.onnx"
    model.save(path)
    path.chmod(0o640)
    model.save(path)
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path]
    assert load(path).proto == base()
