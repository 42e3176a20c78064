"""An `Explanation` for a terminal: a summary, then tables that fit on a page; all rows where all are asked for."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from graphopt.dry_run import by_step
from graphopt.explain import Explanation, MoveRow, NodeRow
from graphopt.tables import grid, lines, milliseconds

OPS, MOVES, LAYERS, FLOATS, SLOWEST, CHANGES, MISSES = 10, 5, 8, 5, 6, 6, 6
"""Rows of each table where not all are shown."""

UNPLACED = 0.005
"""Share of the time that may be left out without a word."""

NAMED = 2
"""Nodes named in one row."""

WIDE = 44
"""Characters of a name, a longer one loses its middle."""


def explanation(found: Explanation, *, everything: bool = False) -> Group:
    """Return what ORT makes of a model, in about sixty lines, or with every row."""
    parts: list[RenderableType] = [*lines(_head(found), "bold"), *lines(_summary(found))]
    if not found.readable:
        parts += lines(["this provider's graph cannot be read: what became of the nodes is unknown"], "yellow")
    parts += _operators(found, everything)
    parts += _layout(found, everything)
    parts += _layers(found, everything)
    parts += _floats(found, everything)
    parts += _nodes(found, everything)
    parts += _changes(found, everything)
    parts += _misses(found, everything)
    return Group(*parts)


def _head(found: Explanation) -> list[str]:
    machine = found.environment
    threads = machine.get("threads", 1)
    version = machine.get("packages", {}).get("onnxruntime", "")
    at = ", ".join(f"{name} {'x'.join(map(str, shape)) or 'scalar'}" for name, shape in found.at.items())
    run = f"{milliseconds(found.seconds * 1e3)} a run while profiled, on {found.samples}" + (f": {at}" if at else "")
    on = f"{machine.get('provider', 'cpu')}, {threads} thread{'s' if threads != 1 else ''}"
    return [f"{Path(found.model).name} in ONNX Runtime {version}, {on}: {run}"]


def _summary(found: Explanation) -> list[str]:
    kinds = ", ".join(f"{count} {kind}" for kind, count in found.fates.items())
    top = ", ".join(f"{op} {_percent(share)}" for op, share in list(found.by_op().items())[:5])
    texts = [
        f"nodes   {len(found.nodes)} in the model, {sum(found.ops_after.values())} in ONNX Runtime: {kinds}"
        + (f"; {len(found.moves)} added" if found.moves else ""),
        f"time    {top}" + (f"; {_percent(found.unplaced)} could not be placed" if found.unplaced > UNPLACED else ""),
        *_layout_line(found),
    ]
    macs = found.macs
    total = sum(macs.values())
    if total:
        texts.append(f"MACs    {_count(total)} in kernels: {_percent(macs['integer'] / total)} integer, "
                     f"{_percent(macs['float'] / total)} float")  # fmt: skip
    return [*texts, *_promise(found)]


def _layout_line(found: Explanation) -> list[str]:
    if not found.blocked_kernels:
        return ["layout  no kernel runs in the blocked layout (NCHWc)"] if found.readable else []
    count, share = found.reorders
    kernels = sum(found.ops_after.values())
    moved = f"{count} reorder{'s' if count != 1 else ''} in and out of it take {_percent(share)}"
    outside = f"elementwise kernels outside it {_percent(found.elementwise_outside or 0.0)}"
    return [f"layout  {found.blocked_kernels} of {kernels} kernels in the blocked layout (NCHWc); {moved}, {outside}"]


def _promise(found: Explanation) -> list[str]:
    """Return what graphopt would do about it."""
    run = found.dry_run
    if not run.changes:
        return ["graphopt would change nothing"]
    result = run.result
    reorders, _ = found.reorders
    texts = [f"nodes {run.before.nodes} → {run.after.nodes}"]
    if result.kernels is not None:
        texts.append(f"kernels {sum(found.ops_after.values())} → {result.kernels}")
    if result.reorders or (reorders and result.reorders is not None):
        texts.append(f"reorders {reorders} → {result.reorders}")
    if result.timing is not None:
        low, high = result.timing["interval"]
        texts.append(f"latency × {result.timing['ratio']:.2f} (95 % interval {low:.2f}–{high:.2f}, briefly timed)")
    return [f"graphopt would make {len(run.changes)} changes: {', '.join(texts)}"]


def _operators(found: Explanation, everything: bool) -> list[RenderableType]:
    """Return one row per operator: counts before and after, time, and what became of its nodes."""
    shares = found.by_op()
    became: dict[str, Counter[str]] = defaultdict(Counter)
    for row in found.nodes:
        became[row.op][_short(row)] += 1
    for move in found.moves:
        became[move.op]["added"] += 1
    ops = sorted(
        {*found.ops_before, *found.ops_after}, key=lambda op: (-shares.get(op, 0.0), -found.ops_before.get(op, 0), op)
    )
    rows = [
        {
            "operator": op, "model": found.ops_before.get(op) or "", "ORT": found.ops_after.get(op) or "",
            "time": _percent(shares[op]) if op in shares else "",
            "became": ", ".join(f"{count} {text}" for text, count in became[op].most_common(None if everything else 4)),
        }
        for op in ops
        if everything or became[op]
    ]  # fmt: skip
    columns = ("operator", "model", "ORT", "time", "became")
    return _section("operators", columns, rows, OPS, everything, numeric=columns[1:4])


def _short(row: NodeRow) -> str:
    """Return a node's fate in two or three words."""
    blocked = " blocked" if row.blocked else ""
    if row.fate == "kept":
        return f"kept{blocked}"
    if row.fate in ("fused", "rewritten"):
        return f"{'as' if row.seconds is not None or row.fate == 'rewritten' else 'into'} {row.kernel}{blocked}"
    return row.fate


