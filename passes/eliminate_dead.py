"""What no output depends on, removed.

    nodes without a used output, unused initializers, unused functions     ->  gone
    unused optional outputs, unused outputs of If, unused Loop/Scan scans  ->  gone, inside the subgraphs too

A node is live when a graph output needs it.  All outputs of a live node's subgraphs count as needed, so one walk
from the outputs finds everything, subgraphs and function bodies included.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx
import onnx_graphsurgeon as gs

from graphopt.base import Change, Context, Pass
from graphopt.edit import Edit, drop_declared, label, subgraphs
from graphopt.importer import origin
from graphopt.model import Model
from graphopt.ops import OUTPUTS_SET_MODE, STANDARD_DOMAINS, is_standard
from graphopt.registry import register


@register
@dataclass(frozen=True)
class EliminateDead(Pass):
    """Remove nodes, initializers, outputs and functions that no graph output depends on.

    Exact, keeps the signature (unused graph inputs stay).  Nodes of other domains without any output stay, too:
    they can only be there for what they do.
    """

    name: ClassVar[str] = "eliminate-dead"
    scope: ClassVar[Literal["graph", "model"]] = "model"

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose one change per node, output and function, and one per graph for its initializers."""
        model = ctx.model
        yield from _outputs_of_subgraphs(model)
        live = _live_nodes(model)
        for inner in reversed(list(_live_graphs(model, live))):
            yield from _nodes(inner, live)
        yield from _functions(model)
        for inner in model.graphs():
            yield from _optional_outputs(inner)
        yield from _initializers(model)


def _live_nodes(model: Model) -> set[int]:
    """Return the ids of the nodes that some graph output, or a function's, needs."""
    live: set[int] = set()
    waiting: list[gs.Node] = []

    def need(tensors: Iterable[gs.Tensor]) -> None:
        for tensor in tensors:
            for producer in tensor.inputs:
                if id(producer) not in live:
                    live.add(id(producer))
                    waiting.append(producer)

    for root in (model.graph, *model.functions):
        need(root.outputs)
    for inner in model.graphs():
        for node in inner.nodes:
            if not any(t.name for t in node.outputs) and not is_standard(node):
                live.add(id(node))
                waiting.append(node)
    while waiting:
        node = waiting.pop()
        need(node.inputs)
        for inner in subgraphs(node):
            need(inner.outputs)
    return live


def _live_graphs(model: Model, live: set[int]) -> Iterator[gs.Graph]:
    """Yield the graphs that stay, outer before inner."""
    waiting: list[gs.Graph] = [model.graph, *model.functions]
    while waiting:
        graph = waiting.pop()
        yield graph
        waiting.extend(g for n in graph.nodes if id(n) in live for g in subgraphs(n))


def _nodes(graph: gs.Graph, live: set[int]) -> Iterator[Change]:
    with Edit(graph) as edit:
        for node in reversed(list(graph.nodes)):
            if id(node) in live:
                continue

            def apply(node: gs.Node = node) -> None:
                if not any(edit.is_used(t) for t in node.outputs):  # a reader was kept: its change was left out
                    edit.remove(node)

            yield Change(label(node), f"remove {node.op}", "no output depends on it", apply)


def _functions(model: Model) -> Iterator[Change]:
    called: set[tuple[str, str]] = set()
    bodies = {(f.domain or "", f.name): f for f in model.functions}
    waiting: list[gs.Graph] = [model.graph]
    while waiting:
        for node in waiting.pop().nodes:
            key = (node.domain or "", node.op)
            if key in bodies and key not in called:
                called.add(key)
                waiting.append(bodies[key])
            waiting.extend(subgraphs(node))
    for key, function in bodies.items():
        if key in called:
            continue

        def apply(key: tuple[str, str] = key) -> None:
            model.functions[:] = [f for f in model.functions if (f.domain or "", f.name) != key]

        yield Change(f"{function.domain}.{function.name}", "remove function", "nothing calls it", apply)


def _optional_outputs(graph: gs.Graph) -> Iterator[Change]:
    """Propose to leave out named optional outputs that nothing reads."""
    outputs = {id(t) for t in graph.outputs}
    for node in graph.nodes:
        if len(node.outputs) < 2 or node.domain not in STANDARD_DOMAINS:
            continue
        unused = [i for i, t in enumerate(node.outputs) if t.name and not t.outputs and id(t) not in outputs]
        optional = set(_optional(node, int(graph.opset))) if unused else set()
        for index in (i for i in unused if i in optional):

            def apply(node: gs.Node = node, index: int = index) -> None:
                list.__setitem__(node.outputs, index, gs.Variable.empty())
                while len(node.outputs) > 1 and node.outputs[-1].is_empty():
                    list.pop(node.outputs)

            yield Change(label(node), f"leave out output {index} of {node.op}", "nothing reads it", apply)


def _optional(node: gs.Node, opset: int) -> Iterator[int]:
    """Yield the outputs that an operator may leave out without computing anything else."""
    if node.op in OUTPUTS_SET_MODE:
        return
    try:
        schema = onnx.defs.get_schema(node.op, opset, "")
    except onnx.defs.SchemaError:
        return
    for index, output in enumerate(schema.outputs[: len(node.outputs)]):
        if output.option == onnx.defs.OpSchema.FormalParameterOption.Optional:
            yield index


def _outputs_of_subgraphs(model: Model) -> Iterator[Change]:
    """Propose to drop outputs of control flow that nothing reads, innermost last."""
    for graph in model.graphs():
        ends = {id(t) for t in graph.outputs}
        for node in graph.nodes:
            for index in reversed(range(len(node.outputs))) if subgraphs(node) else ():
                tensor = node.outputs[index]
                if tensor.outputs or id(tensor) in ends or not _droppable(node, index):
                    continue

                def apply(node: gs.Node = node, index: int = index) -> None:
                    _drop_output(node, index)

                yield Change(label(node), f"drop output {index} of {node.op}", "nothing reads it", apply)


def _droppable(node: gs.Node, index: int) -> bool:
    """Tell whether an output of control flow can go: any of If's but the last, the scans of Loop."""
    if len(node.outputs) < 2 or not is_standard(node):
        return False
    if is_standard(node, "Loop"):
        return index >= len(node.inputs) - 2
    return is_standard(node, "If")


def _drop_output(node: gs.Node, index: int) -> None:
    within = index + (1 if node.op == "Loop" else 0)
    for inner in subgraphs(node):
        del inner.outputs[within]
    list.clear(node.outputs[index].inputs)
    list.__delitem__(node.outputs, index)


def _initializers(model: Model) -> Iterator[Change]:
    """Propose to drop declared constants that nothing reads, all of a graph in one change."""
    for graph in model.graphs():
        held = origin(graph)
        ends = {id(t) for t in graph.outputs}
        unused = [c for c in (held.declared if held else ()) if not c.outputs and id(c) not in ends]
        if not unused:
            continue

        def apply(graph: gs.Graph = graph, gone: frozenset[int] = frozenset(id(c) for c in unused)) -> None:
            drop_declared(graph, set(gone))

        size = sum(int(c._values.nbytes) for c in unused)
        what = f"remove {len(unused)} initializer{'s'[: len(unused) > 1]} ({size} bytes)"
        kinds = Counter(str(c.dtype) for c in unused).most_common(3)
        yield Change(graph.name or "graph", what, f"nothing reads them: {dict(kinds)}", apply)
