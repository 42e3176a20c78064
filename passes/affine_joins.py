"""Operators that join or part tensors, and what an affine map of one makes of the others.

(u + v) * a + b = (u * a + b) + v * a     and back, where the other side can be divided by a
(u * v) * a     = (u * a) * v
concat, split   : the map is put together, or cut, along the axis
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.affine import Affine, same
from graphopt.analysis.constants import refers
from graphopt.ops import is_standard

from .affine_rule import Carried, Found, Rule
from .affine_site import AffineSite, Array


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


BACK: Mapping[str, Rule] = {
    "Concat": _concat_back,
    "Add": _sum_back,
    "Sum": _sum_back,
    "Sub": _sub_back,
    "Mul": _product_back,
    "Div": _product_back,
}
"""Operator -> how a map of its output becomes maps of its inputs."""

FORE: Mapping[str, Rule] = {
    "Concat": _concat_fore,
    "Split": _split_fore,
    "Add": _sum_fore,
    "Sum": _sum_fore,
    "Sub": _sum_fore,
    "Mul": _product_fore,
    "Div": _product_fore,
}
"""Operator -> how a map of an input becomes maps of its outputs."""
