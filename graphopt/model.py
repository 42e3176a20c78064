"""LOAD and EMIT: `.onnx` <-> `Model`, losing nothing.

A `Model` is one `onnx_graphsurgeon.Graph` that passes edit in place, with everything beside it that a file
holds.  Weights are read from the mapped file only when a pass asks for them, and come back out as they came.
"""

from __future__ import annotations

import glob
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from graphopt.errors import ModelError
from graphopt.exporter import Exporter, Place, inline, put_inline, untouched
from graphopt.external import ModelFile, atomic_write, digest
from graphopt.importer import Importer, NodeOrigin, Values, opset_of, origin, shell_of
from graphopt.sanity import check_graphs, check_proto
from graphopt.tensors import LazySparse, LazyTensor, mappings, onnx_dtype, release, stored_bytes
from graphopt.wire import MAPPED

Source: TypeAlias = "str | Path | onnx.ModelProto | Model"

COUNTED = 1 << 28
"""Bytes of weights up to which the size of a file is counted, and not estimated."""

INLINE_LIMIT = (1 << 31) - (1 << 26)
"""Bytes of weights that still fit beside the graph into one protobuf message (2 GiB less 64 MiB)."""

Dimension: TypeAlias = onnx.TensorShapeProto.Dimension

_SMALL = 1024
_PAGE = 4096


@dataclass(frozen=True)
class ValueSpec:
    """One input or output: `dtype` and `shape` are None where unknown; `kind` is as in `TypeProto`."""

    name: str
    dtype: np.dtype[Any] | None
    shape: tuple[int | str | None, ...] | None
    kind: str = "tensor"

    def __str__(self) -> str:
        dims = "?" if self.shape is None else ",".join("?" if d is None else str(d) for d in self.shape)
        return f"{self.name}: {self.dtype or self.kind}[{dims}]"


@dataclass(frozen=True)
class Snapshot:
    """A model's structure with its weights by reference: cheap to take, exact to restore."""

    proto: onnx.ModelProto
    weights: tuple[Values, ...]
    path: Path | None = None
    custom_ops: tuple[Path, ...] = ()

    @property
    def nbytes(self) -> int:
        """About how many bytes the model takes on disk: its structure and its weights."""
        return int(self.proto.ByteSize()) + sum(map(stored_bytes, self.weights))

    def same_as(self, other: Snapshot) -> bool:
        """Tell whether both hold the same model (weights are compared by identity, then by value)."""
        if len(self.weights) != len(other.weights) or self.proto != other.proto:
            return False
        return all(x is y or _same_values(x, y) for x, y in zip(self.weights, other.weights, strict=True))

    def _shell(self) -> tuple[object, ...]:
        return self.proto.opset_import, self.proto.functions, self.proto.ir_version

    def only_lost_constants(self, later: Snapshot) -> bool:
        """Tell whether `later` is this without some small initializers that nothing read: no pass finds more in it."""
        old, new = self.proto.graph, later.proto.graph
        if len(new.node) != len(old.node) or len(new.initializer) >= len(old.initializer):
            return False
        if len(self.weights) != len(later.weights) or any(
            x is not y for x, y in zip(self.weights, later.weights, strict=True)
        ):
            return False
        held = {tensor.name: tensor for tensor in old.initializer}
        same = all(tensor == held.get(tensor.name) for tensor in new.initializer)
        fields = ("node", "input", "output", "sparse_initializer", "quantization_annotation")
        return same and self._shell() == later._shell() and all(getattr(old, f) == getattr(new, f) for f in fields)

    def skeleton(self) -> onnx.ModelProto:
        """Return the model with large initializers turned into inputs of their type (for checks and inference).

        Large tensors elsewhere, in subgraphs and attributes, are there with their values.
        """
        out = onnx.ModelProto()
        out.CopyFrom(self.proto)
        graph = out.graph
        inputs = {info.name for info in graph.input}
        kept: list[TensorProto] = []
        large = 0
        for tensor in graph.initializer:
            if tensor.data_location != TensorProto.EXTERNAL:
                kept.append(tensor)
                continue
            large += 1
            if tensor.name not in inputs:
                info = graph.input.add(name=tensor.name)
                info.type.tensor_type.elem_type = tensor.data_type
                info.type.tensor_type.shape.dim.extend(Dimension(dim_value=size) for size in tensor.dims)
        if large:
            small = onnx.GraphProto(initializer=kept)
            graph.ClearField("initializer")
            graph.initializer.MergeFrom(small.initializer)
        if large < len(self.weights):
            bodies = [graph.node, *(function.node for function in out.functions)]
            _put_back((node for nodes in bodies for node in nodes), self.weights)
        return out


