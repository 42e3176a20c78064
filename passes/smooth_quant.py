"""SmoothQuant: channels of a product's input made of one size, so that its integer codes lose less.

    x @ W            =  (x / s) @ (s W)            s: a factor per channel, from statistics (`smooth_scales.py`)
    norm(v; g, b)/s  =  norm(v; g / s, b / s)      likewise of products and biases, through what is homogeneous
    x / s            =  x * (1 / s)                a multiplication of its own where nothing before can take it

One large channel decides the step of all of them where a tensor has one scale.  In transformers a few channels of what
a LayerNormalization returns are ten times larger than the others, and always the same ones; so are some behind the
activation of a feed-forward block.  Where the sum around the block reads the tensor, too (normalisation behind the
block), it must stay as it is: then a multiplication is put in for the products alone, which costs little beside them.

all-MiniLM-L6 (sums before its normalisations), int8 by quantize-dynamic, 2,000 sentences; time with 8 x 64 tokens on
one thread, of float in ORT (ORT 1.31, AVX-512 VNNI):

                                        cosine to float   nearest neighbour kept   time
    as it is                                0.9934               93.8 %             0.40
    the published factors (alpha 0.5)       0.9916               93.7 %
    searched                                0.9986               97.4 %             0.42
    searched, weights of 7 bits             0.9976               96.6 %

Source: Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", ICML
2023.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import array_of, is_constant
from graphopt.base import Change, Context, Pass
from graphopt.edit import Edit, label
from graphopt.importer import NodeOrigin, origin
from graphopt.names import left_out
from graphopt.ops import HOMOGENEOUS, is_standard
from graphopt.registry import register

from .new_nodes import Maker
from .quantize_dynamic import why_not_layer
from .smooth_scales import ChannelStatistics, Factors, find_factors

Array = np.ndarray[Any, Any]

MARK = "graphopt.smooth-quant"
"""Metadata of a product that has been seen to: it is not touched again."""

NORMS = frozenset({"LayerNormalization", "RMSNormalization"})
"""Their factor and shift lie along the last axes."""

FREE, PAID = 0.9, 0.5
"""Part of the error that may stay where the factors cost nothing, and where they cost a multiplication."""

LOUD = 2e-4
"""Variance of a product's error over that of its result, from which a multiplication is worth it."""


class _RefusedError(Exception):
    """The factors cannot go further back."""


@dataclass
class _Group:
    """Products that read one tensor."""

    source: gs.Tensor
    layers: list[gs.Node] = field(default_factory=list)

    @property
    def where(self) -> str:
        """What reports call it."""
        return label(self.layers[0])


