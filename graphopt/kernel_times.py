"""Models timed side by side: seconds of whole runs, and of each kernel that ORT runs.

All models are loaded at once and run in laps, each once per lap, so that what else the machine does meets all of them
alike; the quietest laps count, the same ones for all.  Some rounds of fresh sessions, since where weights come to lie
in memory matters.  One session gives both: first it runs with profiling, then without.
"""

from __future__ import annotations

import bisect
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx

from graphopt.importer import paused_gc
from graphopt.model import Model, load
from graphopt.profile import is_readable
from graphopt.runtime import Feeds, Session
from graphopt.trace import Matches, Trace

Array: TypeAlias = npt.NDArray[np.float64]
Call: TypeAlias = Callable[[], object]

ROUNDS = 3
"""Times that each model is loaded anew."""

QUIET = 0.25
"""Part of the laps that counts."""

AT_ONCE = 2 << 30
"""Bytes of weights that are loaded at once; models beyond that are timed in several groups."""

_LEAST_LAPS, _MOST_LAPS = 3, 200
_PROFILED_LAPS = 60  # at most: reading an event takes longer than a small kernel

_VISIT = 0.004
"""Seconds that a visit to a model should last, its first run not counted."""

_SLOW = 0.03
"""Seconds from which on what caches hold makes no difference."""


@dataclass
class Subject:
    """A model to time, and what was found.

    Attributes:
        model: in the form that runs.
        int8: its layers in int8.
        seconds: per run, the mean over feeds.
        kernels: seconds per run by the name in ORT's profile; nodes of inner graphs are there too.
        ops: their operators.
        matches: what ORT's nodes stand for; None where its graph cannot be read.
        optimized: that graph, without the values of its initializers.
    """

    model: Model
    int8: frozenset[str]
    seconds: float = float("nan")
    kernels: dict[str, float] = field(default_factory=dict)
    ops: dict[str, str] = field(default_factory=dict)
    matches: Matches | None = None
    optimized: onnx.ModelProto | None = None


def run_all(
    subjects: Sequence[Subject],
    feeds: Sequence[Feeds],
    *,
    provider: str = "cpu",
    threads: int = 1,
    budget: float = 20.0,
    progress: Callable[[str], None] | None = None,
    rounds: int = ROUNDS,
    profile: bool = True,
) -> None:
    """Time all models and note in them what runs and kernels take.

    Args:
        subjects: the models.
        feeds: what each is run on, one per lap in turn.
        provider: short name of the execution provider.
        threads: ORT's intra-op threads; with one, whole runs are timed by processor time.
        budget: seconds for all runs, about; loading comes on top.
        progress: takes short sentences about what is going on.
        rounds: how often each model is loaded.
        profile: whether to time kernels too; half of the time goes to that.

    Raises:
        ModelError: ORT refuses a model.
        DataError: the feeds do not fit.
    """
    clock = time.thread_time if threads == 1 and provider == "cpu" else time.perf_counter
    for group in _groups(subjects):
        laps = _Laps(group, feeds, clock, profile=profile)
        share = budget * len(group) / len(subjects)
        spent = 0.0
        for number in range(rounds):
            if spent > share:  # slow models: the least that makes sense took it all
                break
            if progress is not None:
                progress(f"timing {len(group)} models, round {number + 1} of {rounds}")
            sessions = [_session(subject, provider, threads, profile=profile) for subject in group]
            spent += laps.run(sessions, share / rounds)
        laps.finish()


