"""A model -> what ONNX Runtime (ORT) makes of it, where the time goes, and what graphopt would and would not change.

One profiled session gives the graph that ORT runs and the time of every kernel; two more, at lower optimisation
levels, tell at which level a node was changed.  `fate.py`, `layout.py` and `analysis/quantized.py` put it in words.
A dry run of the default pipeline lists the changes it makes and the near misses of its passes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.analysis.cost import Sizes, costs
from graphopt.analysis.quantized import is_wrapped, why_float
from graphopt.analysis.shapes import Shapes
from graphopt.data import load_samples
from graphopt.dry_run import DryRun, dry_run
from graphopt.errors import GraphoptError
from graphopt.fate import Fate, blocked_kernels, fates
from graphopt.inspect import operator, sizes_of
from graphopt.kernels import ELEMENTWISE, REORDERS, is_integer
from graphopt.layout import moves
from graphopt.model import Model, Source, load
from graphopt.ops import is_standard
from graphopt.profile import Profiled, optimized_graph, profiled
from graphopt.runtime import Optimization
from graphopt.samples import Samples
from graphopt.trace import Trace

LOWER_LEVELS: tuple[Optimization, ...] = ("basic", "extended")
"""ORT's optimisation levels before `all`."""


@dataclass(frozen=True)
class NodeRow:
    """One node of the model, Constant nodes left out.

    Attributes:
        name: of the node; unnamed ones: operator and first output.
        op: its operator, with its domain where that is not the standard one.
        fate, how: kind and words of its `Fate`.
        kernel: operators that ORT runs for it, empty where none does.
        level: ORT's optimisation level that changed it, None where none did or none can be told.
        blocked: whether it runs in ORT's blocked layout.
        arithmetic: `integer`, `float`, or None for what computes neither (shapes, booleans, nothing at all).
        provider: that ran its kernel, None where none ran on these samples.
        macs: multiply-accumulates, None where unknown.
        seconds, share: time of the kernels that are there for it, per run, and of all kernels; None where its time
            is within another node's.
    """

    name: str
    op: str
    fate: str
    how: str
    kernel: str
    level: str | None
    blocked: bool
    arithmetic: str | None
    provider: str | None
    macs: int | None
    seconds: float | None
    share: float | None


@dataclass(frozen=True)
class MoveRow:
    """A node that ORT added between kernels: the node that forces it, why, and its time."""

    name: str
    op: str
    node: str | None
    forced_op: str
    why: str
    provider: str | None
    seconds: float
    share: float


@dataclass(frozen=True)
class FloatRow:
    """A node that runs in float although it computes on dequantized values."""

    name: str
    op: str
    why: str
    macs: int | None
    share: float | None


@dataclass(frozen=True)
class Explanation:
    """What ORT makes of a model.

    Attributes:
        model: its file, or `<memory>`.
        samples: what was run.
        at: input -> shape in the first sample (tensors only).
        seconds: one run while profiled, of which `kernel_seconds` inside kernels.
        readable: whether ORT could write its graph (not for providers that compile, nor above 2 GB): else all fates
            are unknown or guessed from names.
        ops_before, ops_after: operator -> nodes, of the model (Constant left out) and of ORT's graph.
        blocked_kernels: kernels in the blocked layout, reorders left out.
        elementwise_outside: share of time in elementwise kernels outside the blocked layout, None where there is none.
        nodes, moves, floats: in the model's order, in ORT's order, in the model's order.
        dry_run: what graphopt would do.
    """

    model: str
    samples: str
    at: dict[str, tuple[int, ...]]
    seconds: float
    kernel_seconds: float
    readable: bool
    ops_before: dict[str, int]
    ops_after: dict[str, int]
    blocked_kernels: int
    elementwise_outside: float | None
    nodes: tuple[NodeRow, ...]
    moves: tuple[MoveRow, ...]
    floats: tuple[FloatRow, ...]
    dry_run: DryRun
    environment: dict[str, Any]

    @property
    def fates(self) -> dict[str, int]:
        """Fate -> nodes."""
        return dict(Counter(row.fate for row in self.nodes).most_common())

    @property
    def macs(self) -> dict[str, int]:
        """Known MACs of kernels that ran in integer and in float arithmetic."""
        found = {"integer": 0, "float": 0}
        for row in self.nodes:
            if row.kernel and row.macs:
                found["integer" if row.arithmetic == "integer" else "float"] += row.macs
        return found

    @property
    def reorders(self) -> tuple[int, float]:
        """How many reorders in and out of the blocked layout, and their share of the time."""
        rows = [row for row in self.moves if row.op in REORDERS]
        return len(rows), sum(row.share for row in rows)

    def by_op(self) -> dict[str, float]:
        """Return operator -> share of the time of its nodes, what ORT added under its own, the largest first."""
        found: dict[str, float] = defaultdict(float)
        rows: list[NodeRow | MoveRow] = [*self.nodes, *self.moves]
        for row in rows:
            found[row.op] += row.share or 0.0
        return dict(sorted(((op, share) for op, share in found.items() if share), key=lambda pair: -pair[1]))

    @property
    def unplaced(self) -> float:
        """Share of the time in kernels of which nothing tells what they are for."""
        return max(0.0, 1.0 - sum(self.by_op().values())) if self.kernel_seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        reorders, reorder_share = self.reorders
        return {
            "model": self.model, "samples": self.samples,
            "at": {k: list(shape) for k, shape in self.at.items()}, "ms": self.seconds * 1e3,
            "kernel_ms": self.kernel_seconds * 1e3, "readable": self.readable,
            "summary": {
                "nodes": len(self.nodes), "kernels": sum(self.ops_after.values()), "fates": self.fates,
                "time": self.by_op(), "unplaced": self.unplaced,
                "blocked_kernels": self.blocked_kernels, "reorders": reorders, "reorder_share": reorder_share,
                "elementwise_outside_blocked": self.elementwise_outside,
                "macs": self.macs,
            },
            "ops": [
                {"op": op, "before": self.ops_before.get(op, 0), "after": self.ops_after.get(op, 0)}
                for op in sorted({*self.ops_before, *self.ops_after})
            ],
            "nodes": [asdict(row) for row in self.nodes],
            "layout_changes": [asdict(row) for row in self.moves],
            "float_inside_qdq": [asdict(row) for row in self.floats],
            "graphopt": self.dry_run.to_dict(),
            "environment": self.environment,
        }  # fmt: skip


