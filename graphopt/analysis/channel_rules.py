"""How operators tie channels: tables of letters, of aligned axes, of axes that an operator works over.

    Conv           X nc..  W oc..  B o   -> Y no..     c is contracted: W reads it; o is made
    elementwise    right-aligned over all operands, equal sizes go together, size 1 broadcasts
    BatchNorm      aligned, parameters along axis 1
    Softmax        aligned, but its axis is mixed: it stays

Cutting an index everywhere it is tied to is right where every operator then computes, for what is left, what it
computed before; and where the cut values only ever leave through an axis that a weight contracts (`reads`), for a
weight of zeros there is as good as none.  So whatever else looks along an axis freezes it.  Axes that a rule does not
mention freeze too, and so does all around an operator without a rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from graphopt.analysis.channel_layers import attention, conv, conv_transpose, einsum, gemm, matmul
from graphopt.analysis.channel_place import Place, Rule, broadcast
from graphopt.analysis.channel_recurrent import RECURRENT, recurrent
from graphopt.analysis.channel_ties import Axes
from graphopt.analysis.constants import Unknown, parameter, scalar_of
from graphopt.ops import BROADCASTING, REDUCTIONS, UNARY


def elementwise(place: Place) -> None:
    """Right-aligned over all inputs."""
    broadcast(place, [port for port in range(len(place.node.inputs)) if place.has(port)])


def pointwise(place: Place) -> None:
    """Aligned with input 0; further inputs are parameters."""
    broadcast(place, [0])


def aligned(place: Place, mixed: Mapping[int, str], parameters: Mapping[int, int] | None = None) -> None:
    """Tie the axes of the first input to those of the output, but for those that are mixed.

    Args:
        place: the node.
        mixed: axis -> what the node does along it.
        parameters: port -> the axis of the first input that it belongs to.
    """
    x = place.into(0)
    if x is None or place.out(0) is None:
        place.freeze(f"the rank of an operand of {place.name} is unknown")
        return
    for port in range(len(place.node.outputs)):
        for at, axis in enumerate(place.out(port) or ()):
            if at not in mixed and at < len(x):
                place.ties.tie(x[at], axis, f"{place.name} has two sizes along it")
    for at, why in mixed.items():
        for axes in (x, *(place.out(port) for port in range(len(place.node.outputs)))):
            if axes is not None and at < len(axes):
                place.ties.freeze(axes[at], f"{place.name} {why}")
    for port, at in (parameters or {}).items():
        for axis in place.into(port) or ():
            place.ties.tie(x[at], axis, f"{place.name} has two sizes along it")


def spatial(place: Place, why: str) -> dict[int, str]:
    """Return the axes from 2 on as mixed."""
    return dict.fromkeys(range(2, len(place.into(0) or ())), why)


def pool(place: Place) -> None:
    """Each channel of its own elements alone; where the largest stood counts through all channels."""
    if len([t for t in place.node.outputs if not t.is_empty()]) > 1:
        place.freeze(f"{place.name} numbers places through all channels")
        return
    aligned(place, spatial(place, "pools over it"))


def batch_norm(place: Place) -> None:
    """Scale, bias, mean and variance along axis 1."""
    if place.attr("training_mode", 0) or len([t for t in place.node.outputs if not t.is_empty()]) > 1:
        place.freeze(f"{place.name} is in training mode")
        return
    aligned(place, {}, dict.fromkeys(range(1, 5), 1))


def instance_norm(place: Place) -> None:
    """Statistics of each channel of its own."""
    aligned(place, spatial(place, "takes statistics over it"), {1: 1, 2: 1})


def group_norm(place: Place) -> None:
    """Statistics of whole groups of channels: only whole groups may go."""
    x = place.into(0)
    group = int(place.attr("num_groups", 1))
    if x is None or len(x) < 2 or x[1] < 0 or group == 1 or place.ties.axes[x[1]].size % group:
        aligned(place, {**spatial(place, "takes statistics over it"), 1: "takes statistics over all channels"})
        place.freeze(f"{place.name} takes statistics over all channels")
        return
    size = place.ties.axes[x[1]].size // group
    shared = place.ties.virtual(group)
    place.ties.tag(shared, "groups")
    aligned(place, spatial(place, "takes statistics over it"))
    place.ties.merge(x[1], [(shared, np.arange(group * size) // size)], place.name)
    for port in (1, 2):
        for axis in place.into(port) or ():
            per_group = axis >= 0 and place.ties.axes[axis].size == group
            place.ties.tie(shared if per_group else x[1], axis, f"{place.name} has two sizes along it")


def mixes(attribute: str, default: int, why: str) -> Rule:
    """Return the rule of an operator that works along one axis, given as an attribute."""

    def rule(place: Place) -> None:
        rank = len(place.into(0) or ())
        aligned(place, {int(place.attr(attribute, default)) % max(rank, 1): why})

    return rule


def softmax(place: Place) -> None:
    """Along its axis; along all from its axis on before opset 13."""
    rank = len(place.into(0) or ())
    axis = int(place.attr("axis", -1 if place.opset >= 13 else 1)) % max(rank, 1)
    last = axis + 1 if place.opset >= 13 else rank
    aligned(place, dict.fromkeys(range(axis, last), "mixes what lies along it"))


def layer_norm(place: Place) -> None:
    """Statistics over all axes from `axis` on; scale and bias lie there."""
    x = place.into(0)
    if x is None or place.out(0) is None:
        place.freeze(f"the rank of an operand of {place.name} is unknown")
        return
    axis = int(place.attr("axis", -1)) % len(x)
    why = "takes statistics over it"
    if not place.normalization:
        aligned(place, dict.fromkeys(range(axis, len(x)), why))
        for port in (1, 2):
            place.ties.freeze_all(place.into(port), f"{place.name} {why}")
        return
    for at, one in enumerate(place.out(0) or ()):
        place.ties.tie(x[at], one, place.name)
    for at in range(axis, len(x)):
        if x[at] >= 0:
            place.ties.inexact.setdefault(x[at], f"{place.name} {why}")
    broadcast(place, [port for port in (0, 1, 2) if place.has(port)])


STATISTICS = frozenset({"ReduceMean", "ReduceL2"})
"""Reductions that norms are written with, and that mean much the same over fewer channels."""


def reduction(place: Place) -> None:
    """The axes that are left go on; with `keepdims` at their place."""
    x, out = place.into(0), place.out(0)
    given = parameter(place.node, "axes", place.opset)
    if x is None or out is None or isinstance(given, Unknown):
        place.freeze(f"{place.name} reduces axes that are not known")
        return
    reduced = {int(a) % len(x) for a in given.reshape(-1)} if given is not None else set()
    if not reduced and not place.attr("noop_with_empty_axes", 0):
        reduced = set(range(len(x)))
    if place.normalization and place.node.op in STATISTICS and place.attr("keepdims", 1):
        for at in reduced:
            if x[at] >= 0:
                place.ties.touched.add(x[at])
                place.ties.inexact.setdefault(x[at], f"{place.name} takes statistics over it")
        reduced = set()
    _reduce(place, x, out, reduced, "works over it")


def arg(place: Place) -> None:
    """ArgMax and ArgMin: one axis."""
    x, out = place.into(0), place.out(0)
    if x is None or out is None:
        place.freeze(f"the rank of an operand of {place.name} is unknown")
        return
    _reduce(place, x, out, {int(place.attr("axis", 0)) % len(x)}, "picks one along it")


def _reduce(place: Place, x: Axes, out: Axes, reduced: set[int], why: str) -> None:
    kept = [at for at in range(len(x)) if at not in reduced]
    targets = kept if place.attr("keepdims", 1) else range(len(kept))
    for at, to in zip(kept, targets, strict=True):
        place.ties.tie(x[at], out[to], f"{place.name} has two sizes along it")
    for at in reduced:
        place.ties.freeze(x[at], f"{place.name} {why}")


def resize(place: Place) -> None:
    """Axes that keep their size go on."""
    x, out = place.into(0), place.out(0)
    if x is None or out is None or place.attr("coordinate_transformation_mode") == b"tf_crop_and_resize":
        place.freeze(f"{place.name} changes sizes that are not known")
        return
    sizes = [place.ties.shapes.proved(t).shape or () for t in (place.node.inputs[0], place.node.outputs[0])]
    changed = {at: "resizes it" for at, (a, b) in enumerate(zip(*sizes, strict=True)) if a != b}
    aligned(place, changed)
    ignore(place, range(1, len(place.node.inputs)))


def gather(place: Place) -> None:
    """Rows picked by computed indices: the other axes go on, those of the indices stand in the axis' place."""
    x, at, out = place.into(0), place.into(1), place.out(0)
    if x is None or at is None or out is None:
        place.freeze(f"the rank of an operand of {place.name} is unknown")
        return
    axis = int(place.attr("axis", 0)) % len(x)
    for i, one in enumerate(x):
        if i == axis:
            place.ties.freeze(one, f"{place.name} picks along it by computed indices")
            continue
        place.ties.tie(one, out[i if i < axis else i + len(at) - 1], f"{place.name} has two sizes along it")
        if place.weight(0):
            place.ties.role(one, "makes")
    for i, one in enumerate(at):
        place.ties.tie(one, out[axis + i], f"{place.name} has two sizes along it")


