"""What of a node says how many channels there are, and how to write it anew once channels are gone.

    Conv, ConvTranspose     group
    LSTM, GRU, RNN          hidden_size
    Split                   sizes of the parts
    Reshape, Expand, Resize and ConstantOfShape: the target, computed ones too
    Tile, Pad               repeats, amounts
    Slice, Gather           places on an axis that was cut

A patch looks at one node through a `Place` and returns a `Patch`, or raises `RefusedError` with what it cannot do.
Operators that are not in `PATCHES` hold nothing of that kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import array_of
from graphopt.analysis.shapes import Shapes
from graphopt.analysis.symbolic_expr import Expr
from graphopt.ops import MOVED_TO_INPUT

from .shape_targets import constant_target

Array: TypeAlias = np.ndarray[Any, Any]
Axes: TypeAlias = Mapping[int, Array]
"""Axis -> which of its indices stay, in order."""

Dims: TypeAlias = tuple[int | str | None, ...]

TO_THE_FRONT = -(1 << 63)
"""A Slice's end that means before the first element."""


class RefusedError(Exception):
    """A cut that the graph does not take, and why."""


@dataclass
class Patch:
    """What changes about a node.

    Attributes:
        inputs: input -> the constant that it becomes.
        attrs: attribute -> value, None to drop it.
        blends: input -> (mask, values): its elements under the mask become those values, the others stay computed.
        takes: axis -> places along it that are taken of input 0 before the node reads it.
    """

    inputs: dict[int, Array] = field(default_factory=dict)
    attrs: dict[str, Any] = field(default_factory=dict)
    blends: dict[int, tuple[Array, Array]] = field(default_factory=dict)
    takes: dict[int, Array] = field(default_factory=dict)


class Place:
    """A node, and how its tensors are cut.

    Args:
        node: the node.
        opset: of its graph.
        shapes: of the model before the cut.
        cut: input or output -> how its axes are cut, by ("in" or "out", index).
    """

    def __init__(self, node: gs.Node, opset: int, shapes: Shapes, cut: Mapping[tuple[str, int], Axes]) -> None:
        self.node, self.opset, self.shapes = node, opset, shapes
        self._cut = cut

    def attr(self, name: str, default: Any) -> Any:
        """Return an attribute."""
        return self.node.attrs.get(name, default)

    def kept(self, port: int = 0) -> Axes:
        """Return what stays of an input."""
        return self._cut.get(("in", port), {})

    def out_kept(self, port: int = 0) -> Axes:
        """Return what stays of an output."""
        return self._cut.get(("out", port), {})

    def before(self, port: int = 0) -> Dims:
        """Return the shape that an input has before the cut."""
        return self._shape(self.node.inputs[port])

    def out_before(self, port: int = 0) -> Dims:
        """Return the shape that an output has before the cut."""
        return self._shape(self.node.outputs[port])

    def after(self, port: int = 0) -> Dims:
        """Return the shape that an input has after the cut."""
        return _cut_shape(self.before(port), self.kept(port))

    def out_after(self, port: int = 0) -> Dims:
        """Return the shape that an output has after the cut."""
        return _cut_shape(self.out_before(port), self.out_kept(port))

    def number(self, shape: Dims, axis: int) -> int:
        """Return a size that must be known."""
        size = shape[axis]
        if not isinstance(size, int):
            raise RefusedError(f"axis {axis} of what {self.node.op} reads or makes has no known size")
        return size

    def has(self, port: int) -> bool:
        """Tell whether an input is given."""
        return port < len(self.node.inputs) and not self.node.inputs[port].is_empty()

    def values(self, port: int) -> Array | None:
        """Return what an input holds where that is known, computed from shapes or not."""
        tensor = self.node.inputs[port]
        found = array_of(tensor)
        if found is None:
            known = self.shapes.symbolic.of(tensor)
            if known.known_values is not None:
                found = known.known_values.astype(known.dtype or np.int64)
        return found

    def parameter(self, name: str) -> Array | None:
        """Return a parameter, attribute or input as the opset has it; None where it is left out."""
        since, index = MOVED_TO_INPUT[self.node.op, name]
        if self.opset < since:
            value = self.node.attrs.get(name)
            return None if value is None else np.asarray(value)
        if not self.has(index):
            return None
        found = self.values(index)
        if found is None:
            raise RefusedError(f"{name} of {self.node.op} is computed")
        return found

    def setting(self, name: str, values: Array) -> Patch:
        """Return the patch that gives a parameter other values."""
        since, index = MOVED_TO_INPUT[self.node.op, name]
        if self.opset < since:
            return Patch(attrs={name: [int(v) for v in values]})
        dtype = np.dtype((self.node.inputs[index].dtype if self.has(index) else None) or np.int64)
        return Patch(inputs={index: np.clip(values, np.iinfo(dtype).min, np.iinfo(dtype).max).astype(dtype)})

    def _shape(self, tensor: gs.Tensor) -> Dims:
        found = self.shapes.proved(tensor).shape
        if found is None:
            raise RefusedError(f"the shape of '{tensor.name}' is not known")
        return found


