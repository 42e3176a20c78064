"""What a loop computes anew in each step although it is always the same, computed once before it.

    Loop(… x …) { c = Sqrt(w); y = x * c }      w from outside   ->  c = Sqrt(w); Loop(… x …) { y = x * c }
    Loop(… v …) { … v' = v }                    v is handed on   ->  the loop reads v from outside

A body may run no time at all.  Then an operator that would have failed inside must not fail outside: unless the
loop surely runs, only operators that cannot fail for the types and sizes at hand move.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from graphopt.analysis.constants import is_deterministic, refers, scalar_of
from graphopt.analysis.symbolic_expr import Size, at_most
from graphopt.base import Change, Context, Pass
from graphopt.edit import Edit, declare, drop_declared, label, names_defined, nested_graphs, replace_uses, subgraphs
from graphopt.importer import origin
from graphopt.ops import BROADCASTING, NEVER_FAILS, is_standard
from graphopt.registry import register

_INTEGER_FAULTS = frozenset({"Div", "Mod"})
"""Elementwise operators that fail on integers: division by zero."""


@register
@dataclass(frozen=True)
class HoistLoopInvariants(Pass):
    """Move what a Loop or Scan computes from outer values alone out of its body.

    Exact, keeps the signature.  Refuses random operators, control flow, results that the body returns, and, where
    the body may run no time, whatever could fail.
    """

    name: ClassVar[str] = "hoist-loop-invariants"

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose one change per loop and kind."""
        loops = [n for n in graph.nodes if is_standard(n, "Loop", "Scan") and isinstance(n.attrs.get("body"), gs.Graph)]
        if not loops or isinstance(graph, gs.Function):
            return
        names = Counter(name for g in ctx.model.graphs() for name in names_defined([g]))
        with Edit(graph) as edit:
            before = dict(zip((id(n) for n in graph.nodes), [None, *graph.nodes], strict=False))
            for node in loops:
                yield from _variables(edit, node)
                yield from _nodes(edit, ctx, node, before[id(node)], names)


def _variables(edit: Edit, node: gs.Node) -> Iterator[Change]:
    """Propose to read a variable that the body only hands on from outside."""
    body = node.attrs["body"]
    first_in, first_out = (2, 1) if node.op == "Loop" else (0, 0)
    count = len(body.inputs) - first_in if node.op == "Loop" else len(node.inputs) - _scanned(node)
    if len(node.inputs) - first_in < count or count < 0:
        return
    inside = names_defined([body, *nested_graphs(body.nodes)])
    for index in reversed(range(min(count, len(node.outputs)))):
        own, outer = body.inputs[first_in + index], node.inputs[first_in + index]
        if _source(body.outputs[first_out + index]) is not own:
            continue
        where, what = f"{label(node)}/{own.name}", f"{node.op} variable -> '{outer.name}'"
        why = _why_not(edit, node, index, own, outer, body.outputs[first_out + index])
        if outer.name in inside:
            why = f"another tensor is called '{outer.name}' inside"
        if why is not None:
            yield Change(where, what, why)
            continue

        def apply(index: int = index, own: gs.Tensor = own, body: gs.Graph = body) -> None:
            if node.outputs[index].name:
                edit.bypass(node.outputs[index], node.inputs[first_in + index])
            replace_uses(own, node.inputs[first_in + index])
            del body.inputs[first_in + index], body.outputs[first_out + index]
            del node.inputs[first_in + index], node.outputs[index]

        yield Change(where, what, "the body hands it on as it is", apply)


def _why_not(
    edit: Edit, node: gs.Node, index: int, own: gs.Tensor, outer: gs.Tensor, returned: gs.Tensor
) -> str | None:
    """Return why a variable must stay, None where it can go."""
    ends = [t for t in node.attrs["body"].outputs if t is own]
    if len(ends) > (1 if returned is own else 0):
        return "the body returns it more than once"
    if len(node.outputs) < 2:
        return "the loop returns nothing else"
    result = node.outputs[index]
    return edit.why_not_bypass(result, outer) if result.name else None


def _scanned(node: gs.Node) -> int:
    count = node.attrs.get("num_scan_inputs")
    return count if isinstance(count, int) else len(node.inputs) + 1


def _source(tensor: gs.Tensor) -> gs.Tensor:
    """Return what a tensor is, through Identity."""
    while len(tensor.inputs) == 1 and is_standard(tensor.inputs[0], "Identity"):
        tensor = tensor.inputs[0].inputs[0]
    return tensor


