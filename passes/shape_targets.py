"""Targets that are computed from shapes, written as constants where they say what a constant can say.

    Reshape(x, [n, t, 8, 15])       x: [n, t, 120]     ->  Reshape(x, [0, 0, 8, 15])
    Reshape(x, [n*t, 120])                             ->  Reshape(x, [-1, 120])
    Expand(x, [n, 4])               x: [n, 1]          ->  Expand(x, [1, 4])
    Slice(x, 1, h) over h                              ->  Slice(x, 1, end)
    Resize(x, sizes=[n, c, 2*h, 2*w])                  ->  Resize(x, scales=[1, 1, 2, 2])
    LSTM(x, …, zeros of [1, n, 8], zeros of [1, n, 8]) ->  LSTM(x, …)

A Reshape to -1 fails where another axis that its target names is empty.  So -1 is only put where the others are
surely not empty, or where the computed target had it, too (and no `allowzero`, with which ORT takes both).
Where all axes but one keep their product, that one has to keep its size, whatever the model calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.facts import Fact, Site
from graphopt.analysis.symbolic_expr import Expr, Size, at_most, equal, product, quotient, subtract
from graphopt.analysis.symbolic_shapes import crops, resized_axes, slice_plan
from graphopt.analysis.uniform import uniform_of

END = (1 << 63) - 1
"""A Slice's end that means the end of the axis, whatever its size."""

Inputs: TypeAlias = dict[int, np.ndarray[Any, Any] | None]
"""Input index -> the constant that it becomes, None where it is left out."""

Finding: TypeAlias = Inputs | str | None
"""What is to become constant, or why it cannot, or None where there is nothing to say."""

Finder: TypeAlias = Callable[[Site], Finding]


def computed(site: Site, index: int) -> bool:
    """Tell whether an input is there and not a constant."""
    return site.has(index) and isinstance(site.node.inputs[index], gs.Variable)


def reshape(site: Site) -> Finding:
    """Return the constant target of a Reshape."""
    if site.opset < 5 or not computed(site, 1):
        return None
    source, target = site.shape(), site.fact(1).values
    length = site.shape(1)
    if target is None:
        if length == (1,):
            return {1: np.array([-1], np.int64)}
        return "the target is not made of sizes"
    found = constant_target(source, list(target.flat), allowzero=bool(site.attr("allowzero", 0)))
    return found if isinstance(found, str) else {1: np.array(found, np.int64)}


def constant_target(source: Sequence[Size] | None, target: Sequence[Any], *, allowzero: bool) -> list[int] | str:
    """Return the target that says the same with numbers, 0 for an axis that stays and -1 for one that is left over.

    Args:
        source: shape of what is reshaped, None where unknown.
        target: the computed target: numbers, expressions, None for what is not known.
        allowzero: whether a 0 in it means an empty axis.
    """
    found: list[int | None] = []
    nonempty = True
    for axis, wanted in enumerate(target):
        own = source[axis] if source is not None and axis < len(source) else None
        if isinstance(wanted, int):
            if wanted == 0 and allowzero:
                return "its target has an empty axis"
            nonempty &= wanted != 0 or (own is not None and at_most(1, own))
            found.append(int(wanted))
        elif wanted is not None and own is not None and wanted == own:
            nonempty &= at_most(1, own)
            found.append(0)
        else:
            found.append(None)
    missing = [axis for axis, wanted in enumerate(found) if wanted is None]
    if len(missing) == 1 and source is not None and _stays(source, target, missing[0]):
        found[missing[0]], missing = 0, []
    if len(missing) + found.count(-1) > 1:
        return f"axes {missing} of its target are sizes that the input does not have there"
    if missing and not nonempty:
        return f"axis {missing[0]} of its target would become -1, which fails where another axis is empty"
    if allowzero and -1 in found and not nonempty:
        return "with allowzero its -1 holds beside an empty axis, which a copied one does not"
    return [-1 if wanted is None else wanted for wanted in found]


