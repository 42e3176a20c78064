"""Ranges of activations made smaller or larger where that brings the model's outputs nearer.

The graph is a quantized one (quantize-static).  A range that suits a tensor need not suit what is computed of it: a few
large values may carry all that counts, or nothing.  So each scale is tried times a few factors, its zero point kept,
with all others as they are, and the outputs are compared with those of the model before quantizing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import array_of
from graphopt.analysis.integer_layers import FORMS
from graphopt.base import Change, Context, Measure, Pass
from graphopt.codes import normal
from graphopt.edit import Edit
from graphopt.ops import DEQUANTIZE, QUANTIZE, is_standard
from graphopt.registry import register

MARK = "graphopt.refine-ranges"

FACTORS = (1.25, 0.8)
"""Tried of each scale; the first that helps is tried once more on top of itself."""

LEAST_GAIN = 0.005
"""Part of the noise at the outputs that another range must take away: less is chance."""


@dataclass
class _Code:
    """A scale of activations.

    Attributes:
        scale: the constant.
        nodes: all that read it.
        first: the first QuantizeLinear among them.
    """

    scale: gs.Constant
    nodes: list[gs.Node] = field(default_factory=list)

    @property
    def first(self) -> gs.Node:
        return next(n for n in self.nodes if is_standard(n, *QUANTIZE))

    @property
    def label(self) -> str:
        return str(self.first.inputs[0].name)


@register
@dataclass(frozen=True)
class RefineRanges(Pass):
    """Try other ranges of activations, and keep those that bring the outputs nearer.

    Lossy, keeps the signature; works on a quantized graph, in the pipeline that quantizes it, behind round-weights and
    correct-bias.  Takes two to three runs of the samples for each range.

    Options:
        samples: read at most, 0 for all.
    """

    name: ClassVar[str] = "refine-ranges"
    exactness: ClassVar[Any] = "lossy"
    scope: ClassVar[Any] = "model"
    samples: int = 4

    def __post_init__(self) -> None:
        """Refuse values that are none of the choices.

        Raises:
            ValueError: `samples` is negative.
        """
        if self.samples < 0:
            raise ValueError(f"samples is a number of samples, or 0 for all, not {self.samples}")

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose a change for each code, measured with those before it as they were found best."""
        mark = f"samples={self.samples}"
        todo = []
        with Edit(graph) as edit:
            for code in _codes(graph):
                why = _why_not(edit, code)
                if why:
                    yield Change(code.label, "another range", why)
                elif ctx.model.metadata(code.first).get(MARK) != mark:
                    todo.append(code)
            if not todo or ctx.reference is None:
                return
            measure = ctx.output_noise(ctx.reference(), [c.scale.name for c in todo], self.samples)
            found: dict[str, np.ndarray[Any, Any]] = {}
            least = before = measure(found)
            for code in todo:
                factor, least = _best(measure, code, found, least)
                yield _change(edit, ctx, code, factor, (before, least), mark)
                before = least


def _codes(graph: gs.Graph) -> list[_Code]:
    """Return the scales of activations, in the graph's order."""
    found: dict[int, _Code] = {}
    for node in graph.nodes:
        if is_standard(node, "QuantizeLinear") and isinstance(node.inputs[1], gs.Constant):
            found.setdefault(id(node.inputs[1]), _Code(node.inputs[1]))
    for node in graph.nodes:
        for tensor in {id(t): t for t in node.inputs}.values():
            if id(tensor) in found:
                found[id(tensor)].nodes.append(node)
    return list(found.values())


def _why_not(edit: Edit, code: _Code) -> str:
    """Return why a scale cannot be changed on its own, empty where it can."""
    values = array_of(code.scale)
    if values is None or values.size != 1 or values.dtype != np.float32:
        return "it has not one scale"
    if not all(is_standard(n, *QUANTIZE, *DEQUANTIZE) and n.inputs[1] is code.scale for n in code.nodes):
        return "its scale is read by something else"
    members = {id(n) for n in code.nodes}
    if len(edit.consumers(code.scale)) != len(members):
        return "its scale is read in a subgraph"
    for node in code.nodes:
        if not is_standard(node, *QUANTIZE):
            continue
        if any(id(reader) not in members for reader in edit.consumers(node.outputs[0])):
            return "its codes are read with another scale"
    return ""


def _best(measure: Measure, code: _Code, found: dict[str, np.ndarray[Any, Any]], least: float) -> tuple[float, float]:
    """Return the best factor of a scale and the noise with it; note the new scale in `found`."""
    scale = np.asarray(code.scale.values, np.float32)
    best = 1.0
    for step in FACTORS:
        while True:
            factor = best * step
            noise = measure({**found, code.scale.name: normal(scale * np.float32(factor))})
            if not noise < least * (1 - LEAST_GAIN):
                break
            best, least = factor, noise
            found[code.scale.name] = normal(scale * np.float32(factor))
        if best != 1.0:
            break
    return best, least


def _change(edit: Edit, ctx: Context, code: _Code, factor: float, noise: tuple[float, float], mark: str) -> Change:
    if factor == 1.0:
        return Change(
            code.label, "its range stays", "no other brings the outputs nearer", _writer(edit, ctx, code, 1.0, mark)
        )
    why = f"noise at the outputs {noise[1] / noise[0]:.1%} of what it was"
    return Change(code.label, f"its range times {factor:.3g}", why, _writer(edit, ctx, code, factor, mark))


def _writer(edit: Edit, ctx: Context, code: _Code, factor: float, mark: str) -> Callable[[], None]:
    def apply() -> None:
        ctx.model.metadata(code.first)[MARK] = mark
        if factor == 1.0:
            return
        old = np.asarray(code.scale.values, np.float32)
        new = ctx.constant(f"{code.scale.name}_refined", normal(old * np.float32(factor)))
        ratio = float(np.asarray(new.values, np.float64) / old)
        for node in code.nodes:
            edit.set_input(node, 1, new)
        for node in code.nodes:
            for reader in edit.consumers(node.outputs[0]) if is_standard(node, *DEQUANTIZE) else ():
                _follow(edit, ctx, reader, node.outputs[0], ratio)

    return apply


def _follow(edit: Edit, ctx: Context, layer: gs.Node, source: gs.Tensor, ratio: float) -> None:
    """Write the bias of a layer anew whose input has another scale: its own scale is the product of both others."""
    form = FORMS.get(layer.op) if is_standard(layer) else None
    if form is None or form.bias is None or len(layer.inputs) <= form.bias or layer.inputs[0] is not source:
        return
    bias = layer.inputs[form.bias]
    maker = bias.inputs[0] if bias.inputs else None
    if maker is None or not is_standard(maker, *DEQUANTIZE):
        return
    codes, scale = array_of(maker.inputs[0]), array_of(maker.inputs[1])
    if codes is None or scale is None or codes.dtype != np.int32:
        return
    wanted = np.asarray(scale.astype(np.float64) * ratio, np.float32)
    values = codes.astype(np.float64) * scale.astype(np.float64)
    moved = np.clip(np.rint(values / wanted), -(2**30), 2**30).astype(np.int32)
    edit.set_input(maker, 0, ctx.constant(f"{maker.inputs[0].name}_refined", moved))
    edit.set_input(maker, 1, ctx.constant(f"{maker.inputs[1].name}_refined", wanted))