def _nodes(edit: Edit, ctx: Context, node: gs.Node, place: gs.Node | None, names: Counter[str]) -> Iterator[Change]:
    """Propose to put the invariant nodes of a body behind `place`."""
    body = node.attrs["body"]
    found = _Invariants(ctx, node, body)
    for refused, why in found.refused:
        yield Change(label(refused), f"move {refused.op} out of '{label(node)}'", why)
    if not found.nodes:
        return

    def apply() -> None:
        moved = {id(n) for n in found.nodes}
        body.nodes[:] = [n for n in body.nodes if id(n) not in moved]
        constants = {id(t): t for n in found.nodes for t in n.inputs if isinstance(t, gs.Constant)}
        held = origin(body)
        own = [c for c in (held.declared if held else ()) if id(c) in constants]
        drop_declared(body, {id(c) for c in own})
        for constant in own:
            declare(edit.graph, constant)
        for tensor in (*own, *(t for n in found.nodes for t in n.outputs if t.name)):
            if names[tensor.name] > 1:
                names[tensor.name] -= 1
                tensor.name = ctx.fresh_name(f"{label(node)}/{tensor.name}")
                names[tensor.name] += 1
        edit.insert_after(place, found.nodes)

    what = f"move {len(found.nodes)} node{'s'[: len(found.nodes) > 1]} out of the body"
    ops = ", ".join(sorted({n.op for n in found.nodes}))
    yield Change(label(node), what, f"they depend on nothing that changes: {ops}", apply)


class _Invariants:
    """The nodes of a body that can move out, in order, and those that could but for a reason."""

    def __init__(self, ctx: Context, node: gs.Node, body: gs.Graph) -> None:
        self.ctx = ctx
        self.runs = _surely_runs(ctx, node)
        self.opset = int(body.opset)
        self.nodes: list[gs.Node] = []
        self.refused: list[tuple[gs.Node, str]] = []
        self._inside = {id(t) for t in body.inputs} | {id(t) for n in body.nodes for t in n.outputs if t.name}
        ends = {id(t) for t in body.outputs}
        for inner in body.nodes:
            if subgraphs(inner) or refers(inner) or not is_deterministic(inner, self.opset) or not inner.inputs:
                continue
            if any(id(t) in self._inside for t in inner.inputs) or is_standard(inner, "Constant"):
                continue
            why = self._why_not(inner, ends)
            if why is not None:
                self.refused.append((inner, why))
                continue
            self.nodes.append(inner)
            self._inside -= {id(t) for t in inner.outputs}

    def _why_not(self, node: gs.Node, ends: set[int]) -> str | None:
        if any(id(t) in ends for t in node.outputs):
            return "the body returns it"
        if self.runs or node.op in NEVER_FAILS:
            return None
        return None if node.op in BROADCASTING and self._fits(node) else "it might fail, and the loop might not run"

    def _fits(self, node: gs.Node) -> bool:
        """Tell whether the inputs of an elementwise operator surely broadcast."""
        types = [self.ctx.shapes.symbolic.of(t) for t in node.inputs]
        if node.op in _INTEGER_FAULTS and any(t.dtype is None or t.dtype.kind in "iu" for t in types):
            return False
        shapes = [t.shape for t in types]
        if any(s is None for s in shapes) or self.opset < 8:
            return False
        known = [s for s in shapes if s is not None]
        rank = max(len(s) for s in known)
        return all(_agree([s[-back] for s in known if len(s) >= back]) for back in range(1, rank + 1))


def _agree(sizes: list[Size]) -> bool:
    return len({size for size in sizes if size != 1}) <= 1


def _surely_runs(ctx: Context, node: gs.Node) -> bool:
    """Tell whether a body runs at least once."""
    if node.op == "Scan":
        rows = [ctx.shapes.symbolic.of(t).shape for t in node.inputs[-_scanned(node) :]]
        axes = node.attrs.get("scan_input_axes") or [0]
        return _scanned(node) <= len(node.inputs) and bool(rows and rows[0]) and at_most(1, (rows[0] or (0,))[axes[0]])
    trips, condition = node.inputs[0], node.inputs[1]
    count = None if trips.is_empty() else scalar_of(trips)
    enough = trips.is_empty() or (isinstance(count, int) and count > 0)
    return enough and (condition.is_empty() or bool(scalar_of(condition)))