def _cut_shape(shape: Dims, kept: Axes) -> Dims:
    return tuple(cut_size(size, len(kept[axis])) if axis in kept else size for axis, size in enumerate(shape))


def cut_size(size: Any, left: int) -> Any:
    """Return the size of a cut axis; where it is a multiple of what is not known (4*batch), the multiple that is left.

    Args:
        size: number, text, expression, or None where it is not known.
        left: indices that stay.
    """
    if isinstance(size, Expr):
        return Expr(dict.fromkeys(size.terms, left))
    if isinstance(size, str):
        return f"{left}*{size.partition('*')[2]}" if "*" in size else None
    return None if size is None else left


def _conv(place: Place) -> Patch:
    """Channels of a group stay as many as the weight has; what changes is how many groups there are."""
    group = int(place.attr("group", 1))
    if group == 1:
        return Patch()
    width = place.number(place.before(1), 1) * group
    channels = len(place.kept(0).get(1, range(width)))
    return _groups(place, channels, place.number(place.after(1), 0))


def _conv_transpose(place: Place) -> Patch:
    group = int(place.attr("group", 1))
    if group == 1:
        return Patch()
    width = place.number(place.before(1), 1) * group
    channels = len(place.out_kept(0).get(1, range(width)))
    return _groups(place, channels, place.number(place.after(1), 0))


