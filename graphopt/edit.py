"""Safe edits of an `onnx_graphsurgeon` graph, near linear however many there are.

graphsurgeon keeps two-way links between nodes and tensors; taking one consumer off a tensor costs as much as
it has consumers.  An `Edit` therefore only notes what goes, and takes it all out in one sweep at the end:

    with Edit(graph) as edit:
        for node in graph.nodes:
            if edit.bypass(node.outputs[0], node.inputs[0]):
                edit.remove(node)

Until the sweep, removed nodes still stand in `graph.nodes` and in their tensors' consumers; `edit.consumers`
leaves them out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import onnx
import onnx_graphsurgeon as gs

from graphopt.importer import Node, NodeOrigin, Values, origin


def is_output(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    """Tell whether `tensor` is an output of `graph`."""
    return any(tensor is t for t in graph.outputs)


def subgraphs(node: gs.Node) -> list[gs.Graph]:
    """Return the graphs that a node holds as attributes (not those within them)."""
    return [a for a in node.attrs.values() if isinstance(a, gs.Graph)]


def nested_graphs(nodes: Iterable[gs.Node]) -> Iterator[gs.Graph]:
    """Yield every graph inside `nodes`, at any depth, outer before inner."""
    stack = [g for n in nodes for g in subgraphs(n)]
    while stack:
        graph = stack.pop()
        yield graph
        stack.extend(g for n in graph.nodes for g in subgraphs(n))


def label(node: gs.Node) -> str:
    """Return how reports call a node: its name, else its first output's."""
    return str(node.name or next((t.name for t in node.outputs if t.name), node.op))


