"""What ONNX Runtime (ORT) put between kernels, and which node made it do so.

A tensor leaves the blocked layout for a node that has no kernel there, and comes back for the next convolution; it is
transposed for a kernel that runs channels-last, cast for one that lacks the type, copied for another provider.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import onnx

from graphopt.fate import blocked_kernels
from graphopt.kernels import (
    BLOCKED_ACTIVATIONS,
    BLOCKED_ALWAYS,
    BLOCKED_DOMAIN,
    BLOCKED_RESIZES,
    BLOCKED_SUMS,
    COPIES,
)
from graphopt.trace import Kernel, Matches, Trace


@dataclass(frozen=True)
class Move:
    """A node that ORT added.

    Attributes:
        name: ORT's name of it, its operator where it has none.
        op: its operator.
        kernel: its place in `Matches.kernels`.
        node: name of the original node that forces it; of an input or output of the model where that does; None where
            it cannot be said.
        forced_op: operator of that node; `input` or `output` of the model.
        why: the reason, empty where it is not known.
    """

    name: str
    op: str
    kernel: int
    node: str | None
    forced_op: str
    why: str


def moves(trace: Trace, matches: Matches, optimized: onnx.ModelProto) -> list[Move]:
    """Return what ORT added between kernels, in its order."""
    return list(_Layout(trace, matches.kernels, optimized).moves())


class _Layout:
    """The kernels of one optimised graph, and who reads what."""

    def __init__(self, trace: Trace, kernels: Sequence[Kernel], optimized: onnx.ModelProto) -> None:
        self.trace, self.kernels = trace, kernels
        self.blocked = blocked_kernels(kernels)
        self.sizes = {i.name: i.dims for i in optimized.graph.initializer}
        self.results = {o.name for o in optimized.graph.output}
        self.maker: dict[str, int] = {}
        self.readers: dict[str, list[int]] = defaultdict(list)
        for k, kernel in enumerate(kernels):
            self.maker.update((name, k) for name in kernel.node.output)
            for name in kernel.node.input:
                self.readers[name].append(k)

    def moves(self) -> list[Move]:
        found = []
        for k, kernel in enumerate(self.kernels):
            if kernel.stands:
                continue
            node, op, why = self._cause(k)
            found.append(Move(kernel.node.name or kernel.node.op_type, kernel.node.op_type, k, node, op, why))
        return found

    def _cause(self, k: int) -> tuple[str | None, str, str]:
        """Return the original node that an added one is there for, its operator, and the reason."""
        node = self.kernels[k].node
        if node.op_type == "ReorderInput":
            source = self._source(k)
            if isinstance(source, str):
                return source, "input", "the model's own input is in plain layout"
            return self._named(*self._root(source)) if source is not None else (None, "", "")
        targets = self._targets(k)
        if node.op_type == "ReorderOutput":
            return self._first(targets, "the model's own output is in plain layout")
        if node.op_type == "Transpose":
            return self._transposed(k, targets)
        if node.op_type == "Cast":
            to = next((a.i for a in node.attribute if a.name == "to"), 0)
            source = self._source(k)
            around = targets if to == onnx.TensorProto.FLOAT or source is None else [source]
            return self._first(around, "", "has no kernel for its type: it runs in another")
        if node.op_type in COPIES:
            return self._first(targets, "the model's own output lies on the host", "runs on another provider")
        return self._first(
            targets, "", "takes the blocked tensor in another shape" if node.op_type == "Reshape" else ""
        )

    def _transposed(self, k: int, targets: list[int | str]) -> tuple[str | None, str, str]:
        source = self._source(k)
        around = [*targets, *([source] if source is not None else [])]
        last = [n for n in around if isinstance(n, int) and _channels_last(self.kernels[n].node)]
        if last:
            return self._named(last[0], "its integer kernel runs channels-last")
        return self._first(around, "", "a Transpose of the model was moved here")

    def _first(self, places: Sequence[int | str], at_end: str, why: str | None = None) -> tuple[str | None, str, str]:
        """Return the first kernel of `places`, an output of the model where there is none."""
        for place in places:
            if isinstance(place, int):
                return self._named(place, why) if why is not None else self._named(*self._root(place))
        for place in places:
            return str(place), "output", at_end
        return None, "", ""

    def _named(self, k: int, why: str) -> tuple[str | None, str, str]:
        kernel = self.kernels[k]
        lead = self.trace.lead(kernel.stands, kernel.node.op_type)
        if lead is None:
            return None, kernel.node.op_type, why
        return self.trace.labels[lead], str(self.trace.nodes[lead].op), why

    def _source(self, k: int) -> int | str | None:
        """Return the kernel whose result an added node moves, or the model's input."""
        while True:
            name = self.kernels[k].node.input[0]
            if name not in self.maker:
                return name if name not in self.sizes else None
            k = self.maker[name]
            if self.kernels[k].stands:
                return k

    def _targets(self, k: int) -> list[int | str]:
        """Return the kernels that read what an added node moves, and the model's outputs it becomes."""
        found: list[int | str] = []
        stack = list(self.kernels[k].node.output)
        while stack:
            name = stack.pop()
            found += [name] if name in self.results else []
            for reader in self.readers.get(name, ()):
                if self.kernels[reader].stands:
                    found.append(reader)
                else:
                    stack.extend(self.kernels[reader].node.output)
        return found

    def _root(self, k: int) -> tuple[int, str]:
        """Return the kernel that keeps `k` out of the blocked layout, itself or one before it, and why."""
        while True:
            why = self.why_plain(k)
            before = None if why else self.maker.get(self.kernels[k].node.input[0])
            if before is None or not self.kernels[before].stands:
                return k, why or "its channels do not fill the blocks"
            k = before

    def why_plain(self, k: int) -> str:
        """Return why a kernel does not take blocked tensors, empty where it would if it got one."""
        node = self.kernels[k].node
        if node.domain == BLOCKED_DOMAIN:
            return "its input channels do not fill a block"
        if node.op_type in BLOCKED_SUMS:
            return self._why_sum(node)
        if node.op_type in BLOCKED_ACTIVATIONS:
            return "stays blocked only as the activation of a convolution right before it"
        if node.op_type in BLOCKED_RESIZES:
            return "not in this mode or by these factors"
        if node.op_type in ("Conv", "FusedConv"):
            return self._why_convolution(node)
        return "" if node.op_type in BLOCKED_ALWAYS else "has no kernel in the blocked layout"

    def _why_sum(self, node: onnx.NodeProto) -> str:
        for name in node.input:
            if name in self.sizes:
                one = all(size == 1 for size in self.sizes[name])
                return f"its operand '{name}' is a {'scalar ' if one else ''}constant"
        for name in node.input:
            made = self.maker.get(name)
            if made is None or (made not in self.blocked and self.kernels[made].node.domain != BLOCKED_DOMAIN):
                return f"its operand '{name}' is in plain layout"
        return "its operands differ in shape"

    def _why_convolution(self, node: onnx.NodeProto) -> str:
        weight = node.input[1]
        if weight not in self.sizes:
            return "its weight is computed, not constant"
        if len(self.sizes[weight]) != 4:
            return f"it has {len(self.sizes[weight]) - 2} spatial dimensions, not 2"
        return "its channels do not fill the blocks"


def _channels_last(node: onnx.NodeProto) -> bool:
    return any(a.name == "channels_last" and a.i for a in node.attribute) or node.domain.endswith("nhwc")
