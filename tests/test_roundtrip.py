"""Loading and emitting gives back the same message: over generated models, ONNX's own test models, the zoo."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.backend.test.case.node import collect_testcases

import graphopt.model
from graphopt.model import Model, load
from graphopt.models import zoo
from graphopt.tensors import LazyTensor
from graphopt.text import to_text

from .protos import models

HUGE = {"vgg19", "zfnet512", "alexnet"}  # hundreds of megabytes: comparing them takes half a minute


def read_everything(model: Model) -> None:
    """Read the values of every constant: that must not change what is emitted."""
    for values in model.weights():
        if not isinstance(values, np.ndarray):
            values.load()
    for constant in model.constants():
        assert constant.values.shape == constant.shape


def check_round_trip(proto: onnx.ModelProto) -> None:
    kept = onnx.ModelProto()
    kept.CopyFrom(proto)
    model = load(proto)
    assert model.proto == proto
    assert proto == kept, "the caller's own object changed"
    text = to_text(model)
    read_everything(model)
    assert model.proto == proto
    copy = model.copy()
    assert copy.proto == proto
    assert to_text(copy) == text
    model.restore(model.snapshot())
    assert model.proto == proto


@given(models())
@settings(max_examples=150)
def test_generated_models(proto: onnx.ModelProto) -> None:
    check_round_trip(proto)


@given(models())
@settings(max_examples=40)
def test_generated_models_through_files(proto: onnx.ModelProto) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        path.write_bytes(proto.SerializeToString())
        model = load(path)
        assert model.proto == proto
        read_everything(model)
        model.save(path)  # over the very file that its weights are mapped from
        assert onnx.load(path) == proto
        assert load(path).proto == proto
        assert [p.name for p in Path(folder).iterdir()] == ["model.onnx"]


@given(models())
@settings(max_examples=40)
def test_generated_models_with_external_data(proto: onnx.ModelProto) -> None:
    """What a file with its weights beside it says is what it said with them inside, but for their field."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphopt.model, "INLINE_LIMIT", -1)
        path = Path(folder, "model.onnx")
        load(proto).save(path)
        patch.undo()
        again = load(path)
        assert as_raw(again.emit()) == as_raw(proto)
        read_everything(again)
        again.save(Path(folder, "other.onnx"))
        assert as_raw(load(Path(folder, "other.onnx")).emit()) == as_raw(proto)


def as_raw(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model with the data of large numeric tensors as raw data (the only form external data has)."""
    out = onnx.ModelProto()
    out.CopyFrom(proto)
    stack = [out.graph, *out.functions]
    while stack:
        graph = stack.pop()
        tensors = [] if isinstance(graph, onnx.FunctionProto) else list(graph.initializer)
        for attribute in (a for n in graph.node for a in n.attribute):
            if attribute.type == onnx.AttributeProto.GRAPH:
                stack.append(attribute.g)
            if attribute.type == onnx.AttributeProto.TENSOR and not attribute.ref_attr_name:
                tensors.append(attribute.t)
        for tensor in tensors:
            if 300 in tensor.dims and tensor.data_type != onnx.TensorProto.STRING:
                raw = LazyTensor(tensor).raw()
                tensor.ClearField(onnx.helper.tensor_dtype_to_field(tensor.data_type))
                tensor.raw_data = bytes(raw)
    return out


@given(models(), st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_nodes_out_of_order_are_sorted_and_kept(proto: onnx.ModelProto, random: Random) -> None:
    nodes = list(proto.graph.node)
    random.shuffle(nodes)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    emitted = load(proto).proto
    seen = {t.name for t in (*emitted.graph.input, *emitted.graph.initializer)}
    seen |= {t.values.name for t in emitted.graph.sparse_initializer}
    for node in emitted.graph.node:
        assert {i for i in node.input if i} <= seen
        seen.update(node.output)
    key = onnx.NodeProto.SerializeToString
    assert sorted(map(key, emitted.graph.node)) == sorted(map(key, nodes))
    del emitted.graph.node[:], proto.graph.node[:]
    assert emitted == proto


def backend_models() -> Iterator[onnx.ModelProto]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reference implementations overflow on purpose
        yield from (case.model for case in collect_testcases(None) if case.model is not None)
    folder = Path(onnx.__file__).parent / "backend/test/data"
    yield from (onnx.load(path) for path in sorted(folder.rglob("*.onnx")))


def test_every_model_of_the_onnx_package() -> None:
    count = 0
    for proto in backend_models():
        model = load(proto)
        assert model.proto == proto
        count += 1
    assert count > 1500


@pytest.mark.zoo
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in HUGE)) for n in zoo.names()])
def test_every_model_of_the_zoo(name: str, tmp_path: Path) -> None:
    path = zoo.fetch(name)
    proto = onnx.load(path)
    model = load(path)
    assert model.proto == proto
    for constant in model.constants():
        assert constant.values.flags.writeable is False
    model.save(tmp_path / "model.onnx")
    assert onnx.load(tmp_path / "model.onnx") == proto
