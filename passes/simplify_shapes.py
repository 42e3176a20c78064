"""Arithmetic on shapes, done once: with symbols for the sizes that are only known when the model runs.

    Shape(x)[1:2], Equal(Shape(x)[0], -1) …       ->  constant             where the sizes are numbers, or do not matter
    Reshape(x, [n, t, 8, 15])                     ->  Reshape(x, [0, 0, 8, 15])    and more of shape_targets.py
    Concat(Unsqueeze(Gather(Shape(x), 0)), …)     ->  Shape(x, start, end)
    two computations of the same sizes            ->  one of them

Sizes are followed by `graphopt.analysis.symbolic`; every open axis of an input is a symbol of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import refers
from graphopt.analysis.facts import Fact
from graphopt.base import Change, Context, Pass
from graphopt.edit import Edit, become_constant, label, subgraphs
from graphopt.ops import is_standard
from graphopt.registry import register

from .shape_rebuild import Rebuilder
from .shape_targets import FINDERS, site_of


@register
@dataclass(frozen=True)
class SimplifyShapes(Pass):
    """Compute what depends on shapes alone, as far as it is known, and shorten the rest.

    Exact, keeps the signature.  A Reshape gets a -1 only where no other axis of its target can be empty.  Takes
    sizes to fit int32 where the model casts them to it.
    """

    name: ClassVar[str] = "simplify-shapes"

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose one change per tensor and node."""
        if isinstance(graph, gs.Function) or (graph is not ctx.model.graph and ctx.model.ir_version < 4):
            return  # no initializers there
        with Edit(graph) as edit:
            yield from _known(graph, ctx, edit)
        with Edit(graph) as edit:
            yield from _targets(graph, ctx, edit)
        again = True
        while again:  # each change takes nodes away, and what they shared may be worth a look then
            with Edit(graph) as edit:
                rebuilder = Rebuilder(graph, ctx, edit)
                yield from rebuilder.run()
            again = rebuilder.changed


def _known(graph: gs.Graph, ctx: Context, edit: Edit) -> Iterator[Change]:
    """Propose to make tensors constant whose every element is a known number."""
    known: dict[int, tuple[Fact, gs.Tensor]] = {}
    of = ctx.shapes.symbolic.of
    for node in graph.nodes:
        if is_standard(node, "Constant") or subgraphs(node):
            continue
        for tensor in node.outputs[:1]:
            fact = of(tensor)
            if fact.known_values is not None and tensor.name:
                known[id(tensor)] = fact, tensor
    for fact, tensor in list(known.values()):
        if not edit.is_output(tensor) and all(_follows(n, known) for n in edit.consumers(tensor)):
            continue  # nothing else reads it
        assert fact.values is not None
        values = np.array(fact.values.tolist(), fact.dtype).reshape(fact.values.shape)

        def apply(tensor: gs.Tensor = tensor, values: np.ndarray[Any, Any] = values) -> None:
            node = tensor.inputs[0]
            become_constant(graph, tensor, values)
            if not any(edit.is_used(t) for t in node.outputs if t.name):
                edit.remove(node)

        node = tensor.inputs[0]
        yield Change(label(node), f"{node.op} -> {values.tolist()}", "it depends on no size that is open", apply)


def _follows(node: gs.Node, known: dict[int, tuple[Fact, gs.Tensor]]) -> bool:
    return len(node.outputs) == 1 and id(node.outputs[0]) in known


def _targets(graph: gs.Graph, ctx: Context, edit: Edit) -> Iterator[Change]:
    """Propose constants for computed targets."""
    of = ctx.shapes.symbolic.of
    for node in graph.nodes:
        finder = FINDERS.get(node.op) if is_standard(node) and not refers(node) else None
        if finder is None:
            continue
        found = finder(site_of(node, int(graph.opset), [of(t) for t in node.inputs]))
        if found is None:
            continue
        if isinstance(found, str):
            yield Change(label(node), f"constant target of {node.op}", found)
            continue

        def apply(node: gs.Node = node, found: dict[int, np.ndarray[Any, Any] | None] = found) -> None:
            for index, values in found.items():
                made = gs.Variable.empty() if values is None else ctx.constant(f"{label(node)}/target", values)
                edit.set_input(node, index, made)
            while node.inputs[-1].is_empty():
                edit.trim_inputs(node, len(node.inputs) - 1)
            node.attrs.pop("allowzero", None)

        said = next((values.tolist() for values in found.values() if values is not None), "none")
        what = "zeros" if said == "none" else "target"
        yield Change(label(node), f"computed {what} of {node.op} -> {said}", "it says the same", apply)
