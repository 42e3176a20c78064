"""How an operator computes on permuted tensors: which permutation each of its tensors has, and its new axes.

A tensor t permuted by P is Transpose(t, P): axis P[k] of t is its axis k.  `flow` starts from the permutation of one
input or output and says, where the operator can live with it, the others'.

    elementwise                  all the same; constants are permuted
    Softmax, Concat, Split …     the same; the axis is where P has it
    Reduce, Squeeze, Gather      of the axes that are left, in the order in which P has them
    Unsqueeze                    of the axes that were there
    Slice, Pad, Expand, Tile     the parameters are permuted
    norms, pools                 where P leaves the axes alone that mean something
    MatMul(x, w)                 where P leaves the last axis last
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import Unknown, array_of, is_constant, is_deterministic, parameter, refers
from graphopt.base import Context
from graphopt.edit import Edit
from graphopt.ops import BROADCASTING, MOVED_TO_INPUT, REDUCTIONS, UNARY
from graphopt.rewrite import LARGE

Array = np.ndarray[Any, Any]
Perm = tuple[int, ...]
Port = tuple[str, int]
"""("in" or "out", index)."""


SINCE = 9
"""Operator set from which on operators broadcast and normalise as it is told here."""


@dataclass
class Flow:
    """How a node computes on permuted tensors.

    Attributes:
        inputs: permutation of each input that is permuted, by index.
        outputs: permutation of each output.
        attrs: attributes that change.
        constants: new values of parameters and constant operands, by input index.
    """

    inputs: dict[int, Perm]
    outputs: dict[int, Perm]
    attrs: dict[str, Any] = field(default_factory=dict)
    constants: dict[int, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Site:
    """One node, and what its flow may ask."""

    node: gs.Node
    edit: Edit
    ctx: Context

    @property
    def opset(self) -> int:
        """The graph's operator set."""
        return int(self.edit.graph.opset)

    def rank(self, tensor: gs.Tensor) -> int | None:
        """Return a tensor's rank, None where it is not proved."""
        return self.ctx.shapes.proved(tensor).rank

    def known(self, name: str) -> list[int] | None:
        """Return a parameter's numbers, None where it is left out or computed."""
        found = parameter(self.node, name, self.opset)
        return None if found is None or isinstance(found, Unknown) else [int(v) for v in found.reshape(-1)]

    def left_out(self, name: str) -> bool:
        """Tell whether a parameter is left out."""
        return parameter(self.node, name, self.opset) is None


def flow(site: Site, port: Port, perm: Perm) -> Flow | None:
    """Return how a node computes when the tensor at `port` has a permutation; None where it cannot, or may not."""
    node = site.node
    make = _FLOWS.get(node.op)
    if make is None or site.opset < SINCE or not is_deterministic(node, site.opset) or refers(node):
        return None
    if any(t.is_empty() for t in node.inputs[:1]):
        return None
    return make(site, port, perm)


def inverse(perm: Perm) -> Perm:
    """Return the permutation that undoes another."""
    return tuple(perm.index(i) for i in range(len(perm)))


def is_identity(perm: Perm) -> bool:
    """Tell whether a permutation moves nothing."""
    return perm == tuple(range(len(perm)))


def _set_param(site: Site, made: Flow, name: str, values: Sequence[int]) -> Flow:
    """Change a parameter, attribute or input as the opset has it."""
    since, index = MOVED_TO_INPUT.get((site.node.op, name), (1 << 30, 0))
    if site.opset < since:
        made.attrs[name] = list(values)
    else:
        made.constants[index] = np.asarray(values, np.int64)
    return made


def _unary(site: Site, port: Port, perm: Perm) -> Flow | None:
    extra = (t for t in site.node.inputs[1:] if not t.is_empty())
    if port[1] != 0 or any(site.edit.is_used(t) for t in site.node.outputs[1:]):
        return None
    if any(site.rank(t) != 0 and array_of(t, limit=1) is None for t in extra):
        return None
    return Flow({0: perm}, {0: perm})


def _broadcasting(site: Site, _: Port, perm: Perm) -> Flow | None:
    node, rank = site.node, len(perm)
    if site.rank(node.outputs[0]) != rank:
        return None
    made = Flow({}, {0: perm})
    for i, tensor in enumerate(node.inputs):
        shape = site.ctx.shapes.proved(tensor).shape
        if shape is None:
            return None
        if is_constant(tensor):
            if all(d == 1 for d in shape):
                continue
            values = _permuted(site, tensor, perm)
            if values is None:
                return None
            made.constants[i] = values
        elif len(shape) == rank:
            made.inputs[i] = perm
        elif any(d != 1 for d in shape):
            return None
    return made