@register
@dataclass(frozen=True)
class SmoothQuant(Pass):
    """Make the channels that MatMul and Gemm read of one size, before they are quantized.

    Exact but for roundings, keeps the signature; needs samples.  Works on the main graph.  Refuses what
    quantize-dynamic cannot quantize, channels that are of one size already, and what was seen to before.

    Options:
        only, skip: globs of layer names; what `only` does not name, or `skip` does, stays as it is.
        alpha: how much of the difference goes to the weights, above 0 to 1; 0 searches, for each input.
        insert: put in a multiplication where nothing before can take the factors.
    """

    name: ClassVar[str] = "smooth-quant"
    scope: ClassVar[Any] = "model"
    only: tuple[str, ...] = ("*",)
    skip: tuple[str, ...] = ()
    alpha: float = 0.0
    insert: bool = True

    def __post_init__(self) -> None:
        """Refuse an `alpha` out of range.

        Raises:
            ValueError: it is not from 0 to 1.
        """
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is 0 to 1, not {self.alpha}")

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose one change per tensor that products read."""
        with Edit(graph) as edit:
            groups: dict[int, _Group] = {}
            for node in graph.nodes:
                reason = self._why_not(node, ctx) if is_standard(node, "MatMul", "Gemm") else None
                if reason == "":
                    groups.setdefault(id(node.inputs[0]), _Group(node.inputs[0])).layers.append(node)
                elif reason is not None:
                    yield Change(label(node), "channels of one size", reason)
            if not groups:
                return
            if ctx.samples is None or ctx.samples.random:
                why = "the sizes of channels are measured on samples, and there are none (--data)"
                yield from (Change(group.where, "channels of one size", why) for group in groups.values())
                return
            names = {group.source.name: -1 for group in groups.values()}
            calibration = ctx.calibration(names, names)
            for group in groups.values():
                found = _statistics(calibration, group)
                if isinstance(found, str):
                    yield Change(group.where, "channels of one size", found)
                else:
                    yield self._change(_Writer(Maker(edit, ctx)), group, found)

    def _why_not(self, node: gs.Node, ctx: Context) -> str:
        where = label(node)
        if why := left_out(where, self.only, self.skip):
            return why
        held = origin(node)
        if held is not None and MARK in held.metadata:
            return "it was seen to before"
        return why_not_layer(node, ctx)

    def _change(self, writer: _Writer, group: _Group, channels: ChannelStatistics) -> Change:
        weights = [_weight(node) for node in group.layers]
        factors = find_factors(channels, weights, self.alpha)
        count = len(group.layers)
        what = f"{len(factors.values)} channels of one size for {count} product{'s' if count > 1 else ''}"
        error = f"error {_decibels(factors.before)} -> {_decibels(factors.after)}"
        try:
            if factors.ratio > FREE and not self.alpha:
                return Change(group.where, what, f"the channels are of one size already: {error}")
            steps = writer.steps(group.source, {id(n) for n in group.layers}, 1 / factors.values)
            return Change(group.where, what, error, lambda: writer.migrate(group, factors, steps))
        except _RefusedError as refused:
            if not self.insert:
                return Change(group.where, what, str(refused))
            if (factors.ratio > PAID or factors.before < LOUD) and not self.alpha:
                return Change(group.where, what, f"{refused}, and a multiplication brings too little: {error}")
            why = f"{error}; {refused}, so a multiplication goes in between"
            return Change(group.where, what, why, lambda: writer.insert(group, factors))


def _decibels(noise: float) -> str:
    return "none" if noise <= 0 else f"{10 * math.log10(noise):.0f} dB"


def _statistics(calibration: Any, group: _Group) -> ChannelStatistics | str:
    """Return the statistics of a group's channels, or what is odd about them."""
    name = group.source.name
    problem = calibration.problems(name)
    if problem is not None:
        return str(problem)
    found = ChannelStatistics(
        calibration.channel_low(name), calibration.channel_high(name), calibration.channel_second_moment(name)
    )
    depth = _weight(group.layers[0]).shape[0]
    return found if len(found.low) == depth else f"'{name}' has {len(found.low)} channels, its readers {depth}"


def _weight(node: gs.Node) -> Array:
    """Return a product's weight, inputs by outputs."""
    values = np.asarray(array_of(node.inputs[1]))
    return values.T if node.attrs.get("transB", 0) else values