def _layout(found: Explanation, everything: bool) -> list[RenderableType]:
    groups: dict[tuple[str, str, str], list[MoveRow]] = defaultdict(list)
    for move in found.moves:
        groups[move.op, move.forced_op, re.sub(r" '[^']*'", "", move.why)].append(move)
    rows = [
        {
            "added": f"{len(members)} {op}", "time": _percent(sum(m.share for m in members)),
            "because of": ": ".join(filter(None, [forced or "?", why])),
            "such as": _names([m.node or m.name for m in members], everything),
        }
        for (op, forced, why), members in sorted(groups.items(), key=lambda g: -sum(m.share for m in g[1]))
    ]  # fmt: skip
    return _section("added between kernels", ("added", "time", "because of", "such as"), rows, MOVES, everything)


def _layers(found: Explanation, everything: bool) -> list[RenderableType]:
    """Return which layers run on integers, which in float and why, where a model has any of the former or means to."""
    total = sum(found.macs.values())
    if not total or not (found.macs["integer"] or found.floats):
        return []
    whys = {row.name: row.why for row in found.floats}
    groups: dict[tuple[str, str, str], list[NodeRow]] = defaultdict(list)
    for row in found.nodes:
        if row.kernel and row.macs:
            groups[row.op, row.arithmetic or "other", _because(row, whys)].append(row)
    rows = [
        {
            "layers": f"{len(members)} {op}", "arithmetic": arithmetic,
            "MACs": _percent(sum(m.macs or 0 for m in members) / total),
            "time": _percent(sum(m.share or 0.0 for m in members)), "because": why,
            "such as": _names([m.name for m in members], everything),
        }
        for (op, arithmetic, why), members in sorted(groups.items(), key=lambda g: -sum(m.macs or 0 for m in g[1]))
    ]  # fmt: skip
    columns = ("layers", "arithmetic", "MACs", "time", "because", "such as")
    return _section("layers by arithmetic", columns, rows, LAYERS, everything, numeric=("MACs",))


def _because(row: NodeRow, whys: dict[str, str]) -> str:
    """Return why a layer runs on integers or in float, other nodes' names left out."""
    if row.arithmetic == "integer":
        return f"runs as {row.kernel}"
    return re.sub(r" '[^']*'", "", whys[row.name]) if row.name in whys else "not quantized: nothing it reads has a code"