class Model:
    """An ONNX model that passes edit.  Make one with `load`.

    Attributes:
        graph: the main graph.
        functions: local functions, in file order.
        path: the file it came from, None for a model made in memory.
        custom_ops: libraries of custom operators that the user named; sessions of this model load them.
    """

    def __init__(
        self, shell: onnx.ModelProto, graph: gs.Graph, functions: list[gs.Function], path: Path | None
    ) -> None:
        self.shell = shell
        self.graph = graph
        self.functions = functions
        self.path = path
        self.custom_ops: tuple[Path, ...] = ()
        self._settled: Snapshot | None = None
        self._graphs: list[gs.Graph] | None = None

    @property
    def settled(self) -> Snapshot | None:
        """A snapshot that is the present state, None where nobody knows.

        Set and cleared by whoever alone edits the model (a pipeline), so that it need not be taken again.
        """
        return self._settled

    @settled.setter
    def settled(self, snapshot: Snapshot | None) -> None:
        self._settled = snapshot
        self._graphs = None

    @property
    def opset(self) -> int:
        """Version of the standard operator set."""
        return opset_of(self.shell.opset_import) or 1

    @property
    def opsets(self) -> dict[str, int]:
        """Version of each operator set, by domain ('' is the standard one)."""
        return {"" if o.domain == "ai.onnx" else o.domain: int(o.version) for o in self.shell.opset_import}

    @property
    def ir_version(self) -> int:
        """Version of the ONNX file format."""
        return int(self.shell.ir_version)

    @property
    def inputs(self) -> list[ValueSpec]:
        """What must be fed, in order."""
        optional = self._optional_names()
        return [value_spec(t) for t in self.graph.inputs if t.name not in optional]

    @property
    def optional_inputs(self) -> list[ValueSpec]:
        """Inputs with a default value, which a caller may override (IR 4 and later)."""
        optional = self._optional_names()
        return [value_spec(t) for t in self.graph.inputs if t.name in optional]

    @property
    def outputs(self) -> list[ValueSpec]:
        """What comes out, in order."""
        return [value_spec(t) for t in self.graph.outputs]

    def _optional_names(self) -> set[str]:
        held = origin(self.graph)
        return {variable.name for variable, _ in held.defaults} if held else set()

    def graphs(self) -> Iterator[gs.Graph]:
        """Yield the main graph, its nested subgraphs, then function bodies and theirs: outer before inner."""
        if self._settled is not None:
            self._graphs = self._graphs or [g for root in (self.graph, *self.functions) for g in _nested(root)]
            yield from self._graphs
            return
        for root in (self.graph, *self.functions):
            yield from _nested(root)

    def nodes(self) -> Iterator[gs.Node]:
        """Yield every node of every graph."""
        for graph in self.graphs():
            yield from graph.nodes

    def constants(self) -> list[gs.Constant]:
        """Return every initializer of every graph once, in file order, then those that passes added."""
        found: dict[int, gs.Constant] = {}
        for graph in self.graphs():
            held = origin(graph)
            used = (t for n in graph.nodes for t in n.inputs)
            for tensor in [*(held.declared if held else []), *used, *graph.outputs]:
                if isinstance(tensor, gs.Constant):
                    found.setdefault(id(tensor), tensor)
        return list(found.values())

    def weights(self) -> list[Values]:
        """Return all values once: of constants, of optional inputs, and of tensors in attributes; unread."""
        found = {id(v): v for c in self.constants() if (v := untouched(c)) is not None}
        for graph in self.graphs():
            held = origin(graph)
            found.update((id(values), values) for _, values in (held.defaults if held else ()))
            attributes = (a for n in graph.nodes for a in n.attrs.values() if isinstance(a, gs.Constant))
            found.update((id(values), values) for values in map(untouched, attributes))
        return list(found.values())

    def weight_bytes(self) -> int:
        """Return the bytes of all weights, in initializers or elsewhere; nothing is read."""
        return sum(map(stored_bytes, self.weights()))

    def emitted_bytes(self) -> int:
        """Return how many bytes the model takes on disk: above `COUNTED` of weights, about."""
        if self.weight_bytes() <= COUNTED:
            return int(self.emit(compact=True).ByteSize())
        return self.snapshot().nbytes

    def emit(self, place: Place = put_inline, *, compact: bool = False) -> onnx.ModelProto:
        """Return the model as a new proto, its weights put where `place` says; `compact` as in `Exporter`."""
        return Exporter(self.shell, place, compact=compact).run(self.graph, self.functions)

    @property
    def proto(self) -> onnx.ModelProto:
        """The model as a new `ModelProto`; above 2 GB, external data stays a reference beside `path`."""
        if self.weight_bytes() <= INLINE_LIMIT:
            return self.emit()
        return self.emit(_by_reference)

    def skeleton(self) -> onnx.ModelProto:
        """Return the model as `Snapshot.skeleton` does."""
        return self.snapshot().skeleton()

    def snapshot(self) -> Snapshot:
        """Return the present state, weights by reference."""
        if self.settled is not None:
            return self.settled
        weights: list[Values] = []

        def keep(out: TensorProto, name: str, values: Values) -> bool:
            if values.nbytes < _SMALL:
                return put_inline(out, name, values)
            weights.append(values)
            return _elsewhere(out, name, values, {MAPPED: len(weights) - 1})

        return Snapshot(self.emit(keep), tuple(weights), self.path, self.custom_ops)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to `snapshot`; graph and node objects are new ones."""
        other = from_snapshot(snapshot)
        self.shell, self.graph, self.functions = other.shell, other.graph, other.functions
        self.settled = None

    def copy(self) -> Model:
        """Return an independent model that shares the (read-only) weights."""
        return from_snapshot(self.snapshot())

    def save(self, path: str | Path) -> None:
        """Write the model atomically; above 2 GB, or when it came with external data, weights go beside it.

        Raises:
            ModelError: the file cannot be written; what was there before is unchanged.
        """
        path = Path(path)
        check_output(path)
        path = path.resolve() if path.is_symlink() else path
        stale = _own_data_files(path)
        if self.weight_bytes() > INLINE_LIMIT or self._came_external():
            stale.discard(self._save_external(path))
        else:
            _write(path, self.emit(compact=True))
        for old in stale:
            old.unlink(missing_ok=True)

    def _came_external(self) -> bool:
        return any(isinstance(v, LazyTensor) and v.tensor.data_location == TensorProto.EXTERNAL for v in self.weights())

    def _save_external(self, path: Path) -> Path:
        """Write the weights, then the model; return the data file.  It goes again if the model cannot be written."""
        large = {id(v): v for v in self.weights() if _can_be_external(v)}
        data_file = path.parent / f"{path.name}.{digest(_in_turn(large.values()))}.data"
        existed = data_file.exists()
        places: dict[int, dict[str, object]] = {}
        mapped = mappings(large.values())
        with atomic_write(data_file) as file:
            for key, values in large.items():
                file.write(b"\0" * (-file.tell() % _PAGE))
                start = file.tell()
                file.write(_raw(values))
                places[key] = {"location": data_file.name, "offset": start, "length": file.tell() - start}
                release(mapped)

        def place(out: TensorProto, name: str, values: Values) -> bool:
            elsewhere = places.get(id(values))
            return put_inline(out, name, values) if elsewhere is None else _elsewhere(out, name, values, elsewhere)

        try:
            _write(path, self.emit(place))
        except BaseException:
            if not existed:
                data_file.unlink(missing_ok=True)
            raise
        return data_file

    def metadata(self, node: gs.Node) -> dict[str, str]:
        """Return a node's `metadata_props`: change the dict to change them."""
        if origin(node) is None:
            node.origin = NodeOrigin(onnx.NodeProto(), {})
        return node.origin.metadata  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return f"<Model {self.graph.name!r}: {len(self.graph.nodes)} nodes, opset {self.opset}>"


