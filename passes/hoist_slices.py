"""Slices moved to the front of what computes elements that nobody reads.

    Slice(f(x))            ->  f(Slice(x))                f elementwise, a norm, rows of a MatMul …
    Gather(f(x), i)        ->  Squeeze(f(Slice(x, i)))    one constant index: the last token, the class token
    Slice(x + f(x))        ->  Slice(x) + f(Slice(x))

Classifiers and decoders read one token of the last layer: its MLP, norms, projections and queries are then computed
for that one alone.  Where the moved Slice would become several, they must save more than they cost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import Unknown, array_of, is_constant, parameter, refers, scalar_of
from graphopt.analysis.shapes import TensorType
from graphopt.base import Change, Context, Pass
from graphopt.edit import Edit, label, replace_output, turn_into
from graphopt.ops import is_standard
from graphopt.registry import register

from .fuse_cuts import OPEN, Cut, as_range
from .new_nodes import Maker
from .slice_flow import Needs, elements, needs
from .transpose_flow import Site

_SLICE = 8192
"""Element operations that one more Slice costs (about two microseconds)."""

_DYNAMIC = 32
"""Size that a dynamic axis is taken to have."""

_ROUNDS = 8
"""Times that the whole graph is looked at, while it changes."""


@register
@dataclass(frozen=True)
class HoistSlices(Pass):
    """Move Slices, and Gathers of one index, above operators that then compute only what is read.

    Exact: the same elements are computed in the same way, fewer of them.  Keeps the signature.
    """

    name: ClassVar[str] = "hoist-slices"
    optional: ClassVar[bool] = True

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose one change per Slice that can move."""
        with Edit(graph) as edit:
            for _ in range(_ROUNDS):
                applied: list[bool] = []
                near: list[Change] = []
                for node in reversed(list(graph.nodes)):
                    if not edit.removed(node):
                        yield from _hoisted(edit, ctx, node, applied, near)
                edit.sweep()
                if not applied:
                    break
            yield from near


@dataclass
class _Taken:
    """What a node takes of its input: one cut of one axis; `scalar` if the axis goes."""

    axis: int
    cut: Cut
    scalar: bool


def _taken(site: Site) -> _Taken | None:
    node = site.node
    if not is_standard(node, "Slice", "Gather") or refers(node) or site.opset < 10:
        return None
    rank = site.rank(node.inputs[0])
    if rank is None or rank < 2:
        return None
    if node.op == "Gather":
        index = scalar_of(node.inputs[1])
        if index is None or site.rank(node.inputs[1]) != 0:
            return None
        end = OPEN if index == -1 else int(index) + 1
        return _Taken(int(node.attrs.get("axis", 0)) % rank, (int(index), end, 1), scalar=True)
    starts, ends, steps = (site.known(name) for name in ("starts", "ends", "steps"))
    if starts is None or ends is None or len(starts) != 1:
        return None
    axes = [0] if site.left_out("axes") else site.known("axes")
    if axes is None or isinstance(parameter(node, "steps", site.opset), Unknown):
        return None
    return _Taken(axes[0] % rank, (starts[0], ends[0], steps[0] if steps else 1), scalar=False)


@dataclass
class _Cone:
    """The operators above a Slice that nobody else needs whole.

    Attributes:
        nodes: them, by id, each with what it needs.
        axes: axis along which each of their tensors is cut, by id.
        cuts: tensors at the border that are to be cut, by (id, axis).
    """

    nodes: dict[int, tuple[gs.Node, Needs]] = field(default_factory=dict)
    axes: dict[int, int] = field(default_factory=dict)
    cuts: dict[tuple[int, int], gs.Tensor] = field(default_factory=dict)


