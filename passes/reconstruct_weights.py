"""Weights behind a cut, fitted anew: each layer gives again what it gave in the model before, as nearly as it can.

Layers are taken in the order of computation, and each is measured on what those before it give by then, so that it
makes up for what they could not.  See `graphopt.sweep` for what is measured, and `graphopt.reconstruct` for the algebra
and its sources.

    a layer alone           Y is its output in the reference, on the channels that are left
    a layer before a sum    Y is the sum in the reference, less what is added now: so a layer that ends a residual
                            branch makes up for the errors of the other one
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import is_constant
from graphopt.analysis.differences import differing
from graphopt.analysis.shapes import Shapes
from graphopt.base import Change, Context, Pass
from graphopt.edit import Edit, is_output, label, nested_graphs
from graphopt.kept import positions
from graphopt.layer_inputs import WIDEST
from graphopt.linear_layer import LinearLayer, linear_layer, linear_layers
from graphopt.model import Model
from graphopt.moments import Fit, Split
from graphopt.names import left_out
from graphopt.ops import is_standard
from graphopt.reconstruct import Solution, solve
from graphopt.registry import register
from graphopt.sparse_marks import marks

Array = np.ndarray[Any, Any]

MARK = "graphopt.reconstruct-weights"
METHODS = ("least-squares", "bias")
WHAT = "fit its weight"
TAKEN = {"nothing": "it is left", "bias": "its bias is moved", "least-squares": "its weight is fitted"}


@register
@dataclass(frozen=True)
class ReconstructWeights(Pass):
    """Fit weights again behind channels, ranks or blocks that are gone, so that layers give what they gave.

    Lossy, keeps the signature; needs samples, and the model before the cut: it works in the pipeline that cuts.

    Options:
        method: `least-squares` fits weights and biases, `bias` moves biases alone (as it is for sparse weights anyhow).
        rows: measured of each layer over all samples, drawn at random; 0 for as many as its width asks for.
        sums: whether a layer before a sum is fitted to the sum.
        only, skip: globs of layer names.
    """

    name: ClassVar[str] = "reconstruct-weights"
    exactness: ClassVar[Any] = "lossy"
    loses: ClassVar[Any] = "structure"
    scope: ClassVar[Any] = "model"
    method: str = "least-squares"
    rows: int = 0
    sums: bool = True
    only: tuple[str, ...] = ("*",)
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse values that are none of the choices.

        Raises:
            ValueError: `method` is something else, or `rows` negative.
        """
        if self.method not in METHODS:
            raise ValueError(f"method is one of {', '.join(METHODS)}, not {self.method!r}")
        if self.rows < 0:
            raise ValueError(f"rows is a number of rows, or 0, not {self.rows}")

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose a change for each layer that a cut reaches; each is measured with those before it applied."""
        if ctx.reference is None:
            yield Change("the model", "fit its weights", "there is no model before the cut")
            return
        reference = ctx.reference()
        mark = self._mark(graph)
        found: dict[str, LinearLayer] = {}
        for layer in reached(graph, reference.graph):
            name = layer.label if isinstance(layer, LinearLayer) else layer[0]
            why = self._why_not(ctx.model, layer, mark)
            if isinstance(layer, LinearLayer) and why == "":
                found[name] = layer
            elif why:
                yield Change(name, WHAT, why)
        fits: list[Fit] = []
        for fit in targets(graph, reference.graph, list(found.values()), ctx.shapes if self.sums else None):
            if isinstance(fit, Fit):
                fits.append(fit)
            else:
                yield Change(fit[0], WHAT, fit[1])
        if fits:
            yield from self._fitted(graph, ctx, found, fits, mark)

    def _why_not(self, model: Model, layer: LinearLayer | tuple[str, str], mark: str) -> str | None:
        """Return why a layer is left; None where there is nothing to say of it."""
        if not isinstance(layer, LinearLayer):
            return layer[1]
        if why := left_out(layer.label, self.only, self.skip):
            return why
        if model.metadata(layer.node).get(MARK) == mark:
            return None
        if layer.request.width > WIDEST:
            return f"{layer.request.width} inputs: their second moments would be too large"
        return ""

    def _mark(self, graph: gs.Graph) -> str:
        """Return what a layer that was fitted bears: the request, and what all layers' shapes were then."""
        shapes = [(label(n), tuple(n.inputs[1].shape or ())) for n in graph.nodes if len(n.inputs) > 1]
        state = hashlib.sha256(repr(shapes).encode()).hexdigest()[:12]
        return f"method={self.method} rows={self.rows} sums={self.sums} shapes={state}"

    def _fitted(
        self, graph: gs.Graph, ctx: Context, layers: Mapping[str, LinearLayer], fits: Sequence[Fit], mark: str
    ) -> Iterator[Change]:
        for fit, split in ctx.sweep(fits, self.rows):
            layer = layers[fit.label]
            if not split.train.count:
                yield Change(fit.label, WHAT, "its input is empty on the samples, or not finite")
                continue
            sparse = bool(marks(ctx.model.metadata(layer.node)))  # least squares would fill in its zeros
            solution = solve_layer(layer, split, "bias" if sparse else self.method)
            yield Change(fit.label, TAKEN[solution.method], _why(solution), _writer(graph, ctx, layer, solution, mark))


def solve_layer(layer: LinearLayer, split: Split, method: Any) -> Solution:
    """Return what of a layer is to change."""
    return solve(split, layer.weight(), None if layer.adds is None else layer.bias(), method=method)