def _permuted(site: Site, tensor: gs.Tensor, perm: Perm) -> Array | None:
    """Return a constant operand for a permuted result, None where that would keep a large one twice."""
    known = site.ctx.shapes.proved(tensor)
    large = known.static is None or known.dtype is None or math.prod(known.static) * known.dtype.itemsize > LARGE
    if large and site.edit.sole_consumer(tensor) is None:
        return None
    values = array_of(tensor)
    if values is None:
        return None
    return np.ascontiguousarray(values.reshape((1,) * (len(perm) - values.ndim) + values.shape).transpose(perm))


def _along_axis(default: int, since: int = 1) -> Callable[[Site, Port, Perm], Flow | None]:
    """Return the flow of operators of one axis, all tensors alike."""

    def make(site: Site, port: Port, perm: Perm) -> Flow | None:
        node = site.node
        axis = node.attrs.get("axis", default)
        if site.opset < since or not isinstance(axis, int):
            return None
        inputs = range(len(node.inputs)) if node.op == "Concat" else range(1)
        if any(is_constant(node.inputs[i]) for i in inputs) or (port[0] == "in" and port[1] not in inputs):
            return None
        outputs = dict.fromkeys(range(len(node.outputs)), perm)
        return Flow(dict.fromkeys(inputs, perm), outputs, {"axis": perm.index(axis % len(perm))})

    return make


def _quantize(site: Site, port: Port, perm: Perm) -> Flow | None:
    node = site.node
    ranks = [site.rank(t) for t in node.inputs[1:] if not t.is_empty()]
    if port[1] != 0 or any(r not in (0, 1) for r in ranks) or is_constant(node.inputs[0]):
        return None
    axis = int(node.attrs.get("axis", 1))
    moved = {"axis": perm.index(axis % len(perm))} if 1 in ranks else {}
    return Flow({0: perm}, {0: perm}, moved)


def _narrowed(perm: Perm, gone: Sequence[int]) -> Perm:
    """Return the permutation of the axes that are left."""
    left = [a for a in range(len(perm)) if a not in gone]
    return tuple(left.index(a) for a in perm if a not in gone)


def _widened(perm: Perm, new: Sequence[int]) -> Perm:
    """Return the permutation of more axes: the new ones stay where they are."""
    rank = len(perm) + len(new)
    old = [a for a in range(rank) if a not in new]
    rest = iter(perm)
    return tuple(k if k in new else old[next(rest)] for k in range(rank))


def _dropping(site: Site, port: Port, perm: Perm, axes: Sequence[int], name: str) -> Flow | None:
    """Return the flow of an operator that takes axes away; `axes` are of its input."""
    rank = site.rank(site.node.inputs[0])
    if rank is None or is_constant(site.node.inputs[0]):
        return None
    gone = sorted(a % rank for a in axes)
    wide = perm if port[0] == "in" else _widened(perm, gone)
    made = Flow({0: wide}, {0: _narrowed(wide, gone)})
    places = sorted(wide.index(a) for a in gone)
    if name == "axis":
        made.attrs["axis"] = places[0]
        return made
    return _set_param(site, made, name, places)


def _squeeze(site: Site, port: Port, perm: Perm) -> Flow | None:
    axes = site.known("axes")
    return None if axes is None or port[1] != 0 else _dropping(site, port, perm, axes, "axes")


def _unsqueeze(site: Site, port: Port, perm: Perm) -> Flow | None:
    axes, rank = site.known("axes"), site.rank(site.node.outputs[0])
    if axes is None or rank is None or port[1] != 0 or is_constant(site.node.inputs[0]):
        return None
    new = sorted(a % rank for a in axes)
    wide = perm if port[0] == "out" else _widened(perm, new)
    made = Flow({0: _narrowed(wide, new)}, {0: wide})
    return _set_param(site, made, "axes", sorted(wide.index(a) for a in new))


def _reduce(site: Site, port: Port, perm: Perm) -> Flow | None:
    axes, node = site.known("axes"), site.node
    if not axes or port[1] != 0:
        return None
    if not node.attrs.get("keepdims", 1):
        return _dropping(site, port, perm, axes, "axes")
    places = sorted(perm.index(a % len(perm)) for a in axes)
    return _set_param(site, Flow({0: perm}, {0: perm}), "axes", places)


