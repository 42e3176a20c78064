"""Many models timed against the first: every one runs in every sweep, so that drift meets all of them alike.

A round makes all sessions anew (in an order that turns from round to round), warms them up and takes some sweeps,
forwards and backwards in turn.  The interval of each ratio is that of `graphopt.ratio`.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.importer import paused_gc
from graphopt.ratio import Ratio, paired
from graphopt.runtime import Session

_SPINNING = {"session.force_spinning_stop": "1"}
"""Threads of one session must not spin while another runs."""

_SHORTEST = 0.0005
"""Seconds that one measurement lasts at least; faster models run several times for it."""

Call = Callable[[], object]


@dataclass(frozen=True)
class Plan:
    """How long to measure: about `seconds` for all models together, in `least` to `most` rounds."""

    seconds: float = 12.0
    least: int = 5
    most: int = 10
    seed: int = 0


@dataclass(frozen=True)
class Times:
    """Seconds of every model in every sweep of every round.

    Attributes:
        names: of the models.
        rows: per round an array (models, sweeps).
        clock: what was read.
        seed: of the intervals.
    """

    names: tuple[str, ...]
    rows: Sequence[np.ndarray[Any, np.dtype[np.float64]]]
    clock: str
    seed: int

    def median(self, name: str) -> float:
        """Return the median seconds of one run."""
        i = self.names.index(name)
        return float(np.median(np.concatenate([row[i] for row in self.rows])))

    def ratio(self, base: str, name: str) -> Ratio:
        """Return the time of one model over that of another; `conditions` names the clock and both medians."""
        i, j = self.names.index(base), self.names.index(name)
        ratio = paired([row[i] for row in self.rows], [row[j] for row in self.rows], seed=self.seed)
        conditions = {"clock": self.clock, "seconds": self.median(name), "seconds_before": self.median(base)}
        return replace(ratio, conditions=conditions)


def times(paths: Mapping[str, Path], feed: Mapping[str, Any], threads: int, plan: Plan) -> Times:
    """Time models in turn: with one thread by the processor time of that thread, otherwise by wall time."""
    timer = _Timer(list(paths.values()), feed, threads, plan)
    return Times(tuple(paths), timer.run(), timer.clock, plan.seed)


def ratios(paths: Mapping[str, Path], feed: Mapping[str, Any], threads: int, plan: Plan) -> dict[str, Ratio]:
    """Return the time of each model over that of the first, which is left out."""
    first, *others = paths
    found = times(paths, feed, threads, plan)
    return {name: found.ratio(first, name) for name in others}


class _Timer:
    """Takes rounds of sweeps over all models."""

    def __init__(self, paths: Sequence[Path], feed: Mapping[str, Any], threads: int, plan: Plan) -> None:
        self.paths, self.feed, self.threads, self.plan = paths, feed, threads, plan
        self.clock = "cpu" if threads == 1 else "wall"
        self.repeats: list[int] = []
        self.sweeps = 0

    def run(self) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
        """Return one array (models, sweeps) of seconds per round; rounds that take long are fewer."""
        began = time.perf_counter()
        rows = [self._round(0)]
        one = time.perf_counter() - began
        count = min(max(round(self.plan.seconds / one), self.plan.least), self.plan.most)
        rows += [self._round(number) for number in range(1, count)]
        return rows

    def _round(self, number: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        count = len(self.paths)
        order = [(i + number) % count for i in range(count)]
        order = order if number % 2 == 0 else order[::-1]
        config = _SPINNING if self.threads != 1 else {}
        sessions = {i: Session(self.paths[i], threads=self.threads, config=config) for i in order}
        calls = {i: sessions[i].prepared(self.feed) for i in order}
        gc.collect()
        with paused_gc():
            for _ in range(2):
                for i in order:
                    calls[i]()
            if not self.sweeps:
                self._sizes([calls[i] for i in range(count)])
            times = np.empty((count, self.sweeps))
            for sweep in range(self.sweeps):
                for i in order if sweep % 2 == 0 else order[::-1]:
                    times[i, sweep] = self._seconds(calls[i], self.repeats[i])
        return times

    def _sizes(self, calls: Sequence[Call]) -> None:
        """Settle how often each model runs per measurement, and how many (even) sweeps make a round."""
        single = [min(self._seconds(call, 1) for _ in range(3)) for call in calls]
        self.repeats = [max(1, round(_SHORTEST / max(each, 1e-7))) for each in single]
        sweep = sum(each * repeat for each, repeat in zip(single, self.repeats, strict=True))
        self.sweeps = 2 * max(1, round(self.plan.seconds / self.plan.most / (2 * sweep)))

    def _seconds(self, call: Call, repeat: int) -> float:
        now = time.thread_time if self.clock == "cpu" else time.perf_counter
        began = now()
        for _ in range(repeat):
            call()
        return (now() - began) / repeat