def _writer(graph: gs.Graph, ctx: Context, layer: LinearLayer, solution: Solution, mark: str) -> Callable[[], None]:
    def apply() -> None:
        if solution.method != "nothing":
            with Edit(graph) as edit:  # what follows is measured on the layer as it is now
                weight = solution.weight if solution.method == "least-squares" else None
                layer.put(edit, ctx, weight, solution.bias)
        ctx.model.metadata(layer.node)[MARK] = mark

    return apply


def _why(solution: Solution) -> str:
    if solution.method == "nothing":
        return f"error on held-out samples {solution.before:.2%} of its output's variance: nothing lowers it"
    return f"error on held-out samples {solution.before:.2%} -> {solution.error:.2%} of its output's variance"


def reached(graph: gs.Graph, reference: gs.Graph) -> Iterator[LinearLayer | tuple[str, str]]:
    """Yield the linear layers of a graph that give, or read, something else than in the reference."""
    differ = differing(graph, reference)
    nodes = {label(node): node for node in graph.nodes}
    for layer in linear_layers(graph):
        node = layer.node if isinstance(layer, LinearLayer) else nodes[layer[0]]
        if any(t.name in differ for t in (node.inputs[0], node.outputs[0])):
            yield layer


def targets(
    graph: gs.Graph, reference: gs.Graph, layers: Sequence[LinearLayer], shapes: Shapes | None
) -> Iterator[Fit | tuple[str, str]]:
    """Yield what each layer is to give, or (its label, why that is not known); in the order of `layers`, sorted.

    With the shapes of `graph`, layers before a sum of two tensors of one shape are to make up the sum.
    """
    made = {t.name: node for node in reference.nodes for t in node.outputs if t.name}
    named = {label(node): node for node in reference.nodes}
    twins = {}
    for layer in layers:
        twin = _twin(reference, layer, made, named)
        if isinstance(twin, str):
            yield layer.label, twin
        else:
            twins[layer.label] = twin
    known = [layer for layer in layers if layer.label in twins]
    behind = last_behind(graph, known)
    for i, layer in enumerate(known):
        twin = twins[layer.label]
        channels = _channels(layer, twin)
        if channels is None:
            yield layer.label, f"which of the {twin.channels} channels that it had are left is not known"
            continue
        target, minus = twin.output.name, ""
        found = _sum_behind(graph, reference, layer, twin, shapes) if shapes is not None else None
        if found is not None and behind.get(found[1], -1) < i:
            target, minus = found
        request = layer.request
        yield Fit(layer.label, request, target, layer.axis, channels, layer.block, minus)


def _twin(
    reference: gs.Graph, layer: LinearLayer, made: Mapping[str, gs.Node], named: Mapping[str, gs.Node]
) -> LinearLayer | str:
    """Return the layer of the reference that a layer was, or stands at the end of."""
    node = made.get(layer.node.outputs[0].name) or named.get(layer.label)
    if node is None:
        return "the model before has no such layer"
    if not is_standard(node, layer.node.op):
        return f"it was a {node.op} in the model before"
    twin = linear_layer(reference, node)
    if isinstance(twin, str):
        return f"in the model before, {twin}"
    if twin.block != layer.block:
        return "it made blocks of another size in the model before"
    if (twin.adds is node) != (layer.adds is layer.node) or (twin.adds is None) != (layer.adds is None):
        return "its bias stood elsewhere in the model before"
    return twin


def _channels(layer: LinearLayer, twin: LinearLayer) -> Array | None:
    """Return which of the twin's channels a layer's are; None where that is not known."""
    found = positions(twin.node, layer.node, twin.channels)
    return found if len(found) == layer.channels else None


def _sum_behind(
    graph: gs.Graph, reference: gs.Graph, layer: LinearLayer, twin: LinearLayer, shapes: Shapes
) -> tuple[str, str] | None:
    """Return the sum that a layer ends in, in the reference, and what is added to it now: names of tensors."""
    now, then = _only_add(graph, layer.output), _only_add(reference, twin.output)
    if now is None or then is None or now.outputs[0].name != then.outputs[0].name:
        return None
    other = next((t for t in now.inputs if t is not layer.output), None)
    before = next((t for t in then.inputs if t is not twin.output), None)
    if other is None or before is None or is_constant(other) or not other.name:
        return None
    own = shapes.proved(layer.output).shape
    if own is None or None in own or own != shapes.proved(other).shape:
        return None  # one is spread over the other, for all that is known
    return then.outputs[0].name, other.name


def _only_add(graph: gs.Graph, tensor: gs.Tensor) -> gs.Node | None:
    """Return the Add that alone reads a tensor."""
    readers = {id(node): node for node in tensor.outputs}
    if len(readers) != 1 or is_output(graph, tensor):
        return None
    (reader,) = readers.values()
    return reader if is_standard(reader, "Add") else None


def last_behind(graph: gs.Graph, layers: Sequence[LinearLayer]) -> dict[str, int]:
    """Return, for each tensor of a sorted graph, the last of these layers that it depends on (-1: none)."""
    number = {id(layer.node): i for i, layer in enumerate(layers)}
    found: dict[str, int] = {}
    for node in graph.nodes:
        last = max((found.get(t.name, -1) for t in _reads(node)), default=-1)
        last = max(last, number.get(id(node), -1))
        found.update((t.name, last) for t in node.outputs if t.name)
    return found


def _reads(node: gs.Node) -> Iterable[gs.Tensor]:
    inner = (t for g in nested_graphs([node]) for n in g.nodes for t in n.inputs)
    return (*node.inputs, *inner)
