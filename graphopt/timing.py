"""Two models -> how long each takes, and how many times as long B takes as A.

One process, two sessions, the same feeds.  Pairs are timed AB BA AB BA, so that drift cancels, in rounds: each
round makes both sessions anew (in alternating order, since the one made second lies elsewhere in memory), warms
them up and times some pairs.  The plan comes from the time one run takes and from the time allowed.  Rounds are
doubled while the interval is wider than asked for and time is left: the rule looks at the width, never at the
ratio, and only at those few points, so that it does not favour either model.

What a user waits for is wall time, and each model's own percentiles are of that.  But on a machine that does other
work too, wall time counts that work.  Where one thread does all of the model's work, its processor time is the
same on an idle machine and keeps out the rest on a busy one (measured with four other jobs on two cores:
intervals 2–4 % wide instead of 4–14 %), so the ratio is then of that, and the ratio of wall times stands beside it.

With several threads wall time decides.  On a busy machine it may tell nothing (measured: 0.6 to 1.1 for a model against
itself).  The calling thread takes part in all work and spins while it waits for the others, so its processor time is
close to the latency on an idle machine (same models: 0.93 to 1.03); `quick_ratio` goes by that where, judged by the
widths of the two intervals alone, wall time is disturbed.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from graphopt import environment
from graphopt.data import Spec, load_samples
from graphopt.errors import DataError, SpecError
from graphopt.importer import paused_gc
from graphopt.memory import peak_memory
from graphopt.model import Model, load
from graphopt.ratio import Ratio, Times, paired
from graphopt.runtime import Feeds, Runnable, Session

__all__ = ["Bench", "ModelTiming", "Plan", "Prepared", "Ratio", "bench", "paired", "prepare", "quick_ratio"]

Clock: TypeAlias = Literal["auto", "wall", "cpu", "steady"]

QUICK_ROUNDS = 6
"""Rounds of a short measurement."""

MAX_FEEDS = 16
"""Feeds held in memory while timing; pairs take them in turn."""

_ALONE = 1.2
"""The process may use so many times the processor time of the calling thread before others count as at work."""

STEADY = 0.06
"""Intervals of wall time that are no wider than this, as a part of the ratio, need no other clock."""

_MUCH = 1.5
"""So many times wider than that of processor time, an interval of wall time is of a busy machine."""

_SPINNING = {"session.force_spinning_stop": "1"}
"""Threads of one session must not spin while the other runs."""


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    Attributes:
        rounds: rounds of fresh sessions before the width is looked at.
        least_rounds: as many are made even when it is late; None for `rounds`.
        round_seconds: time to spend on the pairs of one round.
        max_seconds: no further rounds begin after this.
        precision: width of the interval (as a part of the ratio) at which to stop; None takes the rounds as given.
        warmup: untimed runs of each session in each round.
        min_time: seconds that one measurement lasts at least; faster models are run several times for it.
        clock: whose ratio decides; `auto` is processor time where the calling thread does all the work; `steady` is the
            same, and with several threads that of the calling thread where wall time is disturbed.
    """

    rounds: int = 10
    least_rounds: int | None = None
    round_seconds: float = 0.8
    max_seconds: float = 40.0
    precision: float | None = 0.03
    warmup: int = 3
    min_time: float = 0.0005
    clock: Clock = "auto"


@dataclass(frozen=True)
class Prepared:
    """Feeds that were read before, for several measurements on the same; `description` and `shapes` in words."""

    feeds: tuple[Feeds, ...]
    description: str
    shapes: str = ""


