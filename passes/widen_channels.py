"""Channels between convolutions, rounded up to what ORT's blocked layout takes, with channels of zeros.

    Conv(f(Conv(x, V, b)), W)   ->   Conv(f(Conv(x, [V; 0], [b; 0])), [W 0])

ORT computes a convolution in its blocked layout (NCHWc) only if its channels are a multiple of 4; there it computes
blocks of 16.  So 30 channels as 32 take the fast path at 1.07 times the work.  Measured on residual networks (ORT 1.31,
AVX-512, one thread), time against channels computed for each that is there:

    3x3          30 -> 32  0.65 (1.07)   45 -> 48  0.71 (1.07)   26 -> 28  0.80 (1.23)   22 -> 24  1.01 (1.45)
    1x1          58 -> 60  0.87 (1.10)   90 -> 92  0.88 (1.07)   50 -> 52  1.05 (1.28)
    depthwise    30 -> 32  0.42 (1.07)   22 -> 24  0.56 (1.45)   chains of 3x3, not residual: 18 -> 20  1.11 (1.78)

which gives `WASTE`.  Networks pruned without rounding, and searched ones, have such widths.

All that carries the channels is widened together: elementwise operators that are finite at zero, pools, normalisations
and depthwise convolutions, between convolutions that make the channels and convolutions that read them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import array_of, is_constant, refers
from graphopt.base import Change, Context, Pass
from graphopt.edit import Edit, label, replace_output, replace_uses
from graphopt.ops import is_standard
from graphopt.registry import register

Array = np.ndarray[Any, Any]

STEP, BLOCK = 4, 16
"""Channels must be a multiple of the one; ORT computes multiples of the other."""

WASTE = {"depthwise": 1.46, "window": 1.35, "1x1": 1.15}
"""Channels computed for each that is there, up to which widening pays, by the convolutions in the group."""

LARGE = 1024
"""Bytes from which a constant is not kept twice."""

FINITE_AT_ZERO = frozenset(
    {
        "Abs", "Clip", "Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "Neg", "Relu", "Selu",
        "Sigmoid", "Softplus", "Softsign", "Tanh",
    }
)  # fmt: skip
"""Elementwise operators that make something finite of a channel of zeros, and of what the others make of it."""

POOLS = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"})
"""Operators that keep channels apart."""

JOINING = frozenset({"Add", "Mul", "Sum", "Max", "Min"})
"""Elementwise operators of several tensors, finite where those are."""


class _RefusedError(Exception):
    """A group that cannot be widened."""


@dataclass
class _Group:
    """Tensors that have their channels in common.

    Attributes:
        width: number of channels.
        tensors: by id.
        nodes: those that touch them.
        padded: (node, input, axis, fill) of each constant that gets channels.
    """

    width: int
    tensors: dict[int, gs.Tensor] = field(default_factory=dict)
    nodes: dict[int, gs.Node] = field(default_factory=dict)
    padded: list[tuple[gs.Node, int, int, float]] = field(default_factory=list)


@register
@dataclass(frozen=True)
class WidenChannels(Pass):
    """Round channels between convolutions up to a multiple of 4, with zeros.

    Exact (what is added is zero), keeps the signature.  Only on the CPU provider, in float32.  Refuses channels that
    anything but convolutions, pools, normalisations and elementwise operators read.

    Options:
        multiple: of how many channels; beyond 4, only where depthwise convolutions have them: ORT's fast depthwise
            kernel on 8-bit integers takes multiples of 16 (5x5, 6 x 88 x 12 x 48: 506 µs, as 96 channels 184).
    """

    name: ClassVar[str] = "widen-channels"
    stage: ClassVar[Any] = "lowering"
    optional: ClassVar[bool] = True
    multiple: int = STEP

    def __post_init__(self) -> None:
        """Refuse what is no multiple of `STEP`.

        Raises:
            ValueError: it is not.
        """
        if self.multiple < STEP or self.multiple % STEP:
            raise ValueError(f"multiple is a multiple of {STEP}, not {self.multiple}")

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose one change per group of channels."""
        if ctx.target.provider != "cpu":
            return
        with Edit(graph) as edit:
            widening = _Widening(edit, ctx)
            seen: set[int] = set()
            for node in list(graph.nodes):
                width = _odd_width(node, self.multiple)
                if width is None or id(node.outputs[0]) in seen:
                    continue
                group, reason = widening.group(node.outputs[0], width)
                if reason is None and _waste(width) > WASTE[_kind(group)]:
                    reason = f"{_waste(width):.2f} channels would be computed for each that is there"
                if reason is None and self.multiple > STEP and _kind(group) != "depthwise":
                    reason = "no depthwise convolution has them"
                seen |= set(group.tensors)
                wanted = -(-width // self.multiple) * self.multiple
                what = f"{width} channels of {len(group.tensors)} tensors -> {wanted}"
                if reason is not None:
                    yield Change(label(node), what, reason)
                    continue
                yield Change(
                    label(node), what, f"ORT's fast kernels take multiples of {self.multiple}",
                    lambda group=group, wanted=wanted: widening.apply(group, wanted),  # type: ignore[misc]
                )  # fmt: skip


def _odd_width(node: gs.Node, multiple: int) -> int | None:
    """Return the channels that a Conv makes where rounding them up pays."""
    if not is_standard(node, "Conv") or not _plain(node):
        return None
    width = int(node.inputs[1].shape[0])
    return width if width % multiple and _waste(width) <= max(WASTE.values()) else None


def _waste(width: int) -> float:
    return -(-width // BLOCK) * BLOCK / width


def _kind(group: _Group) -> str:
    """Return which of the convolutions in a group has most to gain."""
    convs = [n for n in group.nodes.values() if n.op == "Conv"]
    if any(int(n.attrs.get("group", 1)) > 1 for n in convs):
        return "depthwise"
    return "window" if any(set(n.inputs[1].shape[2:]) != {1} for n in convs) else "1x1"


def _plain(node: gs.Node) -> bool:
    """Tell whether a node is a Conv of two dimensions in one group with constant weight and bias."""
    constant = all(isinstance(t, gs.Constant) for t in node.inputs[1:] if t.name)
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    if refers(node) or not constant or not isinstance(weight, gs.Constant) or weight.dtype != np.float32:
        return False
    return int(node.attrs.get("group", 1)) == 1 and len(weight.shape) == 4


def _biased(node: gs.Node) -> bool:
    return len(node.inputs) > 2 and bool(node.inputs[2].name)


def _pad_convs(group: _Group) -> None:
    """Note what the convolutions that make or read a group's channels need."""
    for node in group.nodes.values():
        if node.op == "Conv" and _plain(node):
            if id(node.inputs[0]) in group.tensors:
                group.padded.append((node, 1, 1, 0.0))
            if id(node.outputs[0]) in group.tensors:
                group.padded += [(node, i, 0, 0.0) for i in ((1, 2) if _biased(node) else (1,))]


class _Widening:
    """Finds groups in one graph and widens them."""

    def __init__(self, edit: Edit, ctx: Context) -> None:
        self.edit, self.ctx = edit, ctx
        self.refused: dict[int, str] = {}

    def group(self, start: gs.Tensor, width: int) -> tuple[_Group, str | None]:
        """Return what has its channels in common with a tensor, and why it cannot be widened."""
        group, waiting = _Group(width), [start]
        try:
            while waiting:
                tensor = waiting.pop()
                if id(tensor) in group.tensors:
                    continue
                group.tensors[id(tensor)] = tensor
                if id(tensor) in self.refused:
                    raise _RefusedError(self.refused[id(tensor)])
                shape = self.ctx.shapes.proved(tensor).shape
                if shape is None or len(shape) != 4 or shape[1] != width:
                    raise _RefusedError(f"'{tensor.name}' is not known to have {width} channels")
                if self.edit.is_output(tensor) or not tensor.inputs:
                    raise _RefusedError(f"'{tensor.name}' is an input or output of the graph")
                for node in (*tensor.inputs, *self.edit.consumers(tensor)):
                    if id(node) not in group.nodes:
                        group.nodes[id(node)] = node
                        waiting += self._touched(node, group)
                if len(self.edit.consumers(tensor)) == 0:
                    raise _RefusedError(f"nothing reads '{tensor.name}'")
        except _RefusedError as refused:
            self.refused.update(dict.fromkeys(group.tensors, str(refused)))
            return group, str(refused)
        _pad_convs(group)
        return group, None

    def _touched(self, node: gs.Node, group: _Group) -> list[gs.Tensor]:
        """Return the tensors that must be widened because a node of the group reads or makes them."""
        where = f"{node.op} '{label(node)}'"
        if not is_standard(node) or not self.edit.is_local(node) or refers(node):
            raise _RefusedError(f"{where} reads them")
        if node.op == "Conv":
            return self._conv(node, group)
        if sum(bool(t.name) for t in node.outputs) != 1:
            raise _RefusedError(f"{where} has several outputs")
        if node.op in FINITE_AT_ZERO or node.op in POOLS:
            if not all(is_constant(t) for t in node.inputs[1:] if t.name):
                raise _RefusedError(f"{where} has computed parameters")
            return [node.inputs[0], node.outputs[0]]
        if node.op == "BatchNormalization" and not node.attrs.get("training_mode", 0):
            fills = (0.0, 0.0, 0.0, 1.0)
            group.padded += [(node, i, 0, fill) for i, fill in enumerate(fills, 1)]
            self._check_constants(node, range(1, 5))
            return [node.inputs[0], node.outputs[0]]
        if node.op in JOINING:
            return self._joining(node, group)
        raise _RefusedError(f"{where} reads them")

    def _conv(self, node: gs.Node, group: _Group) -> list[gs.Tensor]:
        """A Conv makes the channels, reads them (see `_pad_convs`), or keeps them apart."""
        if _plain(node):
            self._check_constants(node, (1, 2) if _biased(node) else (1,))
            return []
        weight = node.inputs[1] if len(node.inputs) > 1 else None
        depthwise = int(node.attrs.get("group", 1)) == group.width and isinstance(weight, gs.Constant)
        if not depthwise or weight is None or list(weight.shape[:2]) != [group.width, 1]:
            raise _RefusedError(f"Conv '{label(node)}' has groups, or weights that are not constant")
        indices = (1, 2) if _biased(node) else (1,)
        self._check_constants(node, indices)
        group.padded += [(node, i, 0, 0.0) for i in indices]
        return [node.inputs[0], node.outputs[0]]

    def _joining(self, node: gs.Node, group: _Group) -> list[gs.Tensor]:
        """Operands have the channels, or one element along them."""
        found = [node.outputs[0]]
        for i, tensor in enumerate(node.inputs):
            shape = self.ctx.shapes.proved(tensor).shape
            if shape is None or len(shape) > 4:
                raise _RefusedError(f"the shape of '{tensor.name}' is unknown")
            channels = shape[len(shape) - 3] if len(shape) > 2 else 1
            if channels == group.width and is_constant(tensor):
                self._check_constants(node, (i,))
                group.padded.append((node, i, len(shape) - 3, 0.0))
            elif channels == group.width and len(shape) == 4:
                found.append(tensor)
            elif channels != 1:
                raise _RefusedError(f"'{tensor.name}' has {channels} channels")
        return found

    def _check_constants(self, node: gs.Node, indices: Any) -> None:
        for index in indices:
            tensor = node.inputs[index]
            if not isinstance(tensor, gs.Constant):
                raise _RefusedError(f"input {index} of {node.op} '{label(node)}' is not constant")
            others = (n for n in tensor.outputs if n is not node and not self.edit.removed(n))
            if int(np.prod(tensor.shape)) * 4 > LARGE and next(others, None) is not None:
                raise _RefusedError(f"constant '{tensor.name}' is used elsewhere, too")

    def apply(self, group: _Group, wanted: int) -> None:
        """Widen a group."""
        more = wanted - group.width
        for node, index, axis, fill in group.padded:
            values = array_of(node.inputs[index])
            assert values is not None
            pads = [(0, more if a == axis else 0) for a in range(values.ndim)]
            wide = np.pad(values, pads, constant_values=values.dtype.type(fill))
            self.edit.set_input(node, index, self.ctx.constant(f"{node.inputs[index].name}/wide", wide))
        for node in group.nodes.values():
            if node.op == "Conv" and int(node.attrs.get("group", 1)) == group.width > 1:
                node.attrs["group"] = wanted
        for tensor in group.tensors.values():
            wide_tensor = gs.Variable(self.ctx.fresh_name(f"{tensor.name}/wide"), tensor.dtype)
            producer = tensor.inputs[0]
            replace_output(producer, tensor, wide_tensor)
            replace_uses(tensor, wide_tensor)