def load(source: Source, *, custom_ops: Iterable[str | Path] = ()) -> Model:
    """Return a `Model` of a path, a `ModelProto` or another `Model`, which are left untouched.

    Args:
        source: what to load.
        custom_ops: libraries of custom operators that ORT loads when it runs this model; none is ever loaded that is
            not named here.

    Raises:
        ModelError: missing, damaged, hostile, or not a model that this version understands; a library is missing.
    """
    if isinstance(source, Model):
        model = source.copy()
    elif not isinstance(source, str | Path | onnx.ModelProto):
        raise ModelError(f"a model is a path, a ModelProto or a Model, not {type(source).__name__}")
    elif isinstance(source, onnx.ModelProto):
        copy = onnx.ModelProto()
        copy.CopyFrom(source)
        model = _build(copy, ModelFile(None), None)
    else:
        path = Path(source)
        file = ModelFile(path)
        model = _build(file.parse(), file, path)
    for library in map(Path, custom_ops):
        if not library.is_file():
            raise ModelError("no such library of custom operators", at=str(library), hint="check the path")
        model.custom_ops += (library,)
    return model


def check_output(path: Path) -> None:
    """Raise ModelError where no file can be written at `path`, before any work is done for it."""
    if not path.parent.is_dir():
        raise ModelError("the output folder does not exist", at=str(path.parent), hint="create it first")
    if path.is_dir():
        raise ModelError("the output is a folder", at=str(path), hint="name a file in it")
    if path.exists() and not path.is_file():
        raise ModelError("the output is a device, not an ordinary file", at=str(path), hint="name a file")