@dataclass(frozen=True)
class ModelTiming:
    """Timings of one model, in seconds of wall time; `cpu` is the median processor time of the calling thread.

    `load` is the median time to make a session (file in the page cache).  `peak_bytes` is what a process of its
    own needs, above its imports, to load the model and run it once; None where not measured.
    """

    name: str
    median: float
    p90: float
    p99: float
    load: float
    cpu: float
    peak_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; times in milliseconds."""
        return {
            "name": self.name,
            "median_ms": self.median * 1e3,
            "p90_ms": self.p90 * 1e3,
            "p99_ms": self.p99 * 1e3,
            "load_ms": self.load * 1e3,
            "cpu_ms": self.cpu * 1e3,
            "peak_bytes": self.peak_bytes,
        }


@dataclass(frozen=True)
class Bench:
    """What `bench` measured.

    Attributes:
        a, b: each model's own timings.
        paired: the ratio of b to a with its interval, by the clock that its conditions name.
        wall: the ratio of wall times.
        runs_per_measurement: above 1 for very fast models, whose percentiles are then of means over so many runs.
        samples: what was fed.
        seconds: how long the whole measurement took.
        environment: where, with threads and provider.
    """

    a: ModelTiming
    b: ModelTiming
    paired: Ratio
    wall: Ratio
    runs_per_measurement: int
    samples: str
    seconds: float
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Time of B over time of A, the median over pairs."""
        return self.paired.median

    @property
    def interval(self) -> tuple[float, float]:
        """The ratio's interval."""
        return self.paired.low, self.paired.high

    def table(self) -> list[dict[str, Any]]:
        """Return one row per model, for a terminal."""
        rows = [self.a.to_dict(), self.b.to_dict()]
        return [{**row, "ratio": ratio} for row, ratio in zip(rows, ("1", str(self.paired)), strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            **self.paired.to_dict(),
            "wall": self.wall.to_dict(),
            "a": self.a.to_dict(),
            "b": self.b.to_dict(),
            "runs_per_measurement": self.runs_per_measurement,
            "samples": self.samples,
            "seconds": self.seconds,
            "environment": self.environment,
        }


@dataclass
class _Record:
    """Rows of seconds per run of each model, one row per round, by clock; seconds to load, one per round."""

    wall: tuple[list[Times], list[Times]] = field(default_factory=lambda: ([], []))
    cpu: tuple[list[Times], list[Times]] = field(default_factory=lambda: ([], []))
    loads: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    repeat: int = 1
    pairs: int = 0
    clock: Literal["wall", "cpu", "steady"] = "wall"

    def ratio(self, confidence: float, seed: int) -> Ratio:
        """Return the ratio by the clock that decides."""
        if self.clock == "cpu":
            return self._by("cpu", confidence, seed)
        wall = self._by("wall", confidence, seed)
        if self.clock == "wall" or wall.width <= STEADY:
            return wall
        cpu = self._by("cpu", confidence, seed)
        return cpu if wall.width > _MUCH * cpu.width else wall

    def _by(self, clock: Literal["wall", "cpu"], confidence: float, seed: int) -> Ratio:
        found = paired(*(self.cpu if clock == "cpu" else self.wall), confidence=confidence, seed=seed)
        return replace(found, conditions={"clock": clock})


def bench(
    a: Runnable,
    b: Runnable,
    samples: Spec = None,
    *,
    rounds: int | None = None,
    warmup: int = 3,
    threads: int = 1,
    provider: str = "cpu",
    min_time: float = 0.0005,
    max_seconds: float = 40.0,
    precision: float = 0.03,
    seed: int = 0,
    confidence: float = 0.95,
    memory: bool = False,
    clock: Clock = "auto",
) -> Bench:
    """Time two models against each other.

    Args:
        a: the model to compare with; a path is loaded by ORT as it lies there.
        b: the model to time.
        samples: feeds for both in any form that `load_samples` takes, the first `MAX_FEEDS`; None: one random feed.
        rounds: rounds of fresh sessions; None takes ten, and more while the interval is wider than `precision`.
        warmup: untimed runs of each session in each round.
        threads: ORT's intra-op threads.
        provider: short name of the execution provider.
        min_time: seconds that one measurement lasts at least.
        max_seconds: no further rounds begin after this (never fewer than ten, or `rounds`).
        precision: width of the interval, relative to the ratio, that is narrow enough.
        seed: of the order of runs, the bootstrap and random feeds.
        confidence: level of the interval.
        memory: also measure peak memory, each model in a process of its own.
        clock: `wall`, `cpu` (processor time of the calling thread), or the one that fits: see the module's text.

    Raises:
        ModelError: ORT refuses a model.
        DataError: the feeds do not fit both models, or there are none.
        ProviderError: the provider is missing.
        SpecError: an option is out of range.
    """
    if rounds is not None and rounds < 1:
        raise SpecError(f"rounds must be at least 1, not {rounds}")
    plan = Plan(warmup=warmup, min_time=min_time, max_seconds=max_seconds, precision=precision, clock=clock)
    if rounds is not None:
        plan = replace(plan, rounds=rounds, precision=None)
    started = time.perf_counter()
    feeds, description = _feeds(a, samples, seed)
    custom_ops = custom_libraries(a, b)
    with _on_disk((a, b)) as paths:
        timer = _Timer(paths, feeds, plan, seed, threads=threads, provider=provider, custom_ops=custom_ops)
        record = timer.run(confidence)
        peaks = timer.peaks() if memory else (None, None)
    models = [_summary(m, n, record, i, peaks[i]) for i, (m, n) in enumerate(((a, "a"), (b, "b")))]
    return Bench(
        models[0], models[1], record.ratio(confidence, seed), paired(*record.wall, confidence=confidence, seed=seed),
        record.repeat, description, time.perf_counter() - started,
        environment.describe(threads=threads, provider=provider),
    )  # fmt: skip


def quick_ratio(
    a: Runnable,
    b: Runnable,
    samples: Spec | Prepared = None,
    *,
    budget_s: float = 2.0,
    threads: int = 1,
    provider: str = "cpu",
    seed: int = 0,
    confidence: float = 0.95,
    custom_ops: Sequence[Path] = (),
) -> Ratio:
    """Return the ratio b/a from a short measurement of about `budget_s` seconds, loading not counted.

    Six rounds of at least two pairs; fewer, down to four, where loading takes several times the budget.
    Arguments and errors are those of `bench`; `custom_ops` are for models given by path.
    """
    plan = Plan(
        rounds=QUICK_ROUNDS, least_rounds=4, round_seconds=budget_s / QUICK_ROUNDS, precision=None,
        max_seconds=3 * budget_s + 1.0, clock="steady",
    )  # fmt: skip
    feeds, _ = _feeds(a, samples, seed)
    custom_ops = tuple(dict.fromkeys((*custom_ops, *custom_libraries(a, b))))
    with _on_disk((a, b)) as paths:
        timer = _Timer(paths, feeds, plan, seed, threads=threads, provider=provider, custom_ops=custom_ops)
        record = timer.run(confidence)
    found = record.ratio(confidence, seed)
    return replace(found, conditions={"threads": threads, "provider": provider, **found.conditions})


class _Timer:
    """Times rounds of pairs until the plan is fulfilled."""

    def __init__(
        self, paths: tuple[Path, Path], feeds: list[Feeds], plan: Plan, seed: int, *,
        threads: int, provider: str, custom_ops: Sequence[Path],
    ) -> None:  # fmt: skip
        self.paths, self.feeds, self.plan, self.seed = paths, feeds, plan, seed
        self.rng = np.random.default_rng(seed)
        self.first = int(self.rng.integers(2))
        self.threads, self.provider, self.custom_ops = threads, provider, custom_ops

    def run(self, confidence: float) -> _Record:
        """Return the timings of all rounds; the number of rounds doubles until the interval is narrow."""
        record = _Record()
        deadline = time.perf_counter() + self.plan.max_seconds
        wanted = self.plan.rounds
        while True:
            for number in range(len(record.wall[0]), wanted):
                self._round(number, record)
                late = time.perf_counter() > deadline
                if late and number + 1 >= (self.plan.least_rounds or self.plan.rounds):
                    return record
            if self.plan.precision is None:
                return record
            if record.ratio(confidence, self.seed).width <= self.plan.precision:
                return record
            wanted *= 2

    def peaks(self) -> tuple[int | None, ...]:
        """Return the peak memory of each model, each in a process of its own."""
        options: dict[str, Any] = {"threads": self.threads, "provider": self.provider, "custom_ops": self.custom_ops}
        return tuple(peak_memory(path, self.feeds[0], **options) for path in self.paths)

    def _session(self, path: Path) -> Session:
        config = _SPINNING if self.threads != 1 else {}
        return Session(path, threads=self.threads, provider=self.provider, custom_ops=self.custom_ops, config=config)

    def _round(self, number: int, record: _Record) -> None:
        order = (0, 1) if (number + self.first) % 2 == 0 else (1, 0)
        sessions: dict[int, Session] = {}
        for i in order:
            begun = time.perf_counter()
            sessions[i] = self._session(self.paths[i])
            record.loads[i].append(time.perf_counter() - begun)
        calls = tuple([sessions[i].prepared(feed) for feed in self.feeds] for i in (0, 1))
        gc.collect()
        with paused_gc():
            for k, i in itertools.product(range(self.plan.warmup), order):
                calls[i][k % len(self.feeds)]()
            if not record.pairs:
                record.repeat, record.pairs = self._sizes(calls)
                record.clock = self._clock(calls)
            times = self._pairs(calls, record)
        for i in (0, 1):
            record.wall[i].append(times[i, 0])
            record.cpu[i].append(times[i, 1])

    def _clock(self, calls: Sequence[Sequence[Callable[[], object]]]) -> Literal["wall", "cpu", "steady"]:
        """Return the clock that decides: processor time where nobody but this thread works on the model."""
        if self.plan.clock in ("wall", "cpu"):
            return self.plan.clock
        # Windows counts a thread's time in ticks of 16 ms
        if self.provider != "cpu" or sys.platform == "win32":
            return "wall"
        if self.threads != 1:
            return "steady" if self.plan.clock == "steady" else "wall"
        own, process = time.thread_time(), time.process_time()
        for call, _ in itertools.product(calls, range(3)):
            call[0]()
        own, process = time.thread_time() - own, time.process_time() - process
        return "cpu" if process <= _ALONE * own else "wall"

    def _sizes(self, calls: Sequence[Sequence[Callable[[], object]]]) -> tuple[int, int]:
        """Return runs per measurement and (even) pairs per round."""
        single = [min(_seconds(call[0], 1)[0] for _ in range(3)) for call in calls]
        repeat = max(1, round(self.plan.min_time / max(min(single), 1e-7)))
        pair, allowed = repeat * sum(single), self.plan.round_seconds
        least = 2 if 4 * pair <= 3 * allowed else 1
        return repeat, 2 * max(least, round(allowed / (2 * pair)))

    def _pairs(self, calls: Sequence[Sequence[Callable[[], object]]], record: _Record) -> Times:
        """Return seconds by model, clock (wall, processor) and pair."""
        times = np.empty((2, 2, record.pairs))
        flip = int(self.rng.integers(2))
        for pair in range(record.pairs):
            for i in ((0, 1), (1, 0))[(pair + flip) % 2]:
                times[i, :, pair] = _seconds(calls[i][pair // 2 % len(self.feeds)], record.repeat)
        return times


def _seconds(call: Callable[[], object], repeat: int) -> tuple[float, float]:
    """Return the mean wall and processor time of one call over `repeat` calls."""
    begun, cpu = time.perf_counter(), time.thread_time()
    for _ in range(repeat):
        call()
    cpu, ended = time.thread_time() - cpu, time.perf_counter()
    return (ended - begun) / repeat, cpu / repeat


def prepare(model: Runnable, samples: Spec, seed: int = 0) -> Prepared:
    """Return the feeds that models are timed on: the first `MAX_FEEDS`, of random ones the first.

    Raises:
        DataError: there are none, or they do not fit.
    """
    feeds, description = _feeds(model, samples, seed)
    return Prepared(tuple(feeds), description, _shapes(feeds))


def _feeds(model: Runnable, samples: Spec | Prepared, seed: int) -> tuple[list[Feeds], str]:
    """Return the feeds to time on and their description; of random ones the first, which has one shape."""
    if isinstance(samples, Prepared):
        return list(samples.feeds), samples.description
    loaded = load_samples(samples, model if isinstance(model, Model) else load(model), seed=seed)
    feeds: list[Feeds] = list(itertools.islice(loaded, 1 if loaded.random else MAX_FEEDS))
    if not feeds:
        raise DataError("there are no samples to time on")
    return feeds, f"{loaded.description}; timed on {len(feeds)}: {_shapes(feeds)}"


def _shapes(feeds: Sequence[Feeds]) -> str:
    def one(feed: Feeds) -> str:
        return ", ".join(
            f"{k}[{','.join(map(str, np.shape(v)))}]" for k, v in feed.items() if isinstance(v, np.ndarray)
        )

    distinct = list(dict.fromkeys(one(feed) for feed in feeds))
    return "; ".join(distinct[:3]) + (f" and {len(distinct) - 3} more shapes" if len(distinct) > 3 else "")


def custom_libraries(*models: Runnable) -> tuple[Path, ...]:
    """Return the libraries of custom operators that were named for these models."""
    return tuple(dict.fromkeys(library for m in models if isinstance(m, Model) for library in m.custom_ops))


@contextmanager
def _on_disk(models: tuple[Runnable, Runnable]) -> Iterator[tuple[Path, Path]]:
    """Yield both models as files, so that both are loaded in the same way."""
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        paths = []
        for i, model in enumerate(models):
            if isinstance(model, str | Path):
                paths.append(Path(model))
                continue
            paths.append(Path(folder) / f"{'ab'[i]}.onnx")
            load(model).save(paths[-1])
        yield paths[0], paths[1]


def _summary(model: Runnable, name: str, record: _Record, which: int, peak: int | None) -> ModelTiming:
    path = model.path if isinstance(model, Model) else model
    if isinstance(path, str | Path):
        name = Path(path).name
    median, p90, p99 = (float(q) for q in np.quantile(np.concatenate(record.wall[which]), [0.5, 0.9, 0.99]))
    cpu = float(np.median(np.concatenate(record.cpu[which])))
    return ModelTiming(name, median, p90, p99, statistics.median(record.loads[which]), cpu, peak)