class Edit:
    """Edits of one graph in one run of a pass.  A context manager: leaving it sweeps.

    Args:
        graph: the graph, function body or subgraph to edit.
    """

    def __init__(self, graph: gs.Graph) -> None:
        self.graph = graph
        self._gone: dict[int, gs.Node] = {}
        self._after: dict[int, list[gs.Node]] = {}
        self._front: list[gs.Node] = []
        self._dirty: dict[int, gs.Tensor] = {}
        self._local = {id(n) for n in graph.nodes}
        self._outputs = {id(t) for t in graph.outputs}
        self._inputs = {id(t) for t in graph.inputs}
        self._inner_names: set[str] | None = None
        self._own_names: set[str] | None = None

    def __enter__(self) -> Edit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.sweep()

    def removed(self, node: gs.Node) -> bool:
        """Tell whether a node is to go."""
        return id(node) in self._gone

    def is_local(self, node: gs.Node) -> bool:
        """Tell whether a node stands in this very graph."""
        return id(node) in self._local

    def is_output(self, tensor: gs.Tensor) -> bool:
        """Tell whether a tensor is an output of this graph."""
        return id(tensor) in self._outputs

    def consumers(self, tensor: gs.Tensor) -> list[gs.Node]:
        """Return the nodes that read a tensor, here and in subgraphs, each once."""
        found = {id(n): n for n in tensor.outputs if id(n) not in self._gone}
        if id(tensor) not in self._dirty:
            return list(found.values())
        return [n for n in found.values() if any(t is tensor for t in n.inputs)]

    def is_used(self, tensor: gs.Tensor) -> bool:
        """Tell whether a node reads a tensor or this graph returns it."""
        if self.is_output(tensor):
            return True
        return any(id(n) not in self._gone and any(t is tensor for t in n.inputs) for n in tensor.outputs)

    def sole_consumer(self, tensor: gs.Tensor) -> gs.Node | None:
        """Return the only node that reads a tensor, None where there are others or the graph returns it."""
        if self.is_output(tensor):
            return None
        found = self.consumers(tensor)
        return found[0] if len(found) == 1 else None

    def remove(self, node: gs.Node) -> None:
        """Take a node out, with its subgraphs; its outputs must not be used any more when the sweep comes."""
        self._gone[id(node)] = node
        self._gone.update((id(n), n) for inner in nested_graphs([node]) for n in inner.nodes)

    def adopt(self, nodes: Iterable[gs.Node]) -> None:
        """Treat nodes as standing in this graph: `insert_after` will put them there."""
        self._local.update(id(n) for n in nodes)

    def insert_after(self, place: gs.Node | None, nodes: Sequence[gs.Node]) -> None:
        """Put nodes behind `place` (which may be one that goes), or first of all where that is None."""
        self.adopt(nodes)
        if place is None:
            self._front.extend(nodes)
        else:
            self._after.setdefault(id(place), []).extend(nodes)

    def replace(self, node: gs.Node, nodes: Sequence[gs.Node]) -> None:
        """Put nodes in the place of another, whose outputs they must by now produce."""
        self.insert_after(node, nodes)
        self.remove(node)

    def set_input(self, node: gs.Node, index: int, new: gs.Tensor) -> None:
        """Make input `index` of a node read `new`; inputs left out before it are added."""
        while len(node.inputs) <= index:
            list.append(node.inputs, gs.Variable.empty())
        old = node.inputs[index]
        if old is new:
            return
        list.__setitem__(node.inputs, index, new)
        list.append(new.outputs, node)
        self._dirty[id(old)] = old

    def trim_inputs(self, node: gs.Node, count: int) -> None:
        """Keep only the first `count` inputs of a node."""
        for tensor in node.inputs[count:]:
            self._dirty[id(tensor)] = tensor
        list.__delitem__(node.inputs, slice(count, None))

    def why_not_bypass(self, old: gs.Tensor, new: gs.Tensor) -> str | None:
        """Return why `new` cannot stand for `old` everywhere, None where it can (see `bypass`)."""
        if self._shadowed(old, new) or self._hidden(new):
            return f"another tensor is called '{new.name}' where it would be read"
        if not self.is_output(old):
            return None
        if isinstance(new, gs.Constant):
            return "it makes a constant a graph output"
        if id(new) in self._inputs:
            return "it joins a graph input to an output"
        if self.is_output(new):
            return "it joins two graph outputs"
        if len(new.inputs) != 1 or not self.is_local(new.inputs[0]) or self.removed(new.inputs[0]):
            return "it returns a value from outside this graph"
        return None

    def bypass(self, old: gs.Tensor, new: gs.Tensor) -> bool:
        """Make `new` stand for `old` everywhere; the caller then removes the node that made `old`.

        Where `old` is an output of the graph, it keeps its name: the node that makes `new` is made to produce
        `old` instead.  Returns False, with nothing changed, where `why_not_bypass` gives a reason.
        """
        if self.why_not_bypass(old, new) is not None:
            return False
        if not self.is_output(old):
            replace_uses(old, new)
            return True
        self.hand_over(new.inputs[0], new, old)
        replace_uses(new, old)
        return True

    def hand_over(self, producer: gs.Node, made: gs.Tensor, old: gs.Tensor) -> None:
        """Make `producer` produce `old` in place of its output `made`: where its value becomes that of `old`.

        Names keep their meaning that way, which is what comparing two models tensor by tensor stands on.
        """
        for former in list(old.inputs):
            replace_output(former, old, gs.Variable.empty())
        replace_output(producer, made, old)

    def _shadowed(self, old: gs.Tensor, new: gs.Tensor) -> bool:
        """Tell whether a subgraph that reads `old` would take the name of `new` for a tensor of its own."""
        if all(self.is_local(n) for n in old.outputs):
            return False
        if self._inner_names is None:
            self._inner_names = names_defined(nested_graphs(self.graph.nodes))
        return new.name in self._inner_names

    def _hidden(self, tensor: gs.Tensor) -> bool:
        """Tell whether a tensor of an outer graph has the name of one of this graph's own."""
        if not tensor.inputs or self.is_local(tensor.inputs[0]):
            return False
        if self._own_names is None:
            self._own_names = names_defined([self.graph])
        return tensor.name in self._own_names

    def sweep(self) -> None:
        """Take out what goes, put in what comes, and put the links right."""
        if self._after or self._front:
            order = list(self._front)
            stack = list(reversed(self.graph.nodes))
            while stack:
                node = stack.pop()
                order.append(node)
                stack.extend(reversed(self._after.pop(id(node), [])))
            self.graph.nodes[:] = order
            self._front.clear()
        remove_nodes(self.graph, self._gone.values())
        for tensor in self._dirty.values():
            relink_consumers(tensor)
        self._gone.clear()
        self._dirty.clear()


def relink_consumers(tensor: gs.Tensor) -> None:
    """Drop from a tensor's consumers the nodes that do not read it."""
    kept: list[gs.Node] = []
    for node in {id(n): n for n in tensor.outputs}.values():
        kept.extend(node for t in node.inputs if t is tensor)
    list.__setitem__(tensor.outputs, slice(None), kept)


def names_defined(graphs: Iterable[gs.Graph]) -> set[str]:
    """Return the names of all inputs, initializers and node outputs of these graphs.

    Constants that passes made are left out: their names are unique in the model.
    """
    names: set[str] = set()
    for graph in graphs:
        names.update(t.name for t in graph.inputs)
        held = origin(graph)
        names.update(c.name for c in (held.declared if held else ()))
        names.update(t.name for n in graph.nodes for t in n.outputs)
    return names