def _arg(site: Site, port: Port, perm: Perm) -> Flow | None:
    axis = int(site.node.attrs.get("axis", 0))
    if not site.node.attrs.get("keepdims", 1):
        return _dropping(site, port, perm, [axis], "axis")
    return Flow({0: perm}, {0: perm}, {"axis": perm.index(axis % len(perm))})


def _gather(site: Site, port: Port, perm: Perm) -> Flow | None:
    axis, rank = int(site.node.attrs.get("axis", 0)), site.rank(site.node.inputs[1])
    if port == ("in", 1) or is_constant(site.node.inputs[0]):
        return None
    if rank == 0:
        return _dropping(site, port, perm, [axis], "axis")
    if rank != 1:
        return None
    return Flow({0: perm}, {0: perm}, {"axis": perm.index(axis % len(perm))})


def _slice(site: Site, port: Port, perm: Perm) -> Flow | None:
    if site.opset < 10 or port[1] != 0:
        return None
    axes = site.known("axes")
    if axes is None:
        starts = site.known("starts")
        if starts is None or not site.left_out("axes"):
            return None
        axes = list(range(len(starts)))
    return _set_param(site, Flow({0: perm}, {0: perm}), "axes", [perm.index(a % len(perm)) for a in axes])


def _pad(site: Site, port: Port, perm: Perm) -> Flow | None:
    pads, axes, rank = site.known("pads"), site.known("axes"), len(perm)
    if port[1] != 0:
        return None
    made = Flow({0: perm}, {0: perm})
    if axes is not None and site.opset >= 18:
        return _set_param(site, made, "axes", [perm.index(a % rank) for a in axes])
    if pads is None or len(pads) != 2 * rank or not site.left_out("axes"):
        return None
    return _set_param(site, made, "pads", [pads[a] for a in perm] + [pads[rank + a] for a in perm])


def _sized(name: str) -> Callable[[Site, Port, Perm], Flow | None]:
    """Return the flow of Expand and Tile: one number per axis."""

    def make(site: Site, port: Port, perm: Perm) -> Flow | None:
        sizes = site.known(name)
        same = site.rank(site.node.inputs[0]) == len(perm) == site.rank(site.node.outputs[0])
        if sizes is None or not same or port[1] != 0 or is_constant(site.node.inputs[0]):
            return None
        sizes = [1] * (len(perm) - len(sizes)) + sizes
        return _set_param(site, Flow({0: perm}, {0: perm}), name, [sizes[a] for a in perm])

    return make


def _fixing(*axes: int) -> Callable[[Site, Port, Perm], Flow | None]:
    """Return the flow of operators to which some axes mean something, and the others are alike."""

    def make(site: Site, port: Port, perm: Perm) -> Flow | None:
        fixed = all(a < len(perm) and perm[a] == a for a in axes)
        used = any(site.edit.is_used(t) for t in site.node.outputs[1:])
        return Flow({0: perm}, {0: perm}) if fixed and port[1] == 0 and not used else None

    return make


def _layer_norm(site: Site, port: Port, perm: Perm) -> Flow | None:
    axis = int(site.node.attrs.get("axis", -1)) % len(perm)
    return _fixing(*range(axis, len(perm)))(site, port, perm)


def _matmul(site: Site, port: Port, perm: Perm) -> Flow | None:
    node, last = site.node, len(perm) - 1
    if port == ("in", 1) or site.rank(node.inputs[1]) != 2 or perm[last] != last or is_constant(node.inputs[0]):
        return None
    return Flow({0: perm}, {0: perm})


_FLOWS: Mapping[str, Callable[[Site, Port, Perm], Flow | None]] = {
    **dict.fromkeys(UNARY, _unary),
    **dict.fromkeys(BROADCASTING, _broadcasting),
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), _along_axis(-1, since=13)),
    "Concat": _along_axis(1),
    "Split": _along_axis(0),
    "TopK": _along_axis(-1),
    "ArgMax": _arg,
    "ArgMin": _arg,
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _quantize,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Gather": _gather,
    "Slice": _slice,
    "Pad": _pad,
    "Expand": _sized("shape"),
    "Tile": _sized("repeats"),
    "BatchNormalization": _fixing(1),
    "InstanceNormalization": _fixing(0, 1),
    "GlobalAveragePool": _fixing(0, 1),
    "GlobalMaxPool": _fixing(0, 1),
    "LayerNormalization": _layer_norm,
    "MatMul": _matmul,
}
"""What is not here keeps its tensors as they are."""
