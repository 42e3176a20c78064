"""Results as tables for a terminal (rich renderables); the numbers are the results' own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from graphopt.report import CLOCKS, human_bytes, render

if TYPE_CHECKING:
    from graphopt.demo import Demonstration
    from graphopt.inspect import Inspection
    from graphopt.profile import Profile
    from graphopt.timing import Bench
    from graphopt.validate import Validation


def grid(columns: Sequence[str], rows: Iterable[Mapping[str, Any]], numeric: Iterable[str] = ()) -> Table:
    """Return rows as a plain table; `numeric` columns are right-aligned."""
    right = set(numeric)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        number = column in right
        table.add_column(
            column.replace("_", " "), justify="right" if number else "left", overflow="fold", no_wrap=number
        )
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    return table


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, Mapping):
        return " ".join(f"{key}[{_cell(inner)}]" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ",".join("?" if v is None else str(v) for v in value)
    return str(value)


def lines(texts: Iterable[str], style: str = "") -> list[RenderableType]:
    """Return sentences that fold instead of being cut."""
    return [Text(text, style=style, overflow="fold") for text in texts]


_OUTPUT_COLUMNS = (
    "output",
    "optimization",
    "ok",
    "relative",
    "tolerance",
    "max_abs",
    "cosine",
    "sqnr_db",
    "top1",
    "mismatch",
    "worst_sample",
)
_TIMING_COLUMNS = ("model", "median", "p90", "p99", "load", "peak memory")


def validation(result: Validation) -> Group:
    """Return what a comparison found."""
    parts: list[RenderableType] = [grid(_OUTPUT_COLUMNS, result.table(), _OUTPUT_COLUMNS[3:])]
    if result.evaluation is not None:
        found = result.evaluation.to_dict()
        parts.append(grid(list(found), [found], list(found)))
    parts += lines(
        f"model {name} ran on: " + ", ".join(f"{p} ({n} nodes)" for p, n in ran.items())
        for name, ran in result.providers.items()
    )
    parts += lines(result.notes)
    parts += lines([f"compared on {result.samples}" + (": made up, not real data" if result.random else "")])
    parts += lines((f"✗ {failure}" for failure in result.failures), "red")
    if result.location is not None:
        where = result.location
        inside = f" inside {' / '.join(where.path)}" if where.path else ""
        begins = f"begins at node '{where.node}' ({where.op}){inside}, tensor '{where.tensor}', error {where.error:.1e}"
        parts += lines([begins, *([where.what] if where.what else [])])
    verdict = "the models agree" if result.ok else "the models do NOT agree"
    if result.ok and not any(row["tolerance"] is not None for row in result.rows) and result.evaluation is not None:
        verdict = "the task's score is kept; the outputs themselves were not gated"
    parts += lines([verdict], "green" if result.ok else "red")
    return Group(*parts)


def milliseconds(value: float) -> str:
    """Return a time in ms with three digits."""
    return f"{value:.3g} ms" if value < 1000 else f"{value:.0f} ms"


def bench(result: Bench) -> Group:
    """Return a paired timing."""
    rows = [
        {
            "model": one["name"],
            **{name: milliseconds(one[f"{name}_ms"]) for name in ("median", "p90", "p99", "load")},
            "peak memory": human_bytes(one["peak_bytes"]) if one["peak_bytes"] is not None else None,
        }
        for one in (result.a.to_dict(), result.b.to_dict())
    ]
    columns = [c for c in _TIMING_COLUMNS if c != "peak memory" or any(row[c] for row in rows)]
    low, high = result.interval
    conditions = result.environment
    verdict = [
        f"B takes {result.ratio:.3f} of A's time (95 % interval {low:.3f}–{high:.3f}, {result.paired.pairs} pairs)",
        f"on {result.samples}; {conditions.get('threads', 1)} thread(s), {conditions.get('provider', 'cpu')}",
    ]
    clock, wall = result.paired.conditions["clock"], result.wall
    verdict.append(f"the ratio is by {CLOCKS[clock]}; by wall time {wall.median:.3f} ({wall.low:.3f}–{wall.high:.3f})")
    return Group(grid(columns, rows, columns[1:]), *lines(verdict))


def demonstration(result: Demonstration, output: Path | None) -> Group:
    """Return the demo's run and its two accuracies."""
    before, after = result.accuracy_before, result.accuracy_after
    scores = f"held-out accuracy on {result.images} images: {before:.1%} before, {after:.1%} after"
    written = f"wrote {output}" if output else "graphopt demo -o digits.fast.onnx writes the result"
    return Group(*lines([f"model {result.model}"]), render(result.optimized.report), *lines([scores, written]))


