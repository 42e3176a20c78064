"""Nodes that give back their input, bypassed.

    Identity(x), Dropout(x) outside training, Cast(x, its own type)                   ->  x
    x * 1, x / 1, x ** 1, x + 0, x - 0, x and True, x or False, Where(True, x, y)     ->  x   no broadcast
    Transpose(x, 0..n), Reshape(x, its shape), Expand, Tile, Slice, Pad, Flatten …    ->  x   nothing moves
    Concat(x), Split(x), Sum(x), Max(x), Min(x), Mean(x)                              ->  x   one in, one out
    Unsqueeze(Squeeze(x, a), a), Squeeze(Unsqueeze(x, a), a)                          ->  x

A node between a graph input (or a constant) and a graph output cannot be bypassed: it becomes an Identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import array_of, parameter, refers, trains
from graphopt.analysis.uniform import uniform_of
from graphopt.base import Change, Context, Pass
from graphopt.edit import Edit, label, turn_into
from graphopt.ops import is_standard
from graphopt.registry import register

Dims = tuple[int | str | None, ...]

_BIG = (1 << 31) - 1
"""Slice ends from here on mean "to the end" whatever the size."""


@register
@dataclass(frozen=True)
class EliminateIdentity(Pass):
    """Bypass nodes that give back their input: Identity, x * 1, Reshape to its own shape and the like.

    Exact (of values only the sign of zero may change), keeps the signature.  Refuses wherever a shape or type
    that is needed for the proof is not known.
    """

    name: ClassVar[str] = "eliminate-identity"

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose one change per node."""
        with Edit(graph) as edit:
            for node in list(graph.nodes):
                prove = _PROOFS.get(node.op)
                if prove is None or not is_standard(node) or not node.inputs or refers(node):
                    continue
                source = prove(_Site(node, int(graph.opset), ctx))
                if source is not None and len(node.outputs) > 0:
                    yield from _bypassed(edit, node, source)


def _bypassed(edit: Edit, node: gs.Node, source: gs.Tensor) -> Iterator[Change]:
    """Propose to put `source` in the place of the node's first output."""
    if any(edit.is_used(t) for t in node.outputs[1:]):
        yield Change(label(node), f"bypass {node.op}", "its second output is used")
        return
    old = node.outputs[0]

    def apply() -> None:
        if edit.bypass(old, source):
            edit.remove(node)
            return
        turn_into(node, "Identity")
        edit.set_input(node, 0, source)
        edit.trim_inputs(node, 1)
        list.__delitem__(node.outputs, slice(1, None))

    if edit.why_not_bypass(old, source) is None:
        yield Change(label(node), f"bypass {node.op}", "it gives back its input", apply)
    elif node.op != "Identity":
        yield Change(label(node), f"{node.op} -> Identity", "it gives back its input", apply)


@dataclass(frozen=True)
class _Site:
    """One node, and what a proof may ask about it."""

    node: gs.Node
    opset: int
    ctx: Context

    @property
    def x(self) -> gs.Tensor:
        return self.node.inputs[0]

    def dims(self, tensor: gs.Tensor) -> Dims | None:
        return self.ctx.shapes.proved(tensor).shape

    def known(self, name: str) -> np.ndarray[Any, Any] | None:
        """Return a parameter's values, None where it is left out or computed."""
        found = parameter(self.node, name, self.opset)
        return found if isinstance(found, np.ndarray) else None

    def absent(self, name: str) -> bool:
        return parameter(self.node, name, self.opset) is None

    def same_shape(self) -> bool:
        """Tell whether the first output surely has the first input's shape (sizes of equal text are equal)."""
        shape = self.dims(self.x)
        return shape is not None and None not in shape and shape == self.dims(self.node.outputs[0])


Proof = Callable[[_Site], gs.Tensor | None]


def _always(site: _Site) -> gs.Tensor | None:
    return site.x


def _dropout(site: _Site) -> gs.Tensor | None:
    return None if trains(site.node, site.opset) else site.x


def _cast(site: _Site) -> gs.Tensor | None:
    dtype = site.ctx.shapes.proved(site.x).dtype
    if dtype is None:
        return None
    wanted = onnx.helper.tensor_dtype_to_np_dtype(site.node.attrs["to"])
    return site.x if np.dtype(wanted) == dtype and dtype.kind not in "OSU" else None


def _neutral(element: float, *, left: bool) -> Proof:
    """Return the proof for a binary operator with a neutral right (and maybe left) operand."""

    def prove(site: _Site) -> gs.Tensor | None:
        if site.opset < 7 or len(site.node.inputs) != 2:
            return None
        x, c = site.node.inputs
        if _all_equal(c, element) and _keeps_shape(site.dims(x), site.dims(c)):
            return x
        if left and _all_equal(x, element) and _keeps_shape(site.dims(c), site.dims(x)):
            return c
        return None

    return prove


def _where(site: _Site) -> gs.Tensor | None:
    condition, x, y = site.node.inputs
    for chosen, other, element in ((x, y, True), (y, x, False)):
        dims = site.dims(chosen)
        if (
            _all_equal(condition, element)
            and _keeps_shape(dims, site.dims(condition))
            and _keeps_shape(dims, site.dims(other))
        ):
            return chosen
    return None


def _all_equal(tensor: gs.Tensor, element: float) -> bool:
    found = uniform_of(tensor)
    return found is not None and bool(found == element)


def _keeps_shape(dims: Dims | None, other: Dims | None) -> bool:
    """Tell whether broadcasting `dims` with `other` surely gives `dims`."""
    if other == ():
        return True
    if dims is None or other is None or len(other) > len(dims):
        return False
    pairs = zip(dims[len(dims) - len(other) :], other, strict=True)
    return all(o == 1 or (o is not None and o == d) for d, o in pairs)  # equal text is equal size


