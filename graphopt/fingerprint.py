"""A graph -> a short text that is equal for graphs that run alike, whatever their tensors and nodes are called.

A node's hash is that of its operator, attributes and the hashes of what it reads; a graph's is that of its outputs
and of all its nodes.  Two models whose graphs have the same fingerprint *after* ONNX Runtime's own optimisation run
the same kernels in the same dependencies, so that no timing can tell them apart.

Of large weights only type and shape count, and whether they hold denormals, which slow arithmetic down.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx

from graphopt.model import Model, Snapshot
from graphopt.runtime import Session

Describe: TypeAlias = Callable[[onnx.TensorProto], bytes]

SMALL = 1024
"""Bytes up to which a tensor's values count: shapes, axes and the like."""

LARGEST = 1 << 28
"""Bytes of weights above which ORT is not asked to write its graph."""


def runs_as(model: Model, *, provider: str = "cpu") -> str | None:
    """Return the fingerprint of what ORT makes of a model, all optimisations on; None where it cannot be told.

    Raises:
        ModelError: ORT refuses the model.
    """
    if provider != "cpu" or model.weight_bytes() > LARGEST:
        return None
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        path = Path(folder) / "optimized.onnx"
        Session(model, optimization="all", provider=provider, optimized_path=path)
        return fingerprint(onnx.load(path), _by_effect) if path.exists() else None


def structure_of(model: Model | Snapshot) -> str:
    """Return the fingerprint of a model's own graph; the values of its weights do not count."""
    return fingerprint(model.skeleton(), _by_type)


def fingerprint(proto: onnx.ModelProto, describe: Describe) -> str:
    """Return the fingerprint of a model; `describe` says what counts of a tensor."""
    opsets = sorted((o.domain, o.version) for o in proto.opset_import)
    functions = sorted(_hash(f.SerializeToString(deterministic=True)) for f in proto.functions)
    return _hash(repr(opsets).encode(), *functions, _graph(proto.graph, {}, describe)).hex()[:32]


def _by_effect(tensor: onnx.TensorProto) -> bytes:
    values = onnx.numpy_helper.to_array(tensor)
    if values.nbytes <= SMALL:
        return _by_type(tensor) + values.tobytes()
    return _by_type(tensor) + bytes([_has_denormals(values)])


def _by_type(tensor: onnx.TensorProto) -> bytes:
    return repr((tensor.data_type, list(tensor.dims))).encode()


def _has_denormals(values: np.ndarray[Any, np.dtype[Any]]) -> bool:
    if values.dtype.kind != "f":
        return False
    return bool(np.any((np.abs(values) < np.finfo(values.dtype).tiny) & (values != 0)))


def _hash(*parts: bytes) -> bytes:
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.digest()


def _graph(graph: onnx.GraphProto, outside: Mapping[str, bytes], describe: Describe) -> bytes:
    """Return a graph's hash; `outside` are the tensors that it may read from around it."""
    known = dict(outside)
    for place, value in enumerate(graph.input):
        name = b"" if outside else value.name.encode()  # of the main graph: its names are its signature
        known[value.name] = _hash(b"input", str(place).encode(), name, value.type.SerializeToString(deterministic=True))
    for tensor in graph.initializer:
        known[tensor.name] = _hash(b"weight", describe(tensor))
    for sparse in graph.sparse_initializer:
        known[sparse.values.name] = _hash(b"sparse", sparse.SerializeToString(deterministic=True))
    nodes = [_node(node, known, describe) for node in graph.node]
    return _hash(*(known.get(o.name, b"") for o in graph.output), *sorted(nodes))


def _node(node: onnx.NodeProto, known: dict[str, bytes], describe: Describe) -> bytes:
    """Return a node's hash, and enter those of its outputs."""
    attributes = sorted(_attribute(a, known, describe) for a in node.attribute)
    inputs = (known.get(name, name.encode()) for name in node.input)
    kept = bytes(bool(name) for name in node.output)
    own = _hash(node.domain.encode(), node.op_type.encode(), kept, *attributes, b"reads", *inputs)
    known.update((name, _hash(own, str(i).encode())) for i, name in enumerate(node.output) if name)
    return own


def _attribute(attribute: onnx.AttributeProto, known: Mapping[str, bytes], describe: Describe) -> bytes:
    graphs: Iterable[onnx.GraphProto] = [attribute.g] if attribute.HasField("g") else attribute.graphs
    parts = [_graph(graph, known or {"": b""}, describe) for graph in graphs]
    tensors: Iterable[onnx.TensorProto] = [attribute.t] if attribute.HasField("t") else attribute.tensors
    parts += [describe(tensor) for tensor in tensors]
    if not parts:
        plain = onnx.AttributeProto()
        plain.CopyFrom(attribute)
        plain.doc_string = ""
        parts = [plain.SerializeToString(deterministic=True)]
    return _hash(attribute.name.encode(), *parts)
