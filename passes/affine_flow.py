"""Operators that an affine map passes: op(x * a + b) = op(x) * a' + b', in either direction.

    relu(x * a) = relu(x) * a                 a >= 0; LeakyRelu, PRelu, Max- and ReduceMax likewise, those with b, too
    mean(x * a + b) = mean(x) * a + b         average pools, ReduceMean; ReduceSum adds b as often as it sums
    clip(x, l, h) * a + b = clip(x * a + b, l * a + b, h * a + b)                a > 0
    pad(x * a + b, v) = pad(x, (v - b) / a) * a + b
    (u + v) * a + b = (u * a + b) + v * a     and back, where both sides have the same scale
    (u * v) * a = (u * a) * v
    transpose, reshape, squeeze, concat, split, slice, resize …: the map's own arrays are moved

Backward: a map of the output becomes maps of inputs.  Forward: a map of an input becomes one of the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.affine import Affine, reshaped, same
from graphopt.analysis.constants import Unknown, array_of, parameter, refers
from graphopt.ops import is_standard

from .affine_rule import Carried, Found, Rule
from .affine_site import AffineSite
from .affine_weights import padded

Array = np.ndarray[Any, Any]
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


def _cut(values: Array, *, axis: int, places: range) -> Array:
    return values if values.shape[axis] == 1 else values.take(places, axis)


def _parts(given: Affine, axis: int, sizes: Sequence[int]) -> list[Affine]:
    """Return a map cut along an axis."""
    found: list[Affine] = []
    start = 0
    for size in sizes:
        found.append(given.moved(partial(_cut, axis=axis, places=range(start, start + size))))
        start += size
    return found


def _concat_back(site: AffineSite, node: gs.Node, _index: int, given: Affine) -> Found:
    if given.uniform:
        return [Carried(backward=tuple((i, given) for i in range(len(node.inputs))))]
    rank = given.scale.ndim or given.shift.ndim
    axis = int(node.attrs.get("axis", 0)) % rank
    sizes = [site.size(t, axis) for t in node.inputs]
    known = [s for s in sizes if s is not None]
    if len(known) != len(sizes):
        return "the sizes of what Concat joins are not known"
    return [Carried(backward=tuple(enumerate(_parts(given, axis, known))))]


def _concat_fore(site: AffineSite, node: gs.Node, index: int, given: Affine) -> Found:
    """The other inputs keep the identity."""
    rank = site.rank(node.outputs[0])
    if rank is None or refers(node):
        return "the rank of what Concat makes is not known"
    axis = int(node.attrs.get("axis", 0)) % rank
    sizes = [site.size(t, axis) for t in node.inputs]
    known = [s for s in sizes if s is not None]
    if len(known) != len(sizes):
        return "the sizes of what Concat joins are not known"
    given_axes = given.axes() - {axis}
    if given_axes:
        return "the map varies along other axes than Concat joins"

    def joined(a: Array, rest: float) -> Array:
        whole = np.full(sum(known), rest)
        start = sum(known[:index])
        whole[start : start + known[index]] = a.reshape(-1)
        return whole.reshape([-1 if i == axis else 1 for i in range(rank)])

    return [Carried(forward=((0, Affine.of(joined(given.scale, 1.0), joined(given.shift, 0.0))),))]


def _split_fore(site: AffineSite, node: gs.Node, index: int, given: Affine) -> Found:
    if index != 0 or refers(node):
        return "Split reads it as a parameter"
    used = [i for i, t in enumerate(node.outputs) if t.name]
    if given.uniform:
        return [Carried(forward=tuple((i, given) for i in used))]
    axis = int(node.attrs.get("axis", 0)) % (given.scale.ndim or given.shift.ndim)
    sizes = [site.size(t, axis) for t in node.outputs]
    known = [s for s in sizes if s is not None]
    if len(known) != len(sizes):
        return "the sizes that Split makes are not known"
    parts = _parts(given, axis, known)
    return [Carried(forward=tuple((i, parts[i]) for i in used))]


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


def _aligned(site: AffineSite, node: gs.Node, index: int, given: Affine, backward: bool) -> Affine | None:
    """Return a map of an operand as one of the result, or back; None where broadcasting stands in the way."""
    if given.uniform:
        return given
    inner, outer = site.shape(node.inputs[index]), site.shape(node.outputs[0])
    if inner is None or outer is None or len(inner) > len(outer):
        return None
    extra = len(outer) - len(inner)
    if not backward:
        return given.moved(lambda a: a.reshape((1,) * extra + a.shape))
    if any(axis < extra or not same(inner[axis - extra], outer[axis]) for axis in given.axes()):
        return None
    return given.moved(lambda a: a.reshape(a.shape[extra:]))


def _sum_back(site: AffineSite, node: gs.Node, _index: int, given: Affine) -> Found:
    """All operands are scaled, any one is shifted."""
    found = []
    for place in range(len(node.inputs)):
        maps = [
            _aligned(site, node, i, given if i == place else given.scale_part, True) for i in range(len(node.inputs))
        ]
        if None not in maps:
            found.append(Carried(backward=tuple((i, m) for i, m in enumerate(maps) if m is not None)))
    return found or f"the map varies along an axis that an operand of {node.op} does not have"


def _sub_back(site: AffineSite, node: gs.Node, _index: int, given: Affine) -> Found:
    both = _aligned(site, node, 0, given, True), _aligned(site, node, 1, given.scale_part, True)
    if both[0] is None or both[1] is None:
        return "the map varies along an axis that an operand of Sub does not have"
    return [Carried(backward=((0, both[0]), (1, both[1])))]


def _sum_fore(site: AffineSite, node: gs.Node, index: int, given: Affine) -> Found:
    """A shift passes; a scale does where the other operands can be divided by it."""
    sign = -1.0 if node.op == "Sub" and index == 1 else 1.0
    behind = _aligned(site, node, index, Affine.of(given.scale, sign * given.shift), False)
    if behind is None:
        return f"the shapes around {node.op} are not known"
    if not given.scales:
        return [Carried(forward=((0, behind),))]
    inverse = behind.scale_inverse()
    if inverse is None:
        return "a scale is zero or extreme"
    others = [(i, _aligned(site, node, i, inverse, True)) for i in range(len(node.inputs)) if i != index]
    if any(m is None for _, m in others):
        return f"the scale varies along an axis that an operand of {node.op} does not have"
    return [Carried(forward=((0, behind),), backward=tuple((i, m) for i, m in others if m is not None))]


def activation_gate(node: gs.Node) -> gs.Node | None:
    """Return the Erf or Tanh of a product x * (1 + erf(…)): ORT fuses it only as it is written."""
    for operand in node.inputs:
        plus = operand.inputs[0] if len(operand.inputs) == 1 else None
        if plus is None or not is_standard(plus, "Add"):
            continue
        for term in plus.inputs:
            if len(term.inputs) == 1 and is_standard(term.inputs[0], "Erf", "Tanh"):
                return term.inputs[0]
    return None


def _product_back(site: AffineSite, node: gs.Node, _index: int, given: Affine) -> Found:
    if given.shifts:
        return f"a shift does not pass {node.op}"
    if (gate := activation_gate(node)) is not None:
        return f"it belongs to the activation of {gate.op}, which ORT fuses"
    places = range(2) if node.op == "Mul" else range(1)
    maps = [(i, _aligned(site, node, i, given, True)) for i in places]
    found = [Carried(backward=((i, m),)) for i, m in maps if m is not None]
    return found or f"the map varies along an axis that no operand of {node.op} has"


def _product_fore(site: AffineSite, node: gs.Node, index: int, given: Affine) -> Found:
    if given.shifts:
        return f"a shift does not pass {node.op}"
    if (gate := activation_gate(node)) is not None:
        return f"it belongs to the activation of {gate.op}, which ORT fuses"
    if node.op == "Div" and index == 1:
        inverse = given.scale_inverse()
        if inverse is None:
            return "a scale is zero or extreme"
        given = inverse
    behind = _aligned(site, node, index, given, False)
    return f"the shapes around {node.op} are not known" if behind is None else [Carried(forward=((0, behind),))]


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
    "Concat": _concat_back,
    "Clip": _clip_back,
    "Pad": _pad_rule(True),
    "Add": _sum_back,
    "Sum": _sum_back,
    "Sub": _sub_back,
    "Mul": _product_back,
    "Div": _product_back,
}
"""Operator -> how a map of its output becomes maps of its inputs."""

FORE: Mapping[str, Rule] = {
    **{op: pair[1] for op, pair in _PAIRS.items()},
    "Concat": _concat_fore,
    "Split": _split_fore,
    "Gather": _gather_fore,
    "Pad": _pad_rule(False),
    "Add": _sum_fore,
    "Sum": _sum_fore,
    "Sub": _sum_fore,
    "Mul": _product_fore,
    "Div": _product_fore,
}
"""Operator -> how a map of an input becomes maps of its outputs."""
