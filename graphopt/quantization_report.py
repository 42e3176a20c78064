"""What `quantize` did: layer by layer, what was tried, and why the result is what it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from graphopt.lossy_report import LossyReport, tried_table

SHOWN = 30
"""Layers listed on a terminal, those that are quantized first."""


@dataclass(frozen=True)
class LayerRow:
    """One layer: its precision and why; times in microseconds per run, noise as power relative to the output's."""

    layer: str
    op: str
    precision: str
    why: str
    float_us: float | None = None
    int8_us: float | None = None
    border_us: float | None = None
    noise: float | None = None


@dataclass
class QuantizationReport(LossyReport):
    """A whole run of `quantize`.

    Attributes:
        form: `static int8`, `dynamic int8`, `weight-only int4`, `fp16` …
        layers: one row per layer that does the work.
        changes: places that a form asked for by name was brought to; its rows are of what was left out.
    """

    decision: str = "quantized"
    form: str = ""
    layers: list[LayerRow] = field(default_factory=list)
    changes: int = 0

    @property
    def precisions(self) -> dict[str, int]:
        """Precision -> layers."""
        return dict(Counter(row.precision for row in self.layers))

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {**super().to_dict(), "precisions": self.precisions}

    @property
    def head(self) -> str:
        """The decision, the form, and how many layers have which precision."""
        counts = ", ".join(f"{number} {precision}" for precision, number in self.precisions.items())
        if self.changes:
            counts = f"{self.changes} places" + f", {len(self.layers)} left as they were" * bool(self.layers)
        head = f"{self.form} ({counts})" if self.decision == "quantized" and counts else self.form
        return f"{self.decision}: {head}" if head else self.decision


def render(report: QuantizationReport, *, everything: bool = False) -> Group:
    """Return the report for a terminal, with every layer if asked for."""
    shown = len(report.layers) if everything else SHOWN
    parts: list[Any] = [_layers_table(report.layers, shown)] if report.layers else []
    if len(report.tried) > 1:
        parts.append(tried_table(report.tried))
    return Group(*parts, *(Text(line) for line in report.summary()))


def _layers_table(rows: Sequence[LayerRow], shown: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, justify in (("layer", "left"), ("op", "left"), ("precision", "left"), ("float µs", "right"),
                           ("int8 µs", "right"), ("noise", "right"), ("why", "left")):  # fmt: skip
        table.add_column(title, justify=justify, overflow="fold")  # type: ignore[arg-type]  # one of two literals
    kept = {id(row) for row in sorted(rows, key=lambda row: row.precision == "float")[:shown]}
    for row in rows:
        if id(row) in kept:
            noise = "" if row.noise is None else f"{row.noise:.1e}"
            times = ["" if t is None else f"{t:.0f}" for t in (row.float_us, row.int8_us)]
            table.add_row(row.layer, row.op, row.precision, *times, noise, row.why)
    if len(rows) > shown:
        table.add_row(f"… and {len(rows) - shown} more (--all)")
    return table
