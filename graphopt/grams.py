"""Samples -> Gram matrices of layer inputs: `collect(model, samples, {label: request})`.

Streaming: memory is bounded by the model, one feed's values of the tapped tensors, and `budget` bytes of Gram
matrices, whatever the number of samples and however their shapes differ.  Where all matrices together would exceed
the budget, the samples are read several times, for some of the matrices each.  Only the part of the model that makes
the tapped tensors is run.

    requests = {edit.label(node): request for node in nodes if (request := request_of(node, weight.shape))}
    grams = collect(model, samples, requests)
    grams["fc1"].matrix, grams["fc1"].mean, grams["fc1"].count
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.edit import nested_graphs
from graphopt.importer import origin
from graphopt.layer_inputs import Gram, GramRequest, Window, request_of
from graphopt.model import Model
from graphopt.runtime import Session
from graphopt.samples import Samples

__all__ = ["Gram", "GramRequest", "Window", "collect", "request_of", "tappable"]

BUDGET = 1 << 30
"""Bytes of Gram matrices held at a time, unless one alone takes more."""


def collect(
    model: Model,
    samples: Samples,
    requests: Mapping[str, GramRequest],
    *,
    budget: int = BUDGET,
    rows: int = 0,
    threads: int = 1,
    seed: int = 0,
) -> dict[str, Gram]:
    """Return the Gram matrix of each request, over all samples.

    Args:
        model: as it is now; not changed.
        samples: feeds; shapes may differ from one to the next.
        requests: by label; equal ones share one `Gram` object.
        budget: bytes of Gram matrices held while the samples are read once.
        rows: rows taken at most of each tensor and feed, drawn at random (0: all).
        threads: of the session.
        seed: of the draw.

    Returns:
        Label -> Gram.  Tensors that `tappable` does not name are left out: those of subgraphs and function bodies,
        and constants.

    Raises:
        DataError: there are no samples, one does not fit, or a tensor has not the layout that its request says.
        ModelError: ORT refuses the model.
    """
    known = tappable(model)
    wanted = {request for request in requests.values() if request.tensor in known}
    ordered = [r for r in dict.fromkeys(requests.values()) if r in wanted]
    found: dict[GramRequest, Gram] = {}
    for batch in _batches(ordered, budget):
        found.update(_one_reading(model, samples, batch, rows=rows, threads=threads, seed=seed))
    return {label: found[request] for label, request in requests.items() if request in found}


def tappable(model: Model) -> set[str]:
    """Return the names of the tensors that a session can give back: inputs and nodes' outputs of the main graph."""
    graph = model.graph
    return {t.name for t in graph.inputs} | {t.name for n in graph.nodes for t in n.outputs if t.name}


def _batches(requests: Sequence[GramRequest], budget: int) -> Iterator[list[GramRequest]]:
    """Cut requests into runs whose matrices fit the budget together, or are alone."""
    batch: list[GramRequest] = []
    used = 0
    for request in requests:
        size = 8 * request.group * request.width * (request.width + 1)
        if batch and used + size > budget:
            yield batch
            batch, used = [], 0
        batch.append(request)
        used += size
    if batch:
        yield batch


def _one_reading(
    model: Model, samples: Samples, requests: Sequence[GramRequest], *, rows: int, threads: int, seed: int
) -> dict[GramRequest, Gram]:
    """Read the samples once."""
    found = {request: Gram.empty(request) for request in requests}
    inputs = {t.name for t in model.graph.inputs}
    made = list(dict.fromkeys(r.tensor for r in requests if r.tensor not in inputs))
    session = Session(part_for(model, made), threads=threads) if made else None
    for number, feed in enumerate(samples):
        rng = np.random.default_rng([seed, number])
        values = dict(feed)
        if session is not None:
            values.update(session.run({k: v for k, v in feed.items() if k in session.input_names}, made))
        for request, gram in found.items():
            gram.add(request, np.asarray(values[request.tensor]), rows, rng)
    return found


def part_for(model: Model, names: Sequence[str]) -> Model:
    """Return the part of a model that makes these tensors, which become its outputs."""
    part = model.copy()
    graph = part.graph
    makers = {t.name: (n, t) for n in graph.nodes for t in n.outputs}
    outputs = [makers[name][1] for name in names]
    kept: dict[int, gs.Node] = {}
    waiting = [makers[name][0] for name in names]
    while waiting:
        node = waiting.pop()
        if id(node) in kept:
            continue
        kept[id(node)] = node
        inner = (t for g in nested_graphs([node]) for n in g.nodes for t in n.inputs)
        returned = (t for g in nested_graphs([node]) for t in g.outputs)
        waiting += [makers[t.name][0] for t in (*node.inputs, *inner, *returned) if t.name in makers]
    graph.nodes[:] = [node for node in graph.nodes if id(node) in kept]
    used = {id(t) for n in graph.nodes for t in n.inputs}
    used |= {id(t) for g in nested_graphs(graph.nodes) for n in g.nodes for t in (*n.inputs, *g.outputs)}
    held = origin(graph)
    if held is not None:
        held.declared[:] = [c for c in held.declared if id(c) in used]
    for tensor in outputs:  # ORT infers the types: a stale one would make it refuse the model
        tensor.dtype, tensor.shape = None, None
        tensor.__dict__.pop("origin", None)
    graph.outputs[:] = outputs
    return part
