"""Data movement by rules of fixed size: views, cuts, pads.

The algebra stands at the head of the files that hold the rules: `fuse_views.py`, `fuse_cuts.py`,
`fuse_pads.py`, `fuse_casts.py`, `fuse_blocks.py`.  What takes more than a few nodes to see has passes of its own:
`sink-transposes`, `fuse-parts`, `hoist-slices`, `eliminate-casts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.registry import register
from graphopt.rewrite import RulePass

from . import fuse_blocks, fuse_casts, fuse_cuts, fuse_pads, fuse_views


@register
@dataclass(frozen=True)
class FuseMovement(RulePass):
    """Make one of two operators that only move elements, or none.

    Exact: elements are moved, never computed.  Refuses where sizes that decide are not known.
    """

    name: ClassVar[str] = "fuse-movement"
    rules: ClassVar = (*fuse_blocks.RULES, *fuse_views.RULES, *fuse_cuts.RULES, *fuse_pads.RULES, *fuse_casts.RULES)
