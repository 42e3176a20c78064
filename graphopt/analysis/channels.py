"""Coupled channels: which indices of which axes of which tensors go together when a network is cut.

    conv1 (64 channels) -> BatchNorm -> Relu -> conv2        one group of 64 units:
        makes  conv1's weight axis 0        holds  its bias, scale, mean ...
        reads  conv2's weight axis 1        carries  the activations between

A unit is what goes at once: a channel, a whole head, a channel in each part of a concatenation.  Units that live in the
same places form a group.  Cutting some of them everywhere gives what the uncut network computes with the slices that
read them set to zero; an axis where that would not hold is frozen, with the reason.

Source of the idea: coupled structures as in DepGraph (Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR
2023); here ties are between single indices, and connected components give the groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.channel_place import Place, apply_rule
from graphopt.analysis.channel_probe import probe
from graphopt.analysis.channel_rules import RULES
from graphopt.analysis.channel_ties import Role, Ties
from graphopt.analysis.channel_units import Solver, Units
from graphopt.analysis.constants import is_constant
from graphopt.analysis.region import Evaluate
from graphopt.analysis.shapes import Shapes
from graphopt.edit import label, nested_graphs
from graphopt.model import Model
from graphopt.ops import is_standard
from graphopt.tensors import is_float

Array: TypeAlias = np.ndarray[Any, Any]

KINDS = ("heads", "hidden", "groups", "channels")
"""What units are called; where several would do, the first."""


@dataclass(frozen=True)
class Site:
    """One axis that holds units of a group.

    Attributes:
        tensor: a constant, or an activation (`carries`).
        axis: counted from the front.
        units: int64 (size of the axis,): the unit that each index belongs to, -1 where it is none of this group.
        role: `makes`: output axis of a layer's weight; `reads`: contracted axis of a weight; `holds`: bias, parameter
            of a norm, scale ...; `carries`: an activation.
        node: the one that reads the constant or makes the activation, None for inputs of the graph.
        port: index of that input or output.
        part: whether the axis is longer than `units`, by a factor that is not known: index i is every i modulo their
            number (heads beside a batch of unknown size).
    """

    tensor: gs.Tensor
    axis: int
    units: Array
    role: Role
    node: gs.Node | None
    port: int = 0
    part: bool = False


@dataclass(frozen=True)
class Group:
    """Units that live in the same places.

    Attributes:
        name: label of the first layer that makes it; unique.
        size: number of units.
        sites: in the graph's order.
        kind: what its units are.
        frozen: why it cannot be cut, empty where it can.
        inexact: why what is left computes something else than before, empty where it does not.
    """

    name: str
    size: int
    sites: tuple[Site, ...]
    kind: str = "channels"
    frozen: str = ""
    inexact: str = ""

    def role(self, *roles: Role) -> list[Site]:
        """Return the sites of these roles."""
        return [site for site in self.sites if site.role in roles]


@dataclass(frozen=True)
class FrozenAxis:
    """An axis of a weight of which nothing can be cut."""

    where: str
    axis: int
    size: int
    why: str


@dataclass
class Channels:
    """The groups of a graph.

    Attributes:
        groups: in the graph's order, frozen ones too.
        frozen_axes: axes of weights without a group that can be cut.
        parameters: elements of each constant that holds weights, by its id.
    """

    groups: list[Group]
    frozen_axes: list[FrozenAxis]
    parameters: dict[int, int] = field(default_factory=dict)

    def prunable(self) -> list[Group]:
        """Return the groups that can be cut."""
        return [group for group in self.groups if not group.frozen]

    def coverage(self) -> tuple[int, int]:
        """Return the parameters in tensors with at least one axis that can be cut, and all parameters."""
        held = {id(s.tensor) for g in self.prunable() for s in g.sites if s.role != "carries"}
        return sum(n for key, n in self.parameters.items() if key in held), sum(self.parameters.values())

    def of(self, tensor: gs.Tensor, axis: int) -> list[Group]:
        """Return the groups with units along an axis of a tensor."""
        return [self.groups[i] for i in self._by_place.get((id(tensor), axis), ())]

    @cached_property
    def _by_place(self) -> dict[tuple[int, int], list[int]]:
        found: dict[tuple[int, int], list[int]] = {}
        for number, group in enumerate(self.groups):
            for key in dict.fromkeys((id(s.tensor), s.axis) for s in group.sites):
                found.setdefault(key, []).append(number)
        return found


def find_groups(model: Model, shapes: Shapes, evaluate: Evaluate, *, normalization: bool = False) -> Channels:
    """Return the coupled channels of the main graph.

    Args:
        model: not changed.
        shapes: of the model; only what is proved is used.
        evaluate: runs a small model: data movement is tried out on tensors of indices.
        normalization: whether the axis of LayerNorm and the like may be cut, although statistics change.
    """
    ties = Ties(shapes)
    nodes = model.graph.nodes
    fixed = _fixed(nodes)
    _ends(model, ties)
    moves = probe(nodes, shapes, evaluate, model.opset)
    said = [ties.mark()]
    for node in nodes:
        place = Place(node, ties, model.opset, fixed, normalization=normalization)
        if id(node) in moves:
            moves[id(node)].apply(place)
        else:
            apply_rule(place, RULES.get(node.op) if is_standard(node) else None)
        said.append(ties.mark())
    for number in reversed(range(len(nodes))):
        if any(id(t) in fixed for t in nodes[number].outputs):
            ties.pass_back(said[number], said[number + 1])
    _inner(nodes, ties)
    units = Solver(ties).solve()
    return _Listing(ties, units, fixed).channels(model)


def _fixed(nodes: Iterable[gs.Node]) -> set[int]:
    """Return the ids of variables that are computed from constants alone."""
    found: set[int] = set()
    for node in nodes:
        inputs = [t for t in node.inputs if not t.is_empty()]
        if inputs and all(is_constant(t) or id(t) in found for t in inputs):
            found.update(id(t) for t in node.outputs)
    return found


def _ends(model: Model, ties: Ties) -> None:
    """Freeze inputs and outputs: they are the model's signature."""
    for tensor in model.graph.inputs:
        ties.freeze_all(ties.of(tensor), f"it is input '{tensor.name}' of the graph")
    for tensor in model.graph.outputs:
        maker = tensor.inputs[0] if tensor.inputs else None
        port = next((i for i, t in enumerate(maker.outputs) if t is tensor), 0) if maker is not None else 0
        ties.freeze_all(ties.of(tensor, maker, port), f"it is output '{tensor.name}' of the graph")


