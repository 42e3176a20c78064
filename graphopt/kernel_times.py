"""Models timed side by side: seconds of whole runs, and of each kernel that ORT runs.

Rounds of fresh sessions in another order each time, since other work on the machine comes in bursts and where weights
come to lie in memory matters; the fastest runs count, since other work only ever adds.  One session gives both: first
it runs with profiling, then without.
"""

from __future__ import annotations

import bisect
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from graphopt.model import Model, load
from graphopt.profile import is_readable
from graphopt.runtime import Feeds, Session
from graphopt.trace import Matches, Trace

ROUNDS = 3
"""Times that each model is loaded anew and run."""

FASTEST = 0.1
"""Part of the runs that counts.  Their mean: ORT's clock has steps of 1 µs."""

_LEAST_RUNS, _MOST_RUNS = 4, 200


@dataclass
class Subject:
    """A model to time: its kernels' samples of seconds by feed, and those of whole runs."""

    model: Model
    int8: frozenset[str]
    kernels: dict[str, list[list[float]]] = field(default_factory=dict)
    ops: dict[str, str] = field(default_factory=dict)
    totals: list[list[float]] = field(default_factory=list)
    matches: Matches | None = None
    optimized: onnx.ModelProto | None = None

    def seconds(self) -> float:
        """Return seconds per run, the mean over feeds."""
        return float(np.mean([_fast(row) for row in self.totals]))

    def kernel_seconds(self) -> dict[str, float]:
        """Return seconds per run of each kernel, as `seconds`."""
        return {name: sum(_fast(row) for row in rows if row) / len(rows) for name, rows in self.kernels.items()}


def _fast(samples: Sequence[float]) -> float:
    """Return the mean of the fastest runs."""
    ordered = np.sort(samples)
    return float(ordered[: max(1, int(np.ceil(FASTEST * len(ordered))))].mean())


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
    """Run all models in rounds and note in them what runs and kernels take.

    Args:
        subjects: the models.
        feeds: what each is run on.
        provider: short name of the execution provider.
        threads: ORT's intra-op threads.
        budget: seconds for all runs, about; loading comes on top.
        progress: takes short sentences about what is going on.
        rounds: how often each model is loaded.
        profile: whether to time kernels too; half of the time goes to that.

    Raises:
        ModelError: ORT refuses a model.
        DataError: the feeds do not fit.
    """
    rng = np.random.default_rng(0)
    clock = time.thread_time if threads == 1 and provider == "cpu" else time.perf_counter
    share = budget / (rounds * len(subjects))
    for number in range(rounds):
        if progress is not None:
            progress(f"timing {len(subjects)} models, round {number + 1} of {rounds}")
        for k in rng.permutation(len(subjects)):
            _run(subjects[int(k)], feeds, share, clock, provider=provider, threads=threads, profile=profile)


def _run(
    subject: Subject, feeds: Sequence[Feeds], seconds: float, clock: Callable[[], float], *,
    provider: str, threads: int, profile: bool,
) -> None:  # fmt: skip
    """Run one model in a session of its own: with `profile`, half of the time so, then without."""
    session = _session(subject, provider, threads, profile=profile)
    calls = [session.prepared(feed) for feed in feeds]  # runs each once
    begun = time.perf_counter()
    for call in calls:
        call()
    single = (time.perf_counter() - begun) / len(calls)
    runs = int(np.clip(seconds / ((1 + profile) * single * len(calls)), _LEAST_RUNS, _MOST_RUNS))
    if profile:
        for call in calls * runs:
            call()
        _read_profile(subject, session.profile_events(), skip=2 * len(calls), feeds=len(calls))
    subject.totals = subject.totals or [[] for _ in calls]
    for k, call in list(enumerate(calls)) * runs:
        begun = clock()
        call()
        subject.totals[k].append(clock() - begun)


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


def _read_profile(subject: Subject, events: Sequence[Mapping[str, Any]], skip: int, feeds: int) -> None:
    """Note the kernel times of all runs but the first `skip`; those of inner graphs are part of what holds them."""
    begins = sorted(float(e["ts"]) for e in events if e["name"] == "model_run")
    spent: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for event in events:
        if event["cat"] != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        run = bisect.bisect_right(begins, float(event["ts"])) - 1
        name = event["name"].removesuffix("_kernel_time")
        subject.ops.setdefault(name, event["args"].get("op_name", ""))
        if run >= skip:
            spent[name][run] += float(event["dur"]) / 1e6
    for name, by_run in spent.items():
        rows = subject.kernels.setdefault(name, [[] for _ in range(feeds)])
        for run, value in by_run.items():
            rows[run % feeds].append(value)
