"""Safe edits of an `onnx_graphsurgeon` graph, each linear in what it touches.

graphsurgeon keeps two-way links between nodes and tensors; taking one consumer off a tensor costs as much as
it has consumers, so whatever removes many nodes must go through `remove_nodes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_graphsurgeon as gs

from graphopt.importer import origin


def is_output(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    """Tell whether `tensor` is an output of `graph`."""
    return any(tensor is t for t in graph.outputs)


def is_input(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    """Tell whether `tensor` is an input of `graph`."""
    return any(tensor is t for t in graph.inputs)


def remove_nodes(graph: gs.Graph, nodes: Iterable[gs.Node]) -> None:
    """Take nodes out of `graph` and off all their tensors, in time linear in the graph's links."""
    gone = {id(node): node for node in nodes}
    if not gone:
        return
    graph.nodes[:] = [node for node in graph.nodes if id(node) not in gone]
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


def bypass(graph: gs.Graph, old: gs.Tensor, new: gs.Tensor) -> bool:
    """Make `new` stand for `old` everywhere; the caller then removes the node that made `old`.

    Where `old` is an output of `graph`, it keeps its name: the node that makes `new` is made to produce `old`
    instead.  Returns False, with nothing changed, where that cannot be: `new` is itself an input, an output, a
    constant, or made outside this graph.
    """
    if not is_output(graph, old):
        replace_uses(old, new)
        return True
    local = len(new.inputs) == 1 and any(new.inputs[0] is n for n in graph.nodes)
    if isinstance(new, gs.Constant) or is_output(graph, new) or is_input(graph, new) or not local:
        return False
    producer = new.inputs[0]
    slot = next(i for i, t in enumerate(producer.outputs) if t is new)
    for former in list(old.inputs):
        replace_output(former, old, gs.Variable(f"{old.name}/replaced"))
    replace_output(producer, producer.outputs[slot], old)
    replace_uses(new, old)
    return True


def replace_output(node: gs.Node, old: gs.Tensor, new: gs.Tensor) -> None:
    """Make `node` produce `new` in place of `old`."""
    for i, tensor in enumerate(node.outputs):
        if tensor is old:
            list.__setitem__(node.outputs, i, new)
            list.append(new.inputs, node)
    list.__setitem__(old.inputs, slice(None), [n for n in old.inputs if n is not node])


def replace_input(node: gs.Node, index: int, new: gs.Tensor) -> None:
    """Make input `index` of `node` read `new`."""
    old = node.inputs[index]
    list.__setitem__(node.inputs, index, new)
    list.append(new.outputs, node)
    for i, consumer in enumerate(old.outputs):
        if consumer is node:
            list.__delitem__(old.outputs, i)
            break


def outer_uses(graph: gs.Graph) -> set[int]:
    """Return ids of tensors that are outputs of `graph` or of a graph nested in it."""
    found = {id(t) for t in graph.outputs}
    stack: list[gs.Graph] = [graph]
    while stack:
        current = stack.pop()
        found.update(id(t) for t in current.outputs)
        stack.extend(a for n in current.nodes for a in n.attrs.values() if isinstance(a, gs.Graph))
    return found


def carry_metadata(source: Sequence[gs.Node], target: gs.Node) -> None:
    """Give a new node the metadata of those it replaces; what the first says wins."""
    from graphopt.importer import NodeOrigin  # noqa: PLC0415

    merged: dict[str, str] = {}
    for node in reversed(source):
        came_from = origin(node)
        if came_from is not None:
            merged.update(came_from.metadata)
    if merged:
        import onnx  # noqa: PLC0415

        target.origin = NodeOrigin(onnx.NodeProto(), merged)
