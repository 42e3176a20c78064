"""What one run did: records, as JSON and as tables for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

FEW = 8
"""Passes of which each near miss is worth a look: the user named them."""

REASONS = 5
"""Near misses that are printed with their reasons."""

NO_TIME = "not measured: no time was left"
"""The reason of an optional pass that the budget did not reach."""


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
        decision: `optimized`; `canonicalized`, where that without optional passes was returned; or `input kept`; why
            stands in `reason`.
        verification: what numeric checks found (None: none was made).
        timing: what the last gate measured under the condition that was worst, and `conditions` (None: not measured).
        families: what each optional pass brings, and what became of it.
        measured: threads, shapes, budget, and all that the last gate tried.
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
    families: list[dict[str, Any]] = field(default_factory=list)
    measured: dict[str, Any] | None = None
    decision: str = "optimized"
    reason: str | None = None
    seconds: float = 0.0
    environment: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Begin without decisions."""
        self._decisions: dict[str, Any] | Callable[[], dict[str, Any]] | None = None

    @property
    def decisions(self) -> dict[str, Any] | None:
        """What repeats this run without measuring; found when first asked for."""
        if callable(self._decisions):
            self._decisions = self._decisions()
        return self._decisions

    def decided(self, decisions: dict[str, Any] | Callable[[], dict[str, Any]]) -> None:
        """Enter the decisions, or what finds them."""
        self._decisions = decisions

    @property
    def failures(self) -> list[PassRecord]:
        """Passes that were rolled back."""
        return [record for record in self.passes if record.failure]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {**asdict(self), "decisions": self.decisions}


def human_bytes(count: float) -> str:
    """Return a byte count as people read it: 1.2 MB (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def human_count(count: float) -> str:
    """Return a count as people read it: 1.23 M."""
    for unit in ("", " k", " M", " G"):
        if count < 1000 or unit == " G":
            return f"{count:.0f}" if not unit else f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g} G"


def render(report: Report) -> Group:
    """Return the report for a terminal."""
    rows = rows_by_pass(report.passes)
    few = len(rows) <= FEW
    shown = [row for row in rows if row["changes"] or row["failed"] or (few and row["blocked"])]
    parts: list[Any] = [_passes_table(shown)] if shown else []
    idle = len(rows) - len(shown)
    if idle:
        parts.append(_line(f"{idle} {'other ' * bool(shown)}pass{'es' * (idle != 1)} found nothing to change"))
    parts += [_line(line) for line in near_miss_lines(rows)]
    parts += [_families_table(report.families)] if report.families else []
    parts += [_line(line) for line in (*unmeasured_lines(report.families), *summary_lines(report))]
    for record in report.failures:
        parts.append(_line(f"! {record.name} was rolled back: {record.failure}", "red"))
        parts += [_line(f"  reproducer: {record.reproducer}")] if record.reproducer else []
    return Group(*parts)


def near_miss_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return where passes did not fire and why, the first ones; of a long pipeline how many there are."""
    found = [miss for row in rows for miss in row["misses"]]
    if not found:
        return []
    if len(rows) > FEW:
        return [f"near misses: {len(found)}, with reasons in `graphopt explain MODEL` or --json"]
    lines = [f"near miss at {miss['where']}: {miss['why']}" for miss in found[:REASONS]]
    more = len(found) - len(lines)
    return lines + ([f"and {more} near miss{'es' * (more != 1)} more, with reasons in --json"] if more else [])


def unmeasured_lines(families: Iterable[dict[str, Any]]) -> list[str]:
    """Return how many optional passes there was no time to measure, and what to do about it."""
    count = sum(family["reason"] == NO_TIME for family in families)
    many = "families" if count != 1 else "family"
    return [f"{count} {many} not measured: --budget SECONDS gives more time"] if count else []


def _line(text: str, style: str = "") -> Text:
    return Text(text, style=style, overflow="fold", no_wrap=False)


