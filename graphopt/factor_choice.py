"""Which layers get factors, and of which rank: what each choice loses and takes, and the fastest one within a bound.

What a rank loses at the outputs is the layer's own relative error, which its spectrum tells for every rank, times how
much of it reaches the outputs, which one trial on samples tells:

    loss(rank) = noise(trial) / error²(trial) · error²(rank)

Losses of different layers nearly add up; what a choice really loses is tried before it is believed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from graphopt import factor_times
from graphopt.analysis.cost import costs
from graphopt.analysis.factorable import Factorable
from graphopt.factor_request import FactorizeRequest
from graphopt.factor_times import FactorTimes
from graphopt.factor_trials import Trials
from graphopt.factors import ROWS, Asked, Solved, Solver, in_parts
from graphopt.grams import collect
from graphopt.judge import Progress
from graphopt.low_rank import Split, natural_step, rounded
from graphopt.model import Model
from graphopt.quality import Quality
from graphopt.samples import Feeds, Samples
from graphopt.search import Option, Problem, least_loss, solve

WHOLE = "whole"
"""The option of a layer to stay as it is."""

FRACTIONS = (0.08, 0.16, 0.25, 0.35, 0.45, 0.55, 0.65, 0.8)
"""Ranks to choose among, as parts of the one from which on a layer takes less work as it is."""

TRIED_AT = 0.15
"""Relative error of a layer near which its effect on the outputs is tried: above rounding, and small enough to add."""

GAIN = 0.97
"""Factors take at most so much of the layer's time."""

UNMEASURED_GAIN = 0.7
"""The same of MACs, where nothing is timed: two kernels are started instead of one."""

SIZE = 1e-12
"""Seconds that a whole table counts for: what no layer needs of the bound goes to tables, where these are asked for."""

ROOM = 4.0
"""Losses up to this multiple of what the bound seems to allow stay in the choice: they add up only about."""

FIRST = 0.1
"""Noise over signal power that is tried first, where the bound is on something else."""

ATTEMPTS = 10
COARSE = 3.0
CLOSER = 1.15

Judge: TypeAlias = Callable[[Model], Quality]
Picks: TypeAlias = dict[str, "Candidate"]


@dataclass
class Candidate:
    """A layer at one rank.

    Attributes:
        error: relative error of the layer's output (of its weight, without samples).
        loss: noise over signal power that it brings to the outputs; `error`² without samples.
        seconds: of both factors, or their MACs where nothing is timed.
    """

    solved: Solved
    rank: int
    error: float
    loss: float = 0.0
    seconds: float = math.nan

    @property
    def name(self) -> str:
        """How passes and reports call it."""
        return f"{self.solved.split.way}:{self.rank}"


@dataclass
class LayerChoices:
    """A layer with its candidates; `why` is what stands against all of them."""

    layer: Factorable
    seconds: float = math.nan
    candidates: list[Candidate] = field(default_factory=list)
    why: str = ""


