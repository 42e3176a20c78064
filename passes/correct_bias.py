"""Biases of quantized layers moved, so that the mean of each output channel is what it was in float.

The graph is a quantized one (quantize-static); the float weights come from the model before quantizing, means from the
samples.  See `graphopt.bias_correction` for the algebra and its source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import array_of
from graphopt.analysis.integer_layers import FORMS, IntegerLayer, find_layers, float_weights, twins
from graphopt.base import Change, Context, Pass
from graphopt.bias_correction import fast_shift, levels, measured_shift
from graphopt.edit import Edit, make_node
from graphopt.ops import DEQUANTIZE, is_standard
from graphopt.registry import register

Array = np.ndarray[Any, Any]

MARK = "graphopt.correct-bias"
MODES = ("fast", "full")

LARGEST = 2**30
"""An int32 bias beyond this leaves no room for the products that are added to it."""

WHAT = "move its bias"


@register
@dataclass(frozen=True)
class CorrectBias(Pass):
    """Move biases of int8 layers so that each output channel keeps its mean on the samples.

    Lossy, keeps the signature; works on a quantized graph, in the pipeline that quantizes it, behind round-weights.

    Options:
        only, skip: globs of layer names.
        mode: `full` measures the means of each layer's output in both models, one layer after the other; `fast` takes
            the means of the layers' inputs, once.
        samples: read at most for each measurement, 0 for all.
    """

    name: ClassVar[str] = "correct-bias"
    exactness: ClassVar[Any] = "lossy"
    scope: ClassVar[Any] = "model"
    only: tuple[str, ...] = ("*",)
    skip: tuple[str, ...] = ()
    mode: str = "fast"
    samples: int = 32

    def __post_init__(self) -> None:
        """Refuse values that are none of the choices.

        Raises:
            ValueError: `mode` is something else, or `samples` negative.
        """
        if self.mode not in MODES:
            raise ValueError(f"mode is one of {', '.join(MODES)}, not {self.mode!r}")
        if self.samples < 0:
            raise ValueError(f"samples is a number of samples, or 0 for all, not {self.samples}")

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose a change for each layer; in full mode each is measured with those before it applied."""
        found, blocked = find_layers(graph, self.only, self.skip)
        mark = f"mode={self.mode} samples={self.samples}"
        todo = {}
        for name, layer in found.items():
            if ctx.model.metadata(layer.node).get(MARK) == mark:
                continue
            why = _why_not(layer)
            if why:
                blocked[name] = why
            else:
                todo[name] = layer
        for name, why in blocked.items():
            yield Change(name, WHAT, why)
        if todo and ctx.reference is None:
            yield Change("the model", "move its biases", "there is no model before quantizing")
        elif todo:
            with Edit(graph) as edit:
                yield from (
                    self._fast(edit, ctx, todo, mark) if self.mode == "fast" else self._full(edit, ctx, todo, mark)
                )

    def _fast(self, edit: Edit, ctx: Context, todo: Mapping[str, IntegerLayer], mark: str) -> Iterator[Change]:
        assert ctx.reference is not None
        weights = float_weights(todo, ctx.reference().graph)
        inputs = {name: layer.node.inputs[0].name for name, layer in todo.items()}
        axes = {inputs[name]: (1, layer.codes.ndim) for name, layer in todo.items()}
        means = ctx.means(axes, limit=self.samples)
        for name, layer in todo.items():
            weight, mean = weights[name], means.get(inputs[name])
            if isinstance(weight, str) or mean is None:
                yield Change(name, WHAT, weight if isinstance(weight, str) else "its input is empty on the samples")
                continue
            rounded = layer.codes.astype(np.float64) * layer.spread_scale
            yield self._change(edit, ctx, layer, fast_shift(layer.rows(weight), layer.rows(rounded), mean), mark)

    def _full(self, edit: Edit, ctx: Context, todo: Mapping[str, IntegerLayer], mark: str) -> Iterator[Change]:
        assert ctx.reference is not None
        reference = ctx.reference()
        known, weights = twins(todo, reference.graph), float_weights(todo, reference.graph)
        pairs = {}
        for name, layer in todo.items():
            weight = weights[name]
            if isinstance(weight, str):
                yield Change(name, WHAT, weight)
            else:
                pairs[name] = (layer.node.outputs[0].name, known[name].outputs[0].name, (1, layer.codes.ndim))
        wanted = ctx.means({float_: axis for _, float_, axis in pairs.values()}, reference, self.samples)
        by_node = {id(todo[name].node): name for name in pairs}
        for level in levels(edit.graph, [todo[name].node for name in pairs]):
            names = [by_node[id(node)] for node in level]
            found = ctx.means({pairs[name][0]: pairs[name][2] for name in names}, limit=self.samples)
            for name in names:
                own, float_, _ = pairs[name]
                if own not in found or float_ not in wanted:
                    yield Change(name, WHAT, "its output is empty on the samples")
                else:
                    yield self._change(edit, ctx, todo[name], measured_shift(wanted[float_], found[own]), mark)

    def _change(self, edit: Edit, ctx: Context, layer: IntegerLayer, shift: Array, mark: str) -> Change:
        why = f"the mean of its output was off by {float(np.abs(shift).max(initial=0)):.3g} at most"
        return Change(layer.label, "its bias is moved", why, _writer(edit, ctx, layer, shift, mark))