def _stays(source: Sequence[Size], target: Sequence[Any], axis: int) -> bool:
    """Tell whether an axis has to keep its size, because all the others together keep theirs."""
    if axis >= len(source) or any(size is None or size in (0, -1) for size in target):
        return False
    others = product(size for place, size in enumerate(target) if place != axis)
    return others == product(size for place, size in enumerate(source) if place != axis)


def expand(site: Site) -> Finding:
    """Return the constant target of an Expand: 1 for an axis that stays."""
    if not computed(site, 1):
        return None
    source, target = site.shape(), site.fact(1).values
    if source is None or target is None:
        return "the target is not made of sizes"
    found = []
    wanted = list(target.flat)
    for back in range(-len(wanted), 0):
        own = source[back] if -back <= len(source) else 1
        size = wanted[back]
        if isinstance(size, int):
            found.append(size)
        elif size is not None and size == own:
            found.append(1)
        else:
            return f"axis {back} of its target is a size that the input does not have there"
    return {1: np.array(found, np.int64)}


def slice_(site: Site) -> Finding:
    """Return constant starts and ends of a Slice."""
    shape = site.shape()
    if site.opset < 10 or shape is None or not (computed(site, 1) or computed(site, 2)):
        return None
    plan = slice_plan(site, len(shape))
    if plan is None or site.shape(1) != (len(plan),):
        return "its axes are not known"
    starts, ends = [], []
    for axis, (start, end, step) in plan.items():
        if step is None or step <= 0:
            return "it may go backwards"
        first, last = _place(shape[axis], start), _place(shape[axis], end)
        if first is None or last is None:
            return f"where it begins or ends on axis {axis} is not a number"
        starts.append(first)
        ends.append(last)
    dtype = site.fact(1).dtype or np.dtype(np.int64)
    limit = np.iinfo(dtype).max
    return {1: np.array([min(s, limit) for s in starts], dtype), 2: np.array([min(e, limit) for e in ends], dtype)}


def _place(size: Size, place: Size | None) -> int | None:
    """Return a place on an axis as a number that means the same, None where there is none."""
    if isinstance(place, int) or place is None:
        return place
    if equal(place, size):
        return END
    before = subtract(size, place)
    if isinstance(before, int) and before > 0 and at_most(before, size):
        return -before
    return END if at_most(size, place) else None


def resize(site: Site) -> Finding:
    """Return the constant scales of a Resize whose computed sizes are whole multiples of the input's."""
    shape = site.shape()
    if site.opset < 13 or shape is None or not computed(site, 3):
        return None
    sizes, axes = site.fact(3).values, resized_axes(site, len(shape))
    if crops(site) or site.attr("keep_aspect_ratio_policy", "stretch") != "stretch":
        return "it keeps proportions or takes a part"
    if sizes is None or sizes.size != len(axes):
        return "its sizes are not made of the input's"
    scales = [
        None if size is None else quotient(size, shape[axis]) for axis, size in zip(axes, sizes.flat, strict=True)
    ]
    if not all(isinstance(s, int) and s > 0 for s in scales):
        return "its sizes are not whole multiples of the input's"
    return {2: np.array(scales, np.float32), 3: None}


def recurrent(site: Site) -> Finding:
    """Return the initial states of a recurrent layer that are zero anyway when they are left out."""
    found: Inputs = {}
    for index in (5, 6):
        if index < len(site.node.inputs) and site.has(index) and uniform_of(site.node.inputs[index]) == 0:
            found[index] = None
    return found or None


FINDERS: Mapping[str, Finder] = {
    "Reshape": reshape, "Expand": expand, "Slice": slice_, "Resize": resize, "LSTM": recurrent, "GRU": recurrent,
    "RNN": recurrent,
}  # fmt: skip
"""Operator -> what its computed inputs can become."""


def site_of(node: gs.Node, opset: int, facts: Sequence[Fact]) -> Site:
    """Return a node for a finder; nothing new is made up here."""

    def fresh() -> Expr:
        raise LookupError("finders make no symbols")

    return Site(node, opset, facts, fresh)