def explain(
    model: Source,
    *,
    data: Any = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    batch: int = 1,
    threads: int = 1,
    provider: str = "cpu",
    measure: bool = True,
    seed: int = 0,
) -> Explanation:
    """Return what ORT makes of a model, and what graphopt would change; the model is left untouched.

    Args:
        model: a path, `Model` or `ModelProto`.
        data: samples as in `load_samples`; None makes random ones.
        shapes: shapes of inputs by name, for random feeds.
        batch: how many rows of `.npz` samples make a feed.
        threads: ORT's intra-op threads.
        provider: short name of the execution provider.
        measure: time what graphopt makes of the model against the model.
        seed: of random feeds.

    Raises:
        ModelError: not a usable model, or ORT refuses it.
        DataError: the samples do not fit.
        ProviderError: the provider is missing.
    """
    loaded = load(model)
    samples = load_samples(data, loaded, batch=batch, seed=seed, shapes=shapes)
    found = profiled(loaded, samples, threads=threads, provider=provider, seed=seed)
    account = _Account(loaded, found, _sizes(loaded, samples, seed), provider)
    profile = found.profile
    kernels = [k.node.op_type for k in found.matches.kernels] or [time.op for time in found.times]
    blocked = blocked_kernels(found.matches.kernels)
    return Explanation(
        model=str(loaded.path or "<memory>"), samples=profile.samples,
        at={name: value.shape for name, value in samples.first().items() if isinstance(value, np.ndarray)},
        seconds=profile.seconds, kernel_seconds=account.total, readable=found.optimized is not None,
        ops_before=dict(Counter(operator(n) for n in loaded.nodes() if not is_standard(n, "Constant")).most_common()),
        ops_after=dict(Counter(kernels).most_common()),
        blocked_kernels=len(blocked),
        elementwise_outside=account.elementwise_outside(blocked) if blocked else None,
        nodes=tuple(account.nodes()), moves=tuple(account.moves()), floats=tuple(account.floats()),
        dry_run=dry_run(loaded, samples, threads=threads, provider=provider, seed=seed, measure=measure),
        environment=profile.environment,
    )  # fmt: skip


def _sizes(model: Model, samples: Samples, seed: int) -> Sizes:
    try:
        return sizes_of(model, None, samples, seed)[0]
    except GraphoptError:  # runs optimised, but not as it stands: what inference says must do
        return Sizes(Shapes(model))


