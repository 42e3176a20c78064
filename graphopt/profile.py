"""Where the time goes: ORT's profile, put back on the model's own nodes.

What ORT runs is traced back to what the file holds by `trace.py`.  The same machinery reads off one run what
shapes and how many calls there were (`observe`).
"""

from __future__ import annotations

import bisect
import itertools
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from graphopt import environment
from graphopt.analysis.cost import Observation
from graphopt.data import Spec, load_samples
from graphopt.errors import DataError
from graphopt.model import INLINE_LIMIT, Model, Source, load
from graphopt.runtime import Feeds, Optimization, Session
from graphopt.trace import Matches, Trace

_MAX_EVENTS = 500_000
"""ORT drops events beyond a million."""

_SUFFIX = "_kernel_time"

_READABLE = frozenset({"cpu", "cuda", "rocm"})
"""Providers whose optimised graph ORT can write."""


@dataclass(frozen=True)
class NodeTime:
    """Time of one original node, or of one that ORT added.

    Attributes:
        name: of the original node (unnamed ones: operator and first output); ORT's name where `added`.
        op: its operator; where several were fused, that of the one which does the work.
        kernel: the operator that ORT runs.
        fused: names of further original nodes in the same kernel.
        added: ORT put it in; it stands for no node of the model.
        provider: the provider that ran it.
        calls: times it ran in one run of the model (inside loops, or in functions called often: more than one).
        seconds: per run of the model, without the nodes of its subgraphs.
        share: of the time of all nodes.
    """

    name: str
    op: str
    kernel: str
    fused: tuple[str, ...]
    added: bool
    provider: str
    calls: float
    seconds: float
    share: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; time in milliseconds."""
        return {
            "name": self.name, "op": self.op, "kernel": self.kernel, "fused": list(self.fused), "added": self.added,
            "provider": self.provider, "calls": self.calls, "ms": self.seconds * 1e3, "share": self.share,
        }  # fmt: skip


@dataclass(frozen=True)
class Profile:
    """Time per node, the slowest first.

    `seconds` is the mean time of a run with profiling on, `outside` the part of it that no node accounts for.
    """

    nodes: tuple[NodeTime, ...]
    runs: int
    seconds: float
    samples: str
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def outside(self) -> float:
        """Seconds per run spent outside nodes: feeding, fetching, profiling itself."""
        return max(0.0, self.seconds - sum(node.seconds for node in self.nodes))

    @property
    def providers(self) -> dict[str, int]:
        """How many nodes each provider ran."""
        return dict(Counter(node.provider for node in self.nodes))

    def by_op(self) -> list[dict[str, Any]]:
        """Return one row per operator, the slowest first; what ORT added is marked as such."""
        groups: dict[tuple[str, bool], list[NodeTime]] = defaultdict(list)
        for node in self.nodes:
            groups[node.op, node.added].append(node)
        rows = [
            {
                "op": op,
                "added": added,
                "nodes": len({n.name for n in group}),
                "ms": sum(n.seconds for n in group) * 1e3,
                "share": sum(n.share for n in group),
            }
            for (op, added), group in groups.items()
        ]
        return sorted(rows, key=lambda row: -float(row["ms"]))

    def table(self) -> list[dict[str, Any]]:
        """Return one row per node, for a terminal."""
        return [node.to_dict() for node in self.nodes]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "runs": self.runs,
            "ms": self.seconds * 1e3,
            "outside_ms": self.outside * 1e3,
            "samples": self.samples,
            "providers": self.providers,
            "by_op": self.by_op(),
            "nodes": self.table(),
            "environment": self.environment,
        }


def per_node(
    model: Source,
    samples: Spec = None,
    *,
    threads: int = 1,
    provider: str = "cpu",
    runs: int = 20,
    warmup: int = 3,
    seed: int = 0,
) -> Profile:
    """Return how long each node of the model takes in ORT with all optimisations.

    Args:
        model: what to profile; left untouched.
        samples: feeds in any form that `load_samples` takes, taken in turn; None makes one random feed.
        threads: ORT's intra-op threads.
        provider: short name of the execution provider.
        runs: profiled runs (fewer for models of very many nodes).
        warmup: runs before those, not counted.
        seed: of random feeds.

    Raises:
        ModelError: ORT refuses the model.
        DataError: the feeds do not fit.
        ProviderError: the provider is missing.
    """
    return profiled(
        model, samples, threads=threads, provider=provider, runs=runs, warmup=warmup, seed=seed
    ).profile  # fmt: skip


@dataclass(frozen=True)
class KernelTime:
    """What one node that ORT ran took in one run of the model, its subgraphs' nodes taken out.

    `kernel` is its place in `Matches.kernels`, None where ORT's graph could not be read.
    """

    name: str
    op: str
    provider: str
    calls: float
    seconds: float
    kernel: int | None


@dataclass(frozen=True)
class Profiled:
    """A profile with what it was read off.

    Attributes:
        profile: time per original node.
        trace: the model's nodes (of a copy, in the order of `Model.nodes`).
        matches: what ORT's nodes stand for; empty where `optimized` is None.
        optimized: the graph that ORT ran, None where it cannot be written (compiling providers, models over 2 GB).
        times: one per node that ran.
    """

    profile: Profile
    trace: Trace
    matches: Matches
    optimized: onnx.ModelProto | None
    times: tuple[KernelTime, ...]


def profiled(
    model: Source,
    samples: Spec = None,
    *,
    threads: int = 1,
    provider: str = "cpu",
    runs: int = 20,
    warmup: int = 3,
    seed: int = 0,
) -> Profiled:
    """Return how long each node takes (as `per_node` does), and the graph that ORT made of the model."""
    copy = load(model)
    loaded = load_samples(samples, copy, seed=seed)
    feeds = list(itertools.islice(loaded, 1 if loaded.random else 16))
    if not feeds:
        raise DataError("there are no samples to profile on")
    original = Trace(copy)
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        path = Path(folder) / "optimized.onnx" if is_readable(copy, provider) else None
        session = Session(copy, threads=threads, provider=provider, profile=True, optimized_path=path)
        optimized = None if path is None else onnx.load(path)
    runs = max(1, min(runs, _MAX_EVENTS // max(1, len(original.labels))))
    for number in range(warmup + runs):
        session.run(feeds[number % len(feeds)])
    kept, seconds, timed = _kernel_times(session.profile_events(), warmup, len(feeds))
    matches = Matches() if optimized is None else original.match(optimized)
    ran = matches.of({name: kernel.op for name, kernel in timed.items()})
    times = tuple(
        KernelTime(name, k.op, k.provider, k.calls / kept, k.micros / 1e6 / kept, ran.get(name))
        for name, k in timed.items()
    )
    profile = Profile(
        tuple(_rows(times, original, matches)), kept, seconds, loaded.description,
        environment.describe(threads=threads, provider=provider),
    )  # fmt: skip
    return Profiled(profile, original, matches, optimized, times)


def optimized_graph(model: Model, *, provider: str = "cpu", level: Optimization = "all") -> onnx.ModelProto | None:
    """Return the graph that ORT makes of a model at one of its optimisation levels, None where it cannot be written.

    Raises:
        ModelError: ORT refuses the model.
    """
    if not is_readable(model, provider):
        return None
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        path = Path(folder) / "optimized.onnx"
        Session(model, optimization=level, provider=provider, optimized_path=path)
        return onnx.load(path)


def is_readable(model: Model, provider: str) -> bool:
    """Tell whether ORT can write the graph it makes: providers that compile leave nothing, large ones are too large."""
    return provider in _READABLE and model.weight_bytes() <= INLINE_LIMIT


def observe(model: Model, feed: Feeds) -> Observation:
    """Run the model once, as it stands (ORT's rewriting off), and return the shapes and calls seen.

    Raises:
        ModelError: ORT refuses the model.
        DataError: ORT rejects the feed.
    """
    copy = load(model)
    named = Trace(copy).named
    session = Session(copy, optimization="off", profile=True)
    session.run(feed)
    own = list(model.nodes())
    shapes: dict[int, tuple[int, ...]] = {}
    calls: Counter[int] = Counter()
    for event in session.profile_events():
        index = named.get(event["name"].removesuffix(_SUFFIX)) if event["cat"] == "Node" else None
        if index is None:
            continue
        node = own[index]
        calls[id(node)] += 1
        made = [t for t in node.outputs if t.name]
        seen = event["args"].get("output_type_shape", [])
        if len(seen) == len(made):  # sequences and maps leave a gap
            shapes.update((id(t), tuple(next(iter(s.values())))) for t, s in zip(made, seen, strict=True))
    return Observation(shapes, dict(calls))


@dataclass
class _Kernel:
    """All events of one node that ORT ran."""

    op: str
    provider: str
    micros: float = 0.0
    calls: int = 0


def _kernel_times(events: Iterable[Mapping[str, Any]], skip: int, feeds: int) -> tuple[int, float, dict[str, _Kernel]]:
    """Return how many runs were kept, their mean seconds, and what each node took in them, inner nodes taken out.

    Kept is the faster half of the runs of each feed, the first `skip` runs left out: what else the machine did
    hits some runs and some node in them, and one such hit outweighs a fast node's own time.
    """
    events = list(events)
    runs = sorted((e for e in events if e["name"] == "model_run"), key=lambda e: float(e["ts"]))
    kept: set[int] = set()
    for feed in range(feeds):
        same = sorted(range(skip + (feed - skip) % feeds, len(runs), feeds), key=lambda i: float(runs[i]["dur"]))
        kept.update(same[: (len(same) + 1) // 2])
    begins = [run["ts"] for run in runs]
    kernels = [
        e for e in events
        if e["cat"] == "Node" and e["name"].endswith(_SUFFIX) and bisect.bisect_right(begins, e["ts"]) - 1 in kept
    ]  # fmt: skip
    found: dict[str, _Kernel] = {}
    for event, inner in _exclusive(kernels):
        arguments = event["args"]
        name = event["name"].removesuffix(_SUFFIX)
        kernel = found.setdefault(name, _Kernel(arguments.get("op_name", ""), arguments.get("provider", "")))
        kernel.micros += max(0.0, event["dur"] - inner)
        kernel.calls += 1
    return len(kept), sum(runs[i]["dur"] for i in kept) / 1e6 / max(1, len(kept)), found


def _exclusive(events: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], float]]:
    """Yield each event with the time that events nested directly inside it took."""
    by_thread: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        by_thread[event["tid"]].append(event)
    for row in by_thread.values():
        inner = [0.0] * len(row)
        # an outer event begins no later and lasts no shorter than what is inside it
        order = sorted(range(len(row)), key=lambda i: (row[i]["ts"], -row[i]["dur"], -i))
        stack: list[int] = []
        for i in order:
            while stack and row[stack[-1]]["ts"] + row[stack[-1]]["dur"] < row[i]["ts"] + row[i]["dur"]:
                stack.pop()
            if stack and row[stack[-1]]["ts"] + row[stack[-1]]["dur"] > row[i]["ts"]:
                inner[stack[-1]] += row[i]["dur"]
            stack.append(i)
        yield from zip(row, inner, strict=True)


def _rows(times: Sequence[KernelTime], original: Trace, matches: Matches) -> list[NodeTime]:
    total = sum(time.seconds for time in times) or 1.0
    merged: dict[tuple[str, str], NodeTime] = {}
    for time in times:
        covered: Sequence[int] = (
            original.by_name(time.name) if time.kernel is None else matches.kernels[time.kernel].stands
        )
        lead = original.lead(covered, time.op)
        label = time.name if lead is None else original.labels[lead]
        op = original.named_op(covered, time.op)
        fused = tuple(original.labels[i] for i in covered if i != lead)
        before = merged.get((label, time.op))
        merged[label, time.op] = NodeTime(
            label, op, time.op, fused or (before.fused if before else ()), lead is None, time.provider,
            time.calls + (before.calls if before else 0.0),
            time.seconds + (before.seconds if before else 0.0),
            time.seconds / total + (before.share if before else 0.0),
        )  # fmt: skip
    return sorted(merged.values(), key=lambda row: -row.seconds)
