"""Channels between two layers made of one size, so that one integer scale suits them all.

    f(W₁ x + b₁) -> W₂      ->      f(W₁/s x + b₁/s) -> W₂ s         f(c y) = c f(y) for every c > 0

The factors are powers of two, which no float is rounded by: see `graphopt.equalization`.  Pairs of layers that share a
layer are worked on in turn until none has anything left to even out.

A Clip between the layers blocks it: it cuts all channels at the same number.  Taking it for harmless because no sample
reaches that number is no help: on EfficientNet-Lite0 other photographs did, and the float model was 14 dB off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import array_of
from graphopt.analysis.placement import output_axis
from graphopt.base import Change, Context, Pass
from graphopt.edit import Edit, label
from graphopt.equalization import balanced, filled, within_reach
from graphopt.ops import CHANNEL_POOLS, HOMOGENEOUS, is_standard
from graphopt.registry import register
from graphopt.targets import OUTPUT_AXIS

Array = np.ndarray[Any, Any]

SOURCES = ("weights", "samples")

ROUNDS = 40
"""Times that all pairs are looked at, at most."""

WHAT = "even out its channels"


@dataclass
class _Pair:
    """A layer, and the layers that read its channels.

    Attributes:
        producer: its output channels are divided by the factors.
        consumers: their input channels are multiplied.
        nonnegative: whether what lies between cuts off what is below zero.
        exponents: of the factors found so far.
    """

    producer: gs.Node
    consumers: list[gs.Node] = field(default_factory=list)
    nonnegative: bool = False
    exponents: Array = field(default_factory=lambda: np.zeros(0, np.int64))


class _BlockedError(Exception):
    """The channels cannot be rescaled."""


@register
@dataclass(frozen=True)
class EqualizeChannels(Pass):
    """Even out the channels between layers, so that quantizing them costs less.

    Exact to the bit: all factors are powers of two.  Keeps the signature.  Conv, Gemm and MatMul with float32 weights
    that they alone read, with Relu and the like and pools between.

    Options:
        by: `weights` compares the weights on both sides; `samples` takes the activations between for the first side.
    """

    name: ClassVar[str] = "equalize-channels"
    by: str = "weights"

    def __post_init__(self) -> None:
        """Refuse values that are none of the choices.

        Raises:
            ValueError: `by` is something else.
        """
        if self.by not in SOURCES:
            raise ValueError(f"by is one of {', '.join(SOURCES)}, not {self.by!r}")

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose a change for each pair."""
        with Edit(graph) as edit:
            pairs = []
            for node in graph.nodes:
                if not is_standard(node, *OUTPUT_AXIS) or (
                    node.op == "MatMul" and len(node.inputs[1].shape or ()) != 2
                ):
                    continue
                try:
                    pairs.append(_pair(edit, node))
                except _BlockedError as error:
                    yield Change(label(node), WHAT, str(error))
            ranges = self._ranges(graph, ctx, pairs)
            _settle(pairs, ranges)
            for pair in pairs:
                if pair.exponents.any():
                    yield Change(
                        label(pair.producer), "its channels are evened out", _said(pair), _writer(edit, ctx, pair)
                    )

    def _ranges(self, graph: gs.Graph, ctx: Context, pairs: list[_Pair]) -> dict[int, Array]:
        """Return, by the producer's id, how large each channel becomes on the samples; nothing for inner graphs."""
        if self.by == "weights" or not pairs or graph is not ctx.model.graph:
            return {}
        axes = {p.producer.outputs[0].name: 1 if p.producer.op == "Conv" else -1 for p in pairs}
        found = ctx.calibration(axes, axes)
        ranges = {}
        for pair in pairs:
            name = pair.producer.outputs[0].name
            if name in found.names:
                low, high = found.channel_low(name), found.channel_high(name)
                ranges[id(pair.producer)] = np.maximum(high, 0 if pair.nonnegative else -low)
        return ranges


def _pair(edit: Edit, producer: gs.Node) -> _Pair:
    """Return a layer with those that read its channels.

    Raises:
        _BlockedError: they cannot be rescaled.
    """
    _own_weight(edit, producer)
    if producer.op == "MatMul" and len(producer.inputs[1].shape) != 2:
        raise _BlockedError("its weight is no matrix")
    bias = producer.inputs[2] if len(producer.inputs) > 2 and producer.inputs[2].name else None
    if bias is not None and (not isinstance(bias, gs.Constant) or bias.dtype != np.float32):
        raise _BlockedError("its bias is computed")
    channels = int(producer.inputs[1].shape[output_axis(producer)])
    pair = _Pair(producer, exponents=np.zeros(channels, np.int64))
    _follow(edit, pair, producer.outputs[0], spatial=producer.op == "Conv")
    readers = [t for n in pair.consumers for t in n.inputs]
    if any(t is producer.inputs[1] for t in readers):
        raise _BlockedError("a layer behind it has the same weight")
    return pair


