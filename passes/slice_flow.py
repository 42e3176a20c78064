"""Which part of its inputs an operator needs for a part of its output along one axis.

`needs(site, axis)` gives, for each input that can be cut along with the output, the axis to cut; inputs that are
not named are needed as they are.  All that are cut have the size of the output there, so one cut fits all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import is_constant, is_deterministic, refers
from graphopt.ops import BROADCASTING, REDUCTIONS, UNARY

from .fuse_views import Size, product, reshaped
from .transpose_flow import SINCE, Site

Dims = tuple[int | str | None, ...]


@dataclass
class Needs:
    """What an operator needs.

    Attributes:
        axes: axis to cut of each input that is cut, by index.
        constants: new values of parameters, by input index, given how many elements are left.
        work: element operations per element of the output; none for what only looks at it differently.
    """

    axes: dict[int, int]
    constants: dict[int, Callable[[int], np.ndarray[Any, Any]]] = field(default_factory=dict)
    work: float = 1.0


def needs(site: Site, axis: int) -> Needs | None:
    """Return what a part of the only used output, along `axis`, needs; None where that is all, or not known."""
    node = site.node
    make = _NEEDS.get(node.op)
    if make is None or site.opset < SINCE or not is_deterministic(node, site.opset) or refers(node):
        return None
    if any(site.edit.is_used(t) for t in node.outputs[1:]):
        return None
    return make(site, axis)


def _dims(site: Site, tensor: gs.Tensor) -> Dims | None:
    return site.ctx.shapes.proved(tensor).shape


def _unary(site: Site, axis: int) -> Needs | None:
    if any(not t.is_empty() and _dims(site, t) not in ((), (1,)) for t in site.node.inputs[1:]):
        return None
    return Needs({0: axis}, work=4.0 if site.node.op not in ("Relu", "Cast", "Identity", "Neg") else 1.0)


def _broadcasting(site: Site, axis: int) -> Needs | None:
    out = _dims(site, site.node.outputs[0])
    if out is None:
        return None
    made = Needs({})
    varying = [i for i, t in enumerate(site.node.inputs) if not is_constant(t)]
    for i, tensor in enumerate(site.node.inputs):
        dims = _dims(site, tensor)
        if dims is None:
            return None
        place = axis - (len(out) - len(dims))
        if place < 0 or dims[place] == 1:
            continue
        alone = varying == [i]
        if not alone and (dims[place] is None or dims[place] != out[axis]):
            return None
        made.axes[i] = place
    return made if made.axes else None


def _matmul(site: Site, axis: int) -> Needs | None:
    out, left, right = (_dims(site, t) for t in (*site.node.outputs[:1], *site.node.inputs[:2]))
    if out is None or left is None or right is None or min(len(left), len(right)) < 2:
        return None
    inner = left[-1] if isinstance(left[-1], int) else 32
    made = Needs({}, work=inner / 4)
    last = len(out) - 1
    if axis == last:
        made.axes[1] = len(right) - 1
    elif axis == last - 1:
        made.axes[0] = len(left) - 2
    else:
        for i, dims in enumerate((left, right)):
            place = axis - (len(out) - len(dims))
            if place < 0 or dims[place] == 1:
                continue
            if dims[place] is None or dims[place] != out[axis]:
                return None
            made.axes[i] = place
    return made if made.axes else None


def _gemm(site: Site, axis: int) -> Needs | None:
    node = site.node
    shapes = [_dims(site, t) for t in node.inputs]
    out = _dims(site, node.outputs[0])
    if out is None or any(s is None for s in shapes):
        return None
    left = shapes[0] or ()
    flipped = bool(node.attrs.get("transB" if axis else "transA", 0))
    made = Needs({axis: axis ^ int(flipped)})
    inner = left[0 if node.attrs.get("transA", 0) else 1]
    made.work = (inner if isinstance(inner, int) else 32) / 4
    bias = shapes[2] if len(shapes) > 2 and not node.inputs[2].is_empty() else None
    if bias:
        place = axis - (2 - len(bias))
        if place >= 0 and bias[place] != 1:
            if bias[place] is None or bias[place] != out[axis]:
                return None
            made.axes[2] = place
    return made


def _layer_norm(site: Site, axis: int) -> Needs | None:
    rank = site.rank(site.node.inputs[0])
    normed = int(site.node.attrs.get("axis", -1))
    if rank is None or axis >= normed % rank:
        return None
    return Needs({0: axis}, work=6.0)


def _softmax(site: Site, axis: int) -> Needs | None:
    rank = site.rank(site.node.inputs[0])
    if site.opset < 13 or rank is None or int(site.node.attrs.get("axis", -1)) % rank == axis:
        return None
    return Needs({0: axis}, work=8.0)


def _transpose(site: Site, axis: int) -> Needs | None:
    perm = site.node.attrs.get("perm")
    return None if perm is None else Needs({0: int(perm[axis])})


def _reduce(site: Site, axis: int) -> Needs | None:
    axes, rank = site.known("axes"), site.rank(site.node.inputs[0])
    if not axes or rank is None:
        return None
    gone = {a % rank for a in axes}
    place = axis if site.node.attrs.get("keepdims", 1) else [a for a in range(rank) if a not in gone][axis]
    return None if place in gone else Needs({0: place}, work=4.0)


def _squeeze(site: Site, axis: int) -> Needs | None:
    axes, rank = site.known("axes"), site.rank(site.node.inputs[0])
    if axes is None or rank is None:
        return None
    gone = {a % rank for a in axes}
    return Needs({0: [a for a in range(rank) if a not in gone][axis]}, work=0)


def _unsqueeze(site: Site, axis: int) -> Needs | None:
    axes, rank = site.known("axes"), site.rank(site.node.outputs[0])
    if axes is None or rank is None:
        return None
    new = {a % rank for a in axes}
    return None if axis in new else Needs({0: axis - sum(a < axis for a in new)}, work=0)


def _concat(site: Site, axis: int) -> Needs | None:
    own, rank = site.node.attrs.get("axis"), site.rank(site.node.outputs[0])
    if own is None or rank is None or own % rank == axis:
        return None
    return Needs(dict.fromkeys(range(len(site.node.inputs)), axis))


def _slice(site: Site, axis: int) -> Needs | None:
    axes, rank = site.known("axes"), site.rank(site.node.inputs[0])
    if axes is None or rank is None or site.opset < 10 or axis in {a % rank for a in axes}:
        return None
    return Needs({0: axis}, work=0)


def _gather(site: Site, axis: int) -> Needs | None:
    own, data, indices = int(site.node.attrs.get("axis", 0)), *(site.rank(t) for t in site.node.inputs[:2])
    if data is None or indices is None:
        return None
    own %= data
    if own <= axis < own + indices:
        return Needs({1: axis - own})
    return None if is_constant(site.node.inputs[0]) else Needs({0: axis if axis < own else axis - indices + 1})


def _flatten(site: Site, axis: int) -> Needs | None:
    return Needs({0: 0}, work=0) if axis == 0 and site.node.attrs.get("axis", 1) == 1 else None


def _norm(*allowed: int) -> Callable[[Site, int], Needs | None]:
    def make(site: Site, axis: int) -> Needs | None:
        if axis not in allowed or site.node.attrs.get("training_mode", 0):
            return None
        return Needs({0: axis}, work=4.0)

    return make


def _reshape(site: Site, axis: int) -> Needs | None:
    """An axis comes through where what stands before it, and itself, have equal sizes on both sides."""
    target, dims = site.known("shape"), _dims(site, site.node.inputs[0])
    if target is None or dims is None or 0 in dims or site.node.attrs.get("allowzero", 0):
        return None
    sizes: list[Size] = [(d, ()) if isinstance(d, int) else (1, (i,)) for i, d in enumerate(dims)]
    out = reshaped(target, sizes, allowzero=False)
    if out is None:
        return None
    before = product(out[:axis])
    place = next((b for b in range(len(sizes)) if product(sizes[:b]) == before and sizes[b] == out[axis]), None)
    if place is None or (place != axis and place < len(target) and target[place] == 0):
        return None
    made = Needs({0: place}, work=0)
    if target[axis] == 0 and place != axis:
        return None
    if target[axis] > 0:
        made.constants[1] = lambda left: np.asarray([left if i == axis else t for i, t in enumerate(target)], np.int64)
    return made


_NEEDS: Mapping[str, Callable[[Site, int], Needs | None]] = {
    **dict.fromkeys(UNARY, _unary),
    **dict.fromkeys(BROADCASTING, _broadcasting),
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), _softmax),
    "MatMul": _matmul,
    "Gemm": _gemm,
    "LayerNormalization": _layer_norm,
    "BatchNormalization": _norm(0, 2, 3, 4),
    "InstanceNormalization": _norm(0),
    "GlobalAveragePool": _norm(0, 1),
    "GlobalMaxPool": _norm(0, 1),
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Concat": _concat,
    "Slice": _slice,
    "Gather": _gather,
    "Flatten": _flatten,
    "Reshape": _reshape,
}
"""What is not here needs all of its inputs."""


def elements(dims: Dims | None, dynamic: int = 32) -> int:
    """Return a number of elements; dynamic axes count as `dynamic`, an unknown rank as one element."""
    return math.prod(d if isinstance(d, int) else dynamic for d in dims or ())