class _Writer:
    """Moves factors in one graph."""

    def __init__(self, maker: Maker) -> None:
        self.maker, self.edit, self.shapes = maker, maker.edit, maker.ctx.shapes

    def migrate(self, group: _Group, factors: Factors, steps: list[Callable[[], None]]) -> None:
        """Multiply what makes the input, and the weights that read it."""
        for step in steps:
            step()
        self._rows(group, factors, None)

    def insert(self, group: _Group, factors: Factors) -> None:
        """Multiply the input for the group's products only."""
        source = group.source
        made = self.maker.tensor(f"{source.name}/smooth", self.shapes.proved(source))
        constant = self.maker.constant(f"{source.name}/factors", (1 / factors.values).astype(np.float32))
        self.maker.node("Mul", [source, constant], [made], like=group.layers[:1])
        self._rows(group, factors, made)

    def _rows(self, group: _Group, factors: Factors, source: gs.Tensor | None) -> None:
        made: dict[tuple[int, bool], gs.Tensor] = {}
        for node in group.layers:
            weight, turned = node.inputs[1], bool(node.attrs.get("transB", 0))
            if (id(weight), turned) not in made:
                column = factors.values if turned else factors.values[:, None]
                values = (np.asarray(array_of(weight), np.float64) * column).astype(np.float32)
                made[id(weight), turned] = self.maker.constant(f"{weight.name}/smooth", values)
            self.edit.set_input(node, 1, made[id(weight), turned])
            if source is not None:
                self.edit.set_input(node, 0, source)
            _mark(node)

    def steps(self, tensor: gs.Tensor, readers: Collection[int], factor: Array) -> list[Callable[[], None]]:
        """Return what multiplies a tensor by a factor per channel (its last axis), in what makes it.

        Raises:
            _RefusedError: something else reads it, or what makes it does not let the factor through.
        """
        if self.edit.is_output(tensor):
            raise _RefusedError(f"'{tensor.name}' is an output of the graph")
        for other in self.edit.consumers(tensor):
            if id(other) not in readers:
                raise _RefusedError(f"{other.op} '{label(other)}' reads it, too")
        node = tensor.inputs[0] if len(tensor.inputs) == 1 else None
        if node is None or not self.edit.is_local(node) or not is_standard(node):
            raise _RefusedError(f"'{tensor.name}' is made elsewhere")
        if (self.shapes.proved(tensor).shape or (None,))[-1] != len(factor):
            raise _RefusedError(f"the last axis of '{tensor.name}' is not certain")
        if node.op in HOMOGENEOUS and node.outputs[0] is tensor and len(node.inputs) == 1:
            return self.steps(node.inputs[0], {id(node)}, factor)
        if node.op in NORMS and node.outputs[0] is tensor:
            return self._norm(node, factor)
        if node.op in ("Mul", "Add") and len(node.inputs) == 2:
            return self._operands(node, factor)
        if node.op in ("MatMul", "Gemm"):
            return self._product(node, factor)
        raise _RefusedError(f"{node.op} '{label(node)}' does not let factors through")

    def _norm(self, node: gs.Node, factor: Array) -> list[Callable[[], None]]:
        scales = [i for i, t in enumerate(node.inputs) if i > 0 and t.name]
        for index in scales:
            if not is_constant(node.inputs[index]) or len(node.inputs[index].shape or ()) != 1:
                raise _RefusedError(f"{node.op} '{label(node)}' has computed scales, or such of several axes")
        return [self._scaled(node, index, factor) for index in scales]

    def _operands(self, node: gs.Node, factor: Array) -> list[Callable[[], None]]:
        """A sum lets factors into both operands, a product into one: a constant where there is one.

        A number stays a number: it may belong to an activation that ORT has a kernel for.
        """
        constants = [i for i, t in enumerate(node.inputs) if is_constant(t)]
        if node.op == "Mul" and not constants:
            return self._either(node, factor)
        if node.op == "Mul" and math.prod(node.inputs[constants[0]].shape or ()) > 1:
            return [self._scaled(node, constants[0], factor)]
        if node.op == "Mul":
            return self.steps(node.inputs[1 - constants[0]], {id(node)}, factor)
        if not constants:
            raise _RefusedError(f"{node.op} '{label(node)}' does not let factors through")
        return [
            self._scaled(node, constants[0], factor),
            *self.steps(node.inputs[1 - constants[0]], {id(node)}, factor),
        ]

    def _either(self, node: gs.Node, factor: Array) -> list[Callable[[], None]]:
        refusals = []
        for tensor in node.inputs:
            try:
                return self.steps(tensor, {id(node)}, factor)
            except _RefusedError as refused:
                refusals.append(str(refused))
        raise _RefusedError(refusals[-1])

    def _product(self, node: gs.Node, factor: Array) -> list[Callable[[], None]]:
        weight = node.inputs[1]
        if not isinstance(weight, gs.Constant) or weight.dtype != np.float32 or len(weight.shape) != 2:
            raise _RefusedError(f"{node.op} '{label(node)}' has no constant weight")
        turned = bool(node.attrs.get("transB", 0))
        found = [self._scaled(node, 1, factor[:, None] if turned else factor)]
        if node.op == "Gemm" and len(node.inputs) > 2 and node.inputs[2].name:
            if not is_constant(node.inputs[2]):
                raise _RefusedError(f"Gemm '{label(node)}' has a computed bias")
            found.append(self._scaled(node, 2, factor))
        return found

    def _scaled(self, node: gs.Node, index: int, factor: Array) -> Callable[[], None]:
        """Return what multiplies a node's constant input.

        Raises:
            _RefusedError: it is no float32, or does not lie along the channels.
        """
        constant = node.inputs[index]
        shape = list(constant.shape or ())
        fits = factor.ndim > 1 or math.prod(shape) == 1 or shape[-1] == len(factor)
        if constant.dtype != np.float32 or not fits:
            raise _RefusedError(f"'{constant.name}' is of another type, or not along the channels")

        def apply() -> None:
            values = (np.asarray(array_of(node.inputs[index]), np.float64) * factor).astype(np.float32)
            self.edit.set_input(node, index, self.maker.constant(f"{constant.name}/smooth", values))

        return apply


def _mark(node: gs.Node) -> None:
    held = origin(node)
    if held is None:
        node.origin = NodeOrigin(onnx.NodeProto(), {MARK: "1"})
    else:
        held.metadata[MARK] = "1"
