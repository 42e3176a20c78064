"""A student that starts from its teacher's weights: those of the same name and shape, and of channels that are left.

Pruning writes down which channels of a layer are left (`graphopt.kept`). A weight is cut along its outputs by the note
at its own node, and along its inputs by the notes at the layers before it, followed through operators that keep
channels apart; where the two do not lead to the student's shape, the weight stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.shapes import Shapes
from graphopt.kept import kept, positions
from graphopt.model import Model
from graphopt.ops import BROADCASTING, CHANNEL_POOLS, UNARY, WEIGHTED
from graphopt.tensors import is_float

Array: TypeAlias = np.ndarray[Any, Any]
Shape: TypeAlias = tuple[int | str | None, ...]

_KEEP_AXES = UNARY | BROADCASTING | CHANNEL_POOLS | frozenset({
    "BatchNormalization", "GroupNormalization", "InstanceNormalization", "LayerNormalization", "LRN", "Pad", "Resize",
    "Upsample", "Softmax",
})  # fmt: skip
"""Operators whose output has the axes of an input, and its channels in order."""

_REGROUP = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})

_LAYERS: Mapping[str, tuple[int, int]] = {"Conv": (0, 1), "ConvTranspose": (1, 0), "MatMul": (1, 0), "Gemm": (1, 0)}
"""Layers: axes of output and of input channels of their weight (of Gemm: not transposed)."""


@dataclass(frozen=True)
class Channels:
    """Which of the teacher's channels a tensor of the student has.

    Attributes:
        width: how many the teacher has.
        indices: int64, the student's.
        axis: where they are.
    """

    width: int
    indices: Array
    axis: int

    def along(self, before: int, after: int) -> Array | None:
        """Return indices along an axis of `before` elements of which `after` are left, each channel being a run."""
        run, rest = divmod(before, self.width) if self.width else (0, 1)
        if rest or after != run * len(self.indices):
            return None
        return (self.indices[:, None] * run + np.arange(run)).reshape(-1)


def start_from(student: Model, teacher: Model) -> list[str]:
    """Give a student the weights of a teacher, in place.

    Args:
        student: initializers of floats that the teacher has under the same name are written to.
        teacher: the model that it was made of, or one that shares parts with it.

    Returns:
        The names of the initializers that now hold the teacher's values.
    """
    mine, theirs = _weights(student), _weights(teacher)
    common = {name: theirs[name] for name in mine if name in theirs}
    cut = {name for name, other in common.items() if tuple(mine[name].shape) != tuple(other.shape)}
    found = Tracer(student, common).axes if cut else {}
    started = []
    for name, other in common.items():
        shape = tuple(mine[name].shape)
        values = other.values if name not in cut else _part(other.values, shape, found.get(name, {}))
        if values is not None and values.shape == shape:
            mine[name].values = np.array(values, dtype=mine[name].dtype)
            started.append(name)
    return started


def _weights(model: Model) -> dict[str, gs.Constant]:
    return {c.name: c for c in model.constants() if c.name and is_float(c.dtype)}


def _part(values: Array, shape: tuple[int, ...], axes: Mapping[int, Channels]) -> Array | None:
    """Return the channels that are left, None where the notes do not lead to that shape."""
    if values.ndim != len(shape):
        return None
    for axis, size in enumerate(shape):
        if values.shape[axis] != size:
            indices = axes[axis].along(values.shape[axis], size) if axis in axes else None
            if indices is None:
                return None
            values = np.take(values, indices, axis=axis)
    return values


def channels_left(student: Model, teacher: Model) -> dict[str, Channels]:
    """Return which of the teacher's channels tensors of a pruned student have, by name, as far as that is known."""
    return Tracer(student, _weights(teacher)).tensors