def _groups(subjects: Sequence[Subject]) -> Iterator[Sequence[Subject]]:
    """Yield groups of models that are loaded together."""
    largest = max((subject.model.weight_bytes() for subject in subjects), default=0)
    count = max(1, AT_ONCE // max(largest, 1))
    for begin in range(0, len(subjects), count):
        yield subjects[begin : begin + count]


@dataclass(frozen=True)
class _Visit:
    """Runs of one model in a lap: untimed ones, since caches are cold, and timed ones."""

    warm: int
    timed: int

    @property
    def runs(self) -> int:
        """All of them."""
        return self.warm + self.timed

    @classmethod
    def lasting(cls, seconds: float) -> _Visit:
        """Return the visit to a model whose run takes so long."""
        if seconds > _SLOW:
            return cls(0, 1)
        return cls(1, int(np.clip(round(_VISIT / seconds), 2, 5)))


class _Laps:
    """Samples of all models of a group: entry k of each row is of lap k."""

    def __init__(
        self, subjects: Sequence[Subject], feeds: Sequence[Feeds], clock: Callable[[], float], *, profile: bool
    ) -> None:
        self.subjects, self.feeds, self.clock, self.profile = subjects, feeds, clock, profile
        self.rng = np.random.default_rng(0)
        self.wholes: list[list[float]] = [[] for _ in subjects]
        self.profiled: list[list[float]] = [[] for _ in subjects]
        self.kernels: list[list[dict[str, float]]] = [[] for _ in subjects]

    def run(self, sessions: Sequence[Session], seconds: float) -> float:
        """Run laps with these sessions, as many as the time allows for; return the seconds that they took."""
        calls = [[session.prepared(feed) for feed in self.feeds] for session in sessions]
        single = [max(1e-6, min(_timed(call, time.perf_counter) for call in row * 2)) for row in calls]
        visits = [_Visit.lasting(one) for one in single]
        lap = sum(one * visit.runs for one, visit in zip(single, visits, strict=True))
        count = int(np.clip(seconds / ((1 + self.profile) * lap), _LEAST_LAPS, _MOST_LAPS))
        count = -(-count // len(self.feeds)) * len(self.feeds)  # each feed as often
        begun = time.perf_counter()
        with paused_gc():
            if self.profile:
                laps = min(count, -(-_PROFILED_LAPS // len(self.feeds)) * len(self.feeds))
                self._rows(calls, visits, laps)
            profiled = time.perf_counter() - begun
            if self.profile:
                for k, session in enumerate(sessions):
                    self._read(k, session.profile_events(), 3 * len(self.feeds), laps, visits[k])
            begun = time.perf_counter()
            for row, found in zip(self.wholes, self._rows(calls, visits, count), strict=True):
                row.extend(found)
        return profiled + time.perf_counter() - begun

    def _rows(self, calls: Sequence[Sequence[Call]], visits: Sequence[_Visit], count: int) -> list[list[float]]:
        """Return for each model the fastest run of each lap."""
        rows: list[list[float]] = [[] for _ in calls]
        for lap in range(count):
            for k in self.rng.permutation(len(calls)):
                call = calls[k][lap % len(self.feeds)]
                for _ in range(visits[k].warm):
                    call()
                rows[k].append(min(_timed(call, self.clock) for _ in range(visits[k].timed)))
        return rows

    def _read(self, k: int, events: Sequence[Mapping[str, Any]], skip: int, laps: int, visit: _Visit) -> None:
        """Note what a profile says of each lap: its fastest run, and the fastest of each kernel."""
        ran = sorted((e for e in events if e["name"] == "model_run"), key=lambda e: float(e["ts"]))[skip:]
        begins = [float(e["ts"]) for e in ran]
        spent: list[dict[str, list[float]]] = [defaultdict(list) for _ in range(laps)]
        sums: dict[tuple[int, str], float] = defaultdict(float)
        for event in events:
            if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
                run = bisect.bisect_right(begins, float(event["ts"])) - 1
                name = event["name"].removesuffix("_kernel_time")
                self.subjects[k].ops.setdefault(name, event["args"].get("op_name", ""))
                if run >= 0 and run % visit.runs >= visit.warm:
                    sums[run, name] += float(event["dur"]) / 1e6
        for (run, name), value in sums.items():
            spent[run // visit.runs][name].append(value)
        self.kernels[k].extend({name: _middle(values) for name, values in row.items()} for row in spent)
        whole = [float(e["dur"]) / 1e6 for e in ran]
        for lap in range(laps):
            self.profiled[k].append(min(whole[lap * visit.runs + visit.warm : (lap + 1) * visit.runs]))

    def finish(self) -> None:
        """Write into the models what the quiet laps say."""
        quiet = _quiet(np.array(self.wholes), len(self.feeds))
        for subject, row in zip(self.subjects, self.wholes, strict=True):
            subject.seconds = float(np.mean([np.median(np.array(row)[laps]) for laps in quiet]))
        if not self.profile:
            return
        quiet = _quiet(np.array(self.profiled), len(self.feeds))
        for subject, rows in zip(self.subjects, self.kernels, strict=True):
            samples: dict[str, list[list[float]]] = defaultdict(lambda: [[] for _ in quiet])
            for place, laps in enumerate(quiet):
                for lap in laps:
                    for name, value in rows[lap].items():
                        samples[name][place].append(value)
            subject.kernels = {
                name: sum(_middle(values) for values in row if values) / len(quiet) for name, row in samples.items()
            }


def _quiet(times: Array, feeds: int) -> list[npt.NDArray[np.intp]]:
    """Return for each feed the laps in which all models together were fastest, each beside its own usual time."""
    slow = (times / np.median(times, axis=1, keepdims=True)).mean(axis=0)
    found = []
    for feed in range(feeds):
        laps = np.arange(feed, times.shape[1], feeds)
        best = laps[np.argsort(slow[laps], kind="stable")]
        found.append(best[: max(2, int(np.ceil(QUIET * len(best))))])
    return found


def _middle(values: Sequence[float]) -> float:
    """Return the mean of the faster half: ORT's clock has steps of 1 µs, and a median would keep them."""
    ordered = np.sort(values)
    return float(ordered[: (len(ordered) + 1) // 2].mean())


def _timed(call: Call, clock: Callable[[], float]) -> float:
    begun = clock()
    call()
    return clock() - begun


def _session(subject: Subject, provider: str, threads: int, *, profile: bool) -> Session:
    """Return a fresh session; of the first profiled one, what ORT made of the model is noted."""
    if not profile:
        return Session(subject.model, threads=threads, provider=provider)
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        first = subject.matches is None and is_readable(subject.model, provider)
        path = Path(folder) / "optimized.onnx" if first else None
        copy = load(subject.model)
        trace = Trace(copy)
        session = Session(copy, threads=threads, provider=provider, profile=True, optimized_path=path)
        if path is not None:
            subject.optimized = _without_weights(onnx.load(path, load_external_data=False))
            subject.matches = trace.match(subject.optimized)
    return session


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Drop the values of initializers: many models are held at once, and only the names are asked for."""
    for tensor in model.graph.initializer:
        name = tensor.name
        tensor.Clear()
        tensor.name = name
    return model