def _transpose(site: _Site) -> gs.Tensor | None:
    perm = site.node.attrs.get("perm")
    if perm is None:
        dims = site.dims(site.x)
        return site.x if dims is not None and len(dims) < 2 else None
    return site.x if list(perm) == list(range(len(perm))) else None


def _reshape(site: _Site) -> gs.Tensor | None:
    """Equal in all axes but one means equal: the number of elements is kept."""
    target, dims = site.known("shape"), site.dims(site.x)
    if site.same_shape():
        return site.x
    if target is None or dims is None or target.size != len(dims):
        return None
    copies = not site.node.attrs.get("allowzero", 0)
    open_axes = 0
    for wanted, dim in zip(target.reshape(-1).tolist(), dims, strict=True):
        if (wanted == 0 and copies) or (wanted > 0 and wanted == dim):
            continue
        open_axes += 1
    return site.x if open_axes <= 1 and not any(d == 0 for d in dims) else None


def _expand(site: _Site) -> gs.Tensor | None:
    target = site.known("shape")
    if site.same_shape():
        return site.x
    if target is None:
        return None
    return site.x if _keeps_shape(site.dims(site.x), tuple(target.reshape(-1).tolist())) else None


def _tile(site: _Site) -> gs.Tensor | None:
    repeats = site.known("repeats")
    return site.x if repeats is not None and (repeats == 1).all() else None


def _pad(site: _Site) -> gs.Tensor | None:
    pads = site.known("pads")
    return site.x if pads is not None and not pads.any() else None


def _slice(site: _Site) -> gs.Tensor | None:
    if site.same_shape() and _steps_forward(site):
        return site.x
    starts, ends, dims = site.known("starts"), site.known("ends"), site.dims(site.x)
    if starts is None or ends is None or not _steps_forward(site) or starts.any():
        return None
    axes = site.known("axes")
    if axes is None:
        if not site.absent("axes"):
            return None
        axes = np.arange(starts.size)
    for axis, end in zip(axes.reshape(-1).tolist(), ends.reshape(-1).tolist(), strict=True):
        size = None if dims is None else dims[axis]
        if end < _BIG and not (isinstance(size, int) and end >= size):
            return None
    return site.x


def _steps_forward(site: _Site) -> bool:
    """Tell whether a Slice goes through its axes one by one from the left."""
    steps = site.known("steps")
    return site.absent("steps") if steps is None else bool((steps == 1).all())


def _flatten(site: _Site) -> gs.Tensor | None:
    dims = site.dims(site.x)
    return site.x if dims is not None and len(dims) == 2 and site.node.attrs.get("axis", 1) in (1, -1) else None


def _only_input(site: _Site) -> gs.Tensor | None:
    return site.x if len(site.node.inputs) == 1 else None


def _split(site: _Site) -> gs.Tensor | None:
    return site.x if len(site.node.outputs) == 1 else None


def _clip(site: _Site) -> gs.Tensor | None:
    return site.x if site.opset >= 11 and all(t.is_empty() for t in site.node.inputs[1:]) else None


def _undoes(other: str) -> Proof:
    """Return the proof for Squeeze after Unsqueeze of the same axes, or the reverse."""

    def prove(site: _Site) -> gs.Tensor | None:
        inner = site.x.inputs[0] if len(site.x.inputs) == 1 else None
        if inner is None or not is_standard(inner, other) or refers(inner):
            return None
        ours, theirs = site.known("axes"), parameter(inner, "axes", site.opset)
        if ours is None or not isinstance(theirs, np.ndarray):
            return None
        narrow = inner.inputs[0] if other == "Unsqueeze" else site.x
        dims = site.dims(narrow)
        if dims is None:
            return None
        rank = len(dims) + ours.size
        return inner.inputs[0] if _axes(ours, rank) == _axes(theirs, rank) else None

    return prove


def _axes(values: np.ndarray[Any, Any], rank: int) -> Sequence[int]:
    return sorted(int(a) % rank for a in values.reshape(-1))


def _resize(site: _Site) -> gs.Tensor | None:
    """Scale 1 samples every element at its own place, in every mode but cropping."""
    node = site.node
    if site.opset < 11 or node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        return None
    scales = array_of(node.inputs[2]) if len(node.inputs) > 2 and not node.inputs[2].is_empty() else None
    if scales is not None and scales.size:
        return site.x if (scales == 1).all() else None
    sized = len(node.inputs) > 3 and not node.inputs[3].is_empty()
    return site.x if sized and site.same_shape() else None


def _upsample(site: _Site) -> gs.Tensor | None:
    scales = site.known("scales")
    return site.x if scales is not None and scales.size and (scales == 1).all() else None


_PROOFS: Mapping[str, Proof] = {
    "Identity": _always,
    "Dropout": _dropout,
    "Cast": _cast,
    "Mul": _neutral(1, left=True),
    "Div": _neutral(1, left=False),
    "Pow": _neutral(1, left=False),
    "Add": _neutral(0, left=True),
    "Sub": _neutral(0, left=False),
    "And": _neutral(1, left=True),
    "Or": _neutral(0, left=True),
    "Xor": _neutral(0, left=True),
    "Where": _where,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Expand": _expand,
    "Tile": _tile,
    "Pad": _pad,
    "Slice": _slice,
    "Flatten": _flatten,
    "Concat": _only_input,
    "Sum": _only_input,
    "Max": _only_input,
    "Min": _only_input,
    "Mean": _only_input,
    "Split": _split,
    "Clip": _clip,
    "Squeeze": _undoes("Unsqueeze"),
    "Unsqueeze": _undoes("Squeeze"),
    "Resize": _resize,
    "Upsample": _upsample,
}
