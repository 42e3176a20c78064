"""A model -> what is in it: operators, parameters, bytes, MACs, dynamic dimensions, a row per node.

Sizes come from shape inference.  Where the model leaves dimensions open, or inference gives up, one run in ORT
(its rewriting off) on a random feed shows them; the report says at which input shapes.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import node_values
from graphopt.analysis.cost import Costs, Sizes, costs
from graphopt.analysis.shapes import Shapes
from graphopt.data import Spec, load_samples
from graphopt.errors import DataError, GraphoptError
from graphopt.exporter import untouched
from graphopt.model import Model, Source, ValueSpec, load
from graphopt.ops import STANDARD_DOMAINS, is_standard
from graphopt.profile import observe
from graphopt.random_feeds import checked_shapes
from graphopt.samples import Feeds
from graphopt.tensors import LazyTensor


@dataclass(frozen=True)
class NodeRow:
    """One node: `graph` is where it lies (empty for the main graph); `None` is unknown."""

    name: str
    op: str
    graph: str
    outputs: tuple[tuple[int | str | None, ...] | None, ...]
    parameters: int
    macs: int | None
    bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "name": self.name,
            "op": self.op,
            "graph": self.graph,
            "outputs": [None if shape is None else list(shape) for shape in self.outputs],
            "parameters": self.parameters,
            "macs": self.macs,
            "bytes": self.bytes,
        }


@dataclass(frozen=True)
class Weights:
    """Constants: how many tensors and elements, and their bytes by dtype."""

    tensors: int
    parameters: int
    bytes_by_dtype: dict[str, int]
    external_files: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """All bytes."""
        return sum(self.bytes_by_dtype.values())


@dataclass(frozen=True)
class Inspection:
    """What is in a model.

    Attributes:
        name: file name, or the graph's for a model in memory.
        file_bytes: size of the model file, None in memory.
        ir_version, opsets, producer: as the file states them.
        inputs, optional_inputs, outputs: its signature.
        dynamic: open dimensions of inputs and outputs: symbol ("?" for unnamed ones) -> where.
        ops: operator -> count, over all graphs and function bodies, most frequent first.
        subgraphs: nested graphs.
        functions: local function -> nodes in it.
        weights: initializers and Constant nodes.
        macs, moved_bytes: sums over nodes whose cost is known, of one run.
        unknown_macs: operators of the main graph whose MACs are unknown -> count; empty when `macs` is all.
        at: input -> shape that sizes are taken at.
        rows: every node, inner ones after the node they belong to.
        notes: what was assumed or could not be found.
    """

    name: str
    file_bytes: int | None
    ir_version: int
    opsets: dict[str, int]
    producer: str
    inputs: tuple[ValueSpec, ...]
    optional_inputs: tuple[ValueSpec, ...]
    outputs: tuple[ValueSpec, ...]
    dynamic: dict[str, tuple[str, ...]]
    ops: dict[str, int]
    subgraphs: int
    functions: dict[str, int]
    weights: Weights
    macs: int
    moved_bytes: int
    unknown_macs: dict[str, int]
    at: dict[str, tuple[int, ...]]
    rows: tuple[NodeRow, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def nodes(self) -> int:
        """Nodes of all graphs and function bodies."""
        return sum(self.ops.values())

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "name": self.name,
            "file_bytes": self.file_bytes,
            "ir_version": self.ir_version,
            "opsets": self.opsets,
            "producer": self.producer,
            "inputs": [_spec_dict(spec) for spec in self.inputs],
            "optional_inputs": [_spec_dict(spec) for spec in self.optional_inputs],
            "outputs": [_spec_dict(spec) for spec in self.outputs],
            "dynamic_dims": {symbol: list(places) for symbol, places in self.dynamic.items()},
            "nodes": self.nodes,
            "ops": self.ops,
            "subgraphs": self.subgraphs,
            "functions": self.functions,
            "parameters": self.weights.parameters,
            "weight_tensors": self.weights.tensors,
            "weight_bytes": self.weights.bytes,
            "bytes_by_dtype": self.weights.bytes_by_dtype,
            "external_files": list(self.weights.external_files),
            "macs": self.macs,
            "unknown_macs": self.unknown_macs,
            "moved_bytes": self.moved_bytes,
            "at": {name: list(shape) for name, shape in self.at.items()},
            "per_node": [row.to_dict() for row in self.rows],
            "notes": list(self.notes),
        }


def inspect(
    model: Source, *, shapes: Mapping[str, Sequence[int]] | None = None, samples: Spec = None, seed: int = 0
) -> Inspection:
    """Return what is in a model; nothing is changed, weights are not read.

    Args:
        model: a path, `Model` or `ModelProto`.
        shapes: input name -> shape to take sizes at, where the model leaves dimensions open.
        samples: take sizes at the first of these feeds instead.
        seed: of the random feed.

    Raises:
        ModelError: not a usable model.
        DataError: `shapes` do not fit its inputs, or `samples` are not usable.
    """
    loaded = load(model)
    checked_shapes(loaded, shapes or {})
    found, at, notes = sizes_of(loaded, shapes, samples, seed)
    cost = costs(loaded, found)
    main = {id(node) for node in loaded.graph.nodes}
    rows = tuple(_rows(loaded, found, cost))
    file_bytes = loaded.path.stat().st_size if loaded.path is not None else None
    return Inspection(
        name=loaded.path.name if loaded.path is not None else loaded.graph.name or "model in memory",
        file_bytes=file_bytes,
        ir_version=loaded.ir_version,
        opsets=loaded.opsets,
        producer=" ".join(filter(None, [loaded.shell.producer_name, loaded.shell.producer_version])),
        inputs=tuple(loaded.inputs),
        optional_inputs=tuple(loaded.optional_inputs),
        outputs=tuple(loaded.outputs),
        dynamic=_dynamic(loaded),
        ops=dict(Counter(operator(node) for node in loaded.nodes()).most_common()),
        subgraphs=sum(1 for _ in loaded.graphs()) - 1 - len(loaded.functions),
        functions={f"{f.domain}::{f.name}": len(f.nodes) for f in loaded.functions},
        weights=_weights(loaded),
        macs=cost.macs,
        moved_bytes=cost.bytes,
        unknown_macs=dict(Counter(operator(n) for n in cost.unknown if id(n) in main).most_common()),
        at=at,
        rows=rows,
        notes=tuple(notes),
    )


def operator(node: gs.Node) -> str:
    """Return a node's operator, with its domain where that is not the standard one."""
    return str(node.op) if node.domain in STANDARD_DOMAINS else f"{node.domain}::{node.op}"


