"""How many zeros each layer gets, and which, from what the layers read on samples.

`allocate`: the noise that a layer's error makes at the outputs is measured with that layer alone made sparse; it grows
with the layer's own error, and that grows about exponentially with the amount of zeros.  So the loss of all layers is a
sum of exponentials, and the amounts of least loss for a given total follow from one number that all share.

`fitted`: layer after layer, each on what those before it give by then.  What a layer should compute is not its old
weight but what gives the old outputs (`graphopt.reconstruct`): it makes up for the layers before it, and zeros are
chosen and made up for in that (`graphopt.sparsity`).  A bias takes what the mean loses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.base import Context
from graphopt.layer_inputs import WIDEST, Gram
from graphopt.linear_layer import LinearLayer, linear_layer
from graphopt.moments import Fit, Moments, Split
from graphopt.reconstruct import solve
from graphopt.sparse_layers import SparseLayer
from graphopt.sparsity import (
    STAGES,
    Pattern,
    Sparse,
    lowest_in_runs,
    lowest_per_output,
    made_up_for,
    relative_error,
    wanda_scores,
)

Array: TypeAlias = np.ndarray[Any, Any]

BUDGET = 1 << 29
"""Bytes of Gram matrices at a time: the samples are read again for more."""

TRIED = 8
"""Samples that noise at the outputs is measured on."""

MOST = 0.99
"""Part of a layer that becomes zero at most, unless more is asked for."""


@dataclass(frozen=True)
class Curve:
    """What zeros cost in one layer: noise at the outputs about ``exp(offset + slope * amount)``, of `size` elements."""

    size: int
    offset: float
    slope: float

    @classmethod
    def through(cls, size: int, low: tuple[float, float], high: tuple[float, float]) -> Curve:
        """Return the curve through two points (amount, noise)."""
        least = 1e-12
        first, last = (float(np.log(max(noise, least))) for _, noise in (low, high))
        slope = max((last - first) / (high[0] - low[0]), 0.1)
        return cls(size, last - slope * high[0], slope)


def allocate(curves: Mapping[str, Curve], amount: float) -> dict[str, float]:
    """Return the amount of zeros of each layer, of least loss, with this part of all elements zero.

    One more zero costs the same everywhere: slope * exp(offset + slope * amount) / size is equal for all layers whose
    amounts are not at a border.
    """
    if not curves:
        return {}
    sizes = np.array([curve.size for curve in curves.values()], float)
    slopes = np.array([curve.slope for curve in curves.values()])
    offsets = np.array([curve.offset for curve in curves.values()])
    most = max(MOST, amount)

    def amounts(level: float) -> Array:
        return np.asarray(np.clip((level + np.log(sizes / slopes) - offsets) / slopes, 0.0, most))

    low, high = -1e4, 1e4
    for _ in range(200):
        level = (low + high) / 2
        low, high = (low, level) if amounts(level) @ sizes > amount * sizes.sum() else (level, high)
    return dict(zip(curves, map(float, amounts(high)), strict=True))


def second_moments(gram: Gram) -> Array:
    """Return mean second moments of a layer's input: (group, width, width)."""
    return np.asarray(gram.groups / max(gram.count, 1))


def pruned(
    layer: SparseLayer, weight: Array, matrix: Array, amount: float, criterion: str, pattern: Pattern | None = None,
    stages: int = STAGES,
) -> Sparse:  # fmt: skip
    """Return a weight (group, inputs, outputs) made sparse by a criterion that looks at its inputs.

    Args:
        layer: whose weight it is.
        weight: what is wanted of it.
        matrix: second moments of its inputs (group, inputs, inputs).
        amount: part of the elements that becomes zero.
        criterion: `wanda` or `sparsegpt`.
        pattern: zeros come in runs.
        stages: in which `sparsegpt` makes them.
    """
    zero = layer.rows(layer.values()) == 0
    zero = zero if pattern is not None or zero.mean() <= amount else np.zeros_like(zero)
    order = layer.pattern_order()[0]
    if criterion == "sparsegpt":
        return made_up_for(weight, matrix, amount, pattern=pattern, order=order, zero=zero, stages=stages)
    scores = np.where(zero, -1.0, wanda_scores(weight, matrix))
    mask = lowest_per_output(scores, amount) if pattern is None else lowest_in_runs(scores, pattern, order)
    found = np.where(mask, 0.0, weight)
    return Sparse(found, mask, relative_error(weight, found, matrix))