def _build(proto: onnx.ModelProto, file: ModelFile, path: Path | None) -> Model:
    where = str(path) if path else "model in memory"
    check_proto(proto, where)
    try:
        graph, functions = Importer(proto, file.resolve).run()
        model = Model(shell_of(proto, {"graph", "functions"}), graph, functions, path)
        check_graphs(model.graphs(), functions)
    except ModelError as error:
        if path is not None and (error.at is None or str(path) not in error.at):
            error.at = f"{error.at} in {path}" if error.at else str(path)
        raise
    return model


def from_snapshot(snapshot: Snapshot) -> Model:
    """Return a new model equal to the one `snapshot` was taken of."""

    def resolve(proto: TensorProto) -> Values:
        return snapshot.weights[int(proto.external_data[0].value)]

    graph, functions = Importer(snapshot.proto, resolve).run()
    model = Model(shell_of(snapshot.proto, {"graph", "functions"}), graph, functions, snapshot.path)
    model.custom_ops = snapshot.custom_ops
    return model


def _same_values(x: Values, y: Values) -> bool:
    left, right = (v if isinstance(v, np.ndarray) else v.load() for v in (x, y))
    return bool(left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes())


def _put_back(nodes: Iterable[onnx.NodeProto], weights: Sequence[Values]) -> None:
    """Give the tensors in these nodes' attributes and subgraphs their values again."""
    for node in nodes:
        for attribute in node.attribute:
            tensors: Iterable[TensorProto] = ()
            if attribute.type == onnx.AttributeProto.TENSOR:
                tensors = (attribute.t,)
            elif attribute.type == onnx.AttributeProto.GRAPH:
                tensors = attribute.g.initializer
                _put_back(attribute.g.node, weights)
            for tensor in tensors:
                if tensor.data_location == TensorProto.EXTERNAL:
                    values = weights[int(tensor.external_data[0].value)]
                    tensor.CopyFrom(inline(tensor.name, values))


def value_spec(tensor: gs.Tensor) -> ValueSpec:
    """Return name, dtype, shape and kind of a tensor."""
    shape = None if tensor.shape is None else tuple(tensor.shape)
    kind = getattr(tensor, "type", None) or "tensor_type"
    return ValueSpec(tensor.name, tensor.dtype, shape, kind.removesuffix("_type"))


def _nested(graph: gs.Graph) -> Iterator[gs.Graph]:
    stack = [graph]
    while stack:
        current = stack.pop()
        yield current
        inner = [a for node in current.nodes for a in node.attrs.values() if isinstance(a, gs.Graph)]
        stack.extend(reversed(inner))


def _write(path: Path, proto: onnx.ModelProto) -> None:
    try:
        data = proto.SerializeToString(deterministic=True)
    except Exception as error:  # protobuf raises a different class in each implementation
        raise ModelError("the model is too large for one file", at=str(path), hint=str(error)) from error
    with atomic_write(path) as file:
        file.write(data)


def _elsewhere(out: TensorProto, name: str, values: Values, entries: Mapping[str, object]) -> bool:
    """Put a tensor whose data is not in it into an empty proto."""
    if isinstance(values, LazyTensor):
        out.CopyFrom(values.header(name))
    else:
        out.name, out.data_type = name, onnx_dtype(values.dtype)
        out.dims.extend(values.shape)
    out.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        out.external_data.add(key=key, value=str(value))
    return True


def _can_be_external(values: Values) -> bool:
    if isinstance(values, LazySparse) or values.nbytes < _SMALL:
        return False
    return values.dtype.kind not in "OSU"


def _in_turn(weights: Collection[Values]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of each weight, giving back the memory of each before the next."""
    mapped = mappings(weights)
    for values in weights:
        yield _raw(values)
        release(mapped)


def _raw(values: Values) -> bytes | memoryview:
    if isinstance(values, LazyTensor):
        return values.raw()
    return inline("", values).raw_data


def _by_reference(out: TensorProto, name: str, values: Values) -> bool:
    if not isinstance(values, LazyTensor):
        return put_inline(out, name, values)
    values.put(out, name, inline=values.tensor.data_location != TensorProto.EXTERNAL)
    return True


def _own_data_files(path: Path) -> set[Path]:
    """Return data files that an earlier `save` to this path left, named after it and a digest."""
    pattern = f"{glob.escape(path.name)}.{'[0-9a-f]' * 16}.data"
    return set(path.parent.glob(pattern)) if path.exists() else set()
