"""Chains of one-dimensional convolutions as two-dimensional ones of height 1, which ORT has fast kernels for.

    Conv(x [N, C, L], w [M, C, k])   ->   Squeeze(Conv(Unsqueeze(x) [N, C, 1, L], w [M, C, 1, k]))

Whole regions are lifted: convolutions, pools, normalisations and elementwise operators that pass tensors of three axes
to each other get a fourth; Unsqueeze and Squeeze (which copy nothing) stand only where the region ends.

ORT's blocked layout (NCHWc) and its depthwise kernels are for rank 4; convolutions of rank 3 go through im2col.
Measured alone, ORT 1.31, AVX-512, one thread: depthwise ones 0.15 to 0.67 (1.12 where the channels are no multiple of
4), others with a kernel larger than 1 0.74 to 0.97 (grouped 0.77 to 0.83, 16 channels or more in each group; 1.13 to
1.15 where blocks of 16 outputs are a third empty), 1x1 ones 1.08, 0.90 in a row of three.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import array_of, is_constant, parameter, refers
from graphopt.base import Change, Context, Pass
from graphopt.edit import Edit, label, make_node
from graphopt.errors import SpecError
from graphopt.ops import BROADCASTING, MOVED_TO_INPUT, UNARY, is_standard
from graphopt.registry import register

Array = np.ndarray[Any, Any]

BLOCK = 16
"""Output channels that ORT computes together."""

WASTE = 1.15
"""Channels computed for each that is there, above which a convolution is slower."""

LARGE = 1024
"""Bytes from which a constant is not kept twice."""

AXIS = 2
"""Where the new axis comes."""


@register
@dataclass(frozen=True)
class LowerConv1d(Pass):
    """Compute chains of one-dimensional convolutions in two dimensions.

    Exact up to the order of sums, keeps the signature.  Only on the CPU provider, where a region holds a convolution
    that is faster so: a depthwise one, whose sums are short, or with `seeds=all` any.  (Sums over hundreds of channels
    in another order differ by some 2e-7; a recurrent network behind them makes 3e-5 of that where its gates cancel.)
    Weights must be constant.
    """

    name: ClassVar[str] = "lower-conv1d"
    stage: ClassVar[Any] = "lowering"
    optional: ClassVar[bool] = True
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({"seeds": "all"},)

    seeds: str = "depthwise"

    def __post_init__(self) -> None:
        """Refuse other seeds.

        Raises:
            SpecError: `seeds` is none of the two.
        """
        if self.seeds not in ("depthwise", "all"):
            raise SpecError(f"lower-conv1d has no seeds '{self.seeds}'", hint="depthwise, all")

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose one change per region."""
        if ctx.target.provider != "cpu" or not any(self._seed(node) for node in graph.nodes):
            return
        with Edit(graph) as edit:
            lift = _Lift(edit, ctx, self._seed)
            for region in lift.regions():
                yield Change(
                    label(region[0]),
                    f"{len(region)} operators of one dimension -> of two",
                    "ORT's fast convolutions are two-dimensional",
                    lambda region=region: lift.apply(region),  # type: ignore[misc]
                )

    def _seed(self, node: gs.Node) -> bool:
        return _gain(node) > 0 and (self.seeds == "all" or int(node.attrs.get("group", 1)) == node.inputs[1].shape[0])


