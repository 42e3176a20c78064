"""What rules say about the axes of a graph: which indices go together, which stay, and what a layer makes or reads.

An axis has atoms, one per index, where its size is a proved number above 1.  Rules tie atoms of two axes, freeze atoms
with a reason, and note merges: an axis whose indices are made up of those of several others (heads and their width).
Virtual axes belong to no tensor: the group of a grouped convolution, for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.channel_sizes import factor
from graphopt.analysis.constants import is_constant
from graphopt.analysis.shapes import Shapes
from graphopt.analysis.symbolic_expr import Size

Array: TypeAlias = np.ndarray[Any, Any]
Role = Literal["makes", "reads", "holds", "carries"]

ONE = -1
"""Stands for an axis of size 1: it has nothing to cut, and broadcasts."""

OPEN = -2
"""Stands for an axis whose size is no proved number."""

Axes: TypeAlias = list[int]
"""The axes of one tensor: numbers of axes, `ONE` or `OPEN`."""


@dataclass
class Axis:
    """One axis of a tensor: of a variable, or of a constant as one node reads it; of none where it is virtual.

    An axis whose size is not known but for a factor (4*batch, heads beside the batch) stands for that factor: index i
    of it is every i modulo `size`, and `whole` is the size as text.
    """

    size: int
    tensor: gs.Tensor | None = None
    place: int = 0
    node: gs.Node | None = None
    port: int = 0
    role: Role = "holds"
    whole: str = ""


@dataclass
class Merge:
    """An axis whose every index belongs to one index of each of several others, outermost first.

    Attributes:
        fine: the axis.
        coarse: (axis, for each index of `fine` the index there).
        why: what merges them.
    """

    fine: int
    coarse: list[tuple[int, Array]]
    why: str


@dataclass
class Ties:
    """Collects what rules say.

    Attributes:
        shapes: as far as they are proved.
        axes: all with atoms, in the graph's order.
        same: pairs of axes whose equal indices go together.
        mapped: (axis, indices, axis, indices): pairs of indices that go together.
        merges: where one of several axes has to be chosen.
        frozen: (axis, indices or None for all, why).
        tags: axis -> what its units are called.
        inexact: axis -> why cutting it changes what is left.
        roles: axis of a weight, or of what is computed from one -> what the node that reads it does along it.
        touched: axes mentioned since this was cleared.
    """

    shapes: Shapes
    axes: list[Axis] = field(default_factory=list)
    same: list[tuple[int, int]] = field(default_factory=list)
    mapped: list[tuple[int, Array, int, Array]] = field(default_factory=list)
    merges: list[Merge] = field(default_factory=list)
    frozen: list[tuple[int, Array | None, str]] = field(default_factory=list)
    tags: dict[int, str] = field(default_factory=dict)
    inexact: dict[int, str] = field(default_factory=dict)
    roles: dict[int, Role] = field(default_factory=dict)
    touched: set[int] = field(default_factory=set)
    _of: dict[tuple[int, int], Axes | None] = field(default_factory=dict)

    def of(self, tensor: gs.Tensor, node: gs.Node | None = None, port: int = 0) -> Axes | None:
        """Return the axes of a tensor, None where its rank is unknown.

        Args:
            tensor: a constant is a tensor of its own wherever it is read.
            node: the one that reads the constant or makes the variable.
            port: index of the input or output there.
        """
        constant = is_constant(tensor)
        key = (id(node), port) if constant else (id(tensor), -1)
        if key not in self._of:
            shape = tensor.shape if isinstance(tensor, gs.Constant) else self.shapes.symbolic.of(tensor).shape
            role: Role = "holds" if constant else "carries"
            self._of[key] = (
                None
                if shape is None
                else [self._axis(size, tensor, place, node, port, role) for place, size in enumerate(shape)]
            )
        return self._of[key]

    def _axis(self, size: Size, tensor: gs.Tensor, place: int, node: gs.Node | None, port: int, role: Role) -> int:
        if size == 1:
            return ONE
        known, whole = (size, "") if isinstance(size, int) else (factor(size), size.text)
        if known in (0, 1):
            return OPEN
        self.axes.append(Axis(known, tensor, place, node, port, role, whole))
        return len(self.axes) - 1

    def virtual(self, size: int) -> int:
        """Return a new axis that belongs to no tensor."""
        if size == 1:
            return ONE
        self.axes.append(Axis(size))
        return len(self.axes) - 1

    def tie(self, a: int, b: int, why: str, *, part: bool = False) -> None:
        """Say that equal indices of two axes go together; beside an unknown size nothing can.

        Args:
            a: one axis.
            b: the other.
            why: reason where they cannot.
            part: whether one may stand for a factor of its size and the other for all of its own.
        """
        self.touched.update((a, b))
        if a >= 0 and b >= 0:
            one, other = self.axes[a], self.axes[b]
            if one.size == other.size and (part or one.whole == other.whole):
                self.same.append((a, b))
            else:
                self.freeze(a, why)
                self.freeze(b, why)
        elif OPEN in (a, b):
            self.freeze(max(a, b), f"{why}: beside a size that is not known")

    def tie_at(self, a: int, at_a: Array, b: int, at_b: Array) -> None:
        """Say which indices of two axes go together: int64 arrays of equal length."""
        self.touched.update((a, b))
        if a >= 0 and b >= 0 and len(at_a):
            self.mapped.append((a, at_a, b, at_b))

    def freeze(self, axis: int, why: str, at: Array | None = None) -> None:
        """Say that an axis, or some of its indices, must stay."""
        self.touched.add(axis)
        if axis >= 0:
            self.frozen.append((axis, at, why))

    def freeze_all(self, axes: Sequence[int] | None, why: str) -> None:
        """Freeze the axes of a tensor."""
        for axis in axes or ():
            self.freeze(axis, why)

    def merge(self, fine: int, coarse: Sequence[tuple[int, Array]], why: str) -> None:
        """Say that the indices of an axis are made up of those of others, outermost first."""
        self.touched.update((fine, *(axis for axis, _ in coarse)))
        chosen = [(axis, at) for axis, at in coarse if axis >= 0]
        if fine < 0 or not chosen:
            self.freeze(fine, why)
            for axis, _ in chosen:
                self.freeze(axis, why)
        elif len(chosen) == 1:
            axis, at = chosen[0]
            held = np.flatnonzero(at >= 0)
            self.tie_at(fine, held, axis, at[held])
        else:
            self.merges.append(Merge(fine, chosen, why))

    def role(self, axis: int, role: Role) -> None:
        """Say what the node that reads a constant does along its axis."""
        if axis >= 0:
            self.roles[axis] = role

    def tag(self, axis: int, kind: str) -> None:
        """Name the units of an axis."""
        if axis >= 0:
            self.tags.setdefault(axis, kind)

    def mark(self) -> tuple[int, int, int]:
        """Return how much has been said so far."""
        return len(self.same), len(self.mapped), len(self.merges)

    def pass_back(self, start: tuple[int, int, int], end: tuple[int, int, int]) -> None:
        """Give the roles of what a node computes from constants to those: a weight in codes is read like the weight.

        Args:
            start: `mark` before the node.
            end: `mark` after it.
        """
        pairs = [*self.same[start[0] : end[0]], *((a, b) for a, _, b, _ in self.mapped[start[1] : end[1]])]
        pairs += [(merge.fine, axis) for merge in self.merges[start[2] : end[2]] for axis, _ in merge.coarse]
        for a, b in pairs:
            for made, read in ((a, b), (b, a)):
                if made in self.roles and self.axes[made].role == "carries":
                    self.roles.setdefault(read, self.roles[made])
