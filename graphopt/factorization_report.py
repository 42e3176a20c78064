"""What `factorize` did: layer by layer, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from graphopt.lossy_report import LossyReport, change, tried_table
from graphopt.report import human_count

SHOWN = 30
"""Layers listed on a terminal, those with factors first."""


@dataclass(frozen=True)
class FactorRow:
    """One layer; times in microseconds of the layer alone.

    Attributes:
        form: `whole`, or way and rank of its factors.
        error: relative error of the layer's output by its factors; of its weight without samples.
        why: why it has these factors, or none.
    """

    layer: str
    op: str
    form: str
    why: str
    whole_us: float | None = None
    factors_us: float | None = None
    error: float | None = None


@dataclass
class FactorizationReport(LossyReport):
    """A whole run of `factorize`.

    Attributes:
        goal: what said which ranks.
        layers: one row per layer with a weight.
        macs_before, macs_after: of the canonical model and of the result.
        error: relative error at the worst output on the judging samples; None where there were none.
    """

    decision: str = "factorized"
    goal: str = ""
    layers: list[FactorRow] = field(default_factory=list)
    macs_before: int | None = None
    macs_after: int | None = None
    error: float | None = None

    @property
    def head(self) -> str:
        """What was done, in a line."""
        if self.decision != "factorized":
            return self.decision
        made = sum(row.form != "whole" for row in self.layers)
        return f"factorized: {made} of {len(self.layers)} layers"

    def size_lines(self) -> list[str]:
        """Return error, MACs and bytes."""
        lines = [] if self.error is None else [f"relative error at the outputs: {self.error:.3g}"]
        if self.macs_before is not None and self.macs_after is not None:
            lines.append("MACs of the first feed: " + change(self.macs_before, self.macs_after, human_count))
        return lines + super().size_lines()


def render(report: FactorizationReport, *, everything: bool = False) -> Group:
    """Return the report for a terminal, with every layer if asked for."""
    shown = len(report.layers) if everything else SHOWN
    parts: list[Any] = [_table(report.layers, shown)] if report.layers else []
    if len(report.tried) > 1:
        parts.append(tried_table(report.tried))
    return Group(*parts, *(Text(line) for line in report.summary()))


def _table(rows: Sequence[FactorRow], shown: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, justify in (("layer", "left"), ("op", "left"), ("form", "left"), ("whole µs", "right"),
                           ("factors µs", "right"), ("error", "right"), ("why", "left")):  # fmt: skip
        table.add_column(title, justify=justify, overflow="fold")  # type: ignore[arg-type]  # one of two literals
    kept = {id(row) for row in sorted(rows, key=lambda row: row.form == "whole")[:shown]}
    for row in rows:
        if id(row) in kept:
            times = ["" if t is None else f"{t:.0f}" for t in (row.whole_us, row.factors_us)]
            table.add_row(row.layer, row.op, row.form, *times, "" if row.error is None else f"{row.error:.2g}", row.why)
    if len(rows) > shown:
        table.add_row(f"… and {len(rows) - shown} more (--all)")
    return table
