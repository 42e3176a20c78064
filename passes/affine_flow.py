"""Operators that an affine map passes: op(x * a + b) = op(x) * a' + b', in either direction.

    relu(x * a) = relu(x) * a                 a >= 0; LeakyRelu, PRelu, Max- and ReduceMax likewise, those with b, too
    mean(x * a + b) = mean(x) * a + b         average pools, ReduceMean; ReduceSum adds b as often as it sums
    clip(x, l, h) * a + b = clip(x * a + b, l * a + b, h * a + b)                a > 0
    pad(x * a + b, v) = pad(x, (v - b) / a) * a + b
    transpose, reshape, squeeze, slice, resize …: the map's own arrays are moved

Backward: a map of the output becomes maps of inputs.  Forward: a map of an input becomes one of the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.affine import Affine, reshaped
from graphopt.analysis.constants import Unknown, array_of, parameter, refers

from .affine_rule import Carried, Found, Rule
from .affine_site import AffineSite, Array
from .affine_weights import padded

Moved = Affine | str
Move = Callable[[AffineSite, gs.Node, Affine, bool], Moved]
"""(site, node, map, backward) -> the map on the other side of a node with one input and one output."""


def _through(move: Move, source: int = 0) -> tuple[Rule, Rule]:
    """Return the backward and forward rule of an operator that has one way through."""

    def back(site: AffineSite, node: gs.Node, index: int, given: Affine) -> Found:
        if index != 0 or refers(node):
            return f"this form of {node.op} is not understood"
        found = move(site, node, given, True)
        return found if isinstance(found, str) else [Carried(backward=((source, found),))]

    def fore(site: AffineSite, node: gs.Node, index: int, given: Affine) -> Found:
        if index != source or refers(node):
            return f"'{node.op}' reads it as a parameter"
        found = move(site, node, given, False)
        return found if isinstance(found, str) else [Carried(forward=((0, found),))]

    return back, fore


def _as_is(_site: AffineSite, _node: gs.Node, given: Affine, _backward: bool) -> Moved:
    return given


def _ramp(_site: AffineSite, node: gs.Node, given: Affine, _backward: bool) -> Moved:
    """Functions with f(a x) = a f(x) for a >= 0."""
    if given.shifts:
        return f"a shift does not pass {node.op}"
    return given if given.positive else f"a negative scale does not pass {node.op}"


def _largest(site: AffineSite, node: gs.Node, given: Affine, backward: bool) -> Moved:
    """Max pools: the largest of a window stays the largest."""
    if any(t.name for t in node.outputs[1:]):
        return "the pool returns indices, too"
    if not given.positive:
        return f"a negative scale does not pass {node.op}"
    return _over_space(site, node, given, backward)


def _average(site: AffineSite, node: gs.Node, given: Affine, backward: bool) -> Moved:
    beyond = padded(node) or node.attrs.get("ceil_mode", 0)
    if given.shifts and beyond and node.attrs.get("count_include_pad", 0):
        return "the pool counts its padding, which has no shift"
    return _over_space(site, node, given, backward)


def _over_space(_site: AffineSite, _node: gs.Node, given: Affine, _backward: bool) -> Moved:
    return "the map varies over space" if given.varies_beside(0, 1) else given


def _transpose(_site: AffineSite, node: gs.Node, given: Affine, backward: bool) -> Moved:
    if given.uniform:
        return given
    rank = max(given.scale.ndim, given.shift.ndim)
    perm = [int(p) for p in node.attrs.get("perm", reversed(range(rank)))]
    if backward:
        perm = [perm.index(i) for i in range(rank)]
    return given.moved(lambda a: a.transpose(perm))


def _reshape(site: AffineSite, node: gs.Node, given: Affine, backward: bool) -> Moved:
    """Reshape, Flatten, Squeeze, Unsqueeze: the same elements, in order."""
    if given.uniform:
        return given
    shapes = [site.shape(node.inputs[0]), site.shape(node.outputs[0])]
    if shapes[0] is None or shapes[1] is None:
        return f"the shapes around {node.op} are not known"
    before, after = reversed(shapes) if backward else shapes
    assert before is not None
    assert after is not None
    found = reshaped(given, before, after)
    return found if found is not None else f"{node.op} mixes the axes that the map varies along"


def _resize(site: AffineSite, node: gs.Node, given: Affine, _backward: bool) -> Moved:
    mode, place = node.attrs.get("mode", "nearest"), node.attrs.get("coordinate_transformation_mode", "half_pixel")
    if mode not in ("nearest", "linear") or place == "tf_crop_and_resize":
        return f"{node.op} in this mode does not pass a shift"
    if given.uniform:
        return given
    ranks = [site.rank(t) for t in (node.inputs[0], node.outputs[0])]
    scales = parameter(node, "scales", site.opset) if node.op == "Upsample" else _resize_scales(node)
    if scales is None or isinstance(scales, Unknown) or None in ranks or node.attrs.get("axes") is not None:
        return "which axes are resized is not known"
    if any(axis >= scales.size or scales[axis] != 1 for axis in given.axes()):
        return "an axis is resized along which the map varies"
    return given


def _resize_scales(node: gs.Node) -> Array | None:
    index = 2 if len(node.inputs) > 2 else 1
    if len(node.inputs) <= index or node.inputs[index].is_empty():
        return None
    values = array_of(node.inputs[index])
    return values if values is not None and values.size else None


def _pad(_site: AffineSite, node: gs.Node, given: Affine, _backward: bool) -> Moved:
    """Pads by the edge or a mirror image take any map that does not vary along a padded axis."""
    if node.attrs.get("mode", "constant") == "constant":
        return "constants are padded"
    return given if given.uniform else "the map may vary along a padded axis"


def _reduce(site: AffineSite, node: gs.Node, given: Affine, backward: bool) -> Moved:
    rank = site.rank(node.inputs[0])
    axes = parameter(node, "axes", site.opset)
    if isinstance(axes, Unknown) or rank is None:
        return f"the axes of {node.op} are not known"
    named = axes is not None and axes.size > 0
    if not named and node.attrs.get("noop_with_empty_axes", 0):
        return given
    gone = [int(a) % rank for a in axes.reshape(-1)] if axes is not None and named else list(range(rank))
    if node.op in _REDUCES_ORDER and not given.positive:
        return f"a negative scale does not pass {node.op}"
    if node.op == "ReduceSum" and given.shifts:
        sizes = [site.size(node.inputs[0], a) for a in gone]
        if None in sizes:
            return "how many elements ReduceSum adds is not known"
        count = math.prod(s for s in sizes if s is not None)
        if not count:
            return "ReduceSum adds nothing"
        given = Affine.of(given.scale, given.shift / count if backward else given.shift * count)
    kept = bool(node.attrs.get("keepdims", 1))
    if backward:
        return given if kept else given.moved(lambda a: np.expand_dims(a, tuple(gone)))
    if given.axes() & set(gone):
        return f"the map varies along an axis of {node.op}"
    return given if kept else given.moved(lambda a: a.squeeze(tuple(gone)))


_REDUCES_ORDER = frozenset({"ReduceMax", "ReduceMin"})


def _depth_to_space(site: AffineSite, node: gs.Node, given: Affine, backward: bool) -> Moved:
    """Each channel of the output comes from blocksize² of the input."""
    if given.uniform:
        return given
    channels = site.size(node.outputs[0], 1)
    if not backward or channels is None or given.varies_beside(1):
        return "the map varies along channels that become space"
    block = int(node.attrs.get("blocksize", 1)) ** 2
    repeats = str(node.attrs.get("mode", "DCR")) == "CRD"

    def spread(a: Array) -> Array:
        row = a.reshape(-1)
        wide = np.repeat(row, block) if repeats else np.tile(row, block)
        return wide.reshape(1, -1, *[1] * (a.ndim - 2))

    return given.moved(spread)


def _slice(site: AffineSite, node: gs.Node, given: Affine, backward: bool) -> Moved:
    """Any cut along axes on which the map does not vary; forward along others, too."""
    if given.uniform:
        return given
    rank = given.scale.ndim or given.shift.ndim
    starts, ends = (parameter(node, name, site.opset) for name in ("starts", "ends"))
    axes, steps = (parameter(node, name, site.opset) for name in ("axes", "steps"))
    if not isinstance(starts, np.ndarray) or not isinstance(ends, np.ndarray) or isinstance(axes, Unknown):
        return "what Slice cuts is not known"
    places = list(range(starts.size)) if axes is None else [int(a) % rank for a in axes.reshape(-1)]
    if isinstance(steps, Unknown):
        return "the steps of Slice are not known"
    if not given.axes() & set(places):
        return given
    if backward:
        return "Slice cuts along an axis that the map varies along"
    strides = np.ones(starts.size, np.int64) if steps is None else steps
    cuts = [slice(None)] * rank
    for axis, start, end, step in zip(places, starts.flat, ends.flat, strides.flat, strict=True):
        if step <= 0:
            return "Slice goes backwards"
        cuts[axis] = slice(int(start), int(end), int(step))
    return given.moved(lambda a: a[tuple(c if a.shape[i] != 1 else slice(None) for i, c in enumerate(cuts))])


def _gather_fore(_site: AffineSite, node: gs.Node, index: int, given: Affine) -> Found:
    if index != 0 or refers(node):
        return "Gather reads it as an index"
    return [Carried(forward=((0, given),))] if given.uniform else "the map may vary along what Gather takes"


def _clip_back(site: AffineSite, node: gs.Node, _index: int, given: Affine) -> Found:
    if site.opset < 11 or not given.uniform or not (given.scale > 0).all():
        return "only one positive scale passes Clip"
    limits = {i: t for i, t in enumerate(node.inputs) if i and not t.is_empty()}
    values = {i: array_of(t) for i, t in limits.items()}
    if any(v is None or v.size != 1 for v in values.values()):
        return "a limit of Clip is computed"
    with np.errstate(all="ignore"):
        new = {
            i: (v.astype(np.float64) * given.scale + given.shift).astype(v.dtype).reshape(v.shape)
            for i, v in values.items()
            if v is not None
        }
    if not all(np.isfinite(n.astype(np.float64)).all() for n in new.values()):
        return "a limit of Clip would not be finite"

    def do() -> None:
        for place, value in new.items():
            site.put(node, place, f"{node.outputs[0].name}/limit", value)

    return [Carried(backward=((0, given),), do=do)]


def _pad_constant(site: AffineSite, node: gs.Node, given: Affine, backward: bool) -> tuple[Affine, Array] | str:
    """Return the map, which must be uniform, and the new value that is padded."""
    value = parameter(node, "value", site.opset)
    if not given.uniform or isinstance(value, Unknown) or site.opset < 11:
        return "the padded value would vary"
    old = np.zeros(()) if value is None else value.reshape(-1)[0].astype(np.float64)
    if not backward and not given.tame:
        return "a scale of zero does not pass Pad"
    new = old * given.scale + given.shift if backward else (old - given.shift) / given.scale
    return given, np.asarray(new)


def _pad_rule(backward: bool) -> Rule:
    def rule(site: AffineSite, node: gs.Node, index: int, given: Affine) -> Found:
        if index != 0 or refers(node):
            return "Pad reads it as a parameter"
        if str(node.attrs.get("mode", "constant")) != "constant":
            found = _pad(site, node, given, backward)
            carried = ((0, found),) if isinstance(found, Affine) else ()
            return found if isinstance(found, str) else _one(backward, carried)
        both = _pad_constant(site, node, given, backward)
        dtype = site.dtype(node.inputs[0])
        if isinstance(both, str) or dtype is None:
            return both if isinstance(both, str) else "the type of what is padded is not known"
        value = both[1].astype(dtype)
        if not np.isfinite(value.astype(np.float64)):
            return "the padded value would not be finite"
        name = f"{node.outputs[0].name}/value"
        unchanged = not given.shifts and value == 0 and parameter(node, "value", site.opset) is None
        do = None if unchanged else lambda: site.put(node, 2, name, value)
        return _one(backward, ((0, given),), do)

    return rule


def _one(backward: bool, carried: tuple[tuple[int, Affine], ...], do: Callable[[], None] | None = None) -> Found:
    return [Carried(backward=carried, do=do) if backward else Carried(forward=carried, do=do)]


_WAYS: Mapping[str, Move] = {
    "Identity": _as_is,
    "Relu": _ramp,
    "LeakyRelu": _ramp,
    "PRelu": _ramp,
    "MaxPool": _largest,
    "GlobalMaxPool": _largest,
    "AveragePool": _average,
    "GlobalAveragePool": _over_space,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Flatten": _reshape,
    "Squeeze": _reshape,
    "Unsqueeze": _reshape,
    "Resize": _resize,
    "Upsample": _resize,
    "ReduceMean": _reduce,
    "ReduceSum": _reduce,
    "ReduceMax": _reduce,
    "ReduceMin": _reduce,
    "DepthToSpace": _depth_to_space,
    "Slice": _slice,
}

_PAIRS: Mapping[str, tuple[Rule, Rule]] = {op: _through(move) for op, move in _WAYS.items()}

BACK: Mapping[str, Rule] = {
    **{op: pair[0] for op, pair in _PAIRS.items()},
    "Clip": _clip_back,
    "Pad": _pad_rule(True),
}
"""Operator -> how a map of its output becomes maps of its inputs."""

FORE: Mapping[str, Rule] = {
    **{op: pair[1] for op, pair in _PAIRS.items()},
    "Gather": _gather_fore,
    "Pad": _pad_rule(False),
}
"""Operator -> how a map of an input becomes maps of its outputs."""
