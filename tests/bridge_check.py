"""What every model must hold in the bridge: outputs, gradients and write-back are those of the ONNX graph."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from graphopt.bridge import TrainableGraph
from graphopt.model import Model, Source, load
from graphopt.runtime import Session

Feeds = Mapping[str, Any]

FORWARD = 1e-4
"""Largest difference, of the largest element of an output (the issue's bound): other kernels, another order of sums."""

_DATA = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data")


def check(source: Source, feeds: Feeds, *, stored: float = 0.0, exact: bool = True) -> TrainableGraph:
    """Hold a model to all of it, and return its bridge with weights perturbed by 2 %.

    Args:
        source: the model.
        feeds: one feed.
        stored: further tolerance after the write-back, for weights stored in half precision or codes.
        exact: whether the bridge computes what the model does to float32 rounding.
    """
    model = load(source)
    bridge = TrainableGraph(model)
    assert bridge.model is model
    assert bridge.parameters, "nothing to train"
    if exact:
        assert difference(bridge, model, feeds) < FORWARD
    check_gradients(bridge, feeds)
    perturb(bridge)
    back = bridge.write_back()
    assert difference(bridge, back, feeds) < FORWARD + stored
    assert_only_trained_changed(model, back, bridge.values())
    return bridge


def difference(bridge: TrainableGraph, model: Model, feeds: Feeds) -> float:
    """Return the largest difference from ONNX Runtime, each output's relative to its largest element."""
    bridge.module.eval()
    with torch.no_grad():
        found = bridge.module(dict(feeds))
    worst = 0.0
    for name, wanted in Session(model, optimization="off").run(feeds).items():
        ours, theirs = found[name].detach().numpy().astype(np.float64), np.asarray(wanted).astype(np.float64)
        assert ours.shape == theirs.shape, name
        if ours.size:
            scale = max(float(np.abs(theirs[np.isfinite(theirs)]).max(initial=0.0)), 1e-12)
            assert np.array_equal(np.isfinite(ours), np.isfinite(theirs)), name
            worst = max(worst, float(np.nanmax(np.abs(ours - theirs), initial=0.0)) / scale)
    return worst


def check_gradients(bridge: TrainableGraph, feeds: Feeds) -> None:
    """Every trained tensor has a finite gradient in training mode; one that has none changes nothing."""
    bridge.module.train()
    outputs = bridge.module(dict(feeds))
    weights = (torch.linspace(0.5, 1.5, max(t.numel(), 1))[: t.numel()].reshape(t.shape) for t in outputs.values())
    terms = [(t.float() * w).sum() for t, w in zip(outputs.values(), weights, strict=True) if t.requires_grad]
    assert terms, "no output has a gradient"
    sum(terms).backward()
    missing = [name for name, p in bridge.parameters.items() if p.grad is None]
    for name, parameter in bridge.parameters.items():
        assert name in missing or torch.isfinite(parameter.grad).all(), name
    if missing:  # in the branch that these feeds do not take
        assert _silent(bridge, missing, feeds), missing


def _silent(bridge: TrainableGraph, names: Collection[str], feeds: Feeds) -> bool:
    """Tell whether the outputs stay, to the bit, when these tensors change."""
    before = Session(bridge.model, optimization="off").run(feeds)
    other = TrainableGraph(bridge.model)
    with torch.no_grad():
        for name in names:
            other.parameters[name].add_(1.0)
    after = Session(other.write_back(), optimization="off").run(feeds)
    return all(np.array_equal(before[name], after[name]) for name in before)


def perturb(bridge: TrainableGraph, part: float = 0.02) -> None:
    """Multiply each element of what is trained by about 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in bridge.parameters.values():
            parameter.mul_(1 + part * torch.randn(parameter.shape, generator=generator))


def assert_only_trained_changed(before: Model, after: Model, trained: Collection[str]) -> None:
    """Compare two models, the data of the trained tensors left out, byte by byte; and that those did change."""
    assert blanked(before.emit(), trained) == blanked(after.emit(), trained)
    assert before.emit() != after.emit()


def assert_only_trained_changed_on_disk(before: Path, after: Path, trained: Collection[str]) -> None:
    """Likewise for two files."""
    one, two = (onnx.load(path, load_external_data=False) for path in (before, after))
    assert blanked(one, trained) == blanked(two, trained)


def blanked(proto: onnx.ModelProto, names: Collection[str]) -> bytes:
    """Return a model as bytes, without the data of these tensors (by the name, or its end after the last slash)."""
    out = onnx.ModelProto()
    out.CopyFrom(proto)
    known = {*names}
    for tensor in (*_tensors(out.graph, known), *(t for f in out.functions for t in _in_nodes(f.node, known))):
        for field in _DATA:
            tensor.ClearField(field)
    return out.SerializeToString(deterministic=True)  # type: ignore[no-any-return]


def _tensors(graph: onnx.GraphProto, names: Collection[str]) -> Iterator[onnx.TensorProto]:
    yield from (tensor for tensor in graph.initializer if tensor.name in names)
    yield from (sparse.values for sparse in graph.sparse_initializer if sparse.values.name in names)
    yield from _in_nodes(graph.node, names)


def _in_nodes(nodes: Any, names: Collection[str]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _tensors(attribute.g, names)
            if node.op_type != "Constant" or node.output[0] not in names:
                continue
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t
            elif attribute.type == onnx.AttributeProto.SPARSE_TENSOR:
                yield attribute.sparse_tensor.values
            else:
                attribute.ClearField("f")
                attribute.ClearField("floats")