def coded(place: Place) -> None:
    """QuantizeLinear, DequantizeLinear: elementwise; scale and zero point along one axis or for all."""
    x = place.into(0)
    scale = place.into(1)
    if x is None or scale is None or place.attr("block_size", 0) or len(scale) > 1:
        place.freeze(f"{place.name} has scales for blocks")
        return
    axis = int(place.attr("axis", 1)) % max(len(x), 1)
    aligned(place, {}, {port: axis for port in (1, 2) if place.has(port) and place.into(port)})


def ignore(place: Place, ports: Iterable[int]) -> None:
    """Leave inputs that are parameters alone."""
    for port in ports:
        place.ties.touched.update(place.into(port) or ())


def sampled(place: Place) -> None:
    """GridSample, RoiAlign: each channel by itself, at places that others say."""
    x, out = place.into(0) or [], place.out(0) or []
    place.ties.tie(x[1], out[1], f"{place.name} has two sizes along it")


def rotary(place: Place) -> None:
    """RotaryEmbedding of rank 4: the last axis turns."""
    if len(place.into(0) or ()) != 4:
        place.freeze(f"{place.name} has heads that its input does not show")
        return
    aligned(place, {2: "counts along it", 3: "turns what lies along it"})


def cumulative(place: Place) -> None:
    """CumSum, CumProd: one axis."""
    x, given = place.into(0) or [], scalar_of(place.node.inputs[1])
    axes = range(len(x)) if given is None else [int(given) % max(len(x), 1)]
    aligned(place, dict.fromkeys(axes, "adds up along it"))