def _inner(nodes: Iterable[gs.Node], ties: Ties) -> None:
    """Freeze what graphs inside nodes read."""
    for node in nodes:
        for graph in nested_graphs([node]):
            for inner in graph.nodes:
                for port, tensor in enumerate(inner.inputs):
                    if not tensor.is_empty():
                        why = f"a graph inside {node.op} '{label(node)}' reads it"
                        ties.freeze_all(ties.of(tensor, inner, port), why)


class _Listing:
    """Turns units into groups."""

    def __init__(self, ties: Ties, units: Units, fixed: set[int]) -> None:
        self.ties = ties
        self.fixed = fixed
        self.units = units
        self.roles = [ties.roles.get(i, a.role) if a.role != "carries" else a.role for i, a in enumerate(ties.axes)]
        self._numbers = np.full(len(units.reason), -1, np.int64)
        self.members: dict[int, list[int]] = {}
        for number, kind in enumerate(units.of_axis):
            self.members.setdefault(int(kind), []).append(number)

    def channels(self, model: Model) -> Channels:
        """Return the groups, the axes without one, and the size of all weights."""
        found = self._groups()
        prunable = {(id(s.node), s.port, s.axis) for g in found if not g.frozen for s in g.sites}
        stays = {(id(s.node), s.port, s.axis): g.frozen for g in found if g.frozen for s in g.sites}
        return Channels(found, self._frozen_axes(prunable, stays), _parameters(model, self.ties))

    def _groups(self) -> list[Group]:
        if not self.ties.axes:
            return []
        kinds = np.repeat(np.arange(len(self.units.offset) - 1), np.diff(self.units.offset))
        unit = self.units.unit
        if not len(unit):
            return []
        rng = np.random.default_rng(0)  # numbers that stand for classes: sums of equal sets are equal, others differ
        marks = rng.integers(1, 1 << 62, len(self.units.offset), dtype=np.uint64)
        signature = np.zeros(len(self.units.reason), np.uint64)
        np.add.at(signature, unit, marks[kinds])
        signature += (self.units.reason >= 0) * np.uint64(marks[-1])
        _, group_of = np.unique(signature, return_inverse=True)
        order = np.lexsort((kinds, group_of[unit]))
        groups, firsts = np.unique(group_of[unit][order], return_index=True)
        held = {int(g): np.unique(part) for g, part in zip(groups, np.split(kinds[order], firsts[1:]), strict=True)}
        found = []
        for number, classes in held.items():
            group = self._group(number, classes, group_of)
            if group is not None:
                found.append(group)
        return _named([group for _, group in sorted(found, key=lambda item: item[0])])

    def _group(self, number: int, classes: Array, group_of: Array) -> tuple[tuple[int, int], Group] | None:
        """Return the first axis and index that make a group, and the group; None where no layer makes it."""
        axes = sorted(a for kind in classes for a in self.members[int(kind)] if self.ties.axes[a].tensor is not None)
        makes = [a for a in axes if self.roles[a] == "makes"]
        if not makes:
            return None
        first = self.units.unit[self.units.atoms(int(self.units.of_axis[makes[0]]))]
        at = np.flatnonzero(group_of[first] == number)
        _, places = np.unique(first[at], return_index=True)
        places = at[np.sort(places)]
        numbers = first[places]  # in the order of the first layer's channels
        self._numbers[numbers] = np.arange(len(numbers))
        arrays = {int(kind): self._numbers[self.units.unit[self.units.atoms(int(kind))]] for kind in classes}
        self._numbers[numbers] = -1
        sites = tuple(self._site(a, arrays[int(self.units.of_axis[a])]) for a in axes)
        why = self._why(numbers, sites)
        tags = {self.ties.tags[a] for a in self._tagged if int(self.units.of_axis[a]) in arrays}
        kind = next((k for k in KINDS if k in tags), KINDS[-1])
        inexact = next((self.ties.inexact[a] for a in axes if a in self.ties.inexact), "")
        name = label(self._layer(makes[0]))
        return (makes[0], int(places[0])), Group(name, len(numbers), sites, kind, why, inexact)

    def _layer(self, axis: int) -> gs.Node:
        """Return the layer that a weight is for, behind what decodes it."""
        node = self.ties.axes[axis].node
        assert node is not None  # a constant is read by one
        while id(node.outputs[0]) in self.fixed and node.outputs[0].outputs:
            node = node.outputs[0].outputs[0]
        return node

    @cached_property
    def _tagged(self) -> list[int]:
        return sorted(self.ties.tags)

    def _why(self, numbers: Array, sites: Sequence[Site]) -> str:
        reasons = self.units.reason[numbers]
        if (reasons >= 0).any():
            return self.units.why[int(reasons[reasons >= 0].min())]
        if len(numbers) == 1:
            return "it is a single unit: all of it goes together"
        return "" if any(site.role == "reads" for site in sites) else "no layer reads it"

    def _site(self, number: int, units: Array) -> Site:
        axis = self.ties.axes[number]
        assert axis.tensor is not None  # virtual axes have no sites
        return Site(axis.tensor, axis.place, units, self.roles[number], axis.node, axis.port, bool(axis.whole))

    def _frozen_axes(
        self, prunable: set[tuple[int, int, int]], frozen: dict[tuple[int, int, int], str]
    ) -> list[FrozenAxis]:
        found = []
        for number, axis in enumerate(self.ties.axes):
            if axis.tensor is None or axis.node is None or self.roles[number] == "carries":
                continue
            key = id(axis.node), axis.port, axis.place
            if key in prunable or not is_float(axis.tensor.dtype):
                continue
            unit = self.units.unit[self.units.atoms(int(self.units.of_axis[number]))]
            reasons = self.units.reason[unit]
            stays = reasons[reasons >= 0]
            why = self.units.why[int(stays.min())] if len(stays) else frozen.get(key, "no layer makes it")
            where = f"{label(axis.node)}:{axis.tensor.name}"
            found.append(FrozenAxis(where, axis.place, axis.size, why))
        return found


def _named(groups: Sequence[Group]) -> list[Group]:
    """Give groups of equal names numbers."""
    seen: dict[str, int] = {}
    taken = {group.name for group in groups}
    found = []
    for group in groups:
        name, number = group.name, seen.get(group.name, 0)
        while number and (name := f"{group.name}#{number + 1}") in taken:
            number += 1
        taken.add(name)
        seen[group.name] = number + 1
        found.append(Group(name, group.size, group.sites, group.kind, group.frozen, group.inexact))
    return found


def _parameters(model: Model, ties: Ties) -> dict[int, int]:
    """Return the elements of each constant that holds weights: floats, and what layers read in codes."""
    coded = {id(axis.tensor) for axis in ties.axes if axis.role != "carries" and axis.tensor is not None}
    return {
        id(c): int(np.prod(c.shape, dtype=np.int64)) for c in model.constants() if is_float(c.dtype) or id(c) in coded
    }