def _follow(edit: Edit, pair: _Pair, start: gs.Tensor, *, spatial: bool) -> None:
    """Collect what reads a tensor, through operators that keep factors.

    Args:
        edit: of the graph.
        pair: gets the layers found.
        start: the tensor.
        spatial: whether channels lie along axis 1 of an image; else along the last axis.
    """
    waiting = [(start, spatial)]
    while waiting:
        tensor, image = waiting.pop()
        if edit.is_output(tensor):
            raise _BlockedError(f"'{tensor.name}' is an output of the graph")
        readers = edit.consumers(tensor)
        if not readers:
            raise _BlockedError(f"nothing reads '{tensor.name}'")
        for reader in readers:
            if (
                not edit.is_local(reader)
                or sum(t is tensor for t in reader.inputs) != 1
                or reader.inputs[0] is not tensor
            ):
                raise _BlockedError(f"{reader.op} '{label(reader)}' reads it in another way")
            if _is_consumer(reader, image=image):
                _check_consumer(edit, pair, reader)
                pair.consumers.append(reader)
            else:
                waiting.append((reader.outputs[0], _passed(reader, image=image)))
                pair.nonnegative |= tensor is start and is_standard(reader, "Relu") and len(readers) == 1


def _passed(node: gs.Node, *, image: bool) -> bool:
    """Return whether channels lie along axis 1 of an image behind a node that keeps factors.

    Raises:
        _BlockedError: it does not keep them.
    """
    if any(t.outputs for t in node.outputs[1:]):
        raise _BlockedError(f"{node.op} '{label(node)}' between has several results")
    if is_standard(node, *HOMOGENEOUS) or (image and is_standard(node, *CHANNEL_POOLS)):
        return image
    if image and is_standard(node, "Flatten") and node.attrs.get("axis", 1) == 1:
        return False
    raise _BlockedError(f"{node.op} '{label(node)}' reads it, which does not keep factors of channels")


def _is_consumer(node: gs.Node, *, image: bool) -> bool:
    if image:
        return is_standard(node, "Conv")
    return is_standard(node, "MatMul") or (is_standard(node, "Gemm") and not node.attrs.get("transA", 0))


def _check_consumer(edit: Edit, pair: _Pair, node: gs.Node) -> None:
    _own_weight(edit, node)
    if node.op == "MatMul" and len(node.inputs[1].shape) != 2:
        raise _BlockedError(f"MatMul '{label(node)}' has no matrix for a weight")
    if _columns(node, np.zeros(node.inputs[1].shape, np.bool_)).shape[0] % len(pair.exponents):
        raise _BlockedError(f"{node.op} '{label(node)}' has another number of channels")


def _own_weight(edit: Edit, node: gs.Node) -> None:
    weight = node.inputs[1]
    if not isinstance(weight, gs.Constant) or weight.dtype != np.float32:
        raise _BlockedError(f"the weight of {node.op} '{label(node)}' is no float32 initializer")
    if len(edit.consumers(weight)) != 1 or edit.is_output(weight):
        raise _BlockedError(f"several nodes read the weight of {node.op} '{label(node)}'")


def _rows(node: gs.Node, weight: Array) -> Array:
    """Return a view of a weight, output channels first."""
    return np.moveaxis(weight, output_axis(node), 0)