def remove_nodes(graph: gs.Graph, nodes: Iterable[gs.Node]) -> None:
    """Take nodes and their subgraphs out of `graph` and off all their tensors, in linear time."""
    gone = {id(node): node for node in nodes}
    if not gone:
        return
    graph.nodes[:] = [node for node in graph.nodes if id(node) not in gone]
    for inner in list(nested_graphs(gone.values())):
        gone.update((id(node), node) for node in inner.nodes)
        inner.nodes.clear()
        inner.outputs.clear()
    read = {id(t): t for node in gone.values() for t in node.inputs}
    made = {id(t): t for node in gone.values() for t in node.outputs}
    for tensor in read.values():
        list.__setitem__(tensor.outputs, slice(None), [n for n in tensor.outputs if id(n) not in gone])
    for tensor in made.values():
        list.__setitem__(tensor.inputs, slice(None), [n for n in tensor.inputs if id(n) not in gone])
    for node in gone.values():
        list.clear(node.inputs)
        list.clear(node.outputs)


def replace_uses(old: gs.Tensor, new: gs.Tensor) -> None:
    """Make every node that reads `old`, in subgraphs too, read `new`; graph outputs are not touched."""
    consumers = list({id(n): n for n in old.outputs}.values())
    list.clear(old.outputs)
    for node in consumers:
        for i, tensor in enumerate(node.inputs):
            if tensor is old:
                list.__setitem__(node.inputs, i, new)
                list.append(new.outputs, node)


def replace_output(node: gs.Node, old: gs.Tensor, new: gs.Tensor) -> None:
    """Make `node` produce `new` in place of `old`."""
    for i, tensor in enumerate(node.outputs):
        if tensor is old:
            list.__setitem__(node.outputs, i, new)
            list.append(new.inputs, node)
    list.__setitem__(old.inputs, slice(None), [n for n in old.inputs if n is not node])


def make_node(
    op: str,
    inputs: Sequence[gs.Tensor],
    outputs: Sequence[gs.Tensor],
    attrs: Mapping[str, Any] | None = None,
    *,
    name: str = "",
    like: Sequence[gs.Node] = (),
) -> gs.Node:
    """Return a new node of the standard domain that inherits the metadata of those it stands for."""
    node = Node(op=op, name=name, attrs=dict(attrs or {}), inputs=list(inputs), outputs=list(outputs))
    carry_metadata(like, node)
    return node


def turn_into(node: gs.Node, op: str, attrs: Mapping[str, Any] | None = None) -> None:
    """Make a node another operator of the standard domain in place; inputs and outputs stay as they are."""
    node.op = op
    node.attrs.clear()
    node.attrs.update(attrs or {})


def carry_metadata(source: Sequence[gs.Node], target: gs.Node) -> None:
    """Give a node the metadata of those it replaces; what the first says wins."""
    merged: dict[str, str] = {}
    for node in reversed(source):
        came_from = origin(node)
        if came_from is not None:
            merged.update(came_from.metadata)
    if merged:
        target.origin = NodeOrigin(onnx.NodeProto(), merged)


def become_constant(graph: gs.Graph, tensor: gs.Variable, values: Values) -> None:
    """Turn a node's output into an initializer of `graph`, under its name and for all that read it.

    The node loses that output; it is not removed.
    """
    for producer in list(tensor.inputs):
        replace_output(producer, tensor, gs.Variable.empty())
    tensor.to_constant(values)
    tensor.origin = values
    declare(graph, tensor)


def declare(graph: gs.Graph, constant: gs.Constant) -> None:
    """Make a constant one of the initializers of `graph`, so that nobody takes it for an outer graph's.

    Constants with a name of their own in the whole model (`Context.constant`) can do without.
    """
    held = origin(graph)
    if held is not None:
        held.declared.append(constant)


def drop_declared(graph: gs.Graph, gone: set[int]) -> None:
    """Take constants (by id) off the list of those that `graph` keeps whether used or not."""
    held = origin(graph)
    if held is not None and gone:
        held.declared[:] = [c for c in held.declared if id(c) not in gone]


def order_constants(graph: gs.Graph) -> None:
    """Declare a graph's constants in the order in which its nodes read them: none is left of when they were made."""
    held = origin(graph)
    if held is None:
        return
    used = {id(t): t for node in graph.nodes for t in node.inputs if isinstance(t, gs.Constant)}
    rest = [constant for constant in held.declared if id(constant) not in used]
    held.declared[:] = [*used.values(), *rest]