class _Account:
    """Puts kernels, times and fates on the model's nodes."""

    def __init__(self, model: Model, found: Profiled, sizes: Sizes, provider: str) -> None:
        self.found, self.sizes = found, sizes
        self.originals: list[gs.Node] = list(model.nodes())
        self.trace = found.trace
        self.cost = costs(model, sizes)
        self.total = sum(time.seconds for time in found.times)
        self.fates = self._fates(found.optimized)
        self.levels = self._levels(model, provider) if found.optimized is not None else {}
        self.seconds: dict[int, float] = defaultdict(float)
        self.providers: dict[int, str] = {}
        self.of_kernel: dict[int, tuple[float, str]] = {}
        for time in found.times:
            if time.kernel is not None:
                self.of_kernel[time.kernel] = (time.seconds, time.provider)
                covered: Sequence[int] = found.matches.kernels[time.kernel].stands
            else:
                covered = self.trace.by_name(time.name)
            self.providers.update(dict.fromkeys(covered, time.provider))
            lead = self.trace.lead(covered, time.op)
            if lead is not None:
                self.seconds[lead] += time.seconds

    def _share(self, seconds: float) -> float:
        return seconds / self.total if self.total else 0.0

    def _fates(self, optimized: onnx.ModelProto | None) -> list[Fate]:
        if optimized is not None:
            return fates(self.trace, self.found.matches, optimized, self.originals, self.sizes)
        ran = {i: time.op for time in self.found.times for i in self.trace.by_name(time.name)}
        return [
            Fate("kept", "runs under its name", ran[i]) if ran.get(i) == node.op
            else Fate("unknown", "this provider's graph cannot be read", ran.get(i, ""))
            for i, node in enumerate(self.trace.nodes)
        ]  # fmt: skip

    def _levels(self, model: Model, provider: str) -> dict[int, str]:
        """Return at which of ORT's levels each node that did not stay as it was was changed."""
        changed = {i for i, fate in enumerate(self.fates) if fate.kind != "kept"}
        found = dict.fromkeys(changed, "all")
        for level in reversed(LOWER_LEVELS):
            copy = load(model)
            trace = Trace(copy)
            optimized = optimized_graph(copy, provider=provider, level=level)
            if optimized is None:
                continue
            judged = fates(trace, trace.match(optimized), optimized, self.originals, self.sizes)
            found.update((i, level) for i in changed if judged[i].kind not in ("kept", "unknown"))
        return found

    def nodes(self) -> list[NodeRow]:
        """Return a row per node."""
        rows = []
        for i, (node, fate) in enumerate(zip(self.originals, self.fates, strict=True)):
            if is_standard(node, "Constant"):
                continue
            seconds = self.seconds.get(i)
            rows.append(
                NodeRow(
                    self.trace.labels[i], operator(node), fate.kind, fate.how, fate.kernel, self.levels.get(i),
                    fate.blocked, self._arithmetic(node, fate), self.providers.get(i), self.cost.of(node).macs, seconds,
                    None if seconds is None else self._share(seconds),
                )
            )  # fmt: skip
        return rows

    def _arithmetic(self, node: gs.Node, fate: Fate) -> str | None:
        if not fate.kernel:
            return None
        if any(is_integer(op) for op in fate.kernel.split(" + ")):
            return "integer"
        kinds = [self.sizes.dtype(t) for t in (*node.outputs, *node.inputs)]
        return "float" if any(kind is not None and kind.kind in "fV" for kind in kinds) else None

    def moves(self) -> list[MoveRow]:
        """Return a row per node that ORT added."""
        if self.found.optimized is None:
            return []
        rows = []
        for move in moves(self.trace, self.found.matches, self.found.optimized):
            seconds, provider = self.of_kernel.get(move.kernel, (0.0, None))
            rows.append(
                MoveRow(
                    move.name, move.op, move.node, move.forced_op, move.why, provider, seconds, self._share(seconds)
                )
            )
        return rows

    def floats(self) -> list[FloatRow]:
        """Return a row per node that computes on dequantized values in float."""
        last: dict[int, int] = {}
        for kernel in self.found.matches.kernels:
            last.update(dict.fromkeys(kernel.stands, max(kernel.stands, default=0)))
        rows = []
        for i, (node, fate) in enumerate(zip(self.originals, self.fates, strict=True)):
            if not fate.kernel or not is_wrapped(node) or self._arithmetic(node, fate) != "float":
                continue
            why = why_float(node, self.originals[last.get(i, i)])
            seconds = self.seconds.get(i)
            share = None if seconds is None else self._share(seconds)
            rows.append(FloatRow(self.trace.labels[i], operator(node), why, self.cost.of(node).macs, share))
        return rows

    def elementwise_outside(self, blocked: set[int]) -> float:
        """Return the share of time in elementwise kernels outside the blocked layout."""
        times = [t for t in self.found.times if t.kernel not in blocked and t.op in ELEMENTWISE]
        return self._share(sum(t.seconds for t in times))