def _groups(place: Place, channels: int, other: int) -> Patch:
    """Return the number of groups for so many channels of the side whose groups the weight's axis 1 spans."""
    each = place.number(place.after(1), 1)
    if each == 0 or channels % each or other % (channels // each):
        raise RefusedError(f"{channels} and {other} channels do not divide into groups of {each}")
    return Patch(attrs={"group": channels // each})


def _recurrent(place: Place) -> Patch:
    return Patch(attrs={"hidden_size": place.number(place.after(2), 2)})


def _split(place: Place) -> Patch:
    axis = int(place.attr("axis", 0)) % len(place.before(0))
    if axis not in place.kept(0):
        return Patch()
    sizes = [place.number(place.out_after(i), axis) for i in range(len(place.node.outputs))]
    patch = place.setting("split", np.array(sizes, np.int64))
    if "num_outputs" in place.node.attrs:
        patch.attrs["num_outputs"] = None
    return patch


def _reshape(place: Place) -> Patch:
    """0 and -1 keep their meaning where they still say the same."""
    out = place.out_after(0)
    target = array_of(place.node.inputs[1]) if len(place.node.inputs) > 1 else np.asarray(place.attr("shape", []))
    if target is None:
        return _computed_reshape(place, out)
    source = place.after(0)
    changed = set(place.kept(0)) | set(place.out_kept(0))
    wanted = target.copy()
    for axis, size in enumerate(target):
        stays = size == 0 and not place.attr("allowzero", 0)
        if axis not in changed or size == -1 or (stays and axis < len(source) and source[axis] == out[axis]):
            continue
        wanted[axis] = place.number(out, axis)
    if np.array_equal(wanted, target):
        return Patch()
    return place.setting("shape", wanted)


def _computed_reshape(place: Place, out: Dims) -> Patch:
    """Return the target of a Reshape that is computed: a constant where that says as much."""
    known, source = place.shapes.symbolic.of(place.node.inputs[1]), place.shapes.symbolic.of(place.node.inputs[0])
    allowzero = bool(place.attr("allowzero", 0))
    if known.values is not None and source.shape is not None:
        left = {axis: len(stay) for axis, stay in place.out_kept(0).items()}
        values = [
            cut_size(n, left[axis]) if axis in left and n != -1 else n for axis, n in enumerate(known.values.flat)
        ]
        wanted = [size if isinstance(size, int) and axis in left else values[axis] for axis, size in enumerate(out)]
        sizes = _cut_shape(source.shape, place.kept(0))  # type: ignore[arg-type]
        found = constant_target(sizes, wanted, allowzero=allowzero)  # type: ignore[arg-type]
        if not isinstance(found, str):
            patch = place.setting("shape", np.array(found, np.int64))
            patch.attrs.update({"allowzero": None} if allowzero else {})  # its zeros are axes that stay
            return patch
    open_ended = [axis for axis in place.out_kept(0) if not isinstance(out[axis], int)]
    if not open_ended:
        return Patch(blends={1: _blend(out, place.out_kept(0))})
    left_over = [] if known.values is None else [axis for axis, n in enumerate(known.values.flat) if n == -1]
    if known.values is None or len({*open_ended, *left_over}) > 1:
        raise RefusedError("its target holds multiples of sizes that are not known")
    [axis] = open_ended
    return Patch(blends={1: _blend([-1 if at == axis else size for at, size in enumerate(out)], ())})


def _blend(sizes: Sequence[int | str | None], cut: Iterable[int]) -> tuple[Array, Array]:
    """Return mask and values that put the known sizes in the place of computed ones."""
    if any(not isinstance(sizes[axis], int) for axis in cut):
        raise RefusedError("its target holds a multiple of a size that is not known")
    known = np.array([isinstance(size, int) for size in sizes])
    return known, np.array([size if isinstance(size, int) else 0 for size in sizes], np.int64)


def _target(port: int) -> Callable[[Place], Patch]:
    """Return the patch of an operator whose input `port` is the shape of its output, or the end of it."""

    def patch(place: Place) -> Patch:
        if not place.has(port) or not place.out_kept(0):
            return Patch()
        out, target = place.out_after(0), array_of(place.node.inputs[port])
        length = place.number(place.before(port), 0)
        axes = place.attr("axes", None) if place.node.op == "Resize" else None
        named = [axis % len(out) for axis in (range(-length, 0) if axes is None else axes)]
        if length > len(out):
            raise RefusedError(f"the target of {place.node.op} is longer than its output's shape")
        cut = [at for at, axis in enumerate(named) if axis in place.out_kept(0)]
        if target is None:
            return Patch(blends={port: _blend([out[axis] for axis in named], cut)}) if cut else Patch()
        wanted = target.copy()
        for at in cut:
            wanted[at] = place.number(out, named[at]) if target[at] not in (1, -1) else target[at]
        return Patch() if np.array_equal(wanted, target) else Patch(inputs={port: wanted})

    return patch


def _tile(place: Place) -> Patch:
    repeats = place.parameter("repeats")
    if repeats is None or not place.out_kept(0):
        return Patch()
    wanted = repeats.copy()
    for axis in place.out_kept(0):
        made, read = place.number(place.out_after(0), axis), place.number(place.after(0), axis)
        if read == 0 or made % read:
            raise RefusedError(f"{read} channels repeated do not give {made}")
        wanted[axis] = made // read
    return place.setting("repeats", wanted)


def _slice(place: Place) -> Patch:
    """What a Slice takes of an axis is found again among what stays of it."""
    starts, ends = place.parameter("starts"), place.parameter("ends")
    if starts is None or ends is None:
        raise RefusedError("a Slice has no starts or ends")
    axes, steps = place.parameter("axes"), place.parameter("steps") if place.opset >= 10 else None
    rank = len(place.before(0))
    where = [int(a) % rank for a in (range(len(starts)) if axes is None else axes)]
    strides = np.ones(len(starts), np.int64) if steps is None else np.array(steps, np.int64)
    starts, ends = np.array(starts, np.int64), np.array(ends, np.int64)
    touched, takes = False, {}
    for i, axis in enumerate(where):
        if axis not in place.kept(0):
            continue
        size = place.number(place.before(0), axis)
        taken = np.arange(size)[slice(int(starts[i]), int(ends[i]), int(strides[i]))]
        found = _found_again(taken[_or_all(place.out_kept(0), axis, len(taken))], place.kept(0)[axis], size)
        run = _run(found)
        if run is None or (steps is None and run[2] != 1):
            takes[axis], run = found, (0, len(found), 1)
        starts[i], ends[i], strides[i] = run
        touched = True
    if not touched:
        return Patch()
    patch = place.setting("starts", starts)
    patch.takes = takes
    for name, values in (("ends", ends), ("steps", strides)):
        if name == "steps" and (steps is None or np.array_equal(steps, strides)):
            continue
        more = place.setting(name, values)
        patch.inputs.update(more.inputs)
        patch.attrs.update(more.attrs)
    return patch


def _or_all(axes: Axes, axis: int, size: int) -> Array:
    return np.asarray(axes.get(axis, np.arange(size)))


def _found_again(wanted: Array, kept: Array, size: int) -> Array:
    """Return where indices of an axis of `size` are among those that stay."""
    places = np.full(size, -1, np.int64)
    places[kept] = np.arange(len(kept))
    found = places[wanted]
    if (found < 0).any():
        raise RefusedError("it takes channels that are cut from its input and not from its output")
    return found


def _run(places: Array) -> tuple[int, int, int] | None:
    """Return start, end and step that give these places, None where they have no step in common."""
    step = int(places[1] - places[0]) if len(places) > 1 else 1
    if len(places) == 0 or step == 0 or (np.diff(places) != step).any():
        return None
    end = int(places[-1]) + (1 if step > 0 else -1)
    return int(places[0]), TO_THE_FRONT if end < 0 else end, step


def _gather(place: Place) -> Patch:
    """Indices into an axis that was cut point at where their channels are now; those of cut channels go."""
    axis = int(place.attr("axis", 0)) % len(place.before(0))
    if axis not in place.kept(0):
        return Patch()
    indices = place.values(1)
    if indices is None:
        raise RefusedError("a Gather takes channels by computed indices")
    size = place.number(place.before(0), axis)
    for inner in range(indices.ndim):
        if axis + inner in place.out_kept(0):
            indices = np.take(indices, place.out_kept(0)[axis + inner], axis=inner)
    found = _found_again(np.where(indices < 0, indices + size, indices).astype(np.int64), place.kept(0)[axis], size)
    return Patch(inputs={1: found.astype(indices.dtype)})


def _pad(place: Place) -> Patch:
    """Padded channels that are cut are not padded any more."""
    pads = place.parameter("pads")
    if pads is None or not place.out_kept(0):
        return Patch()
    rank = len(place.before(0))
    given = place.parameter("axes") if place.opset >= 18 else None
    axes = list(range(rank)) if given is None else [int(a) % rank for a in given]
    wanted = np.array(pads, np.int64)
    for i, axis in enumerate(axes):
        first, last = int(pads[i]), int(pads[i + len(axes)])
        if axis not in place.out_kept(0) or (first == 0 and last == 0):
            continue
        if first < 0 or last < 0:
            raise RefusedError("a Pad crops an axis that is cut")
        size, stay = place.number(place.before(0), axis), place.out_kept(0)[axis]
        wanted[i] = np.count_nonzero(stay < first)
        wanted[i + len(axes)] = np.count_nonzero(stay >= first + size)
    return Patch() if np.array_equal(wanted, pads) else place.setting("pads", wanted)


def _squeeze(place: Place) -> Patch:
    """Without axes, a Squeeze would take a cut axis of one channel for one of those that it removes."""
    if place.parameter("axes") is not None or all(len(stay) > 1 for stay in place.kept(0).values()):
        return Patch()
    before = place.before(0)
    axes = [axis for axis in range(len(before)) if place.number(before, axis) == 1]
    return place.setting("axes", np.array(axes, np.int64))


def _normalized_groups(place: Place) -> Patch:
    """Whole groups go, or equally many channels of each (which changes what is normalised)."""
    groups, stay = int(place.attr("num_groups", 1)), place.kept(0).get(1)
    if stay is None:
        return Patch()
    each = place.number(place.before(0), 1) // groups
    left = np.bincount(stay // each, minlength=groups)
    left = left[left > 0]
    if (left != left[0]).any():
        raise RefusedError(f"{left.min()} to {left.max()} channels would be left in the groups that are normalised")
    return Patch(attrs={"num_groups": len(left)})


PATCHES: Mapping[str, Callable[[Place], Patch]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
    "Split": _split,
    "Reshape": _reshape,
    "Expand": _target(1),
    "ConstantOfShape": _target(0),
    "Resize": _target(3),
    "Tile": _tile,
    "Slice": _slice,
    "Gather": _gather,
    "Pad": _pad,
    "Squeeze": _squeeze,
    "GroupNormalization": _normalized_groups,
}
"""Standard operator -> what of it says how many channels there are."""
