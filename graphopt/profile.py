"""Where the time goes: ORT's profile, put back on the model's own nodes.

ORT runs other nodes than the file holds: it fuses, moves into its blocked layout, adds reorders.  What it made is
matched by tensors.  A node of the optimised graph still makes some tensor of the original one; walking back from
that tensor, up to tensors that other optimised nodes make, gives the original nodes that it stands for.
"""

from __future__ import annotations

import bisect
import itertools
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnx_graphsurgeon as gs

from graphopt import environment
from graphopt.analysis.cost import Observation
from graphopt.data import Spec, load_samples
from graphopt.errors import DataError
from graphopt.model import INLINE_LIMIT, Model, Source, load
from graphopt.runtime import Feeds, Session

_MAX_EVENTS = 500_000
"""ORT drops events beyond a million."""

_SUFFIX = "_kernel_time"


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
                "nodes": len(group),
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
    custom_ops: Sequence[Path] = (),
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
        custom_ops: libraries of custom operators to load.

    Raises:
        ModelError: ORT refuses the model.
        DataError: the feeds do not fit.
        ProviderError: the provider is missing.
    """
    copy = load(model)
    loaded = load_samples(samples, copy, seed=seed)
    feeds = list(itertools.islice(loaded, 1 if loaded.random else 16))
    if not feeds:
        raise DataError("there are no samples to profile on")
    original = _Original(copy)
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        # providers that compile whole subgraphs leave nothing that ORT could write
        readable = provider in _READABLE and copy.weight_bytes() <= INLINE_LIMIT
        path = Path(folder) / "optimized.onnx" if readable else None
        session = Session(
            copy, threads=threads, provider=provider, profile=True, custom_ops=custom_ops, optimized_path=path
        )
        optimized = None if path is None else onnx.load(path)
    runs = max(1, min(runs, _MAX_EVENTS // max(1, len(original.labels))))
    for number in range(warmup + runs):
        session.run(feeds[number % len(feeds)])
    kept, seconds, timed = _kernel_times(session.profile_events(), warmup, len(feeds))
    rows = _rows(timed, original, {} if optimized is None else original.match(optimized), kept)
    return Profile(
        tuple(rows), kept, seconds, loaded.description, environment.describe(threads=threads, provider=provider)
    )


def observe(model: Model, feed: Feeds, *, custom_ops: Sequence[Path] = ()) -> Observation:
    """Run the model once, as it stands (ORT's rewriting off), and return the shapes and calls seen.

    Raises:
        ModelError: ORT refuses the model.
        DataError: ORT rejects the feed.
    """
    copy = load(model)
    named = _Original(copy).named
    session = Session(copy, optimization="off", profile=True, custom_ops=custom_ops)
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


def _exclusive(events: list[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], float]]:
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


def _rows(
    timed: Mapping[str, _Kernel], original: _Original, matched: Mapping[str, list[int]], runs: int
) -> list[NodeTime]:
    total = sum(kernel.micros for kernel in timed.values()) or 1.0
    merged: dict[tuple[str, str], NodeTime] = {}
    for name, kernel in timed.items():
        covered = matched.get(name) or original.by_name(name)
        lead = original.lead(covered, kernel.op)
        label = name if lead is None else original.labels[lead]
        op = original.named_op(lead, kernel.op)
        fused = tuple(original.labels[i] for i in covered if i != lead)
        before = merged.get((label, kernel.op))
        merged[label, kernel.op] = NodeTime(
            label, op, kernel.op, fused or (before.fused if before else ()), lead is None, kernel.provider,
            kernel.calls / runs + (before.calls if before else 0.0),
            kernel.micros / 1e6 / runs + (before.seconds if before else 0.0),
            kernel.micros / total + (before.share if before else 0.0),
        )  # fmt: skip
    return sorted(merged.values(), key=lambda row: -row.seconds)


class _Original:
    """The nodes of a model, each under a name of its own that ORT's names can be traced back to.

    Renames nodes, and inner tensors of subgraphs and functions whose names are used twice, in the copy it is given.
    """

    def __init__(self, model: Model) -> None:
        self.nodes: list[gs.Node] = list(model.nodes())
        self.labels = [_label(node) for node in self.nodes]
        self.functions = sorted((f.name for f in model.functions), key=len, reverse=True)
        taken = Counter(node.name for node in self.nodes if node.name)
        self.named: dict[str, int] = {}
        for i, node in enumerate(self.nodes):
            if not node.name or taken[node.name] > 1:
                node.name = f"{node.name or node.op}/node_{i}"
            self.named[node.name] = i
        self.made = self._unique_tensors(model)

    def _unique_tensors(self, model: Model) -> dict[str, int]:
        made: dict[str, int] = {}
        kept = {id(t) for graph in (model.graph, *model.functions) for t in (*graph.inputs, *graph.outputs)}
        for i, node in enumerate(self.nodes):
            for tensor in node.outputs:
                if tensor.name in made and id(tensor) not in kept:
                    tensor.name = f"{tensor.name}/node_{i}"
                if tensor.name:
                    made.setdefault(tensor.name, i)
        return made

    def plain(self, name: str) -> str:
        """Return a name without what ORT puts before it when it inlines functions and branches."""
        name = re.sub(r"^.*_Inline_\d+__", "", name)
        stripped = True
        while stripped:
            stripped = False
            for function in self.functions:
                match = re.match(rf"_inlfunc_{re.escape(function)}(_token_\d+)?_", name)
                if match:
                    name, stripped = name[match.end() :], True
        return name

    def by_name(self, name: str) -> list[int]:
        """Return the node that ORT's name points to: its own name, or a tensor's followed by `_nchwc`."""
        if name in self.named:
            return [self.named[name]]
        plain = self.plain(name)
        tensor = plain.removesuffix("_nchwc")
        if plain in self.named:
            return [self.named[plain]]
        if tensor != plain and tensor in self.made:
            return [self.made[tensor]]
        parts = plain.split("/")
        heads = ("/".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))
        return next(([self.named[head]] for head in heads if head in self.named), [])

    def match(self, optimized: onnx.ModelProto) -> dict[str, list[int]]:
        """Return, for every node of the optimised graph, the original nodes that it stands for."""
        ran = list(_all_nodes(optimized.graph))
        ends = {node.name: self._ends(node) for node in ran}
        stops = {name for found in ends.values() for name in found}
        stops |= {i.name for i in optimized.graph.initializer}
        return {name: self._between(found, stops) for name, found in ends.items() if found}

    def _ends(self, node: onnx.NodeProto) -> list[str]:
        """Return the original tensors that an optimised node makes."""
        if node.domain == _BLOCKED:
            return [] if node.op_type in _MOVES else self._blocked_end(node)
        tensors = [name for name in map(self._tensor, node.output) if name is not None]
        # moved into the blocked layout as it was: its outputs have new names
        kept = next((self.named[n] for n in (node.name, self.plain(node.name)) if n in self.named), None)
        if tensors or kept is None or self.nodes[kept].op != node.op_type:
            return tensors
        return [t.name for t in self.nodes[kept].outputs if t.name]

    def _tensor(self, name: str) -> str | None:
        return next((n for n in (name, self.plain(name)) if n in self.made), None)

    def _blocked_end(self, node: onnx.NodeProto) -> list[str]:
        """Return the original tensor of a node in ORT's blocked layout, whose own outputs have other names.

        It is called after the tensor that it made before a sum and an activation moved into it.
        """
        # r7_nchwc, and r7_bn_nchwc, r7_mul_nchwc for what became a depthwise convolution
        names = (self._tensor(re.sub(pattern, "", node.name)) for pattern in ("_nchwc$", "_[a-z]+_nchwc$"))
        name = next((found for found in names if found is not None), None)
        if name is None:
            return []
        tensor = next(t for t in self.nodes[self.made[name]].outputs if t.name == name)
        activation = next((a.s.decode() for a in node.attribute if a.name == "activation"), "")
        if len(node.input) > 3 and node.input[3]:
            tensor = _only_result(tensor, "Add", "Sum")
        return [_only_result(tensor, activation).name] if activation else [tensor.name]

    def _between(self, ends: Sequence[str], stops: set[str]) -> list[int]:
        """Return the original nodes from `ends` back to `stops`."""
        found: dict[int, None] = {}
        stack = list(ends)
        while stack:
            tensor = stack.pop()
            i = self.made.get(tensor)
            if i is None or i in found or self.nodes[i].op == "Constant" or (tensor in stops and tensor not in ends):
                continue
            found[i] = None
            stack.extend(t.name for t in self.nodes[i].inputs if t.name and not isinstance(t, gs.Constant))
        return sorted(found)

    def lead(self, covered: Sequence[int], kernel: str) -> int | None:
        """Return the node that does the work among those in one kernel: the one that the kernel is named after."""
        same = [i for i in covered if self.nodes[i].op == kernel]
        alike = [i for i in covered if self.nodes[i].op in kernel]
        heavy = [i for i in covered if self.nodes[i].op in _HEAVY]
        return next(iter(same or heavy or alike or list(covered[-1:])), None)

    def named_op(self, lead: int | None, kernel: str) -> str:
        """Return the operator to count a kernel under: the original one, or ORT's where it made one of several."""
        if lead is None:
            return kernel
        op = str(self.nodes[lead].op)
        return op if op in _HEAVY or op in kernel else kernel


def _only_result(tensor: gs.Tensor, *ops: str) -> gs.Tensor:
    """Return what the only reader of `tensor` makes of it, if that is one of `ops`; else `tensor`."""
    readers = tensor.outputs
    return readers[0].outputs[0] if len(readers) == 1 and readers[0].op in ops else tensor


_READABLE = frozenset({"cpu", "cuda", "rocm"})
_BLOCKED = "com.microsoft.nchwc"
_MOVES = frozenset({"ReorderInput", "ReorderOutput"})
_HEAVY = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm", "Attention", "LSTM", "GRU", "RNN", "Einsum"})


def _label(node: gs.Node) -> str:
    return node.name or f"{node.op} -> {node.outputs[0].name if node.outputs else '?'}"


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    stack = [graph]
    while stack:
        for node in stack.pop().node:
            yield node
            stack.extend(a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH)
            stack.extend(g for a in node.attribute for g in a.graphs)
