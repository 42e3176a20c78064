"""Which nodes compute in float16: the cheapest assignment, as a minimum cut.

Each node computes in float32 (side 0) or float16 (side 1).  A tensor that is made on one side and read on the other
costs a Cast, once however many read it; a node that could be float16 and is not costs the bytes that it moves more,
and its products at half the speed.  Islands that would need more Casts between them than they save are merged so.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_graphsurgeon as gs

from graphopt.analysis.constants import is_constant
from graphopt.analysis.min_cut import Network, sink_side

from .half_survey import Survey

_CALL = 16
"""What running any Cast costs, in units of 64 bytes moved."""

_CAST_BYTES = 6
"""Moved by a Cast for each element."""

_SAVED_BYTES = 2
"""Saved for each element that is read or written in float16."""

_MULTIPLIES = {"Conv": 1, "ConvTranspose": 1, "MatMul": 1, "Gemm": 1, "LSTM": 1, "GRU": 1, "RNN": 1}
"""Operators that multiply each output element with many weights -> the input that says with how many."""

_MOST = 1 << 22
"""Largest cost of one tensor or node."""

_FLOAT, _HALF = 0, 1


def chosen(found: Survey, kept: dict[int, str]) -> set[int]:
    """Return the ids of the nodes that are to compute in float16: of several cheapest choices the smallest.

    Args:
        found: the graph.
        kept: nodes that must stay float32, by id.
    """
    index = {key: i for i, key in enumerate((k for k in found.ports if k not in kept), 2)}
    network = Network(len(index) + 2)
    for key, number in index.items():
        network.add(number, _HALF, gain(found, found.nodes[key]))
    for tensor in tensors(found, index):
        price = cast_cost(found, tensor)
        maker = found.maker(tensor)
        made = _FLOAT if maker is None else index.get(id(maker), _FLOAT)
        read = {index.get(id(n), _FLOAT) if fits else _FLOAT for n, fits in found.readers(tensor)}
        if found.edit.is_output(tensor):
            read.add(_FLOAT)
        network.tensor(made, read, price)
    reached = sink_side(network.edges, _FLOAT, _HALF) if network.edges else set()
    return {key for key, number in index.items() if number in reached}


def tensors(found: Survey, nodes: dict[int, int] | set[int]) -> Iterator[gs.Tensor]:
    """Yield the tensors that these nodes (by id) can read or make in float16, each once, no constants."""
    seen: set[int] = set()
    for key in nodes:
        node = found.nodes[key]
        for tensor in (*found.inputs(node), *found.outputs(node)):
            if id(tensor) not in seen and not is_constant(tensor):
                seen.add(id(tensor))
                yield tensor


def cast_cost(found: Survey, tensor: gs.Tensor) -> int:
    """Return what a Cast of a tensor costs, in units of 64 bytes moved."""
    return _CALL + min(found.elements(tensor) * _CAST_BYTES // 64, _MOST)


def gain(found: Survey, node: gs.Node) -> int:
    """Return what a node costs more in float32, in units of 64 bytes moved."""
    if node.op == "Cast":
        return 0
    moved = sum(found.elements(t) for t in (*found.inputs(node), *found.outputs(node)))
    products = 0
    if node.op in _MULTIPLIES and node.outputs:
        weight = found.ctx.shapes.proved(node.inputs[_MULTIPLIES[node.op]]).shape or ()
        deep = [d for d in weight[1:] if isinstance(d, int)] if node.op != "MatMul" else weight[-2:-1]
        products = found.elements(node.outputs[0])
        for size in deep:
            products *= size if isinstance(size, int) else 1
    return 1 + min((moved * _SAVED_BYTES + products // 16) // 64, _MOST)


def components(found: Survey, half: set[int]) -> list[list[gs.Node]]:
    """Return the nodes on the float16 side, parted into groups that hand no tensor to each other, in order."""
    import networkx as nx  # noqa: PLC0415  (slow to import, for those who need it)

    graph = nx.Graph()
    graph.add_nodes_from(half)
    for tensor in tensors(found, half):
        maker = found.maker(tensor)
        ends = [maker] if maker is not None else []
        ends += [node for node, fits in found.readers(tensor) if fits]
        keys = [id(n) for n in ends if id(n) in half]
        graph.add_edges_from((keys[0], other) for other in keys[1:])
    groups = [{int(k) for k in group} for group in nx.connected_components(graph)]
    place = {key: i for i, key in enumerate(found.nodes)}
    ordered = sorted(groups, key=lambda group: min(place[k] for k in group))
    return [[found.nodes[k] for k in sorted(group, key=place.__getitem__)] for group in ordered]