def _why_not(layer: IntegerLayer) -> str:
    """Return why a layer's bias cannot be moved, empty where it can."""
    index = FORMS[layer.node.op].bias
    if index is None:
        return f"{layer.node.op} has no bias"
    bias = _bias(layer)
    if bias is None:
        return "" if layer.input_scale is not None else "it has no bias, and its input has not one scale"
    maker = bias.inputs[0] if bias.inputs else None
    if maker is None or not is_standard(maker, *DEQUANTIZE):
        return "its bias is not stored as 32-bit codes"
    if len(bias.outputs) > 1:
        return f"several layers share its bias '{bias.name}'"
    codes, scale = array_of(maker.inputs[0]), array_of(maker.inputs[1])
    if codes is None or scale is None or codes.dtype != np.int32 or codes.size != layer.scale.size:
        return "its bias is not stored as 32-bit codes"
    return ""


def _bias(layer: IntegerLayer) -> Any:
    index = FORMS[layer.node.op].bias
    if index is None or len(layer.node.inputs) <= index or not layer.node.inputs[index].name:
        return None
    return layer.node.inputs[index]


def _writer(edit: Edit, ctx: Context, layer: IntegerLayer, shift: Array, mark: str) -> Callable[[], None]:
    def apply() -> None:
        bias = _bias(layer)
        if bias is None:
            _add(edit, ctx, layer, shift)
        else:
            maker = bias.inputs[0]
            codes, scale = array_of(maker.inputs[0]), array_of(maker.inputs[1])
            assert codes is not None
            assert scale is not None
            moved = _rounded(codes + shift.reshape(codes.shape) / scale.astype(np.float64))
            edit.set_input(maker, 0, ctx.constant(f"{maker.inputs[0].name}_moved", moved))
        ctx.model.metadata(layer.node)[MARK] = mark

    return apply


def _add(edit: Edit, ctx: Context, layer: IntegerLayer, shift: Array) -> None:
    """Give a layer a bias."""
    scale = np.asarray(layer.scale.astype(np.float64) * (layer.input_scale or 1.0), np.float32)
    made = gs.Variable(ctx.fresh_name(f"{layer.node.outputs[0].name}_bias"), np.float32, [len(shift)])
    inputs = [
        ctx.constant(f"{made.name}_quantized", _rounded(shift / scale)),
        ctx.constant(f"{made.name}_scale", scale),
        ctx.constant(f"{made.name}_zero_point", np.zeros(len(shift), np.int32)),
    ]
    node = make_node("DequantizeLinear", inputs, [made], {"axis": 0}, name=ctx.fresh_name(f"{made.name}_DQ"))
    with Edit(edit.graph) as now:  # the layers behind are measured next
        now.insert_after(None, [node])
        now.set_input(layer.node, FORMS[layer.node.op].bias or 0, made)


def _rounded(codes: Array) -> Array:
    return np.clip(np.rint(codes), -LARGEST, LARGEST).astype(np.int32)