def _cone(edit: Edit, ctx: Context, node: gs.Node, taken: _Taken) -> _Cone:
    """Return all operators that need compute only what `node` takes."""
    cone = _Cone()
    readers: dict[int, set[int]] = {id(node.inputs[0]): {id(node)}}
    tensors = {id(node.inputs[0]): node.inputs[0]}
    cone.axes[id(node.inputs[0])] = taken.axis
    waiting = deque([node.inputs[0]])
    while waiting:
        tensor = waiting.popleft()
        producer = tensor.inputs[0] if len(tensor.inputs) == 1 else None
        if producer is None or id(producer) in cone.nodes or not edit.is_local(producer) or edit.is_output(tensor):
            continue
        if {id(n) for n in edit.consumers(tensor)} != readers[id(tensor)] or tensor is not producer.outputs[0]:
            continue
        found = needs(Site(producer, edit, ctx), cone.axes[id(tensor)])
        if found is None or not _agrees(cone, producer, found):
            continue
        cone.nodes[id(producer)] = producer, found
        for i, axis in found.axes.items():
            given = producer.inputs[i]
            tensors[id(given)] = given
            cone.axes[id(given)] = axis
            readers.setdefault(id(given), set()).add(id(producer))
            if not is_constant(given):
                waiting.append(given)
    for producer, found in cone.nodes.values():
        for i, axis in found.axes.items():
            given = producer.inputs[i]
            maker = given.inputs[0] if len(given.inputs) == 1 else None
            if maker is None or id(maker) not in cone.nodes:
                cone.cuts[id(given), axis] = given
    return cone


def _agrees(cone: _Cone, node: gs.Node, found: Needs) -> bool:
    """Tell whether no tensor is cut along two axes, or needed whole as well."""
    wanted = {id(node.inputs[i]): axis for i, axis in found.axes.items()}
    if any(cone.axes.get(key, axis) != axis for key, axis in wanted.items()):
        return False
    whole = {id(t) for i, t in enumerate(node.inputs) if i not in found.axes and not t.is_empty()}
    return not whole & wanted.keys() and all(wanted[id(node.inputs[i])] == axis for i, axis in found.axes.items())


def _hoisted(edit: Edit, ctx: Context, node: gs.Node, applied: list[bool], near: list[Change]) -> Iterator[Change]:
    taken = _taken(Site(node, edit, ctx))
    if taken is None:
        return
    cone = _cone(edit, ctx, node, taken)
    what = f"{node.op} above {len(cone.nodes)} operators"
    if not cone.nodes:
        reason = _read_elsewhere(edit, ctx, node, taken)
        if reason is not None:
            near.append(Change(label(node), f"{node.op} above what it takes of", reason))
        return
    reason = _not_worth(ctx, node, taken, cone)
    if reason is not None:
        near.append(Change(label(node), what, reason))
        return

    def apply() -> None:
        applied.append(True)
        _Hoist(edit, ctx, node, taken, cone).move()

    yield Change(label(node), what, "they compute only what is read", apply)


def _read_elsewhere(edit: Edit, ctx: Context, node: gs.Node, taken: _Taken) -> str | None:
    """Return who else reads what a Slice could be moved above."""
    tensor = node.inputs[0]
    producer = tensor.inputs[0] if len(tensor.inputs) == 1 else None
    if producer is None or not edit.is_local(producer) or edit.sole_consumer(tensor) is not None:
        return None
    if needs(Site(producer, edit, ctx), taken.axis) is None:
        return None
    return f"'{tensor.name}' is used elsewhere, too"


def _left(ctx: Context, node: gs.Node, taken: _Taken) -> int | None:
    """Return how many elements are taken along the axis, None where that is not known."""
    shape = ctx.shapes.proved(node.inputs[0]).shape
    size = None if shape is None else shape[taken.axis]
    if isinstance(size, int):
        return len(as_range(taken.cut, size))
    return 1 if taken.scalar else None


def _share(ctx: Context, node: gs.Node, taken: _Taken) -> float:
    """Return which share of the axis is taken, dynamic axes taken to be of a usual size."""
    shape = ctx.shapes.proved(node.inputs[0]).shape
    size = None if shape is None else shape[taken.axis]
    assumed = size if isinstance(size, int) else _DYNAMIC
    return len(as_range(taken.cut, assumed)) / max(assumed, 1)


