"""If with a known condition: the branch that runs takes its place.

    If(true) {then: … y}                    ->  … y
    If(c) {then: If(c) {…} …, else: …}      ->  If(c) {then: If(true) {…} …, else: …}
    If(c) {then: x, else: y}                ->  … x      where the model could not go on with y

The last is what exporters make of `squeeze`: one branch has an axis less, and only with it do later operators get the
rank that they take.  With the other branch, the model stops with an error; without the If, it still does.


Names of the branch that the model defines elsewhere, too, get new ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import scalar_of
from graphopt.analysis.symbolic import Symbolic
from graphopt.base import Change, Context, Pass
from graphopt.edit import Edit, declare, label, make_node, nested_graphs, replace_output, subgraphs
from graphopt.importer import origin
from graphopt.model import Model
from graphopt.ops import is_standard
from graphopt.registry import register

_MOST_TRIED = 32
"""Ifs of a graph whose branches are tried."""


@register
@dataclass(frozen=True)
class FoldIf(Pass):
    """Replace If nodes whose condition is constant by the branch that runs.

    Exact, keeps the signature.  Conditions that are computed stay, but for those inside a branch of an If on the same
    condition, and those whose other branch leads to an error; fold-constants and simplify-shapes make constant first
    what they can.
    """

    name: ClassVar[str] = "fold-if"

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose one change per If."""
        waiting = [n for n in graph.nodes if is_standard(n, "If")]
        if not waiting:
            return
        if ctx.model.ir_version >= 4 and not isinstance(graph, gs.Function):  # else no initializers inside
            inner = {id(n.inputs[0]) for g in nested_graphs(waiting) for n in g.nodes if is_standard(n, "If")}
            for node in waiting:
                if id(node.inputs[0]) in inner:
                    yield from _implied(graph, ctx, node)
        if any(graph is g for g in _chosen_graphs(ctx.model)):
            yield from _only_way(graph, ctx, waiting)
        defined = _definitions(ctx.model)
        while waiting:
            inlined: list[gs.Node] = []
            with Edit(graph) as edit:
                for node in waiting:
                    condition = scalar_of(node.inputs[0])
                    if condition is None:
                        continue
                    chosen = "then_branch" if condition else "else_branch"

                    def apply(
                        node: gs.Node = node,
                        chosen: str = chosen,
                        edit: Edit = edit,
                        inlined: list[gs.Node] = inlined,
                    ) -> None:
                        inlined.extend(_inline(edit, ctx, node, node.attrs[chosen], defined))

                    yield Change(label(node), f"If -> its {chosen}", f"its condition is {bool(condition)}", apply)
            waiting = [n for n in inlined if is_standard(n, "If")]


def _only_way(graph: gs.Graph, ctx: Context, nodes: list[gs.Node]) -> Iterator[Change]:
    """Propose to make constant the conditions of Ifs whose one branch leads to what stops the model."""
    with Edit(graph) as edit:
        for node in nodes[:_MOST_TRIED]:
            if scalar_of(node.inputs[0]) is not None or not _ranks_differ(ctx, node):
                continue
            for branch, other in (("else_branch", True), ("then_branch", False)):
                reason = Symbolic(ctx.model, assumed={id(node): branch}, watched=graph).impossible
                if reason is None:
                    continue

                def apply(node: gs.Node = node, other: bool = other) -> None:
                    edit.set_input(node, 0, ctx.constant(f"{label(node)}/condition", np.array(other)))

                yield Change(label(node), f"If -> If({other})", f"with its {branch}, {reason}", apply)
                return  # what follows from it is seen more cheaply the next time


def _chosen_graphs(model: Model) -> Iterator[gs.Graph]:
    """Yield the main graph and the branches of Ifs within: graphs that run once or not at all."""
    waiting = [model.graph]
    while waiting:
        graph = waiting.pop()
        yield graph
        waiting += [g for n in graph.nodes if is_standard(n, "If") for g in subgraphs(n)]


