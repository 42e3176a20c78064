"""What `distill` and `finetune` did: each stage's quality, size, work and time, and the course of the training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from graphopt.judge import Comparison
from graphopt.lossy_report import LossyReport, plain
from graphopt.output_quality import OutputQuality
from graphopt.quality import Quality
from graphopt.report import human_bytes, human_count

BOTH = 2
"""Stages without a teacher: there is nothing that outputs should be alike."""


@dataclass
class Stage:
    """One model on the way: what it was given, what training made of it.

    Attributes:
        name: what it is: `reference`, `before`, `after`.
        bytes: on disk.
        macs: multiplications for one sample; None where they are not known.
        quality: beside the reference, on samples that neither trained nor chose.
        timing: its time over the reference's; None where it was not timed.
        loss: on held-out samples that chose the best weights; None where there are none.
    """

    name: str
    bytes: int
    macs: int | None = None
    quality: Quality | None = None
    timing: Comparison | None = None
    loss: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {name: plain(value) for name, value in vars(self).items()}


@dataclass
class TrainingReport(LossyReport):
    """A whole run of `distill` or `finetune`.

    Attributes:
        stages: the reference (the teacher, if there is one), the model as it came, and as it was trained.
        settings: what was asked of training.
        history: the course of it; see `graphopt.bridge.history`.
        trained: tensors that were trained.
        parameters: elements of them.
        rows: samples that trained, that chose the best weights, that judged.
    """

    decision: str = "trained"
    stages: list[Stage] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    history: dict[str, Any] = field(default_factory=dict)
    trained: int = 0
    parameters: int = 0
    rows: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, which has no numbers that are not finite: None there."""
        return finite(super().to_dict())  # type: ignore[no-any-return]  # a dict stays one

    @property
    def head(self) -> str:
        """What was done, in a line."""
        counted = ", ".join(f"{count} {verb}" for verb, count in self.rows.items())
        return f"{self.decision}: {self.trained} tensors, {human_count(self.parameters)} parameters; rows: {counted}"

    def summary(self) -> list[str]:
        """Return the last lines: what was done, and notes."""
        lines = [self.head]
        lines += [f"why: {self.reason}"] if self.reason else []
        lines += [f"missed: {failure}" for failure in self.quality.failures] if self.quality is not None else []
        return lines + [f"note: {note}" for note in dict.fromkeys(self.notes)]


def finite(value: Any) -> Any:
    """Return plain values with None in place of NaN and infinities."""
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render(report: TrainingReport) -> Group:
    """Return the report for a terminal."""
    return Group(stages_table(report.stages), *(Text(line) for line in report.summary()))


def stages_table(stages: Sequence[Stage]) -> Table:
    """Return the stages, one a line; columns that none has a value for are left out."""
    columns = {
        "": [stage.name for stage in stages],
        "loss": [_number(stage.loss) for stage in stages],
        **(_by_output(stages) if len(stages) > BOTH else {}),
        "metric": [_metric(stage.quality, number == 0) for number, stage in enumerate(stages)],
        "size": [human_bytes(stage.bytes) for stage in stages],
        "MACs": ["" if stage.macs is None else human_count(stage.macs) for stage in stages],
        "time": [_time(stage.timing) for stage in stages],
    }
    table = Table(box=None, pad_edge=False, header_style="bold")
    shown = {title: cells for title, cells in columns.items() if any(cells)}
    for title in shown:
        table.add_column(title, justify="right" if title else "left", overflow="fold")
    for row in zip(*shown.values(), strict=True):
        table.add_row(*row)
    return table


def _by_output(stages: Sequence[Stage]) -> dict[str, list[str]]:
    """Return, by output, how each stage agrees with the reference."""
    names = dict.fromkeys(output.name for stage in stages if stage.quality for output in stage.quality.outputs)
    found = {}
    for name in names:
        seen = [next((o for o in (s.quality.outputs if s.quality else ()) if o.name == name), None) for s in stages]
        found[f"'{name}'"] = ["" if output is None else _closeness(output) for output in seen]
    return found


def _closeness(output: OutputQuality) -> str:
    parts = [] if output.sqnr is None else [f"{output.sqnr:.1f} dB"]
    parts += [] if output.agreement is None else [f"{output.agreement:.2%} agree"]
    return ", ".join(parts)


def _metric(quality: Quality | None, reference: bool) -> str:
    if quality is None or quality.evaluation is None:
        return ""
    found = quality.evaluation
    if reference:
        return f"{found.reference:.4g}"
    spread = "" if found.interval is None else f" (drop {found.interval[0]:.4g} to {found.interval[1]:.4g})"
    return f"{found.candidate:.4g}{spread}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _time(timing: Comparison | None) -> str:
    if timing is None:
        return ""
    return "1 (same graph)" if timing.same else str(timing.overall) if timing.ratios else timing.note