def _not_worth(ctx: Context, node: gs.Node, taken: _Taken, cone: _Cone) -> str | None:
    if _left(ctx, node, taken) is None and any(found.constants for _, found in cone.nodes.values()):
        return "how much is taken is not known"
    spared = 1 - _share(ctx, node, taken)
    work = sum(f.work * elements(ctx.shapes.proved(n.outputs[0]).shape) for n, f in cone.nodes.values())
    more = sum(not is_constant(t) for t in cone.cuts.values()) - 1 + taken.scalar
    if spared * work > max(more * _SLICE, 0):
        return None
    return f"it takes {more} more Slices, and saves {int(spared * work)} element operations"


class _Hoist:
    """Puts a Slice above its cone."""

    def __init__(self, edit: Edit, ctx: Context, node: gs.Node, taken: _Taken, cone: _Cone) -> None:
        self.edit = edit
        self.ctx = ctx
        self.node = node
        self.taken = taken
        self.cone = cone
        self.make = Maker(edit, ctx)
        self.left = _left(ctx, node, taken)
        self.cut: dict[tuple[int, int], gs.Tensor] = {}

    def move(self) -> None:
        for producer, _ in self.cone.nodes.values():
            old = producer.outputs[0]
            new = self._tensor(old, self.cone.axes[id(old)])
            self.cut[id(old), self.cone.axes[id(old)]] = new
            replace_output(producer, old, new)
        for producer, found in self.cone.nodes.values():
            for i, axis in found.axes.items():
                self.edit.set_input(producer, i, self._part(producer.inputs[i], axis))
            for i, values in found.constants.items():
                assert self.left is not None
                self.edit.set_input(producer, i, self.make.constant(f"{label(producer)}/{i}", values(self.left)))
        self._last()

    def _last(self) -> None:
        """Let what the Slice gave come from the operator before it."""
        new, old = self.cut[id(self.node.inputs[0]), self.taken.axis], self.node.outputs[0]
        if self.taken.scalar:
            replace_output(self.node, old, gs.Variable.empty())
            self.make.node("Squeeze", [new], [old], params={"axes": [self.taken.axis]}, like=[self.node])
            self.edit.remove(self.node)
        elif self.edit.bypass(old, new):
            self.edit.remove(self.node)
        else:
            turn_into(self.node, "Identity")
            self.edit.set_input(self.node, 0, new)
            self.edit.trim_inputs(self.node, 1)

    def _tensor(self, like: gs.Tensor, axis: int) -> gs.Variable:
        known = self.ctx.shapes.proved(like)
        shape = None if known.shape is None else list(known.shape)
        if shape is not None:
            shape[axis] = self.left
        return self.make.tensor(f"{like.name}/part", TensorType(known.dtype, None if shape is None else tuple(shape)))

    def _part(self, tensor: gs.Tensor, axis: int) -> gs.Tensor:
        """Return the part of a tensor, cut here where nothing above makes it."""
        if (id(tensor), axis) not in self.cut:
            self.cut[id(tensor), axis] = self._sliced(tensor, axis)
        return self.cut[id(tensor), axis]

    def _sliced(self, tensor: gs.Tensor, axis: int) -> gs.Tensor:
        start, end, step = self.taken.cut
        values = array_of(tensor)
        if values is not None:
            indices = np.asarray(as_range((start, end, step), values.shape[axis]), np.int64)
            return self.make.constant(f"{tensor.name}/part", np.ascontiguousarray(values.take(indices, axis)))
        made = self._tensor(tensor, axis)
        params = {"starts": [start], "ends": [end], "axes": [axis]} | ({} if step == 1 else {"steps": [step]})
        place = tensor.inputs[:1] or [self.node]
        self.make.node("Slice", [tensor], [made], params=params, like=place)
        return made
