"""Transposes moved along operators that do not mind, until they cancel or are small.

    Transpose(relu(Transpose(x, p)), p⁻¹)         ->  relu(x)
    Transpose(x, p) + Transpose(y, p)             ->  Transpose(x + y, p)
    Reduce(Transpose(x, p), axes)                 ->  Transpose(Reduce(x, p[axes]), p)

Networks of tf2onnx and Keras have a Transpose before and behind every Conv; what is left is at most one at each
input and output.  `transpose_flow` knows the operators, `transpose_region` finds the places that cost least: by
the bytes moved and one call each, so a change is proposed only where that sum falls.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from graphopt.analysis.shapes import TensorType
from graphopt.base import Change, Context, Pass
from graphopt.edit import Edit, label, replace_output, turn_into
from graphopt.ops import is_standard
from graphopt.registry import register

from .new_nodes import Maker
from .transpose_flow import Perm, inverse, is_identity
from .transpose_region import Cut, Region, cheapest, crosses, grow, is_source, perm_of

_ROUNDS = 8
"""Times that the whole graph is looked at, while it changes."""


@register
@dataclass(frozen=True)
class SinkTransposes(Pass):
    """Move Transposes along elementwise operators, reductions, Concat, Split and more where that costs less.

    Exact: elements are moved, and computed on in another order of axes.  Keeps the signature.
    """

    name: ClassVar[str] = "sink-transposes"

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose one change per region that has a cheaper place for its Transposes."""
        with Edit(graph) as edit:
            near: dict[str, Change] = {}
            for _ in range(_ROUNDS):
                sweep = _Sweep(edit, ctx)
                yield from sweep.changes()
                edit.sweep()
                near = sweep.near
                if not sweep.applied:
                    break
            yield from near.values()


class _Sweep:
    """One look at all Transposes of a graph."""

    def __init__(self, edit: Edit, ctx: Context) -> None:
        self.edit = edit
        self.ctx = ctx
        self.applied = False
        self.near: dict[str, Change] = {}
        self._seen: set[tuple[int, Perm]] = set()
        self._touched: set[int] = set()

    def changes(self) -> Iterator[Change]:
        for node in list(self.edit.graph.nodes):
            perm = perm_of(node) if is_standard(node, "Transpose") else None
            if perm is None or self.edit.removed(node):
                continue
            for tensor, held in ((node.outputs[0], inverse(perm)), (node.inputs[0], perm)):
                yield from self._region(node, tensor, held)

    def _region(self, node: gs.Node, tensor: gs.Tensor, perm: Perm) -> Iterator[Change]:
        if (id(tensor), perm) in self._seen or self.ctx.shapes.proved(tensor).rank != len(perm):
            return
        region = grow(self.edit, self.ctx, tensor, perm, self._touched)
        if region is None:
            return  # the next round looks at it
        self._seen.update(region.perms.items())
        cut = cheapest(self.edit, self.ctx, region)
        what = f"{cut.count_before} Transpose -> {cut.count_after}"
        if not cut.pays:
            if region.nodes or region.stuck is not None:
                self.near.setdefault(label(node), Change(label(node), "move Transpose", _reason(region)))
            return

        def apply() -> None:
            self.applied = True
            self._touched |= region.nodes.keys() | region.sources.keys() | region.sinks.keys()
            _Mover(self.edit, self.ctx, region, cut).move()

        why = f"{len(cut.moved)} operators compute in another order of axes"
        yield Change(label(node), what, why, apply)


def _reason(region: Region) -> str:
    if region.stuck is not None:
        return f"no other place costs less; {region.stuck.op} '{label(region.stuck)}' needs its tensors as they are"
    return "no other place costs less"


class _Mover:
    """Puts an assignment into the graph."""

    def __init__(self, edit: Edit, ctx: Context, region: Region, cut: Cut) -> None:
        self.edit = edit
        self.ctx = ctx
        self.region = region
        self.moved = [node for key, node in region.nodes.items() if key in cut.moved]
        self.ids = cut.moved
        self.make = Maker(edit, ctx)
        self.permuted: dict[int, gs.Tensor] = {}

    def move(self) -> None:
        crossing = {key for key, t in self.region.tensors.items() if crosses(self.edit, self.region, t, self.ids)}
        for node in self.moved:
            self._outputs(node, crossing)
        for node in self.moved:
            self._inputs(node)
        for node in self.region.sinks.values():
            self._sink(node)
        for node in self.region.sources.values():
            if not self.edit.is_used(node.outputs[0]):
                self.edit.remove(node)

    def _outputs(self, node: gs.Node, crossing: set[int]) -> None:
        """Let a moved operator make permuted tensors, and a Transpose the old ones where somebody needs them."""
        for i, perm in self.region.flows[id(node)].outputs.items():
            old = node.outputs[i]
            if not old.name or is_identity(perm):
                continue
            new = self._new(old, perm)
            self.permuted[id(old)] = new
            replace_output(node, old, new)
            if id(old) in crossing:
                self._transpose(new, old, inverse(perm), node)

    def _inputs(self, node: gs.Node) -> None:
        made = self.region.flows[id(node)]
        for i in made.inputs:
            self.edit.set_input(node, i, self._permuted(node.inputs[i]))
        for i, values in made.constants.items():
            self.edit.set_input(node, i, self.make.constant(f"{label(node)}/permuted", values))
        node.attrs.update(made.attrs)

    def _permuted(self, tensor: gs.Tensor) -> gs.Tensor:
        """Return a tensor of the region, permuted."""
        known = self.permuted.get(id(tensor))
        if known is None:
            known = self._find(tensor)
            self.permuted[id(tensor)] = known
        return known

    def _find(self, tensor: gs.Tensor) -> gs.Tensor:
        if is_identity(self.region.perms[id(tensor)]):
            return tensor
        if is_source(self.region, tensor):
            return tensor.inputs[0].inputs[0]
        for node in self.edit.consumers(tensor):
            if id(node) in self.region.sinks:
                return node.outputs[0]
        perm = self.region.perms[id(tensor)]
        new = self._new(tensor, perm)
        self._transpose(tensor, new, perm, tensor.inputs[0] if tensor.inputs else None)
        return new

    def _sink(self, node: gs.Node) -> None:
        """Drop a Transpose whose result is there by now."""
        new, old = self.permuted.get(id(node.inputs[0])), node.outputs[0]
        if new is None and is_source(self.region, node.inputs[0]):
            new = self._permuted(node.inputs[0])
        if new is None or new is old:
            return
        if self.edit.bypass(old, new):
            self.edit.remove(node)
            self.permuted = {k: old if t is new and self.edit.is_output(old) else t for k, t in self.permuted.items()}
        else:
            turn_into(node, "Identity")
            self.edit.set_input(node, 0, new)

    def _new(self, like: gs.Tensor, perm: Perm) -> gs.Variable:
        """Return a new tensor of the type of another, permuted."""
        known = self.ctx.shapes.proved(like)
        shape = None if known.shape is None else tuple(known.shape[a] for a in perm)
        return self.make.tensor(f"{like.name}/permuted", TensorType(known.dtype, shape))

    def _transpose(self, source: gs.Tensor, result: gs.Tensor, perm: Perm, place: gs.Node | None) -> None:
        self.make.node("Transpose", [source], [result], {"perm": list(perm)}, like=[place] if place else [])
