"""What a lossy command did, as far as all of them have it: what was tried, how good, fast and large the result is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any

from rich.table import Table

from graphopt.judge import Comparison
from graphopt.output_quality import OutputQuality
from graphopt.quality import Quality
from graphopt.report import PassRecord, Size, human_bytes


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
class LossyReport:
    """A whole run of a lossy command.

    Attributes:
        model: where the input came from.
        bound: what was asked.
        before, after: sizes of the input and of the result.
        decision: what became of it (`quantized`, `pruned` …), or `lossless` where that model was returned; why stands
            in `reason`.
        pipeline: the passes that make the result from the input, as text.
        samples: what calibrated, and what judged, in words.
        tried: models that were built and looked at, in order.
        quality: of the result on the judging samples; None where there were none.
        timing: of the result against the lossless model; None where it was not timed.
    """

    model: str
    seed: int
    bound: dict[str, Any]
    before: Size
    after: Size
    decision: str = ""
    reason: str = ""
    pipeline: str = ""
    samples: dict[str, str] = field(default_factory=dict)
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

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {name: plain(value) for name, value in vars(self).items()}

    @property
    def head(self) -> str:
        """What became of it, in a line."""
        return self.decision

    def summary(self) -> list[str]:
        """Return the last lines: what was decided, the accuracy, the time, the size."""
        lines = [self.head]
        lines += [f"why: {self.reason}"] if self.reason else []
        lines += quality_lines(self.quality)
        lines += timing_lines(self.timing) if self.timing is not None else []
        lines += self.size_lines()
        return lines + [f"note: {note}" for note in dict.fromkeys(self.notes)]

    def size_lines(self) -> list[str]:
        """Return how large the result is."""
        return ["size on disk: " + change(self.bytes_before, self.bytes_after, human_bytes)]


def change(before: float, after: float, shown: Callable[[Any], str]) -> str:
    """Return two amounts and their ratio in words."""
    return f"{shown(before)} -> {shown(after)}" + (f" ({after / before:.3f})" if before else "")


def plain(value: Any) -> Any:
    """Return plain values for JSON: of objects that know how (`to_dict`), data classes, and lists of them."""
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if hasattr(value, "to_dict"):
        return value.to_dict()
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


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


def tried_table(tried: Sequence[Tried]) -> Table:
    """Return what was tried, a model a line."""
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