def _floats(found: Explanation, everything: bool) -> list[RenderableType]:
    groups: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for row in found.floats:
        groups[row.op, re.sub(r" '[^']*'", "", row.why)].append(row)
    rows = [
        {
            "float": f"{len(members)} {op}", "time": _percent(sum(m.share or 0.0 for m in members)),
            "because": members[0].why if len(members) == 1 else why,
            "such as": _names([m.name for m in members], everything),
        }
        for (op, why), members in sorted(groups.items(), key=lambda g: -sum(m.share or 0.0 for m in g[1]))
    ]  # fmt: skip
    return _section("float inside Q/DQ", ("float", "time", "because", "such as"), rows, FLOATS, everything)


def _nodes(found: Explanation, everything: bool) -> list[RenderableType]:
    rows = found.nodes if everything else sorted(found.nodes, key=lambda row: -(row.share or 0.0))[:SLOWEST]
    shown = [
        {
            "node": row.name if everything else _cut(row.name), "op": row.op,
            "time": "" if row.share is None else _percent(row.share),
            "provider": (row.provider or "did not run").removesuffix("ExecutionProvider"),
            "became": row.how + (f" (level {row.level})" if row.level and everything else ""),
        }
        for row in rows
    ]  # fmt: skip
    several = len({row.provider for row in found.nodes if row.provider}) > 1 or everything
    columns = ("node", "op", "time", *(("provider",) if several else ()), "became")
    return _section("nodes" if everything else "slowest nodes", columns, shown, len(shown), everything)


def _changes(found: Explanation, everything: bool) -> list[RenderableType]:
    run = found.dry_run
    parts: list[RenderableType] = []
    if run.changes:
        counts = ", ".join(f"{step} {count}" for step, count in by_step(run.changes).items())
        rows = [
            {
                "pass": g.step,
                "changes": g.count,
                "what": re.sub(r"\s+", " ", g.what),
                "such as": _names(g.places, everything),
            }
            for g in run.changed()
        ]
        parts += _section(
            f"graphopt would change: {counts}", ("pass", "changes", "what", "such as"), rows, CHANGES, everything,
            numeric=("changes",),
        )  # fmt: skip
    failures = [f"! {step} would be rolled back: {why}" for step, why in run.failures.items()]
    failures += [f"! the result as a whole would be refused: {run.result.refused}"] if run.result.refused else []
    return parts + lines(failures, "red")


def _misses(found: Explanation, everything: bool) -> list[RenderableType]:
    rows = [
        {
            "pass": g.step, "sites": g.count, "what": _briefly(g.what, everything),
            "blocked by": g.example if g.count == 1 else g.why, "such as": _names(g.places, everything),
        }
        for g in found.dry_run.missed()
    ]  # fmt: skip
    columns = ("pass", "sites", "what", "blocked by", "such as")
    return _section("near misses", columns, rows, MISSES, everything, numeric=("sites",))


def _briefly(what: str, everything: bool) -> str:
    """Return a rule by its name, where not all is shown with its algebra."""
    return re.sub(r"\s+", " ", what) if everything else re.sub(r"^(\w+): .*", r"\1", what, flags=re.DOTALL)


def _section(
    title: str, columns: Sequence[str], rows: Sequence[dict[str, Any]], most: int, everything: bool,
    numeric: Iterable[str] = (),
) -> list[RenderableType]:  # fmt: skip
    """Return a titled table, nothing where there are no rows."""
    if not rows:
        return []
    shown = rows if everything else rows[:most]
    more = len(rows) - len(shown)
    left = lines([f"and {more} more (--all, --json)"] if more else [])
    return [Text(), *lines([title], "bold"), grid(columns, shown, {*numeric, "time"} & {*columns}), *left]


def _names(names: Sequence[str], everything: bool) -> str:
    distinct = list(dict.fromkeys(names))
    shown = distinct if everything else distinct[:NAMED]
    more = f" +{len(distinct) - len(shown)}" if len(distinct) > len(shown) else ""
    return ", ".join(name if everything else _cut(name) for name in shown) + more


def _cut(name: str) -> str:
    half = (WIDE - 1) // 2
    return name if len(name) <= WIDE else f"{name[:half]}…{name[-half:]}"


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _count(number: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)
