"""What `prune` did: group by group, and what came of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from graphopt.lossy_report import LossyReport, change, tried_table
from graphopt.report import human_count

SHOWN = 40
"""Groups listed on a terminal, those that can be cut first."""


NODE = re.compile(r" '[^']*'")
"""What names a node in a reason: left out where reasons are counted."""


@dataclass(frozen=True)
class GroupRow:
    """One group of coupled channels.

    Attributes:
        group: its name: the first layer that makes it.
        kind: `channels`, `heads`, `hidden` …
        before, after: units in the input and in the result.
        layers: weights that have an axis of it.
        macs: part of the model's MACs that would go with all of it; None for what cannot be cut.
        why: why it cannot be cut, or why it was not.
    """

    group: str
    kind: str
    before: int
    after: int
    layers: int
    macs: float | None = None
    why: str = ""


@dataclass
class PruningReport(LossyReport):
    """A whole run of `prune`.

    Attributes:
        goal: what said how much is cut.
        removed: the part of it that was asked to go; None where the bound decided.
        criterion, scope, reconstruct: how units were ranked, and how the rest was fitted.
        groups: one row per group of coupled channels.
        frozen: axes of weights that are in no group that can be cut: where, and why.
        blocks: blocks that were dropped.
        macs_before, macs_after, parameters_before, parameters_after: of the canonical model and of the result.
        covered: part of the parameters that stand in tensors with an axis that can be cut.
    """

    decision: str = "pruned"
    goal: str = ""
    removed: float | None = None
    criterion: str = ""
    scope: str = ""
    reconstruct: str = ""
    groups: list[GroupRow] = field(default_factory=list)
    frozen: list[dict[str, Any]] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)
    macs_before: int | None = None
    macs_after: int | None = None
    parameters_before: int = 0
    parameters_after: int = 0
    covered: float = 0.0

    @property
    def head(self) -> str:
        """What was cut, in a line."""
        if self.decision != "pruned":
            return self.decision
        cut = sum(row.after < row.before for row in self.groups)
        blocks = f", {len(self.blocks)} blocks dropped" if self.blocks else ""
        how = f"by {self.criterion}, {self.scope}; reconstruction: {self.reconstruct}"
        return f"pruned: {cut} of {len(self.groups)} groups{blocks} ({how})"

    def size_lines(self) -> list[str]:
        """Return MACs, parameters and bytes before and after."""
        lines = []
        if self.macs_before is not None and self.macs_after is not None:
            lines.append("MACs of the first feed: " + change(self.macs_before, self.macs_after, human_count))
        lines.append("parameters: " + change(self.parameters_before, self.parameters_after, human_count))
        return lines + super().size_lines()


def render(report: PruningReport, *, everything: bool = False) -> Group:
    """Return the report for a terminal, with every group if asked for."""
    parts: list[Any] = [groups_table(report.groups, len(report.groups) if everything else SHOWN)]
    if len(report.tried) > 1:
        parts.append(tried_table(report.tried))
    if report.decision == "explained":
        parts.append(Text(f"{report.covered:.1%} of the parameters stand in weights with an axis that can be cut"))
        whys = Counter(NODE.sub("", row["why"]) for row in report.frozen)
        parts += [Text(f"frozen: {why}" + (f" ({count} axes)" if count > 1 else "")) for why, count in whys.items()]
        return Group(*parts)
    return Group(*parts, *(Text(line) for line in report.summary()))


def groups_table(rows: Sequence[GroupRow], shown: int) -> Table:
    """Return the groups, one a line; those that can be cut first where not all are shown."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, justify in (
        ("group", "left"),
        ("kind", "left"),
        ("units", "right"),
        ("weights", "right"),
        ("of MACs", "right"),
        ("why", "left"),
    ):
        table.add_column(title, justify=justify, overflow="fold")  # type: ignore[arg-type]  # one of two literals
    kept = {id(row) for row in sorted(rows, key=lambda row: bool(row.why))[:shown]}
    for row in rows:
        if id(row) in kept:
            units = str(row.before) if row.after == row.before else f"{row.before} -> {row.after}"
            share = "" if row.macs is None else f"{row.macs:.1%}"
            table.add_row(row.group, row.kind, units, str(row.layers), share, row.why)
    if len(rows) > shown:
        table.add_row(f"… and {len(rows) - shown} more (--all)")
    return table