def usable(graph: gs.Graph, layers: Sequence[SparseLayer]) -> tuple[dict[str, LinearLayer], dict[str, str]]:
    """Return the layers whose inputs can be measured, by label; and label -> why of the others."""
    local = {id(node) for node in graph.nodes}
    found, blocked = {}, {}
    for layer in layers:
        linear = linear_layer(graph, layer.node) if layer.request is not None and id(layer.node) in local else ""
        if isinstance(linear, str):
            blocked[layer.label] = linear or "its inputs are not rows of one matrix that samples tell of"
        elif linear.request.width > WIDEST:
            blocked[layer.label] = f"{linear.request.width} inputs: their Gram matrix would be too large"
        else:
            found[layer.label] = linear
    return found, blocked


def grams(ctx: Context, layers: Sequence[SparseLayer]) -> Iterator[tuple[SparseLayer, Gram]]:
    """Yield layers with the Gram matrices of their inputs, of the graph as it is; those without rows are left out."""
    batch: list[SparseLayer] = []
    used = 0
    for layer in [*layers, None]:
        request = None if layer is None else layer.request
        size = 0 if request is None else 8 * request.group * request.width**2
        if batch and (layer is None or used + size > BUDGET):
            found = ctx.grams({each.label: each.request for each in batch if each.request is not None})
            yield from ((each, found[each.label]) for each in batch if each.label in found and found[each.label].count)
            batch, used = [], 0
        if layer is not None:
            batch.append(layer)
            used += size


def curves(ctx: Context, layers: Sequence[SparseLayer], amount: float, criterion: str) -> dict[str, Curve]:
    """Return what zeros cost in each layer, near an amount."""
    low, high = max(amount - 0.15, amount / 2), min(amount + 0.1, (1 + amount) / 2)
    names = [layer.tensor.name for layer in layers if isinstance(layer.tensor, gs.Constant)]
    noise = ctx.output_noise(ctx.model.copy(), names, TRIED)
    found: dict[str, Curve] = {}
    for layer, gram in grams(ctx, layers):
        weight, matrix = layer.rows(layer.values()).astype(np.float64), second_moments(gram)
        near, far = (pruned(layer, weight, matrix, each, criterion, stages=0) for each in (low, high))
        harm = 1.0
        if layer.tensor.name in names and near.error > 0:
            harm = noise({layer.tensor.name: layer.from_rows(near.weight)}) / near.error
        found[layer.label] = Curve.through(layer.size, (low, harm * near.error), (high, harm * far.error))
    return found


@dataclass(frozen=True)
class FittedLayer:
    """A layer as it is to be.

    Attributes:
        layer: which.
        weight: of the layer's own shape.
        bias: (group, outputs of a group), None where it stays.
        error: of its output on the samples, relative to its power.
    """

    layer: SparseLayer
    weight: Array
    bias: Array | None
    error: float


def fitted(
    ctx: Context,
    layers: Mapping[str, tuple[SparseLayer, LinearLayer]],
    fits: Sequence[Fit],
    amounts: Mapping[str, float],
    pattern: Pattern | None = None,
) -> Iterator[FittedLayer]:
    """Yield layers made sparse one after the other; each is to be put into the graph before the next is asked for.

    Args:
        ctx: runs the samples.
        layers: by label.
        fits: what each is to give, sorted.
        amounts: part of each that becomes zero.
        pattern: zeros come in runs.
    """
    for fit, split in ctx.sweep(fits):
        layer, linear = layers[fit.label]
        if split.train.count:
            yield _fitted(layer, linear, split, amounts[fit.label], pattern)


def _fitted(
    layer: SparseLayer, linear: LinearLayer, split: Split, amount: float, pattern: Pattern | None
) -> FittedLayer:
    weight, whole = linear.weight(), split.whole
    solution = solve(split, weight, None if linear.adds is None else linear.bias())
    matrix = _matrix(whole, centred=linear.adds is not None)
    found = pruned(layer, solution.weight, matrix, amount, "sparsegpt", pattern)
    bias = None
    if linear.adds is not None:
        bias = solution.bias + np.einsum("gi,gio->go", whole.x_mean, solution.weight - found.weight)
    stored = layer.from_rows(found.weight / float(layer.node.attrs.get("alpha", 1.0)))
    return FittedLayer(layer, stored, bias, found.error)


def _matrix(moments: Moments, *, centred: bool) -> Array:
    """Return second moments of the rows, about their means or about zero."""
    count = max(moments.count, 1)
    mean = moments.x_sum / count
    about_means = moments.xx / count - mean[:, :, None] * mean[:, None]
    return about_means if centred else about_means + moments.x_mean[:, :, None] * moments.x_mean[:, None]
