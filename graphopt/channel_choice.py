"""How many units of each channel group to keep, and which: `choose` by a threshold on scores, `allocate` by a program.

    choose      the same part of each group (local), or all units below one threshold (global); the threshold is moved
                until enough channels, parameters or MACs are gone
    allocate    the counts of least summed loss whose cost is within a bound: one item per group, its options counts,
                its losses those of `channel_losses.py`; costs are tables over the groups that share a layer

Counts are multiples of what the target computes in blocks (`targets.CHANNEL_STEPS`), unless the group is whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from graphopt.channel_costs import Counts, MacsModel, Polynomial
from graphopt.errors import GateMissedError, SpecError, did_you_mean
from graphopt.search import Option, Problem, Term, least_loss
from graphopt.targets import CHANNEL_STEPS

if TYPE_CHECKING:
    from graphopt.analysis.channels import Group
    from graphopt.channel_losses import Curve

__all__ = [
    "Allocation",
    "Counts",
    "MacsModel",
    "allocate",
    "allowed_counts",
    "candidates",
    "choose",
    "choose_by_loss",
    "elements_per_unit",
    "keep_first",
]

Array: TypeAlias = np.ndarray[Any, Any]

MEASURES: Mapping[str, str] = {"channels": "channels", "params": "parameters", "macs": "MACs"}
"""What a ratio may be of -> its name in messages."""

SCOPES = ("global", "local")

OPTIONS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.125)
"""Parts of a group that `allocate` chooses from, about: the nearest counts that are allowed."""

TIME_LIMIT = 20.0
"""Seconds for the solver."""

MOST_COLUMNS = 40_000
"""Combinations of counts up to which the program goes to the solver."""

_SLACK = 1e-9
_TOLERANCE = 2e-6  # of the solver, whose choices would else exceed the bound by as much


class Costs(Protocol):
    """What a choice of counts costs: a sum of tables over groups (`Polynomial` and `ChannelTimes` are such)."""

    def at(self, counts: Counts) -> float:
        """Return the cost with so many units kept."""
        ...

    def tables(self, options: Mapping[str, Sequence[int]]) -> dict[tuple[str, ...], dict[tuple[int, ...], float]]:
        """Return groups -> their counts -> cost, for the counts in `options`; a constant stands at no groups."""
        ...


def step_of(group: Group, round_to: int = 0, provider: str = "cpu") -> int:
    """Return the multiple that the units kept of a group must be.

    Args:
        group: it.
        round_to: elements of an axis that the multiple is to be; 0 for what suits the target.
        provider: short name of the target's execution provider.
    """
    each = elements_per_unit(group)
    wanted = round_to
    if not wanted:
        steps = CHANNEL_STEPS.get(provider, CHANNEL_STEPS["cpu"])
        wanted = next(step for width, step in steps if group.size * each >= width)
    return max(1, wanted // math.gcd(wanted, each))


def elements_per_unit(group: Group) -> int:
    """Return the fewest elements of an axis that a unit has: 1 for a channel, the depth of a head."""
    found = [int((site.units >= 0).sum()) // group.size for site in group.sites]
    return max(1, min((n for n in found if n), default=1))


def allowed_counts(group: Group, round_to: int = 0, least: int = 1, provider: str = "cpu") -> list[int]:
    """Return the counts of units that may be kept, the largest (all) first."""
    step = step_of(group, round_to, provider)
    fewest = min(group.size, max(1, least))
    counts = [n for n in range(group.size // step * step, 0, -step) if fewest <= n < group.size]
    return [group.size, *counts]


def keep_first(scores: Array, count: int) -> Array:
    """Return the indices of the highest scores, sorted: int64 (count,); of equal ones the first."""
    return np.sort(np.argsort(-np.asarray(scores, np.float64), kind="stable")[:count]).astype(np.int64)


def choose(
    groups: Sequence[Group],
    scores: Mapping[str, Array],
    *,
    ratio: float,
    of: str = "channels",
    scope: str = "global",
    round_to: int = 0,
    least: int = 1,
    macs: MacsModel,
    provider: str = "cpu",
) -> dict[str, Array]:
    """Return the units to keep of each group: sorted int64 indices by the group's name.

    Args:
        groups: those that may be cut.
        scores: (units,) by group, higher is worth keeping.
        ratio: part to remove, 0 <= ratio < 1.
        of: what of: `channels`, `params` or `macs`, all of the whole model.
        scope: `local`, about the same part of each group; `global`, all units below one threshold.
        round_to: multiple that is kept; 0 for the target's.
        least: units that are kept at least.
        macs: the model's costs.
        provider: short name of the target's execution provider.

    Raises:
        SpecError: an option that is out of range or unknown.
        GateMissedError: so much cannot be removed; the error says what can.
    """
    _check(ratio, of, scope)
    steps = {g.name: allowed_counts(g, round_to, least, provider) for g in groups}
    levels = _Levels(groups, scores, steps, scope)
    cost = macs.polynomial(of)
    if scope == "local" and of == "channels" and all(step_of(g, round_to, provider) == 1 for g in groups):
        counts = {g.name: _nearest(steps[g.name], (1.0 - ratio) * g.size) for g in groups}
    else:
        counts = _bisected(levels, cost, ratio, MEASURES[of])
    return {g.name: keep_first(scores[g.name], counts[g.name]) for g in groups}


def _check(ratio: float, of: str, scope: str) -> None:
    if not 0.0 <= ratio < 1.0:
        raise SpecError(f"a ratio of {ratio} cannot be removed", hint="0 <= ratio < 1: 0.3 removes 30 %")
    for name, known, what in ((of, MEASURES, "ratio of"), (scope, SCOPES, "scope")):
        if name not in known:
            raise SpecError(f"unknown {what} '{name}'", hint=did_you_mean(name, known) or f"known: {', '.join(known)}")


class _Levels:
    """Counts of all groups at rising levels: at level k of `last` the k lowest units are gone, before rounding."""

    def __init__(
        self, groups: Sequence[Group], scores: Mapping[str, Array], steps: Mapping[str, Sequence[int]], scope: str
    ) -> None:
        self.steps, self.scores = steps, scores
        self.sizes = {g.name: g.size for g in groups}
        self.last = sum(self.sizes.values())
        self.local = scope == "local"
        names = np.repeat(np.arange(len(groups)), [g.size for g in groups])
        every = np.concatenate([np.asarray(scores[g.name], np.float64) for g in groups]) if groups else np.zeros(0)
        self.names = [g.name for g in groups]
        self.sequence = names[np.argsort(every, kind="stable")]

    def counts(self, level: int) -> dict[str, int]:
        """Return the units kept of each group."""
        if self.local:
            return {n: _nearest(self.steps[n], size * (1.0 - level / self.last)) for n, size in self.sizes.items()}
        gone = np.bincount(self.sequence[:level], minlength=len(self.names))
        return {n: _nearest(self.steps[n], self.sizes[n] - int(gone[i])) for i, n in enumerate(self.names)}


def _nearest(counts: Sequence[int], wanted: float) -> int:
    return min(counts, key=lambda count: (abs(count - wanted), -count))


def _bisected(levels: _Levels, cost: Polynomial, ratio: float, what: str) -> dict[str, int]:
    """Return the counts of the first level that removes enough, and give back what is not needed of it."""
    whole = cost.at({})
    _check_known(ratio, whole, what)
    bound = (1.0 - ratio) * whole * (1.0 + _SLACK)
    least = cost.at(levels.counts(levels.last))
    if least > bound:
        raise _too_much(ratio, 1.0 - least / whole if whole else 0.0, what)
    low, high = 0, levels.last
    while low < high:
        middle = (low + high) // 2
        if cost.at(levels.counts(middle)) <= bound:
            high = middle
        else:
            low = middle + 1
    counts = levels.counts(high)
    before = levels.counts(max(0, high - 1))
    for name in sorted((n for n in counts if before[n] > counts[n]), key=lambda n: -float(np.max(levels.scores[n]))):
        if cost.at({**counts, name: before[name]}) <= bound:
            counts[name] = before[name]
    return counts


def _check_known(ratio: float, whole: float, what: str) -> None:
    if ratio and not whole:
        raise GateMissedError(
            f"no {what} are known that a part could be removed of", hint="no group can be cut, or shapes are missing"
        )


def _too_much(ratio: float, best: float, what: str) -> GateMissedError:
    return GateMissedError(
        f"{ratio:.1%} of the {what} cannot be removed",
        hint=f"at most {best:.1%} can, at the multiples that counts are kept at and with what may not be cut",
    )


@dataclass(frozen=True)
class Allocation:
    """How many units each group keeps.

    Attributes:
        counts: by group.
        cost: in the terms of what was bounded.
        loss: predicted noise at the model's outputs, relative to them.
        method: how it was found: `milp` or `greedy`.
        proved: whether none within the bound loses less, as far as the tables are right.
    """

    counts: dict[str, int]
    cost: float
    loss: float
    method: str
    proved: bool = False

    def kept(self, curves: Mapping[str, Curve]) -> dict[str, Array]:
        """Return which units are kept of each group: sorted int64 indices."""
        return {name: keep_first(curves[name].scores, count) for name, count in self.counts.items()}


def allocate(
    groups: Sequence[Group],
    curves: Mapping[str, Curve],
    costs: Costs,
    bound: float,
    *,
    round_to: int = 0,
    least: int = 1,
    provider: str = "cpu",
    time_limit: float = TIME_LIMIT,
) -> Allocation:
    """Return the counts of least summed loss whose cost is at most `bound`.

    Args:
        groups: those that may be cut.
        curves: by group, from `channel_losses.losses`.
        costs: what counts cost: `MacsModel.polynomial("macs")`, or `ChannelTimes`.
        bound: in the same terms.
        round_to: multiple that is kept; 0 for the target's.
        least: units that are kept at least.
        provider: short name of the target's execution provider.
        time_limit: seconds for the solver.

    Raises:
        GateMissedError: not even the cheapest counts are within the bound; the error says what they cost.
    """
    options = {g.name: candidates(allowed_counts(g, round_to, least, provider)) for g in groups}
    losses = {g.name: {n: curves[g.name].loss(g.size - n) for n in options[g.name]} for g in groups}
    tables = costs.tables(options)
    found = _descend(options, losses, _Tables(tables), bound)
    if sum(len(table) for table in tables.values()) <= MOST_COLUMNS:
        most = found.loss if found is not None else math.inf
        solved = _solved(_within(options, losses, most), losses, tables, bound, time_limit)
        if solved is not None and (found is None or solved.loss <= found.loss * (1.0 + _SLACK)):
            return solved
    if found is None:
        cheapest = _Tables(tables).cheapest(options)
        raise GateMissedError(
            f"no counts cost {bound:.6g} or less",
            hint=f"the cheapest cost {cheapest:.6g}, {cheapest / max(costs.at({}), 1e-30):.1%} of the whole model",
        )
    return found


def choose_by_loss(
    groups: Sequence[Group],
    curves: Mapping[str, Curve],
    *,
    ratio: float,
    of: str = "macs",
    round_to: int = 0,
    least: int = 1,
    macs: MacsModel,
    provider: str = "cpu",
) -> Allocation:
    """Return the counts of least summed loss with a part of the channels, parameters or MACs removed.

    Args:
        groups: those that may be cut, as they are now.
        curves: by group, from `channel_losses.losses`.
        ratio: part to remove, 0 <= ratio < 1, of `macs` with its own sizes: those of the model at first.
        of: what of: `channels`, `params` or `macs`.
        round_to: multiple that is kept; 0 for the target's.
        least: units that are kept at least.
        macs: the model's costs.
        provider: short name of the target's execution provider.

    Raises:
        SpecError: an option that is out of range or unknown.
        GateMissedError: so much cannot be removed; the error says what can.
    """
    _check(ratio, of, "global")
    cost = macs.polynomial(of)
    whole = cost.at({})
    _check_known(ratio, whole, MEASURES[of])
    cheapest = cost.at({g.name: allowed_counts(g, round_to, least, provider)[-1] for g in groups})
    bound = (1.0 - ratio) * whole
    if cheapest > bound * (1.0 + _SLACK):
        raise _too_much(ratio, 1.0 - cheapest / whole if whole else 0.0, MEASURES[of])
    return allocate(groups, curves, cost, bound, round_to=round_to, least=least, provider=provider)


def candidates(counts: Sequence[int]) -> list[int]:
    """Return some ten counts, the whole group first."""
    return sorted({_nearest(counts, part * counts[0]) for part in OPTIONS} | {counts[-1]}, reverse=True)


def _within(
    options: Mapping[str, Sequence[int]], losses: Mapping[str, Mapping[int, float]], most: float
) -> dict[str, list[int]]:
    """Return the counts that lose no more by themselves than a choice that is known: few numbers of one size remain."""
    return {g: [n for n in counts if losses[g][n] <= most] or [counts[0]] for g, counts in options.items()}


def _open(groups: Sequence[str], counts: Sequence[int], options: Mapping[str, Sequence[int]]) -> bool:
    return all(n in options[g] for g, n in zip(groups, counts, strict=True))


class _Tables:
    """Costs of a choice, quickly again after one change."""

    def __init__(self, tables: Mapping[tuple[str, ...], Mapping[tuple[int, ...], float]]) -> None:
        self.tables = tables
        self.around: dict[str, list[tuple[str, ...]]] = {}
        for groups in tables:
            for group in groups:
                self.around.setdefault(group, []).append(groups)

    def at(self, counts: Mapping[str, int]) -> float:
        """Return the cost of all."""
        return sum(table[tuple(counts[g] for g in groups)] for groups, table in self.tables.items())

    def gain(self, counts: Mapping[str, int], group: str, count: int) -> float:
        """Return what another count of one group saves."""
        saved = 0.0
        for groups in self.around.get(group, ()):
            now = tuple(counts[g] for g in groups)
            then = tuple(count if g == group else counts[g] for g in groups)
            saved += self.tables[groups][now] - self.tables[groups][then]
        return saved

    def cheapest(self, options: Mapping[str, Sequence[int]]) -> float:
        """Return the cost with the fewest of all."""
        return self.at({g: counts[-1] for g, counts in options.items()})


def _descend(
    options: Mapping[str, Sequence[int]], losses: Mapping[str, Mapping[int, float]], tables: _Tables, bound: float
) -> Allocation | None:
    """Return what single cuts lead to, each time the one that saves most cost per loss, then what can be given back."""
    counts = {g: found[0] for g, found in options.items()}
    cost = tables.at(counts)
    while cost > bound * (1.0 + _SLACK):
        best: tuple[float, str, int, float] | None = None
        for group, found in options.items():
            for count in found:
                if count >= counts[group] or (gain := tables.gain(counts, group, count)) <= _SLACK * abs(cost):
                    continue
                more = losses[group][count] - losses[group][counts[group]]
                rate = min(gain, cost - bound) / max(more, 1e-30)
                if best is None or rate > best[0]:
                    best = rate, group, count, gain
        if best is None:
            return None
        counts[best[1]] = best[2]
        cost -= best[3]
    for group, count in _dearest(counts, losses):
        for larger in options[group]:
            if larger > count and cost - (gain := tables.gain(counts, group, larger)) <= bound:
                counts[group], cost = larger, cost - gain
                break
    return Allocation(counts, tables.at(counts), sum(losses[g][n] for g, n in counts.items()), "greedy")


def _dearest(counts: Mapping[str, int], losses: Mapping[str, Mapping[int, float]]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: -losses[item[0]][item[1]])


def _solved(
    options: Mapping[str, Sequence[int]],
    losses: Mapping[str, Mapping[int, float]],
    tables: Mapping[tuple[str, ...], Mapping[tuple[int, ...], float]],
    bound: float,
    time_limit: float,
) -> Allocation | None:
    """Return the solver's choice; None where it finds none in time."""
    tables = {g: {c: cost for c, cost in t.items() if _open(g, c, options)} for g, t in tables.items()}
    own = {g: tables.get((g,), {}) for g in options}
    items = {g: {str(n): Option(own[g].get((n,), 0.0), losses[g][n]) for n in found} for g, found in options.items()}
    terms = [
        Term(groups, {tuple(map(str, counts)): cost for counts, cost in table.items()})
        for groups, table in tables.items()
        if len(groups) > 1
    ]
    constant = tables.get((), {}).get((), 0.0)
    try:
        found = least_loss(Problem(items, terms, constant), bound * (1.0 - _TOLERANCE), time_limit=time_limit)
    except GateMissedError:
        return None
    counts = {g: int(pick) for g, pick in found.picks.items()}
    return Allocation(counts, found.cost, found.loss, found.method, proved=found.proved)
