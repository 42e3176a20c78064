"""What a rule about channels sees: one node and the axes around it; and how a rule is run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import onnx_graphsurgeon as gs

from graphopt.analysis.channel_ties import Axes, Ties
from graphopt.analysis.constants import is_constant
from graphopt.edit import label


class Place:
    """One node, and the axes of what it reads and makes.

    Attributes:
        node: of the standard domain or one that a table knows.
        ties: collects what its rule says.
        opset: of the graph.
        fixed: ids of variables that are computed from constants alone.
        normalization: whether axes under a norm may be cut all the same.
    """

    def __init__(self, node: gs.Node, ties: Ties, opset: int, fixed: set[int], *, normalization: bool = False) -> None:
        self.node = node
        self.ties = ties
        self.opset = opset
        self.fixed = fixed
        self.normalization = normalization
        self.name = f"{node.op} '{label(node)}'"

    def has(self, port: int) -> bool:
        """Tell whether an input is given."""
        return port < len(self.node.inputs) and not self.node.inputs[port].is_empty()

    def into(self, port: int = 0) -> Axes | None:
        """Return the axes of an input, None where it is left out or its rank is unknown."""
        return self.ties.of(self.node.inputs[port], self.node, port) if self.has(port) else None

    def out(self, port: int = 0) -> Axes | None:
        """Return the axes of an output."""
        if port >= len(self.node.outputs) or self.node.outputs[port].is_empty():
            return None
        return self.ties.of(self.node.outputs[port], self.node, port)

    def tensors(self) -> list[Axes | None]:
        """Return the axes of everything that is read or made."""
        inputs = [self.into(port) for port in range(len(self.node.inputs)) if self.has(port)]
        return [*inputs, *(self.out(port) for port, t in enumerate(self.node.outputs) if not t.is_empty())]

    def weight(self, port: int) -> bool:
        """Tell whether an input is constant or computed from constants alone."""
        tensor = self.node.inputs[port]
        return is_constant(tensor) or id(tensor) in self.fixed

    def attr(self, name: str, default: Any = None) -> Any:
        """Return an attribute."""
        return self.node.attrs.get(name, default)

    def freeze(self, why: str) -> None:
        """Freeze everything around the node."""
        for axes in self.tensors():
            self.ties.freeze_all(axes, why)


Rule: TypeAlias = Callable[[Place], None]


def broadcast(place: Place, ports: Sequence[int]) -> None:
    """Tie inputs to the output, right-aligned; size 1 broadcasts."""
    out = place.out(0)
    found = [place.into(port) for port in ports]
    if out is None or any(axes is None for axes in found):
        place.freeze(f"the rank of an operand of {place.name} is unknown")
        return
    for axes in found:
        for place_back, axis in enumerate(reversed(axes or ()), 1):
            if place_back <= len(out):
                place.ties.tie(axis, out[-place_back], f"{place.name} broadcasts along it")
    for axis in out:
        place.ties.touched.add(axis)


def apply_rule(place: Place, rule: Rule | None, why: str = "") -> None:
    """Run the rule of a node, then freeze what it has not mentioned, for a reason."""
    ties = place.ties
    unknown = [t for t in place.tensors() if t is None]
    ties.touched.clear()
    if rule is None:
        place.freeze(f"no rule for {place.name}")
    elif unknown:
        place.freeze(f"the rank of an operand of {place.name} is unknown")
    else:
        rule(place)
    for axes in place.tensors():
        for at, axis in enumerate(axes or ()):
            if axis >= 0 and axis not in ties.touched:
                ties.freeze(axis, f"{place.name} {why or f'works along axis {at}'}")
