"""What `sparsify` did: layer by layer, and what became of the file."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Group
from rich.table import Table
from rich.text import Text

from graphopt.lossy_report import LossyReport, change, tried_table
from graphopt.model import INLINE_LIMIT, Model
from graphopt.report import human_bytes

SHOWN = 30
"""Layers listed on a terminal."""

ZIPPED = 1 << 29
"""Bytes above which a file is not compressed to see how small it gets: that takes ten seconds for this many."""


@dataclass(frozen=True)
class SparseRow:
    """One weight: its elements, the part that is zero, and why (where it is none: why it stays)."""

    layer: str
    op: str
    elements: int
    zeros: float
    why: str


@dataclass(frozen=True)
class FileSizes:
    """Bytes of a result in one file: with dense weights, as it is saved, and both compressed by gzip (None: too large).

    Above 2 GB weights lie in a file of their own, dense.
    """

    dense: int
    file: int
    dense_gzip: int | None = None
    file_gzip: int | None = None

    @classmethod
    def of(cls, model: Model) -> FileSizes:
        """Return what a model takes on disk."""
        if model.weight_bytes() > INLINE_LIMIT:
            size = model.emitted_bytes()
            return cls(size, size)
        dense, file = (model.emit(compact=compact).SerializeToString(deterministic=True) for compact in (False, True))
        if len(dense) > ZIPPED:
            return cls(len(dense), len(file))
        zipped = len(gzip.compress(dense, 6))
        return cls(len(dense), len(file), zipped, zipped if file == dense else len(gzip.compress(file, 6)))


@dataclass
class SparsityReport(LossyReport):
    """A whole run of `sparsify`.

    Attributes:
        criterion, spread, pattern: as they were used.
        amount: part of the elements that was asked for, or found; None where nothing was done.
        layers: one row per weight that could be made sparse, or why not.
        files: sizes of the result; `before_gzip` is that of the input, compressed.
    """

    criterion: str = ""
    spread: str = ""
    pattern: str = ""
    amount: float | None = None
    layers: list[SparseRow] = field(default_factory=list)
    files: FileSizes | None = None
    before_gzip: int | None = None

    @property
    def zeros(self) -> float:
        """Part of the elements of all weights in `layers` that is zero."""
        elements = sum(row.elements for row in self.layers)
        return sum(row.elements * row.zeros for row in self.layers) / elements if elements else 0.0

    @property
    def head(self) -> str:
        """What became of it, in a line."""
        if self.decision != "sparse":
            return self.decision
        how = f"{self.pattern} by {self.criterion}" if self.pattern else f"by {self.criterion}, {self.spread}"
        layers, weights = sum(row.zeros > 0 for row in self.layers), sum(row.elements for row in self.layers)
        return f"sparse: {self.zeros:.1%} of {weights:,} weights, {how} ({layers} layers)"

    def size_lines(self) -> list[str]:
        """Return how large the result is."""
        lines = super().size_lines()
        files, before = self.files, self.before_gzip
        if files is None:
            return lines
        if files.file_gzip is not None and files.dense_gzip is not None and before is not None:
            lines.append(f"by gzip: {change(before, files.file_gzip, human_bytes)}")
            lines.append(f"with dense weights: {human_bytes(files.dense)}, {human_bytes(files.dense_gzip)} by gzip")
        return lines


def render(report: SparsityReport, *, everything: bool = False) -> Group:
    """Return the report for a terminal, with every layer if asked for."""
    shown = len(report.layers) if everything else SHOWN
    parts: list[Table | Text] = [_layers_table(report.layers, shown)] if report.layers else []
    if len(report.tried) > 1:
        parts.append(tried_table(report.tried))
    return Group(*parts, *map(Text, report.summary()))


def _layers_table(rows: Sequence[SparseRow], shown: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("layer", "op"):
        table.add_column(title, overflow="fold")
    for title in ("weights", "zeros"):
        table.add_column(title, justify="right")
    table.add_column("why", overflow="fold")
    for row in rows[:shown]:
        table.add_row(row.layer, row.op, f"{row.elements:,}", f"{row.zeros:.1%}", row.why)
    if len(rows) > shown:
        table.add_row(f"… and {len(rows) - shown} more (--all)")
    return table
