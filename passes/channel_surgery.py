"""Channel groups cut out of a graph: constants lose indices, and whatever says how many channels there are follows.

    plan(graph, groups, kept, shapes)  ->  Surgery, and why some groups cannot be cut
    surgery.operate(model, fresh)          does it

A plan names nodes by their place in the graph, so that it can be carried out on a copy first.  Several groups may have
channels on one axis (Concat), and one constant may be cut along several axes: all is put together before anything is
cut.  An initializer that several nodes read is cloned where they do not lose the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from graphopt import kept as notes
from graphopt.analysis.constants import array_of, is_constant
from graphopt.analysis.shapes import Shapes
from graphopt.edit import Edit, drop_declared, label, make_node
from graphopt.ops import is_standard

from .channel_patches import PATCHES, Axes, Patch, Place, RefusedError, cut_size

if TYPE_CHECKING:
    from graphopt.analysis.channels import Group, Site
    from graphopt.model import Model

Array: TypeAlias = np.ndarray[Any, Any]
Use: TypeAlias = tuple[int, int]
"""A constant where it is read: place of the node in the graph, input."""


@dataclass
class Surgery:
    """A cut, ready to be carried out on the graph that it was planned on or on a copy of it.

    Attributes:
        constants: what stays of the constants, by axis.
        patches: by place of the node.
        shapes: name of a computed tensor -> what stays of it, by axis.
        layers: place of a node with weights -> (output channels before, those that stay).
        groups: place of the node that a group is called after, its name, the channels of that node that it had.
    """

    constants: dict[Use, dict[int, Array]] = field(default_factory=dict)
    patches: dict[int, Patch] = field(default_factory=dict)
    shapes: dict[str, dict[int, Array]] = field(default_factory=dict)
    layers: dict[int, tuple[int, Array]] = field(default_factory=dict)
    groups: list[tuple[int, str, int]] = field(default_factory=list)

    def operate(self, model: Model, fresh: Callable[[str], str]) -> None:
        """Cut.

        Args:
            model: the one that this was planned on, or a copy.
            fresh: returns a free name like the given one.
        """
        nodes = list(model.graph.nodes)
        with Edit(model.graph) as edit:
            replaced = _cut_constants(edit, nodes, self.constants, fresh)
            for place, patch in self.patches.items():
                replaced += _patched(edit, nodes, place, patch, fresh)
            edit.sweep()
            unread = [tensor for tensor in replaced if not edit.is_used(tensor)]
            drop_declared(model.graph, {id(tensor) for tensor in unread})
            for node in (
                node for tensor in unread for node in tensor.inputs
            ):  # a Constant: its values stand nowhere else
                edit.remove(node)
        _state(nodes, self.shapes)
        for place, (width, stay) in self.layers.items():
            notes.record(nodes[place], width, stay)
        for place, group, width in self.groups:
            notes.record_group(nodes[place], group, width)


def plan(
    graph: gs.Graph, groups: Sequence[Group], kept: Mapping[str, Array], shapes: Shapes, opset: int
) -> tuple[Surgery, dict[str, str]]:
    """Return how to cut groups, and why some cannot be cut; the plan is for all others.

    Args:
        graph: the main graph; not changed.
        groups: those that may be cut.
        kept: name of a group -> indices of the units that stay, in order; groups that are not named stay whole.
        shapes: of the model as it is.
        opset: of the graph.
    """
    refused: dict[str, str] = {}
    while True:
        chosen = [g for g in groups if g.name in kept and g.name not in refused and len(kept[g.name]) < g.size]
        planner = _Planner(graph, chosen, kept, shapes, opset)
        found = planner.refusals()
        if not found:
            return planner.surgery, refused
        refused.update(found)


def first_site(group: Group) -> Site | None:
    """Return where a group is first made: at the node that it is called after."""
    return next((site for site in group.sites if site.role == "makes" and site.node is not None), None)


def width_of(site: Site) -> int:
    """Return how many channels of a site belong to its group."""
    return int(np.count_nonzero(site.units >= 0))


class _Planner:
    """Puts the cuts of groups together, axis by axis, and asks each node that they touch."""

    def __init__(
        self, graph: gs.Graph, groups: Sequence[Group], kept: Mapping[str, Array], shapes: Shapes, opset: int
    ) -> None:
        self.graph, self.groups, self.shapes, self.opset = graph, groups, shapes, opset
        self.places = {id(node): place for place, node in enumerate(graph.nodes)}
        self.surgery = Surgery()
        self._masks: dict[tuple[int, int], dict[int, Array]] = {}
        self._computed: dict[int, dict[int, Array]] = {}
        self._tensors: dict[int, gs.Tensor] = {}
        self._touching: dict[int, dict[str, None]] = defaultdict(dict)
        self._refused: dict[str, str] = {}
        for group in groups:
            self._mark(group, kept[group.name])

    def _mark(self, group: Group, kept: Array) -> None:
        """Note which indices of which axes go with a group."""
        stays = np.zeros(group.size, np.bool_)
        stays[kept] = True
        for site in group.sites:
            axis = self._axis(site)
            if axis is None:
                self._refused[group.name] = f"the rank of '{site.tensor.name}' is not known"
                continue
            gone = (site.units >= 0) & ~stays[site.units]
            if is_constant(site.tensor) and site.node is not None and site.role != "carries":
                held = self._masks.setdefault((self.places[id(site.node)], site.port), {})
                self._touching[id(site.node)][group.name] = None
            else:
                held = self._computed.setdefault(id(site.tensor), {})
                self._tensors[id(site.tensor)] = site.tensor
                for node in (*site.tensor.inputs, *site.tensor.outputs):
                    self._touching[id(node)][group.name] = None
            held[axis] = held[axis] & ~gone if axis in held else ~gone
            if not held[axis].any():
                self._refused[group.name] = f"nothing would be left of axis {axis} of '{site.tensor.name}'"

    def _axis(self, site: Site) -> int | None:
        if site.axis >= 0:
            return site.axis
        shape = self.shapes.proved(site.tensor).shape
        return None if shape is None else site.axis % len(shape)

    def refusals(self) -> dict[str, str]:
        """Fill in the plan; return why groups cannot be cut, nothing where all can."""
        if self._refused:
            return self._refused
        for use, axes in self._masks.items():
            self.surgery.constants[use] = _indices(axes)
        computed = {key: _indices(axes) for key, axes in self._computed.items()}
        self.surgery.shapes = {self._tensors[key].name: axes for key, axes in computed.items()}
        for place, node in enumerate(self.graph.nodes):
            if id(node) in self._touching:
                self._node(place, node, computed)
        self._note()
        return self._refused

    def _node(self, place: int, node: gs.Node, computed: Mapping[int, Axes]) -> None:
        """Ask a node what else changes about it."""
        cut: dict[tuple[str, int], Axes] = {}
        for port, tensor in enumerate(node.inputs):
            axes = computed.get(id(tensor)) or self.surgery.constants.get((place, port))
            if axes:
                cut["in", port] = axes
        cut.update((("out", i), computed[id(t)]) for i, t in enumerate(node.outputs) if id(t) in computed)
        rule = PATCHES.get(node.op) if is_standard(node) else None
        if rule is None:
            return
        try:
            patch = rule(Place(node, self.opset, self.shapes, cut))
        except RefusedError as refusal:
            self._refused.update((name, f"{node.op} '{label(node)}': {refusal}") for name in self._touching[id(node)])
            return
        if patch != Patch():
            self.surgery.patches[place] = patch

    def _note(self) -> None:
        """Take down which layers lose output channels, and how many units each group had."""
        for group in self.groups:
            for site in group.role("makes"):  # a weight that is moved or decoded may be cut along several axes
                if site.node is not None:
                    mask = self._masks[self.places[id(site.node)], site.port][site.axis]
                    self.surgery.layers[self.places[id(site.node)]] = (len(mask), np.flatnonzero(mask))
            first = first_site(group)
            if first is not None:
                self.surgery.groups.append((self.places[id(first.node)], group.name, width_of(first)))
        for place, _ in self.surgery.constants:
            self._note_layer(place)

    def _note_layer(self, place: int) -> None:
        """Take down what stays of the channels that a node makes."""
        made = next((tensor for tensor in self.graph.nodes[place].outputs if tensor.name), None)
        axes = self.surgery.shapes.get(made.name, {}) if made is not None else {}
        if len(axes) == 1:
            [(axis, stay)] = axes.items()
            self.surgery.layers[place] = (len(self._computed[id(made)][axis]), stay)


def _indices(masks: Mapping[int, Array]) -> dict[int, Array]:
    """Return what stays as indices, of the axes that lose something."""
    return {axis: np.flatnonzero(mask) for axis, mask in masks.items() if not mask.all()}


def _cut_constants(
    edit: Edit, nodes: Sequence[gs.Node], cuts: Mapping[Use, Axes], fresh: Callable[[str], str]
) -> list[gs.Tensor]:
    """Cut each constant as each of its readers asks; return those that these read no more.

    Readers that ask for the same share the result.
    """
    uses: dict[int, list[Use]] = defaultdict(list)
    for place, port in cuts:
        if cuts[place, port]:
            uses[id(nodes[place].inputs[port])].append((place, port))
    replaced: list[gs.Tensor] = []
    for places in uses.values():
        place, port = places[0]
        tensor = nodes[place].inputs[port]
        alike: dict[tuple[tuple[int, bytes], ...], list[Use]] = defaultdict(list)
        for use in places:
            alike[tuple((axis, stay.tobytes()) for axis, stay in sorted(cuts[use].items()))].append(use)
        whole = array_of(tensor)
        assert whole is not None  # sites name constants
        alone = len(alike) == 1 and isinstance(tensor, gs.Constant) and _reads(edit, tensor) == len(places)
        for same in alike.values():
            values = taken(whole, cuts[same[0]])
            if alone:
                tensor.values = values
                continue
            clone = gs.Constant(fresh(tensor.name), values)
            for place, port in same:
                edit.set_input(nodes[place], port, clone)
            replaced.append(tensor)
    return replaced


def _reads(edit: Edit, tensor: gs.Tensor) -> int:
    """Return how often a constant is read, once more where it is an output of the graph."""
    return sum(t is tensor for node in edit.consumers(tensor) for t in node.inputs) + edit.is_output(tensor)


def taken(values: Array, axes: Axes) -> Array:
    """Return what stays of an array, as an array of its own; the axis that loses most goes first."""
    for axis, stay in sorted(axes.items(), key=lambda item: len(item[1]) / values.shape[item[0]]):
        values = np.take(values, stay, axis=axis)
    return np.ascontiguousarray(values)


def _patched(
    edit: Edit, nodes: Sequence[gs.Node], place: int, patch: Patch, fresh: Callable[[str], str]
) -> list[gs.Tensor]:
    """Do to a node what a patch says; return the tensors that it does not read any more."""
    node = nodes[place]
    for name, value in patch.attrs.items():
        if value is None:
            node.attrs.pop(name, None)
        else:
            node.attrs[name] = value
    replaced = [node.inputs[port] for port in patch.inputs if port < len(node.inputs)]
    for port, values in patch.inputs.items():
        edit.set_input(node, port, gs.Constant(fresh(f"{label(node)}/cut"), values))
    before = nodes[place - 1] if place else None
    for port, (mask, values) in patch.blends.items():
        steps = _blend(node, port, mask, values, fresh)
        edit.insert_after(before, steps)
        edit.set_input(node, port, steps[-1].outputs[0])
    for axis, places in patch.takes.items():
        out = gs.Variable(fresh(f"{label(node)}/taken"), node.inputs[0].dtype)
        taking = [node.inputs[0], gs.Constant(fresh(f"{out.name}/places"), places.astype(np.int64))]
        edit.insert_after(before, [make_node("Gather", taking, [out], {"axis": axis}, name=out.name, like=[node])])
        edit.set_input(node, 0, out)
    return [tensor for tensor in replaced if is_constant(tensor)]


def _blend(node: gs.Node, port: int, mask: Array, values: Array, fresh: Callable[[str], str]) -> list[gs.Node]:
    """Return the nodes that make an input with some of its elements replaced: runs of old and new ones in a row."""
    name = fresh(f"{label(node)}/target")
    steps: list[gs.Node] = []
    parts: list[gs.Tensor] = []
    for run in np.split(np.arange(len(mask)), np.flatnonzero(np.diff(mask)) + 1):
        if mask[run[0]]:
            parts.append(gs.Constant(fresh(f"{name}/known"), values[run]))
            continue
        parts.append(gs.Variable(fresh(f"{name}/part"), np.int64, [len(run)]))
        taking = [node.inputs[port], gs.Constant(fresh(f"{name}/places"), run.astype(np.int64))]
        steps.append(make_node("Gather", taking, [parts[-1]], {"axis": 0}, name=parts[-1].name, like=[node]))
    out = gs.Variable(name, np.int64, [len(mask)])
    return [*steps, make_node("Concat", parts, [out], {"axis": 0}, name=name, like=[node])]


def _state(nodes: Iterable[gs.Node], cuts: Mapping[str, Axes]) -> None:
    """Give cut tensors the shapes that they have now."""
    for node in nodes:
        for tensor in node.outputs:
            if tensor.name not in cuts or tensor.shape is None:
                continue
            dims = list(tensor.shape)
            for axis, stay in cuts[tensor.name].items():
                if axis < len(dims):
                    dims[axis] = cut_size(dims[axis], len(stay))
            tensor.shape = dims
