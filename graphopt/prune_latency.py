"""A cut to a measured latency: predict, cut, measure, correct the prediction, and again.

Times of any channel counts are learned from a few models (`channel_times`), the counts are those of least loss within
a predicted time (`channel_choice.allocate`).  What comes out is timed beside the lossless model, and what cuts were
said to save is corrected by what they did save, until the measured ratio is what was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from graphopt import spec
from graphopt.base import Context
from graphopt.channel_choice import Allocation, allocate, allowed_counts
from graphopt.channel_costs import MacsModel
from graphopt.channel_losses import Curve, magnitudes
from graphopt.channel_noise import losses
from graphopt.channel_times import ChannelTimes, measure
from graphopt.errors import GateMissedError
from graphopt.judge import Comparison
from graphopt.model import Model
from graphopt.pipeline import Pipeline, Settings
from graphopt.prune_request import PruneRequest, Recipe
from graphopt.samples import Samples

if TYPE_CHECKING:
    from graphopt.analysis.channels import Group

ABOVE, BELOW = 0.02, 0.08
"""A measured ratio is what was asked for when it lies by at most so much above or below."""

ATTEMPTS = 5
"""Cuts that are built and measured."""

SLOWEST = 6
"""Layers that a refusal names."""


@dataclass(frozen=True)
class Subject:
    """What is cut.

    Attributes:
        base: the canonical model.
        groups: those of its channel groups that may be cut.
        ctx: its samples, if there are any.
        samples: what it is timed on.
        finish: passes behind the cut.
    """

    base: Model
    groups: list[Group]
    ctx: Context
    samples: Samples
    finish: tuple[spec.Step, ...]
    settings: Settings
    request: PruneRequest
    recipe: Recipe
    progress: Callable[[str], None]

    def make(self, counts: Mapping[str, int]) -> Model:
        """Return the model with so many units, as it will run; which ones does not matter to its time."""
        steps = (*self.recipe.quick(counts), *self.finish)
        return Pipeline(steps).run(self.base, samples=self.samples, settings=self.settings).model


class Build(Protocol):
    """Builds a cut and times it."""

    def __call__(self, counts: Mapping[str, int], accept: Callable[[Comparison], bool]) -> Comparison:
        """Return the time over the lossless model's; `accept` tells whether a look is enough."""


@dataclass
class LatencySearch:
    """Looks for the counts that take a part of the lossless model's time.

    Attributes:
        subject: what is cut.
        kept: the part.
        closest: what came nearest: its counts and its measured ratio.
    """

    subject: Subject
    kept: float
    closest: tuple[Mapping[str, int], float] | None = None
    _curves: dict[str, Curve] = field(default_factory=dict)

    def run(self, build: Build) -> Comparison:
        """Build and time cuts until one takes the part asked for; that one's timing is returned.

        Raises:
            GateMissedError: none does.
        """
        subject = self.subject
        subject.progress("measuring what each group loses")
        groups = subject.groups
        sampled = subject.ctx.samples is not None
        self._curves = losses(groups, subject.ctx, progress=subject.progress) if sampled else magnitudes(groups)
        macs = MacsModel.of(subject.base, groups, subject.samples)
        request = subject.request
        times = measure(
            subject.base, groups, subject.make, macs, subject.samples, round_to=request.round_to, least=request.least,
            provider=request.provider, threads=request.threads[0], budget=request.budget / 3, seed=request.seed,
            progress=subject.progress,
        )  # fmt: skip
        wanted = self.kept - (BELOW - ABOVE) / 2
        for _ in range(ATTEMPTS):
            found = self._allocated(times, wanted)
            timing = build(found.counts, self.accepted)
            ratio = timing.overall.median
            if self.closest is None or abs(ratio - self.kept) < abs(self.closest[1] - self.kept):
                self.closest = found.counts, ratio
            if self.kept - BELOW <= ratio <= self.kept + ABOVE:
                return timing
            times = times.corrected(found.counts, ratio)
        raise self._missed(times)

    def accepted(self, comparison: Comparison) -> bool:
        """Tell whether a look is enough: the interval lies inside what is accepted, or outside of it."""
        ratio = comparison.overall
        low, high = self.kept - BELOW, self.kept + ABOVE
        return (ratio.low >= low and ratio.high <= high) or ratio.low > high or ratio.high < low

    def _allocated(self, times: ChannelTimes, wanted: float) -> Allocation:
        request = self.subject.request
        try:
            return allocate(
                self.subject.groups, self._curves, times, wanted * times.at({}), round_to=request.round_to,
                least=request.least, provider=request.provider,
            )  # fmt: skip
        except GateMissedError:
            raise self._missed(times) from None

    def _missed(self, times: ChannelTimes) -> GateMissedError:
        """Return what can be reached, and which layers keep the rest."""
        least = {group.name: request_least(group, self.subject.request) for group in self.subject.groups}
        rows = sorted(times.explain(least), key=lambda row: -row.cut_us)[:SLOWEST]
        slow = ", ".join(f"{row.name or 'all else'} {row.cut_us:.0f} of {row.whole_us:.0f} µs" for row in rows)
        measured = f"; the nearest that was measured is {self.closest[1]:.3f}" if self.closest else ""
        return GateMissedError(
            f"{self.kept:g} of the lossless model's time was not reached: with all groups cut as far as they go "
            f"{times.ratio(least):.3f} is predicted{measured}",
            hint=f"what stays: {slow}",
        )


def request_least(group: Group, request: PruneRequest) -> int:
    """Return the fewest units that may stay of a group."""
    return allowed_counts(group, request.round_to, request.least, request.provider)[-1]
