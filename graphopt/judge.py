"""Which of two models is faster, at every number of threads and every set of shapes asked for.

`Judge.compare` measures in looks, each longer than the one before and taken anew, and stops as soon as a look decides.
What may be concluded from a comparison stands in its interval alone; its confidence is shared out beforehand among
all comparisons that a run may make, so that trying many things does not find gains that are not there.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphopt.fingerprint import runs_as
from graphopt.model import Model
from graphopt.ratio import Ratio
from graphopt.timing import Prepared, quick_ratio

Decided = Callable[["Comparison"], bool]
Progress = Callable[[str], None]

ERROR = 0.05
"""Probability of any wrong conclusion among the comparisons of a run."""

NEGLIGIBLE = 0.015
"""Where the interval lies this close to 1, measuring longer could not change much."""


@dataclass(frozen=True)
class Condition:
    """What both models run under: threads, and feeds of one set of shapes."""

    threads: int
    feeds: Prepared
    label: str

    @classmethod
    def all(cls, threads: Sequence[int], feeds: Mapping[str, Prepared]) -> tuple[Condition, ...]:
        """Return every number of threads with every set of feeds, which come by their shapes in words."""
        several = len(feeds) > 1
        return tuple(
            cls(count, prepared, f"{count} thread{'s' * (count != 1)}" + f", {shapes}" * several)
            for shapes, prepared in feeds.items()
            for count in threads
        )


@dataclass(frozen=True)
class Comparison:
    """How long B takes, as a part of A's time.

    Attributes:
        ratios: by the conditions' labels; empty where nothing was measured.
        same: ORT makes the same graph of both, so that nothing can differ.
        note: why nothing was measured.
    """

    ratios: Mapping[str, Ratio] = field(default_factory=dict)
    same: bool = False
    note: str = ""

    @property
    def overall(self) -> Ratio:
        """The geometric mean over conditions; errors of measurement are taken as independent."""
        return geometric_mean(list(self.ratios.values())) if self.ratios else Ratio(1.0, 1.0, 1.0)

    @property
    def worst(self) -> tuple[str, Ratio]:
        """The condition whose interval reaches highest."""
        return max(self.ratios.items(), key=lambda item: item[1].high)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        if not self.ratios:
            return {"same_graph": self.same, "note": self.note}
        return {
            "same_graph": self.same,
            **self.overall.to_dict(),
            "conditions": {label: ratio.to_dict() for label, ratio in self.ratios.items()},
        }


def geometric_mean(ratios: Sequence[Ratio]) -> Ratio:
    """Return the geometric mean of independent ratios with its interval."""
    if len(ratios) == 1:
        return ratios[0]
    logs = [math.log(r.median) for r in ratios]
    mean, count = sum(logs) / len(logs), len(logs)
    below = math.hypot(*(log - math.log(r.low) for log, r in zip(logs, ratios, strict=True))) / count
    above = math.hypot(*(math.log(r.high) - log for log, r in zip(logs, ratios, strict=True))) / count
    return Ratio(
        math.exp(mean), math.exp(mean - below), math.exp(mean + above), ratios[0].confidence,
        sum(r.pairs for r in ratios), min(r.rounds for r in ratios),
    )  # fmt: skip


class Candidate:
    """A model on disk, in a folder of its own, so that it is written once for all its measurements."""

    def __init__(self, model: Model, folder: Path, provider: str) -> None:
        self.model, self.path, self._provider = model, folder / "model.onnx", provider
        self.nodes = sum(1 for node in model.nodes() if node.op != "Constant")
        self._runs_as: str | None = None
        self._asked = False
        folder.mkdir()
        model.save(self.path)

    def same_as(self, other: Candidate) -> bool:
        """Tell whether ORT makes the same graph of both; False where that cannot be told."""
        return self.runs_as is not None and self.runs_as == other.runs_as

    @property
    def runs_as(self) -> str | None:
        """The fingerprint of what ORT makes of it."""
        if not self._asked:
            self._runs_as, self._asked = runs_as(self.model, provider=self._provider), True
        return self._runs_as

    def forget(self) -> None:
        """Delete the file, with its weights where they stand beside it."""
        shutil.rmtree(self.path.parent, ignore_errors=True)


@dataclass
class Judge:
    """Compares models under fixed conditions, within a budget of time.

    Attributes:
        conditions: every comparison is made under each of them.
        deadline: `time.monotonic()` by which looks should have ended.
        progress: takes a short sentence about what is going on.
        overhead: seconds that a look took beyond what it was given, the last time: loading, mostly.
    """

    conditions: tuple[Condition, ...]
    provider: str
    seed: int
    folder: Path
    deadline: float
    progress: Progress = print
    overhead: float = 0.5
    _count: int = 0

    def candidate(self, model: Model) -> Candidate:
        """Return a model as one that can be compared."""
        self._count += 1
        return Candidate(model, self.folder / str(self._count), self.provider)

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def compare(
        self, a: Candidate, b: Candidate, what: str, looks: Sequence[float], decided: Decided, confidence: float,
        *, least: int = 1, settled: Callable[[Ratio], bool] = lambda _: False,
    ) -> Comparison:  # fmt: skip
        """Return the time of `b` over that of `a`.

        Args:
            a: what to compare with.
            b: what is judged.
            what: in words, for the progress.
            looks: seconds of each look, under each condition.
            decided: tells whether a look is enough.
            confidence: of each look's intervals.
            least: looks that are taken, if it is not decided, even when it is late.
            settled: tells of a condition's ratio that it needs no further look.
        """
        if a.same_as(b):
            return Comparison(same=True)
        found: dict[str, Ratio] = {}
        for number, seconds in enumerate(looks):
            open_ = [c for c in self.conditions if c.label not in found or not settled(found[c.label])]
            if number >= least and self.left < (seconds + self.overhead) * len(open_):
                break
            found.update({c.label: self._look(a, b, c, seconds, confidence, what) for c in open_})
            if decided(Comparison(found)):
                break
        return Comparison(found)

    def _look(
        self, a: Candidate, b: Candidate, condition: Condition, seconds: float, confidence: float, what: str
    ) -> Ratio:
        self.progress(f"timing {what}, {condition.label}")
        libraries = dict.fromkeys((*a.model.custom_ops, *b.model.custom_ops))
        begun = time.monotonic()
        found = quick_ratio(
            a.path, b.path, condition.feeds, budget_s=seconds, threads=condition.threads, provider=self.provider,
            seed=self.seed, confidence=confidence, custom_ops=tuple(libraries),
        )  # fmt: skip
        self.overhead = max(0.0, time.monotonic() - begun - seconds)
        return found


@contextlib.contextmanager
def judging(conditions: tuple[Condition, ...], *, provider: str, seed: int, progress: Progress) -> Iterator[Judge]:
    """Yield a judge with a folder of its own; it has no time yet."""
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        yield Judge(conditions, provider, seed, Path(folder), time.monotonic(), progress)


def shared(comparisons: int, looks: int = 2) -> float:
    """Return the confidence of each interval, where so many comparisons are made in so many looks (Bonferroni)."""
    return 1.0 - ERROR / max(1, comparisons * looks)


def negligible(ratio: Ratio) -> bool:
    """Tell whether the interval lies so close to 1 that the difference does not matter."""
    return ratio.low > 1.0 - NEGLIGIBLE and ratio.high < 1.0 + NEGLIGIBLE
