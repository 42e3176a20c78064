"""A model -> the same computation for one feed, with every If replaced by the branch that this feed takes.

For looking into models, not for making better ones: the result is right for the conditions seen only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.base import all_names
from graphopt.edit import label
from graphopt.importer import Node
from graphopt.model import Model
from graphopt.order import sort_nodes
from graphopt.runtime import Session

MAX_DEPTH = 32


@dataclass
class Flat:
    """A model without Ifs in its main graph.

    Attributes:
        model: a copy, changed.
        paths: node -> the Ifs that it came out of, outermost first (by `id`).
        taken: first output of an If -> the If, and which way it goes.
    """

    model: Model
    paths: dict[int, tuple[gs.Node, ...]] = field(default_factory=dict)
    taken: dict[str, tuple[gs.Node, bool]] = field(default_factory=dict)


def flatten(model: Model, feeds: Mapping[str, Any]) -> Flat:
    """Return the model with the Ifs of its main graph, and those inside their branches, taken as `feeds` take them.

    Inner tensors keep their names unless another tensor has the same.

    Raises:
        GraphoptError: ORT does not run the model on these feeds.
    """
    flat = Flat(model.copy())
    graph = flat.model.graph
    for _ in range(MAX_DEPTH):
        ifs = [node for node in graph.nodes if node.op == "If"]
        if not ifs:
            break
        taken = _conditions(flat.model, ifs, feeds)
        names = all_names(flat.model)
        counts = _definitions(flat.model)
        for node, condition in zip(ifs, taken, strict=True):
            flat.taken[node.outputs[0].name] = node, condition
            _inline(flat, node, node.attrs["then_branch" if condition else "else_branch"], names, counts)
        sort_nodes(graph)
    return flat


def _conditions(model: Model, ifs: Sequence[gs.Node], feeds: Mapping[str, Any]) -> list[bool]:
    """Return which way each If goes."""
    wanted = {t.name for n in ifs if isinstance(t := n.inputs[0], gs.Variable) and t.name not in feeds}
    values: dict[str, Any] = dict(feeds)
    if wanted:
        session = Session(model, optimization="off", extra_outputs=sorted(wanted))
        values.update(session.run(feeds, sorted(wanted)))
    found = []
    for node in ifs:
        tensor = node.inputs[0]
        value = tensor.values if isinstance(tensor, gs.Constant) else values[tensor.name]
        found.append(bool(np.asarray(value).reshape(-1)[0]))
    return found


def _definitions(model: Model) -> dict[str, int]:
    """Return how many tensors of the model bear each name."""
    counts: dict[str, int] = {}
    for graph in model.graphs():
        local = {id(t): t.name for node in graph.nodes for t in node.outputs}
        local.update((id(t), t.name) for n in graph.nodes for t in n.inputs if isinstance(t, gs.Constant))
        for name in local.values():
            counts[name] = counts.get(name, 0) + 1
    return counts


def _inline(flat: Flat, node: gs.Node, branch: gs.Graph, names: set[str], counts: Mapping[str, int]) -> None:
    """Put a branch in the place of its If."""
    graph = flat.model.graph
    name = label(node)
    path = (*flat.paths.get(id(node), ()), node)
    inner = {id(t): t for n in branch.nodes for t in n.outputs if t.name}
    inner.update((id(t), t) for n in branch.nodes for t in n.inputs if isinstance(t, gs.Constant))
    inner.update((id(t), t) for t in branch.outputs if isinstance(t, gs.Constant))
    for tensor in inner.values():
        if counts.get(tensor.name, 0) > 1:
            tensor.name = _free(f"{name}/{tensor.name}", names)
    place = next(i for i, n in enumerate(graph.nodes) if n is node)
    ends = []
    for made, given in zip(branch.outputs, list(node.outputs), strict=True):
        if given.name:
            list.__setitem__(given.inputs, slice(None), [])
            ends.append(Node("Identity", _free(f"{name}/{given.name}", names), inputs=[made], outputs=[given]))
    for moved in branch.nodes:
        flat.paths[id(moved)] = path
    for end in ends:
        flat.paths[id(end)] = path
    graph.nodes[place : place + 1] = [*branch.nodes, *ends]


def _free(name: str, names: set[str]) -> str:
    found, number = name, 0
    while found in names:
        number += 1
        found = f"{name}_{number}"
    names.add(found)
    return found