def triangle(place: Place) -> None:
    """Trilu: the last two axes."""
    rank = len(place.into(0) or ())
    aligned(place, dict.fromkeys(range(max(rank - 2, 0), rank), "cuts a triangle out of it"))


def free(place: Place) -> None:
    """Nothing of its inputs' values is in its outputs: no axis ties another (Shape tells the new size after a cut)."""
    for axes in place.tensors():
        place.ties.touched.update(axes or ())


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(UNARY, pointwise),
    **dict.fromkeys(BROADCASTING, elementwise),
    **dict.fromkeys(REDUCTIONS, reduction),
    **dict.fromkeys(("MaxPool", "AveragePool", "LpPool", "GlobalMaxPool", "GlobalAveragePool", "GlobalLpPool"), pool),
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Gemm": gemm,
    "MatMul": matmul,
    "Einsum": einsum,
    **dict.fromkeys(RECURRENT, recurrent),
    "BatchNormalization": batch_norm,
    "InstanceNormalization": instance_norm,
    "GroupNormalization": group_norm,
    "LayerNormalization": layer_norm,
    "RMSNormalization": layer_norm,
    "LpNormalization": mixes("axis", -1, "takes a norm over it"),
    "Softmax": softmax,
    "LogSoftmax": softmax,
    "Hardmax": softmax,
    "LRN": lambda place: aligned(place, {1: "takes a norm over its neighbours"}),
    **dict.fromkeys(("CumSum", "CumProd"), cumulative),
    "Trilu": triangle,
    **dict.fromkeys(("GridSample", "RoiAlign"), sampled),
    "RotaryEmbedding": rotary,
    "Attention": attention,
    "CastLike": pointwise,
    "TopK": mixes("axis", -1, "sorts along it"),
    "ArgMax": arg,
    "ArgMin": arg,
    "Resize": resize,
    "Upsample": resize,
    "Expand": pointwise,
    "Gather": gather,
    "QuantizeLinear": coded,
    "DequantizeLinear": coded,
    "Constant": free,
    "Shape": free,
    "Size": free,
    "ConstantOfShape": free,
}
"""Operator -> what it says about its axes; data movement is not here: it is tried out."""
