"""A layer, one way to split it, and second moments from samples -> its factors and its new bias at any rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.factorable import Factorable
from graphopt.layer_inputs import Gram, GramRequest
from graphopt.low_rank import Factors, Spectrum, Split, spectrum
from graphopt.ops import is_standard

Array: TypeAlias = np.ndarray[Any, Any]

BUDGET = 1 << 29
"""Bytes of Gram matrices asked for at a time."""

ROWS = 1024
"""Rows taken of each tensor and sample."""


@dataclass(frozen=True)
class Solved:
    """One way to factorise a layer, solved for all ranks.

    Attributes:
        layer: the layer.
        split: the way.
        rows: rows of samples that it was solved by; 0 where the weight alone decided.
        mean: mean of the product without bias on the samples, (columns of the matrix,); None where no bias can move.
    """

    layer: Factorable
    split: Split
    spectrum: Spectrum
    rows: int = 0
    mean: Array | None = None

    def factors(self, rank: int) -> Factors:
        """Return the factors of a rank."""
        return self.spectrum.factors(rank)

    def bias(self, rank: int) -> Array | None:
        """Return the bias at a rank, (outputs,) float64; None where it stays what it is."""
        if self.mean is None:
            return None
        basis = self.spectrum.basis[:, :rank]
        lost = self.mean - (self.mean @ basis) @ basis.T
        return np.asarray(self.layer.bias_values() + self.split.summed(lost))

    def whole(self, rank: int) -> Array:
        """Return what the factors of a rank stand for, in the weight's own shape, float64."""
        return self.split.whole_weight(self.factors(rank).product)


class Solver:
    """Solves layers by second moments, each Gram matrix taken once.

    Args:
        grams: by request; empty where weights alone decide.
    """

    def __init__(self, grams: Mapping[GramRequest, Gram]) -> None:
        self.grams = grams

    def solve(self, layer: Factorable, split: Split) -> Solved:
        """Return a layer solved for all ranks."""
        matrix = split.matrix(layer.weight())
        asked = layer.request(split)
        request, of_output = asked if asked is not None else (None, False)
        gram = None if request is None else self.grams.get(request)
        if gram is None or not gram.count or not np.isfinite(gram.matrix).all():
            return Solved(layer, split, spectrum(matrix))
        moments = gram.matrix / gram.count if layer.bias is None else gram.covariance()
        found = spectrum(matrix, outputs=moments) if of_output else spectrum(matrix, inputs=moments)
        if layer.bias is None:
            return Solved(layer, split, found, gram.count)
        if not of_output:
            return Solved(layer, split, found, gram.count, gram.mean @ matrix)
        own = 0.0 if is_standard(layer.node, "MatMul") else layer.bias_values()
        return Solved(layer, split, found, gram.count, gram.mean - own)


Asked: TypeAlias = tuple[Factorable, tuple[Split, ...]]
"""A layer, and the ways that it is to be solved in."""


def in_parts(layers: Iterable[Asked]) -> Iterator[tuple[list[Asked], list[GramRequest]]]:
    """Yield layers to be solved together, and the requests of their Gram matrices: within `BUDGET`, or one layer's."""
    part: list[Asked] = []
    requests: dict[GramRequest, None] = {}
    for layer, splits in layers:
        own = dict.fromkeys(asked[0] for split in splits if (asked := layer.request(split)) is not None)
        if part and sum(8 * r.width**2 for r in {**requests, **own}) > BUDGET:
            yield part, list(requests)
            part, requests = [], {}
        part.append((layer, splits))
        requests.update(own)
    if part:
        yield part, list(requests)


def first_form(node: gs.Node, split: Split) -> tuple[str, dict[str, Any]]:
    """Return operator and attributes of the first factor of a layer."""
    if split.way == "product":
        transposed = is_standard(node, "Gemm") and node.attrs.get("transA", 0)
        return ("Gemm", {"transA": 1}) if transposed else ("MatMul", {})
    if split.way == "wide":
        return "Conv", dict(node.attrs)
    return "Conv", _along(node, split, 0) if split.way == "spatial" else _pointwise(split)


def second_form(layer: Factorable, split: Split) -> dict[str, Any]:
    """Return the attributes of the second factor of a layer, of the layer's own operator."""
    node = layer.node
    if split.way == "product":  # what is added and no bias is left as it was
        return {"beta": node.attrs["beta"]} if layer.bias is None and "beta" in node.attrs else {}
    if split.way == "narrow":
        return dict(node.attrs)
    return _along(node, split, 1) if split.way == "spatial" else _pointwise(split)


def _pointwise(split: Split) -> dict[str, Any]:
    return {"kernel_shape": [1] * (len(split.shape) - 2)}


def _along(node: gs.Node, split: Split, axis: int) -> dict[str, Any]:
    """Return the attributes of a convolution of two axes that works along one of them."""
    found: dict[str, Any] = {"kernel_shape": [1, 1]}
    found["kernel_shape"][axis] = split.shape[2 + axis]
    for name in ("strides", "dilations"):
        if name in node.attrs:
            found[name] = [1, 1]
            found[name][axis] = node.attrs[name][axis]
    if "pads" in node.attrs:
        found["pads"] = [0] * 4
        found["pads"][axis], found["pads"][2 + axis] = node.attrs["pads"][axis], node.attrs["pads"][2 + axis]
    if "auto_pad" in node.attrs:
        found["auto_pad"] = node.attrs["auto_pad"]
    return found
