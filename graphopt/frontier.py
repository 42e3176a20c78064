"""Values of inner tensors for many samples, made segment by segment: nothing is computed twice.

A `Replay` walks through one model in the order in which tensors are asked for.  Between two requests it keeps what
the rest of the model still reads (the frontier), for each sample; a request runs only the nodes between the frontier
and the tensor.  Weights may be edited in between, as long as no node that has run is asked for again.  Values are held
in memory up to a budget and in temporary files beyond.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.edit import nested_graphs
from graphopt.exporter import Exporter
from graphopt.importer import origin
from graphopt.model import Model
from graphopt.runtime import Session

Array: TypeAlias = np.ndarray[Any, Any]
Key: TypeAlias = tuple[str, str, int]
"""(whose, tensor, number of the sample)"""

MEMORY = 1 << 30
"""Bytes of values held in memory."""

DISK = 1 << 34
"""Bytes of values held in memory and temporary files together."""


class Store:
    """Arrays by key: in memory up to a budget, in temporary files beyond."""

    def __init__(self, memory: int = MEMORY, disk: int = DISK) -> None:
        self.memory = memory
        self.disk = disk
        self.bytes = 0
        self._held: dict[Key, Array] = {}
        self._files: dict[Key, tuple[Path, int]] = {}
        self._in_memory = 0
        self._made = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def full(self) -> bool:
        """Whether more is held than is allowed."""
        return self.bytes > self.disk

    def put(self, key: Key, values: Array) -> None:
        """Hold an array."""
        self.drop(key)
        self.bytes += values.nbytes
        if self._in_memory + values.nbytes <= self.memory or values.dtype.hasobject:
            self._in_memory += values.nbytes
            self._held[key] = values
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="graphopt-")
        self._made += 1
        path = Path(self._folder.name) / f"{self._made}.npy"
        np.save(path, values)
        self._files[key] = (path, values.nbytes)

    def get(self, key: Key) -> Array:
        """Return an array."""
        if key in self._held:
            return self._held[key]
        return np.asarray(np.load(self._files[key][0]))

    def drop(self, key: Key) -> None:
        """Forget an array, if it is there."""
        if key in self._held:
            size = self._held.pop(key).nbytes
            self._in_memory -= size
            self.bytes -= size
        elif key in self._files:
            path, size = self._files.pop(key)
            path.unlink(missing_ok=True)
            self.bytes -= size

    def cut(self, count: int) -> None:
        """Forget all samples from number `count` on."""
        for key in [key for key in (*self._held, *self._files) if key[2] >= count]:
            self.drop(key)

    def close(self) -> None:
        """Remove the temporary files."""
        self._held.clear()
        self._files.clear()
        if self._folder is not None:
            self._folder.cleanup()


class Replay:
    """One model on its way through the samples.

    Args:
        name: of the model, for keys.
        model: may be edited in between.
        store: shared by all models.
        threads: of sessions.
    """

    def __init__(self, name: str, model: Model, store: Store, threads: int = 1) -> None:
        self.name = name
        self.model = model
        self.store = store
        self.threads = threads
        self.present: set[str] = set()
        self._opaque: set[str] = set()
        held = origin(model.graph)
        defaults = held.defaults if held is not None else []
        self._defaults = {t.name: v if isinstance(v, np.ndarray) else v.load() for t, v in defaults}

    def start(self, number: int, feed: Mapping[str, Any], wanted: Iterable[str]) -> None:
        """Take in one sample; of its inputs, those that the tensors in `wanted` depend on."""
        if not self.present:
            leaves = self._leaves(wanted)
            self.present = {t.name for t in self.model.graph.inputs if t.name in leaves}
        for name in self.present:
            value = feed.get(name, self._defaults.get(name))
            if value is not None:
                self.store.put((self.name, name, number), np.asarray(value))

    def _leaves(self, wanted: Iterable[str]) -> set[str]:
        """Return the names of the tensors without a producer that others depend on, `wanted` itself included."""
        makers = _makers(self.model.graph)
        found: set[str] = set()
        seen: set[str] = set()
        stack = list(wanted)
        while stack:
            name = stack.pop()
            if name in seen:
                continue
            seen.add(name)
            if name in makers:
                stack.extend(_reads(makers[name]))
            else:
                found.add(name)
        return found

    def advance(self, wanted: Sequence[str], later: Iterable[str], count: int) -> int:
        """Make tensors available for the first `count` samples, and drop what no tensor in `later` depends on.

        Returns:
            For how many samples they are: fewer where the store was full.
        """
        while True:
            nodes, reads = self._segment([name for name in wanted if name not in self.present])
            made = {t.name for node in nodes for t in node.outputs if t.name} - self._opaque
            kept = self._still_read(made | self.present, [*later, *wanted])
            outputs = sorted((kept & made) - self.present)
            if not nodes:
                break
            session = self._session(nodes, reads, outputs)
            count, opaque = self._run(session, reads, outputs, kept, count)
            if not opaque:
                break
            self._opaque |= opaque
        for name in self.present - kept:
            for number in range(count):
                self.store.drop((self.name, name, number))
        self.present = (self.present | set(outputs)) & kept
        return count

    def get(self, tensor: str, number: int) -> Array:
        """Return a tensor that is available."""
        return self.store.get((self.name, tensor, number))

    def _segment(self, wanted: Sequence[str]) -> tuple[list[gs.Node], list[str]]:
        """Return the nodes between what is there and these tensors, sorted, and what is there that they read."""
        makers = _makers(self.model.graph)
        order: list[gs.Node] = []
        reads: dict[str, None] = {}
        done: set[int] = set()
        stack: list[tuple[gs.Node, bool]] = [(makers[name], False) for name in reversed(wanted)]
        while stack:
            node, entered = stack.pop()
            if entered:
                order.append(node)
                continue
            if id(node) in done:
                continue
            done.add(id(node))
            stack.append((node, True))
            for name in _reads(node):
                if name in self.present:
                    reads[name] = None
                elif name in makers and id(makers[name]) not in done:
                    stack.append((makers[name], False))
        return order, list(reads)

    def _still_read(self, there: set[str], later: Iterable[str]) -> set[str]:
        """Return which of the tensors that are there others depend on directly."""
        makers = _makers(self.model.graph)
        found: set[str] = set()
        seen: set[str] = set()
        stack = list(later)
        while stack:
            name = stack.pop()
            if name in seen:
                continue
            seen.add(name)
            if name in there:
                found.add(name)
            elif name in makers:
                stack.extend(_reads(makers[name]))
        return found

    def _session(self, nodes: Sequence[gs.Node], reads: Sequence[str], outputs: Sequence[str]) -> Session:
        """Return a session of a segment."""
        inputs = []
        for name in reads:
            example = self.store.get((self.name, name, 0))
            inputs.append(gs.Variable(name, example.dtype, [None] * example.ndim))
        graph = gs.Graph(nodes=list(nodes), inputs=inputs, outputs=[gs.Variable(name) for name in outputs])
        proto: onnx.ModelProto = Exporter(self.model.shell).run(graph, self.model.functions)
        proto.graph.name = "segment"
        del proto.graph.value_info[:]  # outputs among them: ORT infers them all
        return Session(proto, threads=self.threads, custom_ops=self.model.custom_ops)

    def _run(
        self, session: Session, reads: Sequence[str], outputs: Sequence[str], kept: set[str], count: int
    ) -> tuple[int, set[str]]:
        """Run a segment for each sample; return for how many there was room, and outputs that are no arrays."""
        for number in range(count):
            feed = {name: self.store.get((self.name, name, number)) for name in reads}
            values = session.run(feed, outputs)
            opaque = {name for name, value in values.items() if not isinstance(value, np.ndarray)}
            if opaque:
                return count, opaque
            for name, value in values.items():
                self.store.put((self.name, name, number), value)
            for name in self.present - kept:
                self.store.drop((self.name, name, number))
            if self.store.full and number:
                self.store.cut(number)
                return number, set()
        return count, set()


def _makers(graph: gs.Graph) -> dict[str, gs.Node]:
    """Return the node that makes each tensor of a graph."""
    return {t.name: node for node in graph.nodes for t in node.outputs if t.name}


def _reads(node: gs.Node) -> Iterator[str]:
    """Yield the names of the tensors that a node reads, its subgraphs too; names of their own among them."""
    for tensor in node.inputs:
        if tensor.name and not isinstance(tensor, gs.Constant):
            yield tensor.name
    for graph in nested_graphs([node]):
        for tensor in (*(t for inner in graph.nodes for t in inner.inputs), *graph.outputs):
            if tensor.name and not isinstance(tensor, gs.Constant):
                yield tensor.name
