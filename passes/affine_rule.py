"""The form of a rule for affine maps: what an operator makes of a map that reaches it.

A rule is asked with a node, the index of an output (backward) or input (forward) and the map there.  It answers
with ways to take it, the best first, or with the reason why there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import onnx_graphsurgeon as gs

from graphopt.analysis.affine import Affine

from .affine_site import AffineSite


@dataclass(frozen=True)
class Carried:
    """One way to take a map.

    Attributes:
        forward: output index -> the map that stands behind it now.
        backward: input index -> the map that must be done before it.
        do: edits the node itself.
        gain: affine nodes that vanish by this.
    """

    forward: tuple[tuple[int, Affine], ...] = ()
    backward: tuple[tuple[int, Affine], ...] = ()
    do: Callable[[], None] | None = None
    gain: int = 0


Found: TypeAlias = Sequence[Carried] | str
Rule: TypeAlias = Callable[[AffineSite, gs.Node, int, Affine], Found]
