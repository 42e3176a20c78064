"""Kernels that ORT ran -> the layers that they are, or stand between.

What a layer costs is the time of its own kernel.  All the rest (elementwise operators, what converts between number
types and layouts) stands somewhere between layers, and what it costs depends on theirs.  A place is a tensor of the
float model; the layers at it are the nearest ones up and down the graph.  Kernels of a model with some layers
quantized are put down at the tensor of the float model that they lead on from, so that all such models, however
differently ORT compiles them, are told of in the same places.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import onnx
import onnx_graphsurgeon as gs

from graphopt.edit import label
from graphopt.model import Model
from graphopt.trace import Matches

NEAREST = 3
"""Layers that a place is taken to depend on."""

_ABOUT_SHAPES = frozenset({"Shape", "Size"})
"""What they return does not depend on how their input is held: no layer is near through them."""


class Places:
    """The layers at each tensor of a float model.

    Args:
        model: the float model.
        layers: labels of the nodes that are decided on.
    """

    def __init__(self, model: Model, layers: Iterable[str]) -> None:
        wanted = set(layers)
        self.layer_of: dict[str, str] = {}
        self.made_by: dict[str, str] = {}
        self.up: dict[str, list[tuple[int, str]]] = {}
        self.down: dict[str, list[tuple[int, str]]] = {}
        nodes = [n for n in model.graph.nodes if n.op not in _ABOUT_SHAPES]
        self.known = {label(n) for n in nodes}
        self.outputs = {label(n): [t.name for t in n.outputs if t.name] for n in nodes}
        self.tensors = {t.name for n in nodes for t in n.outputs} | {t.name for t in model.graph.inputs}
        for node in nodes:
            self._follow(node, wanted)
        for node in reversed(nodes):
            self._lead(node, wanted)

    def _follow(self, node: gs.Node, wanted: set[str]) -> None:
        own = label(node)
        found = [(1, own)] if own in wanted else _further(self.up.get(t.name, ()) for t in node.inputs)
        for tensor in node.outputs:
            self.up[tensor.name] = found

    def _lead(self, node: gs.Node, wanted: set[str]) -> None:
        own = label(node)
        found = [(1, own)] if own in wanted else _further(self.down.get(t.name, ()) for t in node.outputs)
        for tensor in node.inputs:
            if not isinstance(tensor, gs.Constant):
                self.down[tensor.name] = _nearest([*self.down.get(tensor.name, ()), *found])

    def at(self, tensor: str) -> tuple[str, ...]:
        """Return the nearest layers of a tensor, producers first where two are as near."""
        ups = [(distance, 0, name) for distance, name in self.up.get(tensor, ())]
        downs = [(distance, 1, name) for distance, name in self.down.get(tensor, ())]
        return tuple(dict.fromkeys(name for _, _, name in sorted(ups + downs)))[:NEAREST]

    def all(self) -> list[tuple[str, ...]]:
        """Return the groups of layers that meet somewhere."""
        return list(dict.fromkeys(found for t in sorted(self.tensors) if len(found := self.at(t)) > 1))


def _further(groups: Iterable[Iterable[tuple[int, str]]]) -> list[tuple[int, str]]:
    return _nearest([(distance + 1, name) for group in groups for distance, name in group])


def _nearest(found: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
    best: dict[str, int] = {}
    for distance, name in found:
        best[name] = min(distance, best.get(name, distance))
    return heapq.nsmallest(NEAREST, ((distance, name) for name, distance in best.items()))


def assign_kernels(
    places: Places, layers: Iterable[str], model: Model, matches: Matches, optimized: onnx.ModelProto
) -> list[tuple[str, ...]]:
    """Return for each kernel of ORT's graph (`matches.kernels`) the layers that its time is put down to.

    Args:
        places: of the float model.
        layers: labels of the layers.
        model: the model that ORT compiled, with some layers quantized.
        matches: what the kernels stand for in it.
        optimized: the graph that ORT made.
    """
    nodes = list(model.nodes())
    labels = [label(node) for node in nodes]
    wanted = set(layers)
    made = {name: layer for layer in wanted for name in places.outputs.get(layer, ())}
    constants = {i.name for i in optimized.graph.initializer}
    anchors: dict[str, str] = {i.name: i.name for i in optimized.graph.input}
    found: list[tuple[str, ...]] = []
    for kernel in matches.kernels:
        own = [labels[i] for i in kernel.stands]
        layer = next((name for name in own if name in wanted), None)
        if layer is None:  # one that became several nodes: the last of them makes what it made
            results = (t.name for i in kernel.stands for t in nodes[i].outputs)
            layer = next((made[name] for name in results if name in made), None)
        kept = [t for name in own for t in places.outputs.get(name, ())]
        before = [anchors[name] for name in kernel.node.input if name in anchors]
        anchor = next((t for t in reversed(kept) if places.at(t)), None) or next(iter(before), None)
        if anchor is not None:
            anchors.update((name, anchor) for name in kernel.node.output)
        if layer is not None:
            found.append((layer,))
        else:
            found.append(places.at(anchor) if anchor is not None else ())
    new = [not any(labels[i] in places.known for i in kernel.stands) for kernel in matches.kernels]
    _from_behind(found, matches, constants)
    _towards(found, matches, new, wanted)
    return found


def _from_behind(found: list[tuple[str, ...]], matches: Matches, constants: set[str]) -> None:
    """Put what only prepares a constant for a layer, such as weights decoded on every run, down to that layer."""
    readers: Mapping[str, list[int]] = _readers(matches)
    for k in reversed(range(len(found))):
        node = matches.kernels[k].node
        if found[k] or any(name and name not in constants for name in node.input):
            continue
        behind = {found[r] for name in node.output for r in readers.get(name, ())}
        if len(behind) == 1:
            found[k] = behind.pop()


def _towards(found: list[tuple[str, ...]], matches: Matches, new: Sequence[bool], wanted: set[str]) -> None:
    """Let what prepares the input of one layer depend on that layer, be it not among the nearest of the tensor."""
    readers = _readers(matches)
    ahead: dict[int, set[str]] = {}
    for k in reversed(range(len(found))):
        reached: set[str] = set()
        for reader in (r for name in matches.kernels[k].node.output for r in readers.get(name, ())):
            if len(found[reader]) == 1:
                reached.update(found[reader])
            elif new[reader]:
                reached |= ahead.get(reader, set())
        ahead[k] = reached & wanted
        if new[k] and len(ahead[k]) == 1 and len(found[k]) > 1 and not ahead[k] <= set(found[k]):
            found[k] = (*ahead[k], *found[k])[:NEAREST]


def _readers(matches: Matches) -> Mapping[str, list[int]]:
    readers: dict[str, list[int]] = defaultdict(list)
    for k, kernel in enumerate(matches.kernels):
        for name in kernel.node.input:
            readers[name].append(k)
    return readers