SHOWN_NODES = 20
"""Slowest nodes shown; JSON has all."""


def per_node(result: Profile, name: str) -> Group:
    """Return where a model's time goes: by operator, then its slowest nodes."""
    ops = [
        {
            **row,
            "op": row["op"] + (" (added by ORT)" if row["added"] else ""),
            "ms": f"{row['ms']:.3f}",
            "share": f"{row['share']:.1%}",
        }
        for row in result.by_op()
    ]
    nodes = [
        {
            **row,
            "runs as": row["kernel"] + (f" + {len(row['fused'])} more" if row["fused"] else ""),
            "ms": f"{row['ms']:.3f}",
            "share": f"{row['share']:.1%}",
        }
        for row in result.table()[:SHOWN_NODES]
    ]
    outside = f"{result.outside * 1e3:.3g} ms outside nodes"
    head = f"{name}: {result.seconds * 1e3:.3g} ms a run while profiled ({result.runs} runs), {outside}"
    more = len(result.nodes) - len(nodes)
    return Group(
        *lines([head], "bold"),
        grid(("op", "nodes", "ms", "share"), ops, ("nodes", "ms", "share")),
        Text(),
        grid(("name", "op", "runs as", "ms", "share"), nodes, ("ms", "share")),
        *lines([f"and {more} faster nodes (--json has all)"] if more > 0 else []),
    )


def inspection(found: Inspection, *, nodes: bool = True) -> Group:
    """Return what is in a model."""
    unknown = sum(found.unknown_macs.values())
    size = f", file {human_bytes(found.file_bytes)}" if found.file_bytes is not None else ""
    at = ", ".join(f"{name}=[{','.join(map(str, shape))}]" for name, shape in found.at.items())
    by_dtype = ", ".join(f"{dtype} {human_bytes(count)}" for dtype, count in found.weights.bytes_by_dtype.items())
    producer = found.producer or "producer unknown"
    constants = f" ({found.ops['Constant']} of them Constant)" if "Constant" in found.ops else ""
    texts = [
        f"{found.name}: IR {found.ir_version}, opsets {_opsets(found.opsets)}, {producer}{size}",
        *(f"input   {spec}" for spec in found.inputs),
        *(f"input   {spec} (has a default)" for spec in found.optional_inputs),
        *(f"output  {spec}" for spec in found.outputs),
        *(f"dynamic {symbol}: {', '.join(places)}" for symbol, places in found.dynamic.items()),
        f"{found.nodes} nodes{constants}, {found.subgraphs} subgraphs, {len(found.functions)} functions; "
        f"{found.weights.parameters:,} parameters in {found.weights.tensors} tensors, "
        f"{human_bytes(found.weights.bytes)} ({by_dtype or 'none'})",
        f"{found.macs:,} MACs"
        + (f" and {unknown} nodes of unknown cost" if unknown else "")
        + (f" at {at}" if at else ""),
        "operators: " + ", ".join(f"{op} {count}" for op, count in found.ops.items()),
        *found.notes,
    ]
    parts = lines(texts)
    if nodes:
        columns: tuple[str, ...] = ("name", "op", "graph", "outputs", "parameters", "macs", "bytes")
        rows = [{**row.to_dict(), "outputs": " ".join(_cell(s) or "scalar" for s in row.outputs)} for row in found.rows]
        if not any(row["graph"] for row in rows):
            columns = tuple(c for c in columns if c != "graph")
        parts += [Text(), grid(columns, rows, ("parameters", "macs", "bytes"))]
    return Group(*parts)


def _opsets(opsets: Mapping[str, int]) -> str:
    return ", ".join(f"{domain or 'onnx'} {version}" for domain, version in opsets.items())
