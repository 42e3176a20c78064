"""The learning rate of every update: a linear warm-up times a decay.

    rate(u) = largest * warm(u) * decayed(u)        for updates u = 0, 1, ..., total - 1

`warm` rises linearly from 0 over the first `warmup` of all updates, in which `decayed` stays where it begins.  Then,
with p from 0 (first update after the warm-up) to 1 (last update) and d = `decay`:

    constant     1
    exponential  d ** p
    cosine       d + (1 - d) * (1 + cos(pi * p)) / 2            (Loshchilov and Hutter 2017, without restarts)
    one-cycle    up to 1 over the first 30 % of p by half a cosine, from 1/25; then down to d by another
                 (Smith and Topin 2018; the momentum stays as it is)
    step         d ** floor(epochs since the beginning / every)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from graphopt.training import TrainSettings

RISING = 0.3
"""Part of one-cycle, after the warm-up, in which the rate rises."""

LOWEST = 1 / 25
"""Where one-cycle begins, as a part of the largest rate."""


@dataclass(frozen=True)
class Schedule:
    """The rate of each update.

    Attributes:
        settings: schedule, decay, every and warm-up are taken from it.
        largest: rate.
        total: updates in all.
        per_epoch: updates of an epoch.
    """

    settings: TrainSettings
    largest: float
    total: int
    per_epoch: int

    @property
    def warm(self) -> int:
        """Updates of the warm-up."""
        return round(self.settings.warmup * self.total)

    def rate(self, update: int) -> float:
        """Return the rate of an update, counted from 0."""
        warm = self.warm
        rising = (update + 1) / (warm + 1) if update < warm else 1.0
        return self.largest * rising * self._decayed(update)

    def _decayed(self, update: int) -> float:
        kind, low = self.settings.schedule, self.settings.decay
        if kind == "step":
            every = max(1, self.per_epoch) * self.settings.every
            return math.pow(low, update // every) if every else 1.0
        place = min(1.0, max(0, update - self.warm) / max(1, self.total - 1 - self.warm))
        if kind == "exponential":
            return math.pow(low, place)
        if kind == "cosine":
            return low + (1.0 - low) * _half_cosine(place)
        if kind == "one-cycle":
            if place < RISING:
                return 1.0 - (1.0 - LOWEST) * _half_cosine(place / RISING)
            return low + (1.0 - low) * _half_cosine((place - RISING) / (1.0 - RISING))
        return 1.0


def _half_cosine(place: float) -> float:
    """Return 1 at place 0, 0 at place 1, smooth between."""
    return (1.0 + math.cos(math.pi * place)) / 2.0
