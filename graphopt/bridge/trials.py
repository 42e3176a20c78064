"""The learning rate that suits a training, found by short trainings.

Between tasks the best rates lie a factor of a hundred apart: one rate for all destroys the one network and leaves the
other as it was.  Each candidate trains for a few updates, its schedule and all, from the weights that training starts
from; the loss on batches that it did not see judges it.  From the middle of the ladder the search goes up or down as
long as that helps.

The best rate of a short training is too small for a long one, which has the time to settle (Wu and others 2018,
"Understanding short-horizon bias").  Measured on four networks, the best rate grows as the number of updates does
where much was lost, and less than as its root where little was: what is taken lies between, and no higher than a rate
that did harm.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graphopt.bridge.averaging import copy_into
from graphopt.bridge.parallel import Team
from graphopt.bridge.parts import Data, Loss, Trainable
from graphopt.bridge.plan import Plan
from graphopt.bridge.update import Update
from graphopt.training import TrainSettings

FIRST = {"sgd": 1e-2}
"""Rate that the search begins with, by optimizer; of others `FIRST_ADAPTIVE`."""
FIRST_ADAPTIVE = 3.2e-4
FACTOR = 10.0**0.5
LOWEST, TOP = 1e-5, 0.1
"""Relative rates that are tried: below nothing moves, above each update makes another network."""
MOST = 8
"""Trials, at most."""
PART, FEWEST, LONGEST = 32, 16, 48
"""Updates of a trial: one of so many of the training; at least, at most."""
NEARLY, EQUAL = 0.2, 0.01
"""What a higher rate may miss of the best one's gain, or of the loss, to be taken in its place."""
GROWTH = 2 / 3
"""Power of its length that the rate of a training grows with; of codes it does not: they flip as often as before."""
HIGHEST = 0.03
"""Largest relative rate that a trial's rate grows to: above it, long trainings were no better."""
JUDGED_ROWS = 256
"""Rows that judge a trial, about."""


@dataclass(frozen=True)
class Search:
    """What trials are made with; the weights are afterwards what they were.

    Attributes:
        bridge, data, objective, settings, plan, seed, group: as in the training.
        told: is told the rate that is tried.
    """

    bridge: Trainable
    data: Data
    objective: Loss
    settings: TrainSettings
    plan: Plan
    seed: int
    group: Team
    told: Callable[[float], None]

    def run(self) -> tuple[float, dict[float, float]]:
        """Return the rate for the whole training, and the loss that each trial led to, by rate."""
        found = self._trials()
        best = _best(found)
        rate = best
        if not self.bridge.coded:
            rate *= (self.plan.total / self._length) ** GROWTH
        if self.settings.relative:
            rate = min(rate, HIGHEST)
        harmful = [tried for tried, loss in found.items() if tried > best and loss > found[0.0]]
        return max(best, min([rounded(rate), *harmful])), found

    def _trials(self) -> dict[float, float]:
        """Return the loss that each rate led to, infinite where it was no number, by rate; rate 0: without training."""
        first = FIRST.get(self.settings.optimizer, FIRST_ADAPTIVE)
        found = {0.0: self.loss(self._update(0.0))}
        if not math.isfinite(found[0.0]):
            return {**found, first: math.inf}  # training will say why
        found[first] = self._trial(first)
        for factor in (FACTOR, 1.0 / FACTOR):
            if factor > 1.0 and found[first] > found[0.0] + EQUAL * abs(found[0.0]):
                continue  # it destroys already
            rate = first
            while len(found) <= MOST and _best(found) == rate and self._may_try(rate * factor):
                rate = rounded(rate * factor)
                found[rate] = self._trial(rate)
            if _best(found) > first:
                break
        return dict(sorted(found.items()))

    def _may_try(self, rate: float) -> bool:
        return not self.settings.relative or LOWEST <= rounded(rate) <= TOP

    def _trial(self, rate: float) -> float:
        self.told(rate)
        update = self._update(rate)
        try:
            for step, group in enumerate(itertools.islice(self._unseen(), update.plan.total)):
                if not math.isfinite(update.make(group, step)["loss"]):
                    return math.inf
            return self.loss(update)
        finally:
            copy_into(update.tensors, update.initial)

    def _update(self, rate: float) -> Update:
        return Update(
            self.bridge, self.objective, replace(self.settings, rate=rate), replace(self.plan, total=self._length),
            self.seed, self.group,
        )  # fmt: skip

    @property
    def _length(self) -> int:
        return min(self.plan.total, LONGEST, max(FEWEST, self.plan.total // PART))

    @property
    def _judging(self) -> int:
        return max(1, min(self.plan.per_epoch // 4, math.ceil(JUDGED_ROWS / self.plan.rows)))

    def _unseen(self) -> Iterator[Sequence[Any]]:
        """Yield the batches of updates: in the first epoch none of those that judge."""
        yield from itertools.islice(self._epoch(0), self._judging, None)
        for epoch in itertools.count(1):
            yield from self._epoch(epoch)

    def _epoch(self, epoch: int) -> Iterator[Sequence[Any]]:
        return self.plan.groups(self.data, epoch, seed=self.seed, rank=self.group.rank)

    def loss(self, update: Update) -> float:
        """Return the loss of the module as it is, on what judges trials; infinite where it is no number."""
        loss = update.loss(itertools.islice(self._epoch(0), self._judging))
        return loss if math.isfinite(loss) else math.inf


def _best(trials: dict[float, float]) -> float:
    """Return the highest rate that is nearly as good as the best one; the lowest where all ended in no number."""
    rates = [rate for rate, loss in trials.items() if rate and loss <= _enough(trials)]
    return max(rates) if math.isfinite(_enough(trials)) else min(rates)


def _enough(trials: dict[float, float]) -> float:
    """Return the loss up to which a trial is nearly as good as the best one."""
    least = min(loss for rate, loss in trials.items() if rate)
    before = trials[0.0]
    return least + max(NEARLY * (before - least), EQUAL * abs(least)) if math.isfinite(before) else least


def rounded(rate: float) -> float:
    """Return a rate in two digits: the square root of 10 is no number for people."""
    return float(f"{rate:.1e}")
