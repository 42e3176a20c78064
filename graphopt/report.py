"""What one run did: records, as JSON and as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

SHOWN_BLOCKS = 5


@dataclass(frozen=True)
class Size:
    """Nodes (Constant nodes not counted, subgraphs included), initializers, and bytes of weights."""

    nodes: int
    initializers: int
    weight_bytes: int


@dataclass
class PassRecord:
    """One run of one pass.

    `status` is `changed`, `unchanged` or `rolled back`; `failure` says why, `reproducer` where to look.
    """

    name: str
    options: dict[str, Any]
    before: Size
    after: Size
    seconds: float = 0.0
    changes: int = 0
    status: str = "unchanged"
    notes: list[str] = field(default_factory=list)
    blocked: list[dict[str, str]] = field(default_factory=list)
    failure: str | None = None
    reproducer: str | None = None


@dataclass
class Report:
    """A whole run.

    Attributes:
        model: where the input came from.
        pipeline: its text form.
        decision: `optimized`, or `input kept` with the reason in `reason`.
        verification: what numeric checks found (None: none was made).
        timing: what the profit gate measured (None: not measured).
    """

    model: str
    pipeline: str
    seed: int
    before: Size
    after: Size
    opset_before: int
    opset_after: int
    passes: list[PassRecord] = field(default_factory=list)
    samples: str | None = None
    verification: dict[str, Any] | None = None
    timing: dict[str, Any] | None = None
    decision: str = "optimized"
    reason: str | None = None
    seconds: float = 0.0
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def failures(self) -> list[PassRecord]:
        """Passes that were rolled back."""
        return [record for record in self.passes if record.failure]

    @property
    def firings(self) -> dict[str, int]:
        """How many changes each pass made."""
        counts: dict[str, int] = {}
        for record in self.passes:
            counts[record.name] = counts.get(record.name, 0) + (record.changes if record.status == "changed" else 0)
        return counts

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return asdict(self)


def human_bytes(count: float) -> str:
    """Return a byte count as people read it: 1.2 MB (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def render(report: Report) -> Group:
    """Return the report for a terminal."""
    parts: list[Any] = [_passes_table(report.passes)]
    parts += [_line(line) for line in summary_lines(report)]
    parts += [_line(f"! {record.name} was rolled back: {record.failure}", "red") for record in report.failures]
    parts += [_line(f"  reproducer: {record.reproducer}") for record in report.failures if record.reproducer]
    return Group(*parts)


def _line(text: str, style: str = "") -> Text:
    return Text(text, style=style, overflow="fold", no_wrap=False)


def _passes_table(records: Iterable[PassRecord]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, justify in (
        ("pass", "left"),
        ("changes", "right"),
        ("nodes", "right"),
        ("weights", "right"),
        ("seconds", "right"),
        ("", "left"),
    ):
        table.add_column(title, justify=justify)  # type: ignore[arg-type]
    for record in merge_repeats(records):
        nodes = (
            f"{record.before.nodes} → {record.after.nodes}"
            if record.before.nodes != record.after.nodes
            else str(record.after.nodes)
        )
        remark = record.status if record.failure else (f"{len(record.blocked)} blocked" if record.blocked else "")
        table.add_row(
            record.name,
            str(record.changes),
            nodes,
            human_bytes(record.after.weight_bytes),
            f"{record.seconds:.2f}",
            remark,
        )
    return table


def merge_repeats(records: Iterable[PassRecord]) -> list[PassRecord]:
    """Return one record per pass and options: counts added up, sizes of the first and the last run."""
    merged: dict[str, PassRecord] = {}
    for record in records:
        key = f"{record.name}{sorted(record.options.items())}"
        known = merged.get(key)
        if known is None:
            merged[key] = PassRecord(**{**vars(record), "blocked": list(record.blocked), "notes": list(record.notes)})
            continue
        known.after = record.after
        known.changes += record.changes
        known.seconds += record.seconds
        known.blocked = list(record.blocked)
        known.failure = known.failure or record.failure
        known.reproducer = known.reproducer or record.reproducer
        if record.failure or (known.status == "unchanged" and record.status == "changed"):
            known.status = record.status
    return list(merged.values())


def summary_lines(report: Report) -> list[str]:
    """Return the run in a few sentences."""
    before, after = report.before, report.after
    opset = f", opset {report.opset_before} → {report.opset_after}" if report.opset_before != report.opset_after else ""
    lines = [
        f"nodes {before.nodes} → {after.nodes}, weights {human_bytes(before.weight_bytes)} → "
        f"{human_bytes(after.weight_bytes)}{opset}"
    ]
    lines += [f"{record.name}: {note}" for record in report.passes for note in record.notes]
    if report.verification is not None:
        lines.append(verification_line(report.verification, report.samples))
    if report.timing is not None:
        lines.append(timing_line(report.timing))
    if report.decision != "optimized":
        lines.append(f"{report.decision}: {report.reason}")
    return lines


def verification_line(verification: dict[str, Any], samples: str | None) -> str:
    """Return what the numeric check found."""
    if not verification.get("ok", False):
        return f"NOT verified: {'; '.join(verification.get('failures', []))}"
    rows = [r for r in verification.get("outputs", []) if r.get("relative") is not None]
    worst = max(rows, key=lambda r: r["relative"] / max(r.get("tolerance") or 0.0, 1e-30), default=None)
    reached = f"largest error {worst['relative']:.1e} (allowed {worst['tolerance']:.1e})" if worst else "outputs equal"
    return f"verified on {samples}: {reached}, ONNX Runtime optimisations off and on"


def timing_line(timing: dict[str, Any]) -> str:
    """Return what the profit gate measured."""
    low, high = timing["interval"]
    return (
        f"latency ratio {timing['ratio']:.3f} (95 % interval {low:.3f}–{high:.3f}) of the input in ONNX Runtime, "
        f"{timing['threads']} thread{'s' if timing['threads'] != 1 else ''}, {timing['provider']}"
    )
