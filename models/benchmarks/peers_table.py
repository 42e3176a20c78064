"""Rows of the comparison with the peers -> Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

OURS = "graphopt"

FASTER = 0.97
"""A model counts as faster where the ratio is below this and its whole interval below 1."""

Results = Mapping[str, Mapping[str, "Row"]]
"""Model -> optimizer -> row."""

INTRODUCTION = """\
# graphopt and its peers

Made by

    python -m venv peers
    peers/bin/pip install onnxslim==0.1.98 onnxsim==0.8.1 onnxoptimizer==0.4.2 onnxscript==0.7.2 onnxruntime
    python -m graphopt.models.benchmarks.peers --python peers/bin/python --output docs/peers.md

"""

NODES = """\
Counted here for all alike: nodes of the main graph, of subgraphs and of local functions; Constant nodes are not
counted. onnxslim's own summary counts the same way; onnxsim's counts initializers and Constant nodes as "Constant".
graphopt: `optimize(measure=False, verify="off")`. Bold: the fewest.
"""

LATENCY = """\
Time of a run over that of the unmodified model, median and 95 % interval, ONNX Runtime's own optimisations all on;
all models of a line ran in the same rounds, in turn. {clock}
graphopt: its measuring default, told the threads and the shapes. "–": not timed, see the errors.
"""

CLOCKS = {1: "Processor time of the one thread.", 2: "Wall time."}

ERRORS = """\
Largest difference from the original's outputs, as a part of the largest element of that output, over two feeds, ONNX
Runtime's optimisations off. *wrong outputs*: above 1e-4, or of another shape or type; *invalid*: refused by ONNX's
checker (an error beside it: ONNX Runtime runs it all the same, and it is timed); *broken*: refused by ONNX Runtime;
*crash*, *time limit*: of the optimizer.
"""

TIMES = """\
From the path of a file to a `ModelProto` in memory, in-process after import: median over calls, ms (in brackets: the
first call of a process; then processor time). Bold: graphopt is no slower than onnxslim.
"""


@dataclass
class Row:
    """One optimizer on one model.

    Attributes:
        status: `ok`, or what went wrong (see `ERRORS`).
        why: the reason, or ''.
        version: of the optimizer.
        nodes: of the result.
        error: largest error; None where there is none that is finite.
        calls: wall and processor seconds of each call; the first of a process has `first`.
        latency: threads -> ratio as in `Ratio.to_dict`.
    """

    status: str = "ok"
    why: str = ""
    version: str = ""
    nodes: int | None = None
    error: float | None = None
    calls: list[dict[str, float]] = field(default_factory=list)
    latency: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def runs_right(self) -> bool:
        """Whether ONNX Runtime runs the result and gives the right outputs, valid or not."""
        return self.status == "ok" or (self.status == "invalid" and self.error is not None)

    @property
    def seconds(self) -> float:
        """Median wall seconds of a call."""
        return statistics.median(call["wall"] for call in self.calls)

    @property
    def cpu(self) -> float:
        """Median processor seconds of a call."""
        return statistics.median(call["cpu"] for call in self.calls)

    @property
    def first(self) -> float:
        """Median wall seconds of a process's first call."""
        return statistics.median(call["wall"] for call in self.calls if call.get("first"))

    def update(self, found: Mapping[str, Any]) -> None:
        """Take over the values that are found."""
        for name, value in found.items():
            setattr(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Row:
        """Return the row of `to_dict`, read back from JSON."""
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        known["latency"] = {int(threads): ratio for threads, ratio in known.get("latency", {}).items()}
        return cls(**known)


Cell = Callable[[Mapping[str, Row], str], str]


def document(results: Results, where: str) -> str:
    """Return the whole page: summary, one table per quantity, versions and machine."""
    optimizers = list(next(iter(results.values())))
    threads = sorted({n for rows in results.values() for row in rows.values() for n in row.latency})
    sections = [("In short", "", summary(results, optimizers, threads)), ("Nodes", NODES, _nodes(results, optimizers))]
    for n in threads:
        title = f"Latency, {n} thread{'s' if n > 1 else ''}"
        cell = _latency_cell(n)
        sections.append((title, LATENCY.format(clock=CLOCKS.get(n, "Wall time.")), _table(results, optimizers, cell)))
    sections.append(("Errors", ERRORS, _table(results, optimizers, _error_cell) + failures(results)))
    sections.append(("The optimizers' own time", TIMES, _table(results, optimizers, _time_cell)))
    body = "".join(f"\n## {title}\n\n{text}{chr(10) if text else ''}{table}" for title, text, table in sections)
    versions = {name: next((r[name].version for r in results.values() if r[name].version), "?") for name in optimizers}
    return f"{INTRODUCTION}{', '.join(f'{k} {v}' for k, v in versions.items())}; {where}.\n{body}"


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |\n"


def _head(cells: Sequence[str]) -> str:
    return _line(cells) + "|" + "---|" * len(cells) + "\n"


def _table(results: Results, optimizers: Sequence[str], cell: Cell) -> str:
    lines = [_line([model, *(cell(rows, name) for name in optimizers)]) for model, rows in results.items()]
    return _head(["model", *optimizers]) + "".join(lines)


def _nodes(results: Results, optimizers: Sequence[str]) -> str:
    def cell(rows: Mapping[str, Row], name: str) -> str:
        counts = [row.nodes for row in rows.values() if row.nodes is not None and row.status == "ok"]
        nodes = rows[name].nodes
        if nodes is None:
            return "–"
        text = str(nodes) if rows[name].status == "ok" else f"{nodes} ({rows[name].status})"
        return f"**{text}**" if nodes == min(counts, default=-1) and rows[name].status == "ok" else text

    return _table(results, optimizers, cell)


def _latency_cell(threads: int) -> Cell:
    def cell(rows: Mapping[str, Row], name: str) -> str:
        found = rows[name].latency.get(threads)
        if found is None:
            return "–"
        low, high = found["interval"]
        return f"{found['ratio']:.3f} ({low:.3f}–{high:.3f})"

    return cell


def _error_cell(rows: Mapping[str, Row], name: str) -> str:
    row = rows[name]
    error = "" if row.error is None else f"{row.error:.1e}"
    return error if row.status == "ok" else f"*{row.status}* {error}".strip()


def _time_cell(rows: Mapping[str, Row], name: str) -> str:
    row = rows[name]
    if not row.calls:
        return "–"
    text = f"{row.seconds * 1e3:.0f} ({row.first * 1e3:.0f}; {row.cpu * 1e3:.0f})"
    rival = rows.get("onnxslim")
    wins = name == OURS and rival is not None and rival.calls and row.seconds <= rival.seconds
    return f"**{text}**" if wins else text


def failures(results: Results) -> str:
    """Return the reasons of what went wrong, one line each."""
    lines = [
        f"- {model}, {name}: {row.status}: {row.why}\n"
        for model, rows in results.items()
        for name, row in rows.items()
        if row.status != "ok" and row.why
    ]
    return "\n" + "".join(lines) if lines else ""


def summary(results: Results, optimizers: Sequence[str], threads: Sequence[int]) -> str:
    """Return one line per optimizer over all models."""
    heads = [f"{what}, {n} thread{'s' if n > 1 else ''}" for n in threads for what in ("ratio", "faster", "slower")]
    text = _head(["optimizer", "right outputs", "fewest nodes", *heads, "time over graphopt's"])
    for name in optimizers:
        rows = [models[name] for models in results.values()]
        right = sum(row.status == "ok" for row in rows)
        cells = [name, f"{right} of {len(rows)}", str(sum(_has_fewest(models, name) for models in results.values()))]
        for n in threads:
            cells += _latency_summary([row.latency[n] for row in rows if n in row.latency])
        text += _line([*cells, _time_ratio(results, name)])
    return text + (
        "\nRatio: geometric mean over the models timed. Faster: by more than 3 % with the whole interval below 1. "
        "Slower: the upper end of the interval is above 1.03.\n"
    )


def _has_fewest(rows: Mapping[str, Row], name: str) -> bool:
    counts = [row.nodes for row in rows.values() if row.nodes is not None and row.status == "ok"]
    return rows[name].status == "ok" and rows[name].nodes == min(counts, default=None)


def _latency_summary(found: Sequence[Mapping[str, Any]]) -> list[str]:
    if not found:
        return ["–"] * 3
    mean = math.exp(statistics.fmean(math.log(one["ratio"]) for one in found))
    faster = sum(one["ratio"] < FASTER and one["interval"][1] < 1.0 for one in found)
    slower = sum(one["interval"][1] > 1.03 for one in found)
    return [f"{mean:.3f}", f"{faster} of {len(found)}", str(slower)]


def _time_ratio(results: Results, name: str) -> str:
    pairs = [(rows[name], rows[OURS]) for rows in results.values() if rows[name].calls and rows[OURS].calls]
    if not pairs:
        return "–"
    logs = [math.log(row.seconds / ours.seconds) for row, ours in pairs]
    return f"{math.exp(statistics.fmean(logs)):.2f} ({math.exp(min(logs)):.2f}–{math.exp(max(logs)):.2f})"
