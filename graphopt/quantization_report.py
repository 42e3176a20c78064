"""What `quantize` did: layer by layer, what was tried, and why the result is what it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from graphopt.judge import Comparison
from graphopt.output_quality import OutputQuality
from graphopt.quality import Quality
from graphopt.report import PassRecord, Size, human_bytes

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
class Tried:
    """A model that was built: in which form, how good it is, and how long it takes as a part of the lossless one's."""

    form: str
    layers: int
    predicted: float | None = None
    quality: Quality | None = None
    comparison: Comparison | None = None
    verdict: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "form": self.form, "layers": self.layers, "predicted": self.predicted, "verdict": self.verdict,
            "quality": None if self.quality is None else self.quality.to_dict(),
            "timing": None if self.comparison is None else self.comparison.to_dict(),
        }  # fmt: skip


@dataclass
class QuantizationReport:
    """A whole run of `quantize`.

    Attributes:
        model: where the input came from.
        decision: `quantized`, or `lossless` where that model was returned; why stands in `reason`.
        form: `static int8`, `dynamic int8`, `weight-only int4`, `fp16` …
        pipeline: the passes that make the result from the input, as text.
        bound: what was asked.
        samples: what calibrated, and what judged, in words.
        layers: one row per layer that does the work.
        changes: places that a form asked for by name was brought to; its rows are of what was left out.
        tried: models that were built and looked at, in order.
        quality: of the result on the judging samples; None where there were none.
        timing: of the result against the lossless model; None where it was not timed.
        before, after: sizes of the input and of the result.
    """

    model: str
    seed: int
    bound: dict[str, Any]
    before: Size
    after: Size
    decision: str = "quantized"
    reason: str = ""
    form: str = ""
    pipeline: str = ""
    samples: dict[str, str] = field(default_factory=dict)
    layers: list[LayerRow] = field(default_factory=list)
    changes: int = 0
    tried: list[Tried] = field(default_factory=list)
    quality: Quality | None = None
    timing: Comparison | None = None
    bytes_before: int = 0
    bytes_after: int = 0
    passes: list[PassRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    decisions: dict[str, Any] | None = None
    seconds: float = 0.0
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def precisions(self) -> dict[str, int]:
        """Precision -> layers."""
        return dict(Counter(row.precision for row in self.layers))

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        special = {"tried", "quality", "timing", "layers", "passes", "before", "after"}
        plain = {name: value for name, value in vars(self).items() if name not in special}
        return {
            **plain, "before": asdict(self.before), "after": asdict(self.after), "precisions": self.precisions,
            "layers": [asdict(row) for row in self.layers], "tried": [t.to_dict() for t in self.tried],
            "quality": None if self.quality is None else self.quality.to_dict(),
            "timing": None if self.timing is None else self.timing.to_dict(),
            "passes": [asdict(record) for record in self.passes],
        }  # fmt: skip


def render(report: QuantizationReport, *, everything: bool = False) -> Group:
    """Return the report for a terminal, with every layer if asked for."""
    shown = len(report.layers) if everything else SHOWN
    parts: list[Any] = [_layers_table(report.layers, shown)] if report.layers else []
    if len(report.tried) > 1:
        parts.append(_tried_table(report.tried))
    return Group(*parts, *(Text(line) for line in summary(report)))


def summary(report: QuantizationReport) -> list[str]:
    """Return the last lines: what was decided, the accuracy, the time, the size."""
    counts = ", ".join(f"{number} {precision}" for precision, number in report.precisions.items())
    if report.changes:
        counts = f"{report.changes} places" + f", {len(report.layers)} left as they were" * bool(report.layers)
    head = f"{report.form} ({counts})" if report.decision == "quantized" and counts else report.form
    lines = [f"{report.decision}: {head}" if head else report.decision]
    lines += [f"why: {report.reason}"] if report.reason else []
    lines += quality_lines(report.quality)
    if report.timing is not None:
        lines += timing_lines(report.timing)
    size = f"{human_bytes(report.bytes_before)} -> {human_bytes(report.bytes_after)}"
    ratio = f" ({report.bytes_after / report.bytes_before:.3f})" if report.bytes_before else ""
    lines.append(f"size on disk: {size}{ratio}")
    lines += [f"note: {note}" for note in dict.fromkeys(report.notes)]
    return lines


def quality_lines(quality: Quality | None) -> list[str]:
    """Return how good a result is, in words."""
    if quality is None:
        return []
    lines = [f"output '{output.name}', {quality.samples} samples: {_figures(output)}" for output in quality.outputs]
    if quality.evaluation is not None:
        found = quality.evaluation
        spread = "" if found.interval is None else f" ({found.interval[0]:.4g} to {found.interval[1]:.4g})"
        lines.append(f"metric: {found.reference:.4g} -> {found.candidate:.4g}, a drop of {found.drop:.4g}{spread}")
    return lines + [f"missed: {failure}" for failure in quality.failures]


def _figures(output: OutputQuality) -> str:
    """Return the numbers that were asked for, and SQNR in any case."""
    found = [f"SQNR {output.score:.1f} dB"]
    if output.agreement is not None:
        found.append(f"agreement {output.agreement:.2%}")
    if output.cosine is not None:
        found.append(f"cosine {output.cosine:.4f}")
    return ", ".join(found)


def timing_lines(comparison: Comparison) -> list[str]:
    """Return how long a result takes as a part of the lossless model's time."""
    return [
        f"{ratio.median:.3f} of the lossless model's time ({ratio.low:.3f} to {ratio.high:.3f}), {label}"
        for label, ratio in comparison.ratios.items()
    ]


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


def _tried_table(tried: Sequence[Tried]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("tried", "layers", "predicted", "measured", "SQNR", "verdict"):
        table.add_column(title, overflow="fold")
    for one in tried:
        predicted = "" if one.predicted is None else f"{one.predicted:.3f}"
        measured = ""
        if one.comparison is not None and one.comparison.ratios:
            measured = f"{one.comparison.overall.median:.3f}"
        sqnr = "" if one.quality is None else f"{one.quality.score:.1f} dB"
        table.add_row(one.form, str(one.layers), predicted, measured, sqnr, one.verdict)
    return table
