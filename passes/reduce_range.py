"""Seven bits for weights whose products saturate on processors without VNNI.

    w = DQ(W_q; s)   ->   DQ(round(W / 2s); 2s)       in the output channels where pairs of products leave 16 bits

Which channels those are is counted on the samples, with the instruction emulated: see `graphopt.saturation`, which has
the sources.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import array_of
from graphopt.analysis.integer_layers import FORMS, IntegerLayer, find_layers, float_weights
from graphopt.base import Change, Context, Pass
from graphopt.codes import Affine
from graphopt.edit import Edit
from graphopt.registry import register
from graphopt.saturation import check, layers, reduced, saturates

Array = np.ndarray[Any, Any]


@register
@dataclass(frozen=True)
class ReduceRange(Pass):
    """Give weights 7 bits in the channels where 8-bit products saturate on the samples, for processors without VNNI.

    Lossy, keeps the signature; works on a quantized graph, in the pipeline that quantizes it, before round-weights.

    Options:
        isa: `avx2` or `avx512`, which saturate; `vnni`, which does not, and where nothing is to be done.
        rows: rows of each layer's input that are looked at in each sample, drawn at random.
    """

    name: ClassVar[str] = "reduce-range"
    exactness: ClassVar[Any] = "lossy"
    scope: ClassVar[Any] = "model"
    isa: str = "avx2"
    rows: int = 256

    def __post_init__(self) -> None:
        """Refuse an instruction set that is not known, and no rows.

        Raises:
            ValueError: `rows` is below 1.
        """
        saturates(self.isa)
        if self.rows < 1:
            raise ValueError(f"rows is at least 1, not {self.rows}")

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose one change per layer with channels that saturate."""
        concerned = layers(graph)
        if not saturates(self.isa) or not concerned:
            return
        known, _ = find_layers(graph)
        reference = None if ctx.reference is None else ctx.reference().graph
        weights = {} if reference is None else float_weights(known, reference)
        found = check(concerned, ctx.fetches(layer.codes for layer in concerned), rows=self.rows, seed=ctx.seed)
        with Edit(graph) as edit:
            for name, saturation in found.items():
                if not saturation.channels.any():
                    continue
                what = f"7 bits for {int(saturation.channels.sum())} of {saturation.channels.size} output channels"
                weight = weights.get(name, "the model before quantizing is not known")
                if name not in known or isinstance(weight, str):
                    yield Change(name, what, weight if isinstance(weight, str) else "its weight has not its own codes")
                    continue
                why = f"{saturation.fraction:.2%} of its outputs would be cut off on {self.isa}"
                yield Change(name, what, why, _writer(edit, ctx, known[name], weight, saturation.channels))


def _writer(edit: Edit, ctx: Context, layer: IntegerLayer, weight: Array, channels: Array) -> Any:
    def apply() -> None:
        maker = layer.dequantize
        axis = int(maker.attrs.get("axis", 1)) if layer.scale.size > 1 else None
        code = Affine(array_of(maker.inputs[1]), np.zeros(layer.scale.shape, np.int8), axis)  # type: ignore[arg-type]
        moved = reduced(weight, code, channels)
        base = maker.inputs[0].name
        edit.set_input(maker, 0, ctx.constant(f"{base}_reduced", moved.quantize(weight)))
        edit.set_input(maker, 1, ctx.constant(f"{base}_reduced_scale", np.asarray(moved.scale, np.float32)))
        _rescale_bias(edit, ctx, layer, np.asarray(moved.scale, np.float64))

    return apply


def _rescale_bias(edit: Edit, ctx: Context, layer: IntegerLayer, scale: Array) -> None:
    """Keep the bias's scale the product of those of input and weight."""
    index = FORMS[layer.node.op].bias
    if index is None or len(layer.node.inputs) <= index or not layer.node.inputs[index].inputs:
        return
    maker = layer.node.inputs[index].inputs[0]
    codes, old = array_of(maker.inputs[0]), array_of(maker.inputs[1])
    if codes is None or old is None or layer.input_scale is None:
        return
    new = np.asarray(scale * layer.input_scale, np.float32)
    values = codes.astype(np.float64) * old.astype(np.float64)
    base = maker.inputs[0].name
    edit.set_input(maker, 0, ctx.constant(f"{base}_rescaled", np.rint(values / new).astype(np.int32)))
    edit.set_input(maker, 1, ctx.constant(f"{base}_rescaled_scale", new))
