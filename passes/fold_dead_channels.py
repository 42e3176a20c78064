"""Channels that hold a constant, or that nobody reads, taken out exactly.

    a layer's weight is 0 for an output channel      the channel is its bias, whatever comes in; through elementwise
                                                     operators it stays a constant c
    a layer reads the channel                        c times its weights goes into its bias, the weights become 0
    all weights that read a channel are 0            the channel is cut

A convolution that pads sees 0 beyond the border, not c: there the constant is folded only where it is 0 itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.analysis.channels import Group, find_groups
from graphopt.analysis.constants import array_of, is_constant
from graphopt.base import Change, Context, Pass
from graphopt.channel_choice import allowed_counts
from graphopt.edit import Edit, is_output
from graphopt.exporter import Exporter
from graphopt.linear_layer import LinearLayer, linear_layers
from graphopt.ops import UNARY, is_standard
from graphopt.passes.channel_surgery import plan
from graphopt.registry import register

Array = np.ndarray[Any, Any]

FOLD = "a constant channel goes into its bias"


@register
@dataclass(frozen=True)
class FoldDeadChannels(Pass):
    """Fold channels that are constant into the biases behind them, and cut channels that nobody reads.

    Exact, keeps the signature.  Channels are cut in whole steps, so that kernels stay as fast as they are.

    Options:
        round_to: channels that stay are a multiple of it; 0 for what suits the target.
    """

    name: ClassVar[str] = "fold-dead-channels"
    scope: ClassVar[Any] = "model"
    round_to: int = 0

    def __post_init__(self) -> None:
        """Refuse what has no meaning.

        Raises:
            ValueError: `round_to` is negative.
        """
        if self.round_to < 0:
            raise ValueError(f"round_to is 0 or more, not {self.round_to}")

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose a change for each layer that reads constants, then one for each group that is cut."""
        layers = [layer for layer in linear_layers(graph) if isinstance(layer, LinearLayer)]
        readers: dict[str, list[LinearLayer]] = {}
        for layer in layers:
            readers.setdefault(layer.request.tensor, []).append(layer)
        for layer in layers:
            constant = _constant_channels(layer)
            if constant.any():
                tensor, values = _through(graph, ctx, layer)
                for reader in readers.get(tensor.name, []):
                    yield from _folded(graph, ctx, reader, constant, values)
        yield from self._cut(graph, ctx)

    def _cut(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose to cut the units whose readers' weights are all 0."""
        if not _any_dead(graph):
            return
        ctx.forget()
        groups = find_groups(ctx.model, ctx.shapes, ctx.evaluate).groups
        open_ = [group for group in groups if not group.frozen and not group.inexact]
        stays = {group.name: self._stay(group, ctx.target.provider) for group in open_}
        kept = {group.name: stays[group.name] for group in open_ if len(stays[group.name]) < group.size}
        _, refused = plan(graph, groups, kept, ctx.shapes, ctx.model.opset)
        yield from (Change(name, "units that nobody reads are cut", refused[name]) for name in kept if name in refused)
        accepted: dict[str, Array] = {}
        for group in groups:
            if group.name in kept and group.name not in refused:
                stay = kept[group.name]
                yield Change(
                    group.name, f"{group.size} {group.kind} -> {len(stay)}", "nobody reads the others",
                    lambda name=group.name, stay=stay: accepted.update({name: stay}),  # type: ignore[misc]
                )  # fmt: skip
        if accepted:
            surgery, _ = plan(graph, groups, accepted, ctx.shapes, ctx.model.opset)
            surgery.operate(ctx.model, ctx.fresh_name)

    def _stay(self, group: Group, provider: str) -> Array:
        """Return the units of a group that stay: those that are read, and as many more as fill a step."""
        reads = group.role("reads")
        alive = np.zeros(group.size, bool)
        for site in reads:
            values = array_of(site.tensor)
            if values is None:
                return np.arange(group.size)
            used = np.moveaxis(values, site.axis, 0).reshape(values.shape[site.axis], -1).any(axis=1)
            alive[site.units[used & (site.units >= 0)]] = True
        counts = [n for n in allowed_counts(group, self.round_to, 1, provider) if n >= alive.sum()]
        count = min(counts, default=group.size)
        if not reads:
            return np.arange(group.size)
        return np.sort(np.argsort(~alive, kind="stable")[:count])


def _any_dead(graph: gs.Graph) -> bool:
    """Tell whether a layer reads a channel with weights that are all 0, or makes one."""
    for layer in linear_layers(graph):
        if isinstance(layer, LinearLayer) and layer.request.group == 1:
            weight = layer.weight()[0]
            channels = weight.reshape(-1, _taps(layer) * weight.shape[1])
            if not channels.any(axis=1).all():
                return True
    return False


def _constant_channels(layer: LinearLayer) -> Array:
    """Return which output channels of a layer have no weight: bool (channels,)."""
    if layer.block:
        return np.zeros(layer.channels, bool)
    return np.asarray(~layer.weight().any(axis=1).reshape(-1))


def _taps(layer: LinearLayer) -> int:
    """Return how many columns of a row belong to each input channel."""
    return int(np.prod(layer.request.window.kernel)) if layer.request.window else 1


def _through(graph: gs.Graph, ctx: Context, layer: LinearLayer) -> tuple[gs.Tensor, Array]:
    """Return the last tensor of the elementwise operators behind a layer, and its bias after them: (channels,)."""
    tensor, nodes = layer.output, []
    while not is_output(graph, tensor) and len({id(n) for n in tensor.outputs}) == 1:
        node = tensor.outputs[0]
        if not is_standard(node, *UNARY) or node.op == "Dropout" or node.inputs[0] is not tensor:
            break
        if not all(t.is_empty() or is_constant(t) for t in node.inputs[1:]):
            break
        nodes.append(node)
        tensor = node.outputs[0]
    bias = layer.bias().reshape(-1)
    if not nodes:
        return tensor, bias
    kind = array_of(layer.node.inputs[1])
    assert kind is not None
    ends = gs.Variable(layer.output.name, kind.dtype, [len(bias)]), gs.Variable(tensor.name)
    proto: onnx.ModelProto = Exporter(ctx.model.shell).run(gs.Graph(nodes, [ends[0]], [ends[1]]), [])
    del proto.graph.value_info[:]
    found = ctx.evaluate(proto, {layer.output.name: bias.astype(kind.dtype)}, [tensor.name])
    return tensor, np.asarray(found[tensor.name], np.float64)


def _folded(graph: gs.Graph, ctx: Context, reader: LinearLayer, constant: Array, values: Array) -> Iterator[Change]:
    """Propose to fold constant channels into the bias of a layer that reads them."""
    taps, weight = _taps(reader), reader.weight()
    if reader.request.group != 1 or weight.shape[1] != taps * len(constant):
        return
    by_channel = weight.reshape(len(constant), taps, -1)
    todo = constant & by_channel.any(axis=(1, 2)) & np.isfinite(values)
    if not todo.any():
        return
    window = reader.request.window
    pads = window is not None and (any(window.pads) or window.auto_pad not in {"NOTSET", "VALID"})
    for why, blocked in (
        ("it pads with zeros, which are not the constant", todo & (values != 0) & pads),
        ("it has no bias to take the constant", todo & (values != 0) & (reader.adds is None)),
    ):
        if blocked.any():
            yield Change(reader.label, FOLD, why)
            todo &= ~blocked
    if todo.any():
        shift = np.einsum("cto,c->o", by_channel[todo], values[todo])
        left = np.where(todo[:, None, None], 0.0, by_channel).reshape(weight.shape)
        yield Change(
            reader.label, FOLD, f"{int(todo.sum())} of {len(todo)} channels that it reads are constant",
            _writer(graph, ctx, reader, left, reader.bias() + shift),
        )  # fmt: skip


def _writer(graph: gs.Graph, ctx: Context, reader: LinearLayer, weight: Array, bias: Array) -> Callable[[], None]:
    def apply() -> None:
        with Edit(graph) as edit:
            reader.put(edit, ctx, weight, bias)

    return apply