def _passes_table(rows: Iterable[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("pass", "changes", "nodes", "weights", "seconds", ""):
        table.add_column(title, justify="left" if title in ("pass", "") else "right", no_wrap=True)
    for row in rows:
        weights = human_bytes(abs(row["weight_bytes"]))
        table.add_row(
            row["name"],
            str(row["changes"]),
            f"{row['nodes']:+d}" if row["nodes"] else "",
            f"{'-' if row['weight_bytes'] < 0 else '+'}{weights}" if row["weight_bytes"] else "",
            f"{row['seconds']:.2f}",
            "rolled back" if row["failed"] else (f"{row['blocked']} blocked" if row["blocked"] else ""),
        )
    return table


def _families_table(families: Iterable[dict[str, Any]]) -> Table:
    """Return what each optional pass brings: time with it over time without it."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("optional pass", "sites", "time with it", "interval", "", "why"):
        right = title in ("sites", "time with it")
        table.add_column(title, justify="right" if right else "left", no_wrap=title != "why", overflow="fold")
    for row in families:
        for name, found in family_rows(row):
            low, high = found.get("interval", (None, None))
            table.add_row(
                name,
                str(row["changes"]) if found is row else "",
                f"{found['ratio']:.3f}" if low is not None else "",
                f"{low:.3f}–{high:.3f}" if low is not None else "",
                row["verdict"] if found is row else "",
                row["reason"] if found is row else "",
            )
    return table


def family_rows(family: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return a family under its name, then each variant measured under its options."""
    variants = [(" ".join(f"  {k}={v}" for k, v in one["options"].items()), one) for one in family["variants"]]
    return [(family["name"], family), *variants]


def rows_by_pass(records: Iterable[PassRecord]) -> list[dict[str, Any]]:
    """Return one row per pass and options, its runs added up: changes, nodes and bytes added, near misses left."""
    rows: dict[str, dict[str, Any]] = {}
    for record in records:
        key = f"{record.name}{sorted(record.options.items())}"
        fresh = {"name": record.name, "changes": 0, "nodes": 0, "weight_bytes": 0, "seconds": 0.0, "failed": False}
        row = rows.setdefault(key, fresh)
        row["changes"] += record.changes if record.status == "changed" else 0
        row["nodes"] += record.after.nodes - record.before.nodes
        row["weight_bytes"] += record.after.weight_bytes - record.before.weight_bytes
        row["seconds"] += record.seconds
        row["blocked"], row["misses"] = len(record.blocked), record.blocked
        row["failed"] |= record.failure is not None
    return list(rows.values())


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
    lines += gate_lines((report.measured or {}).get("tried", []))
    if report.reason is not None:
        lines.append(f"{report.decision}: {report.reason}")
    return lines


def verification_line(verification: dict[str, Any], samples: str | None) -> str:
    """Return what the numeric check found."""
    if not verification.get("ok", False):
        return f"NOT verified: {'; '.join(verification.get('failures', []))}"
    rows = [r for r in verification.get("outputs", []) if r.get("relative") is not None]
    worst = max(rows, key=lambda r: r["relative"] / max(r.get("tolerance") or 0.0, 1e-30), default=None)
    reached = "outputs equal"
    if worst:
        allowed = worst["tolerance"]  # lossy passes have none: their results are judged by gates
        reached = f"largest error {worst['relative']:.1e}" + ("" if allowed is None else f" (allowed {allowed:.1e})")
    return f"verified on {samples}: {reached}, ONNX Runtime optimisations off and on"


CLOCKS = {"cpu": "processor time", "wall": "wall time"}
"""What a ratio is measured by, in words."""


def gate_lines(tried: list[dict[str, Any]]) -> list[str]:
    """Return what the last gate measured: every candidate under every condition."""
    lines = []
    for one in tried:
        which = f"{one['candidate']}: " if len(tried) > 1 else ""
        if one["same_graph"]:
            lines.append(f"{which}ONNX Runtime makes the same graph of the result as of the input: nothing to time")
        for label, ratio in one.get("conditions", {}).items():
            shapes = label.partition(", ")[2]
            lines.append(which + timing_line(ratio) + (f", {shapes}" if shapes else ""))
    return lines


def timing_line(timing: dict[str, Any]) -> str:
    """Return what the last gate measured under one condition."""
    low, high = timing["interval"]
    return (
        f"latency ratio {timing['ratio']:.3f} (95 % interval {low:.3f}–{high:.3f}) of the input in ONNX Runtime, "
        f"{timing['threads']} thread{'s' if timing['threads'] != 1 else ''}, {timing['provider']}, "
        f"by {CLOCKS[timing['clock']]}"
    )