class FactorChoice:
    """Chooses ranks for the layers of a canonical model.

    Args:
        model: the canonical model.
        layers: its layers, those with something against them too.
        samples: that choose; None without.
        feed: what layers are timed on.
        request: what is asked.
        budget: seconds of timing.
        progress: takes short sentences.
    """

    def __init__(
        self, model: Model, layers: Sequence[Factorable], samples: Samples | None, feed: Feeds,
        request: FactorizeRequest, *, budget: float, progress: Progress,
    ) -> None:  # fmt: skip
        self.model, self.samples, self.feed, self.request = model, samples, feed, request
        self.budget, self.progress = budget, progress
        self.choices = {layer.label: LayerChoices(layer, why=layer.why) for layer in layers}
        self._trials: Trials | None = None

    @property
    def trials(self) -> Trials:
        """Tries choices without building them."""
        if self._trials is None:
            self._trials = Trials(self.model, [c.layer.label for c in self.open], self.samples)
        return self._trials

    @property
    def open(self) -> list[LayerChoices]:
        """Layers that may get factors, in the graph's order."""
        return [choice for choice in self.choices.values() if not choice.why]

    def prepare(self) -> None:
        """Find what each layer can be, what that loses, and how long it takes."""
        self._solve()
        if self.samples is not None and self.request.goal in ("bound", "latency"):
            self._lose()
        self._time()

    def _solve(self) -> None:
        self.progress("finding factors")
        asked: list[Asked] = [(c.layer, c.layer.splits) for c in self.open]
        for part, requests in in_parts(asked):
            named = {str(i): request for i, request in enumerate(requests)}
            found = {}
            if self.samples is not None:
                found = collect(self.model, self.samples, named, rows=ROWS, seed=self.request.seed)
            solver = Solver({requests[int(i)]: gram for i, gram in found.items()})
            for layer, splits in part:
                self._offer(self.choices[layer.label], [solver.solve(layer, split) for split in splits])

    def _offer(self, choice: LayerChoices, ways: Sequence[Solved]) -> None:
        """Give a layer the candidates that the request allows."""
        request = self.request
        for solved in ways:
            for rank in self._ranks(solved):
                error = solved.spectrum.error(rank)
                if request.goal == "weights" and request.max_error is not None and error > request.max_error:
                    continue
                choice.candidates.append(Candidate(solved, rank, error, error**2))
        if not choice.candidates:
            choice.why = self._why_none(ways)

    def _ranks(self, solved: Solved) -> list[int]:
        split, request = solved.split, self.request
        if request.rank is not None:
            return [request.rank] if request.rank <= split.limit else []
        if request.energy is not None:
            least = solved.spectrum.rank_within(math.sqrt(1.0 - request.energy))
            return [max(least, rounded(least, split.limit))] if least <= split.limit else []
        return ranks_of(split)

    def _why_none(self, ways: Sequence[Solved]) -> str:
        limit = max(solved.split.limit for solved in ways)
        if self.request.rank is not None:
            return f"rank {self.request.rank} saves no work: only up to {limit} does"
        least = min(solved.spectrum.error(max(ranks_of(solved.split), default=1)) for solved in ways)
        return f"ranks that save work lose {least:.2g} of its {'output' if self.samples else 'weight'} at least"

    def _lose(self) -> None:
        """Try one rank of each way on the samples; leave out what loses more than the bound."""
        allowed = ROOM * self.request.noise
        for number, choice in enumerate(self.open):
            self.progress(f"trying layers on samples ({number + 1} of {len(self.choices)})")
            label, least = choice.layer.label, math.inf
            for solved in {id(c.solved): c.solved for c in choice.candidates}.values():
                own = [c for c in choice.candidates if c.solved is solved]
                tried = min(own, key=lambda c: abs(math.log((c.error + 1e-9) / TRIED_AT)))
                noise = self.trials.noise({label: (solved, tried.rank)})
                reach = noise / tried.error**2 if tried.error > 0.0 else 0.0
                for one in own:
                    one.loss = reach * one.error**2
                least = min([least, *(c.loss for c in own)])
            choice.candidates = [c for c in choice.candidates if c.loss <= allowed]
            if not choice.candidates:
                choice.why = f"ranks that save work bring {math.sqrt(least):.2g} of error to the outputs, at least"

    def _time(self) -> None:
        """Time what is left; leave out what is not faster."""
        asked = []
        for choice in self.open:
            if choice.layer.splits[0].way == "table":
                choice.seconds = 0.0
                for one in choice.candidates:
                    one.seconds = (one.rank * one.solved.split.macs / one.solved.split.whole - 1.0) * SIZE
                continue
            ways: dict[Split, list[int]] = {}
            for one in choice.candidates:
                ways.setdefault(one.solved.split, []).append(one.rank)
            asked.append((choice.layer, ways))
        if not asked:
            return
        times = self._measured(asked) if self.request.measure else self._counted(asked)
        most = GAIN if self.request.measure else UNMEASURED_GAIN
        for choice in [self.choices[layer.label] for layer, _ in asked]:
            label = choice.layer.label
            choice.seconds = times.whole[label]
            for one in choice.candidates:
                one.seconds = times.split[label, one.solved.split.way, one.rank]
            fastest = min(choice.candidates, key=lambda c: c.seconds)
            choice.candidates = [c for c in choice.candidates if c.seconds <= most * choice.seconds]
            if not choice.candidates:
                what = "time" if self.request.measure else "work"
                part = fastest.seconds / choice.seconds
                choice.why = f"no rank is faster: {fastest.name} takes {part:.2f} of its {what}"

    def _measured(self, asked: Sequence[tuple[Factorable, Mapping[Split, Sequence[int]]]]) -> FactorTimes:
        self.progress("timing layers and factors")
        shapes = factor_times.input_shapes(self.model, [layer for layer, _ in asked], self.feed)
        return factor_times.measure(
            asked, shapes, provider=self.request.provider, threads=self.request.threads[0], budget=self.budget,
            progress=self.progress,
        )  # fmt: skip

    def _counted(self, asked: Sequence[tuple[Factorable, Mapping[Split, Sequence[int]]]]) -> FactorTimes:
        """Return multiply-accumulates in place of seconds."""
        known = costs(self.model, inputs={name: np.shape(value) for name, value in self.feed.items()})
        found = FactorTimes()
        for layer, ways in asked:
            for split, ranks in ways.items():
                found.whole[layer.label] = whole = float(known.of(layer.node).macs or split.whole)
                for rank in ranks:
                    found.split[layer.label, split.way, rank] = whole * rank * split.macs / split.whole
        return found

    def problem(self, constant: float = 0.0) -> Problem:
        """Return the choice as a problem; costs in seconds."""
        items = {
            choice.layer.label: {
                WHOLE: Option(choice.seconds),
                **{c.name: Option(c.seconds, c.loss) for c in choice.candidates},
            }
            for choice in self.open
        }
        return Problem(items, constant=constant)

    def fastest(self, max_loss: float = math.inf) -> Picks:
        """Return the fastest choice whose summed loss is at most this."""
        problem = self.problem()
        return self._picked(solve(problem, max_loss).picks) if problem.items else {}

    def gentlest(self, saved: float) -> Picks:
        """Return the choice of least loss that saves so many seconds.

        Raises:
            GateMissedError: none saves so much.
        """
        problem = self.problem(-sum(choice.seconds for choice in self.open))
        return self._picked(least_loss(problem, -saved).picks)

    def _picked(self, picks: Mapping[str, str]) -> Picks:
        return {
            label: next(c for c in self.choices[label].candidates if c.name == name)
            for label, name in picks.items() if name != WHOLE
        }  # fmt: skip

    @property
    def saved_at_most(self) -> float:
        """Seconds that the fastest choice saves."""
        return self.saved(self.fastest())

    def saved(self, picks: Picks) -> float:
        """Return the seconds that a choice saves."""
        return sum(self.choices[label].seconds - one.seconds for label, one in picks.items())

    def within(self, judge: Callable[[Picks], Quality]) -> tuple[Picks, Quality] | None:
        """Return the fastest choice that is judged good, None where none is; each is tried before it is believed."""
        low, high, best = 0.0, math.inf, None
        limit, seen = self.request.noise, list[frozenset[tuple[str, str]]]()
        if limit == math.inf and self.samples is not None:
            limit = FIRST
        for _ in range(ATTEMPTS):
            picks = self.fastest(limit)
            key = frozenset((label, one.name) for label, one in picks.items())
            loss = sum(one.loss for one in picks.values())
            if not picks:
                if best is not None or low > 0.0 or high < math.inf:
                    break
                return None
            if key in seen:
                good = best is not None and key == frozenset((k, c.name) for k, c in best[0].items())
            else:
                seen.append(key)
                quality = judge(picks)
                good = quality.ok
                if good and (best is None or self.saved(picks) > self.saved(best[0])):
                    best = picks, quality
            if good and key == frozenset((k, c.name) for k, c in self.fastest().items()):
                break  # nothing is faster
            low, high = (max(limit, loss), high) if good else (low, min(limit, loss))
            if low > 0.0 and high / low < CLOSER:
                break
            limit = COARSE * low if high == math.inf else high / COARSE if low == 0.0 else math.sqrt(low * high)
        return best


def ranks_of(split: Split) -> list[int]:
    """Return the ranks that a split is tried at, rounded to what kernels are made for."""
    step = natural_step(split.limit)
    found = {max(step, round(split.limit * part / step) * step) for part in FRACTIONS}
    return sorted(rank for rank in found if rank <= split.limit)