class Tracer:
    """Follows channels through a student.

    Args:
        student: a pruned model.
        theirs: weights of the teacher by name.

    Attributes:
        axes: for each weight, which channels it has along its axes.
    """

    def __init__(self, student: Model, theirs: Mapping[str, gs.Constant]) -> None:
        self._graph, self._theirs = student.graph, theirs
        self._shapes = Shapes(student)
        self._of: dict[int, Channels] = {}
        self.axes: dict[str, dict[int, Channels]] = {}
        for node in self._graph.nodes:
            made = self._layer(node) if node.op in _LAYERS else self._other(node)
            if made is not None and node.outputs:
                self._of[id(node.outputs[0])] = made

    @property
    def tensors(self) -> dict[str, Channels]:
        """Which channels tensors have, by name."""
        made = (tensor for node in self._graph.nodes for tensor in node.outputs)
        return {tensor.name: self._of[id(tensor)] for tensor in made if id(tensor) in self._of}

    def _layer(self, node: gs.Node) -> Channels | None:
        out, read = _LAYERS[node.op]
        if node.op == "Gemm" and node.attrs.get("transB", 0):
            out, read = read, out
        weight, rank = node.inputs[1], self._rank(node.inputs[0])
        if not isinstance(weight, gs.Constant) or rank is None:
            return None
        into, made = self._of.get(id(node.inputs[0])), self._own(node, out)
        place = 1 if node.op in WEIGHTED else rank - 1
        if into is not None and into.axis != place:
            return None
        depthwise = int(node.attrs.get("group", 1)) > 1
        if made is None and depthwise:
            made = into  # each channel is made of its own alone
        made = None if made is None else replace(made, axis=place)
        self._note(weight, out, made)
        if not depthwise:
            self._note(weight, read, into)
        elif node.op == "ConvTranspose":
            self._note(weight, read, made)
        if len(node.inputs) > 2:
            self._note(node.inputs[2], len(node.inputs[2].shape or ()) - 1, made)
        return made

    def _own(self, node: gs.Node, axis: int) -> Channels | None:
        """Return what the note at a layer says of its outputs, None without one."""
        other, said = self._theirs.get(node.inputs[1].name), kept(node)
        if other is None or said is None or not other.outputs:
            return None
        group = int(node.attrs.get("group", 1)) if node.op == "ConvTranspose" else 1
        size = int(other.shape[axis]) * group
        indices = positions(other.outputs[0], node, size)
        return Channels(size, indices, 1) if not len(indices) or int(indices.max()) < size else None

    def _other(self, node: gs.Node) -> Channels | None:
        if node.op == "Concat":
            return self._joined(node)
        source = next((t for t in node.inputs if id(t) in self._of), None)
        if source is None:
            return None
        found = self._of[id(source)]
        if node.op == "Transpose":
            perm = node.attrs.get("perm")
            return None if perm is None else replace(found, axis=list(perm).index(found.axis))
        if node.op in _REGROUP:
            return self._regrouped(node, found)
        if node.op == "ReduceMean" and node.attrs.get("keepdims", 1):
            return found if self._same_size(source, node.outputs[0], found.axis) else None
        return self._elementwise(node, source, found) if node.op in _KEEP_AXES else None

    def _elementwise(self, node: gs.Node, source: gs.Tensor, found: Channels) -> Channels | None:
        """Note constants that stand beside channels; return where those are in the output."""
        before, after = self._rank(source), self._rank(node.outputs[0])
        if before is None or after is None:
            return None
        behind = before - found.axis
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant) and is_float(tensor.dtype):
                rank = len(tensor.shape)
                axis = rank - behind if node.op in BROADCASTING else 0 if rank == 1 else -1
                if 0 <= axis < rank and tensor.shape[axis] == len(found.indices):
                    self._note(tensor, axis, found)
        out = replace(found, axis=after - behind)
        return out if self._size(node.outputs[0], out.axis) == len(found.indices) else None

    def _regrouped(self, node: gs.Node, found: Channels) -> Channels | None:
        """Return where channels are after a reshape: as they were, or each of them a run of a merged axis."""
        before, after = (self._shapes.of(t).shape for t in (node.inputs[0], node.outputs[0]))
        if before is None or after is None:
            return None
        size = before[found.axis]
        for axis, wide in enumerate(after):
            if wide == size and _alike(before, found.axis, after, axis):
                return replace(found, axis=axis)
        tail = before[found.axis :]
        if all(isinstance(d, int) for d in tail) and after[-1] == math.prod(d for d in tail if isinstance(d, int)):
            return replace(found, axis=len(after) - 1)
        return None

    def _joined(self, node: gs.Node) -> Channels | None:
        """Return the channels of tensors side by side; those that nothing is known of are whole."""
        rank = self._rank(node.outputs[0])
        if rank is None:
            return None
        axis = int(node.attrs.get("axis", 1)) % rank
        known = [self._of[id(t)] for t in node.inputs if id(t) in self._of]
        if known and all(k.axis != axis for k in known):
            return known[0]
        width, parts = 0, []
        for tensor in node.inputs:
            part, size = self._of.get(id(tensor)), self._size(tensor, axis)
            if part is None and isinstance(size, int):
                part = Channels(size, np.arange(size), axis)
            if part is None or part.axis != axis:
                return None
            parts.append(part.indices + width)
            width += part.width
        return Channels(width, np.concatenate(parts), axis)

    def _rank(self, tensor: gs.Tensor) -> int | None:
        return self._shapes.of(tensor).rank

    def _size(self, tensor: gs.Tensor, axis: int) -> int | str | None:
        shape = self._shapes.of(tensor).shape
        return shape[axis] if shape is not None and 0 <= axis < len(shape) else None

    def _same_size(self, tensor: gs.Tensor, other: gs.Tensor, axis: int) -> bool:
        return self._size(tensor, axis) == self._size(other, axis) is not None

    def _note(self, tensor: gs.Tensor, axis: int, channels: Channels | None) -> None:
        if channels is not None and isinstance(tensor, gs.Constant):
            self.axes.setdefault(tensor.name, {})[axis] = channels


def _alike(before: Shape, axis: int, after: Shape, other: int) -> bool:
    """Tell whether two axes of equal size are one, before and after a reshape: by what is ahead, or behind."""
    if [d for d in before[:axis] if d != 1] == [d for d in after[:other] if d != 1]:
        return True
    behind = before[axis + 1 :], after[other + 1 :]
    numbers = [[d for d in dims if isinstance(d, int)] for dims in behind]
    known = all(len(n) == len(dims) for n, dims in zip(numbers, behind, strict=True))
    return known and math.prod(numbers[0]) == math.prod(numbers[1])