def sizes_of(
    model: Model, shapes: Mapping[str, Sequence[int]] | None, samples: Spec, seed: int
) -> tuple[Sizes, dict[str, tuple[int, ...]], list[str]]:
    """Return the sizes of all tensors, the input shapes that they are for, and notes; arguments as of `inspect`."""
    at = {spec.name: tuple(shape) for spec in model.inputs if (shape := (shapes or {}).get(spec.name)) is not None}
    static = Sizes(Shapes(model, at))
    stated = {spec.name: at.get(spec.name, spec.shape) for spec in model.inputs}
    fixed = {k: v for k, v in stated.items() if v is not None and all(isinstance(d, int) for d in v)}
    if samples is None and len(fixed) == len(stated) and not costs(model, static).unknown:
        return static, {k: tuple(int(d) for d in v if d is not None) for k, v in fixed.items()}, []
    try:
        feed: Feeds = next(iter(load_samples(samples, model, seed=seed, shapes=shapes if samples is None else None)))
        observed = observe(model, feed)
    except StopIteration:
        raise DataError("the samples are empty") from None
    except GraphoptError as error:
        if samples is not None:
            raise
        return static, at, [f"sizes come from shape inference alone, a run failed: {error.what}"]
    at = {name: tuple(np.shape(value)) for name, value in feed.items() if isinstance(value, np.ndarray)}
    note = "sizes are those of a run on a random feed" if samples is None else "sizes are those of the first sample"
    return Sizes(Shapes(model, at), observed), at, [note]


def _spec_dict(spec: ValueSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "dtype": None if spec.dtype is None else _dtype_name(spec.dtype),
        "shape": None if spec.shape is None else list(spec.shape),
        "kind": spec.kind,
    }


def _dtype_name(dtype: np.dtype[Any] | None) -> str:
    if dtype is None:
        return "unknown"
    return "string" if dtype.kind in "OSU" else dtype.name


def _dynamic(model: Model) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = defaultdict(list)
    for spec in (*model.inputs, *model.optional_inputs, *model.outputs):
        if spec.kind == "tensor" and spec.shape is None:
            found["?"].append(f"{spec.name} (rank unknown)")
        for axis, size in enumerate(spec.shape or ()):
            if not isinstance(size, int):
                found[size or "?"].append(f"{spec.name}[{axis}]")
    return {symbol: tuple(places) for symbol, places in found.items()}


def _weights(model: Model) -> Weights:
    held = [untouched(constant) for constant in model.constants()]
    held += [v for n in model.nodes() if is_standard(n, "Constant") and (v := node_values(n)) is not None]
    by_dtype: Counter[str] = Counter()
    files: dict[str, None] = {}
    for values in held:
        by_dtype[_dtype_name(values.dtype)] += int(values.nbytes)
        if isinstance(values, LazyTensor) and values.tensor.data_location == onnx.TensorProto.EXTERNAL:
            files.update((e.value, None) for e in values.tensor.external_data if e.key == "location")
    parameters = sum(math.prod(values.shape) for values in held)
    return Weights(len(held), parameters, dict(by_dtype.most_common()), tuple(files))


def _rows(model: Model, sizes: Sizes, cost: Costs) -> Iterator[NodeRow]:
    """Yield a row per node, inner graphs after the node that holds them, function bodies last."""
    stack: list[tuple[gs.Graph, str, int]] = []
    roots = [(model.graph, ""), *((f, f"function {f.domain}::{f.name}") for f in model.functions)]
    for root, label in roots:
        stack.append((root, label, 0))
        while stack:
            graph, place, index = stack.pop()
            if index == len(graph.nodes):
                continue
            stack.append((graph, place, index + 1))
            node = graph.nodes[index]
            yield _row(node, place, sizes, cost)
            inner = [(name, a) for name, a in node.attrs.items() if isinstance(a, gs.Graph)]
            where = f"{place} / " if place else ""
            stack.extend((a, f"{where}{node.name or node.op}.{name}", 0) for name, a in reversed(inner))


def _row(node: gs.Node, place: str, sizes: Sizes, cost: Costs) -> NodeRow:
    found = cost.of(node)
    return NodeRow(
        name=node.name,
        op=operator(node),
        graph=place,
        outputs=tuple(sizes.shown(t) for t in node.outputs if t.name),
        parameters=found.parameters,
        macs=found.macs,
        bytes=found.bytes,
    )
