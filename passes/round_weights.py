"""Codes of int8 weights chosen again, so that each layer's output stays near what the float weight gives.

The graph is a quantized one (quantize-static); the float weights come from the model before quantizing, and what flows
into each layer from the samples.  Scales stay.  See `graphopt.rounding` for the objective and its sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.integer_layers import IntegerLayer, find_layers, float_weights
from graphopt.base import Change, Context, Pass
from graphopt.edit import Edit
from graphopt.layer_inputs import WIDEST, Gram, GramRequest, request_of
from graphopt.registry import register
from graphopt.rounding import DAMPING, SWEEPS, Rounded, round_rows

Array = np.ndarray[Any, Any]

MARK = "graphopt.round-weights"
CORRECTED = "graphopt.correct-bias"

BYTES = 1 << 29
"""Of Gram matrices at a time: the samples are read again for more."""


@register
@dataclass(frozen=True)
class RoundWeights(Pass):
    """Round int8 weights so that layers' outputs stay near on the samples, in place of the weights.

    Lossy, keeps the signature; works on a quantized graph, in the pipeline that quantizes it.  Biases are to be
    corrected afterwards (correct-bias): the mean of the error is left to them.

    Options:
        only, skip: globs of layer names.
        damping: of the covariances; more trusts the samples less.
        sweeps: of coordinate descent behind GPTQ, at most.
        rows: taken of each tensor and sample, at random; 0 for all.
    """

    name: ClassVar[str] = "round-weights"
    exactness: ClassVar[Any] = "lossy"
    scope: ClassVar[Any] = "model"
    only: tuple[str, ...] = ("*",)
    skip: tuple[str, ...] = ()
    damping: float = DAMPING
    sweeps: int = SWEEPS
    rows: int = 256

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose a change for each layer."""
        found, blocked = find_layers(graph, self.only, self.skip)
        for name, why in blocked.items():
            yield Change(name, "round its weight", why)
        mark = f"damping={self.damping} sweeps={self.sweeps} rows={self.rows}"
        todo = {name: layer for name, layer in found.items() if ctx.model.metadata(layer.node).get(MARK) != mark}
        if not todo:
            return
        weights = float_weights(todo, ctx.reference().graph) if ctx.reference else {}
        requests: dict[str, GramRequest] = {}
        for name, layer in todo.items():
            weight = weights.get(name, "there is no model before quantizing")
            request = request_of(layer.node, layer.codes.shape)
            if isinstance(weight, str) or request is None:
                yield Change(name, "round its weight", weight if isinstance(weight, str) else "its inputs are no rows")
            elif request.width > WIDEST:
                yield Change(name, "round its weight", f"{request.width} inputs: their Gram matrix would be too large")
            else:
                requests[name] = request
        with Edit(graph) as edit:
            for batch in _batches(requests):
                grams = ctx.grams(batch, self.rows)
                for name in batch:
                    yield self._change(edit, ctx, todo[name], weights[name], grams.get(name), mark)

    def _change(
        self, edit: Edit, ctx: Context, layer: IntegerLayer, weight: Any, gram: Gram | None, mark: str
    ) -> Change:
        if gram is None or not gram.count:
            return Change(layer.label, "round its weight", "nothing that flows into it on the samples is known")
        width = gram.matrix.shape[-1]
        peak = int(np.abs(layer.codes.astype(np.int32)).max(initial=1))  # fewer bits were asked for where it is small
        rounded = round_rows(
            layer.rows(weight), layer.row_scale, gram.covariance().reshape(-1, width, width),
            low=-peak, high=min(peak, 127), damping=self.damping, sweeps=self.sweeps,
        )  # fmt: skip
        return Change(
            layer.label, "its weight is rounded again", _gain(rounded), _writer(edit, ctx, layer, rounded, mark)
        )


def _writer(edit: Edit, ctx: Context, layer: IntegerLayer, rounded: Rounded, mark: str) -> Callable[[], None]:
    def apply() -> None:
        codes = layer.from_rows(rounded.codes).astype(np.int8)
        if not np.array_equal(codes, layer.codes):
            name = layer.dequantize.inputs[0].name
            edit.set_input(layer.dequantize, 0, ctx.constant(f"{name}_rounded", codes))
        held = ctx.model.metadata(layer.node)
        held[MARK] = mark
        held.pop(CORRECTED, None)

    return apply


def _gain(rounded: Rounded) -> str:
    before, after = float(rounded.nearest.sum()), float(rounded.cost.sum())
    if before <= after:
        return "nothing better than the nearest codes was found"
    return f"variance of its output's error: {after / before:.0%} of what the nearest codes give"


def _batches(requests: Mapping[str, GramRequest]) -> Iterator[dict[str, GramRequest]]:
    """Cut requests into runs whose matrices fit `BYTES` together, or are alone."""
    batch: dict[str, GramRequest] = {}
    used = 0
    for name, request in requests.items():
        size = 8 * request.group * request.width**2
        if batch and used + size > BYTES:
            yield batch
            batch, used = {}, 0
        batch[name] = request
        used += size
    if batch:
        yield batch