def _ranks_differ(ctx: Context, node: gs.Node) -> bool:
    """Tell whether an output of an If has another rank in each branch."""
    branches = [node.attrs[name].outputs for name in ("then_branch", "else_branch")]
    shapes = [[ctx.shapes.proved(t).shape for t in outputs] for outputs in branches]
    return any(a is not None and b is not None and len(a) != len(b) for a, b in zip(*shapes, strict=True))


def _implied(graph: gs.Graph, ctx: Context, node: gs.Node) -> Iterator[Change]:
    """Propose to make the condition of Ifs within a branch constant, where it is the one that chose the branch."""
    condition = node.inputs[0]
    if isinstance(condition, gs.Constant):
        return
    with Edit(graph) as edit:
        for branch, holds in (("then_branch", True), ("else_branch", False)):
            for inner in _graphs_of(node.attrs[branch]):
                for other in (n for n in inner.nodes if is_standard(n, "If") and n.inputs[0] is condition):

                    def apply(other: gs.Node = other, holds: bool = holds) -> None:
                        edit.set_input(other, 0, ctx.constant(f"{label(other)}/condition", np.array(holds)))

                    yield Change(label(other), f"If -> If({holds})", f"it is in the {branch} of '{label(node)}'", apply)


def _graphs_of(branch: gs.Graph) -> Iterator[gs.Graph]:
    yield branch
    yield from nested_graphs(branch.nodes)


def _definitions(model: Model) -> Counter[str]:
    """Count in how many graphs each tensor name is defined."""
    counts: Counter[str] = Counter()
    for graph in model.graphs():
        counts.update(t.name for t in (*graph.inputs, *_own_tensors(graph)))
    return counts


def _inline(edit: Edit, ctx: Context, node: gs.Node, branch: gs.Graph, defined: Counter[str]) -> list[gs.Node]:
    """Put the nodes of a branch in the place of its If; return them."""
    dropped = [g for g in subgraphs(node) if g is not branch]
    for graph in (*dropped, *nested_graphs(n for g in dropped for n in g.nodes)):
        defined.subtract(t.name for t in (*graph.inputs, *_own_tensors(graph)))
    for tensor in _own_tensors(branch):
        if defined[tensor.name] > 1:
            defined[tensor.name] -= 1
            tensor.name = ctx.fresh_name(f"{label(node)}/{tensor.name}")
            defined[tensor.name] += 1
    nodes, results = list(branch.nodes), list(branch.outputs)
    for constant in (t for t in _own_tensors(branch) if isinstance(t, gs.Constant)):
        declare(edit.graph, constant)
    branch.nodes.clear()
    branch.outputs.clear()
    edit.insert_after(node, [*nodes, *_connect(edit, ctx, node, nodes, results)])
    edit.remove(node)
    return nodes


def _connect(
    edit: Edit, ctx: Context, node: gs.Node, nodes: list[gs.Node], results: list[gs.Tensor]
) -> Iterator[gs.Node]:
    """Make the branch's results the outputs of its If; yield the Identity nodes that this takes."""
    edit.adopt(nodes)
    stands_for: dict[int, gs.Tensor] = {}
    for old, result in zip(list(node.outputs), results, strict=True):
        new = stands_for.get(id(result), result)
        if old.is_empty():
            continue
        if edit.bypass(old, new):
            if edit.is_output(old):
                stands_for[id(result)] = old
            continue
        replace_output(node, old, gs.Variable.empty())
        yield make_node("Identity", [new], [old], name=ctx.fresh_name(f"{label(node)}/{old.name}"), like=[node])


def _own_tensors(graph: gs.Graph) -> list[gs.Tensor]:
    """Return the tensors that a graph defines, but for its inputs: outputs of its nodes, and its constants."""
    found = {id(t): t for n in graph.nodes for t in n.outputs if t.name}
    held = origin(graph)
    found.update((id(c), c) for c in (held.declared if held else ()))
    return list(found.values())