def _gain(node: gs.Node) -> int:
    """Return 1 for a convolution of one dimension that is faster as one of two, -1 for one that is slower, else 0."""
    if not is_standard(node, "Conv") or len(node.inputs) < 2 or not isinstance(node.inputs[1], gs.Constant):
        return 0
    shape, group = list(node.inputs[1].shape), int(node.attrs.get("group", 1))
    if len(shape) != 3 or group < 1:
        return 0
    outputs, depth, size = shape
    if group == outputs > 1 and depth == 1:
        return 1 if outputs % 4 == 0 else -1
    if group > 1:
        return 1 if size > 1 and depth % BLOCK == 0 and outputs // group % BLOCK == 0 else -1
    if outputs % 4 or (depth >= BLOCK and depth % 4):
        return 0  # never blocked, whatever its rank
    return -1 if -(-outputs // BLOCK) * BLOCK > WASTE * outputs else int(size > 1)


class _Lift:
    """Finds regions in one graph and gives them their fourth axis."""

    def __init__(self, edit: Edit, ctx: Context, seed: Callable[[gs.Node], bool]) -> None:
        self.edit, self.ctx, self.seed = edit, ctx, seed
        self.opset = int(edit.graph.opset)
        self.eligible: dict[int, gs.Node] = {}
        self.constants: dict[int, gs.Constant] = {}

    def regions(self) -> list[list[gs.Node]]:
        """Return the regions, each in the graph's order.

        In a region is what lies between convolutions that pay, and what follows them with nothing else mixed in.
        """
        nodes = [n for n in self.edit.graph.nodes if self._fits(n)]
        self.eligible = {id(n): n for n in nodes}
        seeds = [n for n in nodes if self.seed(n)]
        behind = _reached(seeds, self._next)
        before = _reached(seeds, self._previous)
        chosen: dict[int, gs.Node] = {}
        for node in nodes:
            made = [p for t in self._tensors(node) for p in (t.inputs[0] if t.inputs else None,)]
            follows = bool(made) and all(p is not None and id(p) in chosen for p in made)
            if (id(node) in behind and id(node) in before) or follows:
                chosen[id(node)] = node
        return [part for part in _components(chosen, self._next) if sum(map(_gain, part)) > 0]

    def _fits(self, node: gs.Node) -> bool:
        """Tell whether a node can have a fourth axis."""
        lifted = LIFTS.get(node.op)
        if lifted is None or not is_standard(node) or refers(node) or len([t for t in node.outputs if t.name]) != 1:
            return False
        data = self._tensors(node)
        if not data or any(self._rank(t) != 3 for t in (*data, node.outputs[0])):
            return False
        return lifted(self, node) is not None

    def _rank(self, tensor: gs.Tensor) -> int | None:
        return self.ctx.shapes.proved(tensor).rank

    def _tensors(self, node: gs.Node) -> list[gs.Tensor]:
        """Return the inputs of a node that are not constant."""
        return [t for t in node.inputs if t.name and not is_constant(t)]

    def _next(self, node: gs.Node) -> list[gs.Node]:
        return [n for n in self.edit.consumers(node.outputs[0]) if id(n) in self.eligible]

    def _previous(self, node: gs.Node) -> list[gs.Node]:
        made = [t.inputs[0] for t in self._tensors(node) if t.inputs]
        return [n for n in made if id(n) in self.eligible]

    def unsqueezed(self, tensor: gs.Tensor) -> gs.Tensor | None:
        """Return a constant with the new axis before its last; None where it is large and others read it, too."""
        values = array_of(tensor)
        if values is None or values.ndim > 3:
            return None
        if values.ndim < 2:
            return tensor
        if values.nbytes > LARGE and any(n.op not in LIFTS for n in tensor.outputs):
            return None
        if id(tensor) not in self.constants:
            flat = values.reshape(*values.shape[:-1], 1, values.shape[-1])
            self.constants[id(tensor)] = self.ctx.constant(f"{tensor.name}/2d", flat)
        return self.constants[id(tensor)]

    def apply(self, region: Sequence[gs.Node]) -> None:
        """Replace a region by its lifted form."""
        inside = {id(n) for n in region}
        made: dict[int, gs.Tensor] = {}
        new: list[gs.Node] = []
        for node in region:
            lifted = LIFTS[node.op](self, node)
            assert lifted is not None
            for tensor in self._tensors(node):
                if id(tensor) not in made:
                    squeezes = [n.inputs[0] for n in tensor.inputs if self._moves(n, "Squeeze")]
                    made[id(tensor)] = squeezes[0] if squeezes else self._squeezing("Unsqueeze", tensor, new)
            inputs = [made.get(id(t), lifted.inputs.get(i, t)) for i, t in enumerate(node.inputs)]
            output = gs.Variable(self.ctx.fresh_name(f"{node.outputs[0].name}/2d"), node.outputs[0].dtype)
            made[id(node.outputs[0])] = output
            new.append(make_node(node.op, inputs, [output], lifted.attrs, name=node.name, like=[node]))
        for node in region:
            tensor = node.outputs[0]
            outside = [n for n in self.edit.consumers(tensor) if id(n) not in inside and not self._cancels(n, made)]
            if outside or self.edit.is_output(tensor):
                flat = self._squeezing("Squeeze", made[id(tensor)], new)
                self.edit.hand_over(new[-1], flat, tensor)
        self.edit.insert_after(region[-1], new)
        for node in region:
            self.edit.remove(node)

    def _moves(self, node: gs.Node, op: str) -> bool:
        """Tell whether a node takes away, or adds, the very axis."""
        if not is_standard(node, op) or not self.edit.is_local(node) or self.edit.removed(node):
            return False
        axes = parameter(node, "axes", self.opset)
        return isinstance(axes, np.ndarray) and axes.reshape(-1).tolist() == [AXIS]

    def _cancels(self, node: gs.Node, made: Mapping[int, gs.Tensor]) -> bool:
        """Take out a node that only adds the new axis itself; tell whether that was so."""
        if not self._moves(node, "Unsqueeze") or self._rank(node.inputs[0]) != 3:
            return False
        gone = self.edit.bypass(node.outputs[0], made[id(node.inputs[0])])
        if gone:
            self.edit.remove(node)
        return gone

    def _squeezing(self, op: str, tensor: gs.Tensor, new: list[gs.Node]) -> gs.Tensor:
        output = gs.Variable(self.ctx.fresh_name(f"{tensor.name}/{op}"), tensor.dtype)
        name = self.ctx.fresh_name(f"{tensor.name}/{op}/node")
        if self.opset < MOVED_TO_INPUT[op, "axes"][0]:
            new.append(make_node(op, [tensor], [output], {"axes": [AXIS]}, name=name))
        else:
            axes = self.ctx.constant(f"{name}/axes", np.array([AXIS], np.int64))
            new.append(make_node(op, [tensor, axes], [output], name=name))
        return output


@dataclass
class _Lifted:
    """A node's attributes with a fourth axis, and those inputs that change with them."""

    attrs: dict[str, Any]
    inputs: dict[int, gs.Tensor] = field(default_factory=dict)


def _window(lift: _Lift, node: gs.Node) -> _Lifted | None:
    """Conv, ConvTranspose and pools: a window of height 1."""
    attrs = dict(node.attrs)
    if "output_shape" in attrs or attrs.get("storage_order"):
        return None
    for name, neutral in (("kernel_shape", 1), ("strides", 1), ("dilations", 1), ("output_padding", 0)):
        if name in attrs:
            attrs[name] = [neutral, *attrs[name]]
    if "pads" in attrs:
        begin, end = attrs["pads"]
        attrs["pads"] = [0, begin, 0, end]
    if len(node.inputs) == 1:
        return _Lifted(attrs)
    weight = lift.unsqueezed(node.inputs[1]) if is_constant(node.inputs[1]) else None
    biased = len(node.inputs) < 3 or not node.inputs[2].name or is_constant(node.inputs[2])
    return _Lifted(attrs, {1: weight}) if weight is not None and biased else None


def _same(_: _Lift, node: gs.Node) -> _Lifted | None:
    """Operators that do not care: further inputs are constant, or of no axis."""
    return _Lifted(dict(node.attrs)) if all(is_constant(t) for t in node.inputs[1:] if t.name) else None


def _broadcasting(lift: _Lift, node: gs.Node) -> _Lifted | None:
    """Operands align from the right: the new axis comes before the last one of each."""
    found: dict[int, gs.Tensor] = {}
    for i, tensor in enumerate(node.inputs):
        if is_constant(tensor):
            made = lift.unsqueezed(tensor)
            if made is None:
                return None
            found[i] = made
    return _Lifted(dict(node.attrs), found)


def _concat(_: _Lift, node: gs.Node) -> _Lifted | None:
    axis = int(node.attrs.get("axis", 1)) % 3
    return _Lifted({"axis": axis + (axis == AXIS)}) if not any(is_constant(t) for t in node.inputs) else None


def _pad(lift: _Lift, node: gs.Node) -> _Lifted | None:
    """Pad takes numbers for every axis, in the attribute or in input 1."""
    pads = parameter(node, "pads", lift.opset)
    if not isinstance(pads, np.ndarray) or pads.size != 6 or len(node.inputs) > 3:
        return None
    wide = np.insert(pads.reshape(-1), (AXIS, 3 + AXIS), 0)
    if lift.opset < MOVED_TO_INPUT["Pad", "pads"][0]:
        return _Lifted({**node.attrs, "pads": wide.tolist()})
    return _Lifted(dict(node.attrs), {1: lift.ctx.constant(f"{label(node)}/pads", wide.astype(np.int64))})


LIFTS: Mapping[str, Callable[[_Lift, gs.Node], _Lifted | None]] = {
    **dict.fromkeys(UNARY - {"Dropout"}, _same),
    **dict.fromkeys(BROADCASTING, _broadcasting),
    **dict.fromkeys(("Conv", "ConvTranspose", "MaxPool", "AveragePool"), _window),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool", "BatchNormalization", "InstanceNormalization"), _same),
    "Concat": _concat,
    "Pad": _pad,
}
"""Operator -> how it takes a fourth axis, None where it cannot."""


def _reached(start: Sequence[gs.Node], following: Callable[[gs.Node], Sequence[gs.Node]]) -> set[int]:
    seen, stack = {id(n) for n in start}, list(start)
    while stack:
        for node in following(stack.pop()):
            if id(node) not in seen:
                seen.add(id(node))
                stack.append(node)
    return seen


def _components(
    chosen: Mapping[int, gs.Node], following: Callable[[gs.Node], Sequence[gs.Node]]
) -> list[list[gs.Node]]:
    """Return the connected parts of the chosen nodes."""
    parent = {key: key for key in chosen}

    def root(key: int) -> int:
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for key, node in chosen.items():
        for other in following(node):
            if id(other) in chosen:
                parent[root(id(other))] = root(key)
    parts: dict[int, list[gs.Node]] = {}
    for key, node in chosen.items():
        parts.setdefault(root(key), []).append(node)
    return list(parts.values())