def _columns(node: gs.Node, weight: Array) -> Array:
    """Return a weight, input channels first: (channels, what they are multiplied with)."""
    if node.op != "Conv":
        turned = np.moveaxis(weight, output_axis(node), -1)
        return turned.reshape(turned.shape[0], -1)
    group = int(node.attrs.get("group", 1))
    apart = weight.reshape(group, weight.shape[0] // group, weight.shape[1], -1)
    return apart.transpose(0, 2, 1, 3).reshape(group * weight.shape[1], -1)


def _times_columns(node: gs.Node, weight: Array, factor: Array) -> Array:
    """Return a weight with its input channels multiplied."""
    if node.op != "Conv":
        shape = [1, 1]
        shape[1 - output_axis(node)] = -1
        return np.asarray(weight * factor.reshape(shape))
    group = int(node.attrs.get("group", 1))
    apart = weight.reshape(group, weight.shape[0] // group, weight.shape[1], -1)
    return np.asarray((apart * factor.reshape(group, 1, -1, 1)).reshape(weight.shape))


def _times_rows(node: gs.Node, weight: Array, factor: Array) -> Array:
    shape = [1] * weight.ndim
    shape[output_axis(node)] = -1
    return np.asarray(weight * factor.reshape(shape))


def _spread(exponents: Array, columns: int) -> Array:
    """Return exponents for the columns of a consumer: a Flatten between gives each channel several of them."""
    return np.repeat(exponents, columns // len(exponents))


def _settle(pairs: list[_Pair], ranges: dict[int, Array]) -> None:
    """Find the factors of all pairs: in turn, until none changes any more."""
    weights = {id(n): _floats(n.inputs[1]) for p in pairs for n in (p.producer, *p.consumers)}
    for _ in range(ROUNDS):
        changed = False
        for pair in pairs:
            found = _wanted(pair, weights, ranges.get(id(pair.producer)))
            if not found.any():
                continue
            changed = True
            pair.exponents = pair.exponents + found
            factor = np.exp2(found).astype(np.float32)
            own = id(pair.producer)
            weights[own] = _times_rows(pair.producer, weights[own], 1 / factor)
            if own in ranges:
                ranges[own] = ranges[own] / factor
            for node in pair.consumers:
                columns = _columns(node, weights[id(node)]).shape[0]
                weights[id(node)] = _times_columns(node, weights[id(node)], _spread(factor, columns))
        if not changed:
            break


def _wanted(pair: _Pair, weights: dict[int, Array], measured: Array | None) -> Array:
    """Return the exponents that a pair is to be changed by."""
    rows = _rows(pair.producer, weights[id(pair.producer)])
    rows = rows.reshape(len(rows), -1)
    first = np.abs(rows).max(axis=1, initial=0.0) if measured is None else measured
    behind = [_columns(node, weights[id(node)]) for node in pair.consumers]
    count = len(pair.exponents)
    second = np.max([np.abs(c).reshape(count, -1).max(axis=1, initial=0.0) for c in behind], axis=0)
    free = measured is not None and all(_is_depthwise(node) for node in pair.consumers)
    found = filled(first) if free else balanced(first, second)
    found = np.where((second > 0) & (np.abs(rows).max(axis=1, initial=0.0) > 0), found, 0)
    fine = within_reach(rows, -found)
    for columns in behind:
        fine &= within_reach(columns.reshape(count, -1), found)
    return np.where(fine, found, 0)


def _is_depthwise(node: gs.Node) -> bool:
    return node.op == "Conv" and int(node.attrs.get("group", 1)) > 1 and int(node.inputs[1].shape[1]) == 1


def _said(pair: _Pair) -> str:
    moved = int(np.count_nonzero(pair.exponents))
    low, high = 2.0 ** float(-pair.exponents.max()), 2.0 ** float(-pair.exponents.min())
    behind = ", ".join(f"'{label(n)}'" for n in pair.consumers[:2]) + (" …" if len(pair.consumers) > 2 else "")
    return f"{moved} of {len(pair.exponents)} channels before {behind} times {low:g} to {high:g}"


def _writer(edit: Edit, ctx: Context, pair: _Pair) -> Callable[[], None]:
    def apply() -> None:
        node, factor = pair.producer, np.exp2(pair.exponents).astype(np.float32)
        _set(node, 1, _times_rows(node, _floats(node.inputs[1]), 1 / factor))
        if len(node.inputs) > 2 and node.inputs[2].name:
            bias = node.inputs[2]
            moved = np.asarray(_floats(bias) / factor, np.float32)
            if len(edit.consumers(bias)) == 1 and not edit.is_output(bias):
                _set(node, 2, moved)
            else:
                edit.set_input(node, 2, ctx.constant(f"{bias.name}_evened", moved))
        for reader in pair.consumers:
            weight = _floats(reader.inputs[1])
            columns = _columns(reader, weight).shape[0]
            _set(reader, 1, _times_columns(reader, weight, _spread(factor, columns)))

    return apply


def _set(node: gs.Node, index: int, values: Array) -> None:
    node.inputs[index].values = np.ascontiguousarray(values, np.float32)


def _floats(tensor: gs.Tensor) -> Array:
    values = array_of(tensor)
    assert values is not None
    return values
