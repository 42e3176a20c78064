"""Choices under a budget: one option per item, so that the summed cost is least and the summed loss within a bound.

Items are what is decided on (the precision of a layer, the channels of a group, the rank of a factor), options what
each may be.  A cost that depends on several items at once, such as the price of a border between two layers of
unlike precision, is a `Term`: a table from their options to a cost.  With x[i, o] = 1 where item i takes option o,
and y[t, c] = 1 where the items of term t take the combination c,

    minimise    sum cost[i, o] x[i, o] + sum cost[t, c] y[t, c]
    subject to  sum over o of x[i, o] = 1                         for each item i
                sum over c with c[i] = o of y[t, c] = x[i, o]     for each term t, item i of t and option o
                sum loss[i, o] x[i, o] <= bound

y needs no integrality where the items of a term are decided.  Without the bound the relaxation is exact on trees and
for binary items with borders that only cost (a minimum cut), so few branches are needed.  Solved by HiGHS.
Source: Savchynskyy, Discrete Graphical Models (2019), chapter 4, for the local polytope.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np

from graphopt.errors import DataError, GateMissedError

Picks: TypeAlias = dict[str, str]
"""Item -> the name of its option."""

TIME_LIMIT = 20.0
"""Seconds that the solver may take."""

_SLACK = 1e-9
"""Sums that exceed a bound by so small a part of it are of rounding."""


@dataclass(frozen=True)
class Option:
    """What one option of an item costs, and what it adds to the loss (never below zero)."""

    cost: float
    loss: float = 0.0


@dataclass(frozen=True)
class Term:
    """A cost that depends on the options of several items together; combinations left out cost nothing."""

    items: tuple[str, ...]
    costs: Mapping[tuple[str, ...], float]
    name: str = ""


@dataclass(frozen=True)
class Problem:
    """What there is to choose.

    Attributes:
        items: item -> option -> its cost and loss; at least one option each.
        terms: costs that several items share.
        constant: cost of what is not decided on.

    Raises:
        DataError: an item without options, a number that is none or a loss below zero, a term of unknown items.
    """

    items: Mapping[str, Mapping[str, Option]]
    terms: Sequence[Term] = ()
    constant: float = 0.0

    def __post_init__(self) -> None:
        for item, options in self.items.items():
            if not options:
                raise DataError("there is nothing to choose from", at=item)
            for name, option in options.items():
                if not (math.isfinite(option.cost) and math.isfinite(option.loss) and option.loss >= 0.0):
                    raise DataError(
                        f"cost {option.cost} and loss {option.loss} of '{name}' cannot be weighed", at=item,
                        hint="costs are finite, losses finite and not below zero",
                    )  # fmt: skip
        for term in self.terms:
            _check_term(term, self.items)

    def cost(self, picks: Mapping[str, str]) -> float:
        """Return the summed cost of a choice."""
        own = sum(options[picks[item]].cost for item, options in self.items.items())
        shared = sum(term.costs.get(tuple(picks[i] for i in term.items), 0.0) for term in self.terms)
        return self.constant + own + shared

    def loss(self, picks: Mapping[str, str]) -> float:
        """Return the summed loss of a choice."""
        return sum(options[picks[item]].loss for item, options in self.items.items())

    def safest(self) -> Picks:
        """Return the options of least loss, the cheaper of equals."""
        return {
            item: min(options, key=lambda name: (options[name].loss, options[name].cost))
            for item, options in self.items.items()
        }


def _check_term(term: Term, items: Mapping[str, Mapping[str, Option]]) -> None:
    where = term.name or ", ".join(term.items)
    if not term.items or len(set(term.items)) != len(term.items):
        raise DataError("a term is about different items", at=where)
    for item in term.items:
        if item not in items:
            raise DataError(f"there is no item '{item}'", at=where)
    for combination, cost in term.costs.items():
        known = len(combination) == len(term.items) and all(
            option in items[item] for item, option in zip(term.items, combination, strict=True)
        )
        if not known or not math.isfinite(cost):
            raise DataError(f"cost {cost} of {combination} cannot be weighed", at=where)


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        picks: item -> option.
        cost, loss: summed.
        method: `milp`, `greedy`, or `fixed` where there was nothing to choose.
        proved: whether no choice within the bound costs less.
        gap: by how much a better one may be better at most, as a part of what is minimised.
    """

    picks: Picks
    cost: float
    loss: float
    method: Literal["milp", "greedy", "fixed"]
    proved: bool = False
    gap: float = math.inf

    def having(self, option: str) -> frozenset[str]:
        """Return the items that take an option of this name."""
        return frozenset(item for item, pick in self.picks.items() if pick == option)


def solve(problem: Problem, max_loss: float = math.inf, *, time_limit: float = TIME_LIMIT) -> Choice:
    """Return the cheapest choice whose loss is at most `max_loss`.

    Where time runs out, the best choice found so far, never one that is dearer than the greedy one.

    Raises:
        GateMissedError: even the options of least loss exceed the bound.
    """
    _check_reachable(problem, max_loss)
    return _best(problem, max_loss, time_limit)


def least_loss(problem: Problem, max_cost: float, *, time_limit: float = TIME_LIMIT) -> Choice:
    """Return the choice of least loss whose cost is at most `max_cost`.

    Raises:
        GateMissedError: the cheapest choice costs more, or none that cheap was found in time.
    """
    found = _by_milp(problem, "loss", max_cost, time_limit) if problem.items else None
    if found is None:
        cheapest = solve(problem, time_limit=time_limit)
        if not _within(cheapest.cost, max_cost):
            raise GateMissedError(
                f"no choice costs {max_cost:.6g} or less", hint=f"the cheapest one found costs {cheapest.cost:.6g}"
            )
        return cheapest
    return found


def greedy(problem: Problem, max_loss: float = math.inf) -> Choice:
    """Return what single changes lead to, each time the one that saves most cost per loss within the bound.

    It starts from the options of least loss, and cannot pay for a border before what lies behind it pays it back.

    Raises:
        GateMissedError: even the options of least loss exceed the bound.
    """
    _check_reachable(problem, max_loss)
    state = _Greedy(problem)
    loss = problem.loss(state.picks)
    while True:
        best: tuple[float, float, str, str] | None = None
        for item, moves in state.moves.items():
            for name, gain, more in moves:
                if not _within(loss + more, max_loss):
                    continue
                rate = gain / more if more > 0.0 else math.inf
                if best is None or (rate, gain) > best[:2]:
                    best = (rate, gain, item, name)
        if best is None:
            return Choice(state.picks, problem.cost(state.picks), problem.loss(state.picks), "greedy")
        state.take(best[2], best[3])
        loss = problem.loss(state.picks)


class _Greedy:
    """A choice in the making: for each item the moves that gain, with what they gain and lose."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.picks = problem.safest()
        self.around: dict[str, list[Term]] = defaultdict(list)
        for term in problem.terms:
            for item in term.items:
                self.around[item].append(term)
        self.moves = {item: self._moves(item) for item in problem.items}

    def take(self, item: str, option: str) -> None:
        """Let an item take an option; what its neighbours would gain changes."""
        self.picks[item] = option
        for near in dict.fromkeys([item, *(i for term in self.around[item] for i in term.items)]):
            self.moves[near] = self._moves(near)

    def _moves(self, item: str) -> list[tuple[str, float, float]]:
        options = self.problem.items[item]
        now = options[self.picks[item]]
        before = self._cost(item, self.picks[item])
        found = []
        for name, option in options.items():
            gain = before - self._cost(item, name)
            if gain > _SLACK * max(1e-12, abs(before)):
                found.append((name, gain, option.loss - now.loss))
        return found

    def _cost(self, item: str, option: str) -> float:
        """Return what depends on the item, were this its option."""
        shared = sum(
            term.costs.get(tuple(option if i == item else self.picks[i] for i in term.items), 0.0)
            for term in self.around[item]
        )
        return self.problem.items[item][option].cost + shared


def uniform(problem: Problem, option: str) -> Choice:
    """Return the choice in which every item that has this option takes it, the others their least lossy one."""
    picks = {
        i: option if option in o else pick
        for (i, o), pick in zip(problem.items.items(), problem.safest().values(), strict=True)
    }
    return Choice(picks, problem.cost(picks), problem.loss(picks), "fixed")


def _check_reachable(problem: Problem, max_loss: float) -> None:
    least = problem.loss(problem.safest())
    if not _within(least, max_loss):
        raise GateMissedError(
            f"no choice keeps the loss within {max_loss:.6g}", hint=f"the least that can be had is {least:.6g}"
        )


def _within(value: float, bound: float) -> bool:
    return value <= bound + _SLACK * abs(bound) if math.isfinite(bound) else value <= bound


def _best(problem: Problem, max_loss: float, time_limit: float) -> Choice:
    """Return the solver's choice, the greedy one where that is better or the solver ran out of time."""
    rough = greedy(problem, max_loss)
    if not problem.items:
        return rough
    found = _by_milp(problem, "cost", max_loss, time_limit)
    if found is None or found.cost > rough.cost:
        return rough
    return found


@dataclass
class _Program:
    """A mixed integer program in the making: columns with their objective, rows with their bounds."""

    objective: list[float] = field(default_factory=list)
    whole: list[int] = field(default_factory=list)
    entries: tuple[list[float], list[int], list[int]] = field(default_factory=lambda: ([], [], []))
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)

    def column(self, objective: float, whole: int) -> int:
        self.objective.append(objective)
        self.whole.append(whole)
        return len(self.objective) - 1

    def row(self, coefficients: Mapping[int, float], low: float, high: float) -> None:
        values, rows, columns = self.entries
        values.extend(coefficients.values())
        rows.extend([len(self.low)] * len(coefficients))
        columns.extend(coefficients)
        self.low.append(low)
        self.high.append(high)

    def solve(self, time_limit: float) -> Any:
        """Return SciPy's result; objective and bounded rows are scaled by whoever made them."""
        from scipy.optimize import Bounds, LinearConstraint, milp  # noqa: PLC0415  (0.3 s, for those who need it)
        from scipy.sparse import coo_array  # noqa: PLC0415  (as above)

        values, rows, columns = self.entries
        matrix = coo_array((values, (rows, columns)), shape=(len(self.low), len(self.objective))).tocsr()
        with _silent_stdout():
            return milp(
                np.array(self.objective), integrality=np.array(self.whole), bounds=Bounds(0.0, 1.0),
                constraints=LinearConstraint(matrix, self.low, self.high),
                options={"time_limit": max(0.01, time_limit), "mip_rel_gap": 0.0},
            )  # fmt: skip


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """Keep off standard output what HiGHS prints there whatever its options are: it may hold our JSON."""
    try:
        sys.stdout.flush()
        kept = os.dup(1)
    except (OSError, ValueError, AttributeError):  # there is none
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123  (a device, by its number)
            os.dup2(nowhere.fileno(), 1)
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _by_milp(problem: Problem, aim: Literal["cost", "loss"], bound: float, time_limit: float) -> Choice | None:
    """Return the best choice by integer programming; None where there is none, or none was found in time."""
    allowed = _allowed(problem, bound) if aim == "cost" else {i: list(o) for i, o in problem.items.items()}
    program = _Program()
    x: dict[tuple[str, str], int] = {}
    limited: dict[int, float] = {}
    cost_scale, loss_scale = _scales(problem)
    for item, names in allowed.items():
        for name in names:
            option = problem.items[item][name]
            cost, loss = option.cost / cost_scale, option.loss / loss_scale
            x[item, name] = program.column(cost if aim == "cost" else loss, 1)
            limited[x[item, name]] = loss if aim == "cost" else cost
        program.row({x[item, name]: 1.0 for name in names}, 1.0, 1.0)
    for term in problem.terms:
        _add_term(program, term, allowed, x, limited if aim == "loss" else None, cost_scale)
    limit = bound / loss_scale if aim == "cost" else (bound - problem.constant) / cost_scale
    _add_limit(program, limited, limit)
    result = program.solve(time_limit)
    if result.x is None:
        return None
    picks = {item: max(names, key=lambda n, i=item: float(result.x[x[i, n]])) for item, names in allowed.items()}  # type: ignore[misc]
    cost, loss = problem.cost(picks), problem.loss(picks)
    if not _within(loss if aim == "cost" else cost, bound):
        return None
    gap = float(result.mip_gap) if result.mip_gap is not None else math.inf
    return Choice(picks, cost, loss, "milp", proved=result.status == 0, gap=gap)


def _add_limit(program: _Program, limited: Mapping[int, float], limit: float) -> None:
    """Bound a sum; scaled so that the solver's tolerance, 1e-6, is a small part of the bound."""
    used = {column: value for column, value in limited.items() if value != 0.0}
    if not math.isfinite(limit) or not used:
        return
    scale = abs(limit) or max(map(abs, used.values()))
    program.row({c: v / scale for c, v in used.items()}, -math.inf, limit / scale)


def _allowed(problem: Problem, max_loss: float) -> dict[str, list[str]]:
    """Return the options that fit the bound where all other items take their least loss: few large numbers remain."""
    least = {item: min(o.loss for o in options.values()) for item, options in problem.items.items()}
    room = max_loss - sum(least.values())
    slack = _SLACK * max(abs(max_loss), 0.0) if math.isfinite(max_loss) else 0.0
    return {
        item: [name for name, o in options.items() if o.loss - least[item] <= max(room, 0.0) + slack]
        for item, options in problem.items.items()
    }


def _scales(problem: Problem) -> tuple[float, float]:
    """Return the largest cost and loss: what the solver sees is of the order of one."""
    costs = [abs(o.cost) for options in problem.items.values() for o in options.values()]
    costs += [abs(cost) for term in problem.terms for cost in term.costs.values()]
    losses = [o.loss for options in problem.items.values() for o in options.values()]
    return max(costs, default=0.0) or 1.0, max(losses, default=0.0) or 1.0


def _add_term(
    program: _Program, term: Term, allowed: Mapping[str, Sequence[str]], x: Mapping[tuple[str, str], int],
    limited: dict[int, float] | None, scale: float,
) -> None:  # fmt: skip
    """Add the columns of a term's combinations and tie them to the items; `limited` takes their cost where given."""
    combinations = list(itertools.product(*(allowed[item] for item in term.items)))
    costs = [term.costs.get(c, 0.0) / scale for c in combinations]
    if not any(costs):
        return
    y = [program.column(0.0 if limited is not None else cost, 0) for cost in costs]
    if limited is not None:
        limited.update(zip(y, costs, strict=True))
    for place, item in enumerate(term.items):
        for name in allowed[item]:
            row = {column: 1.0 for column, c in zip(y, combinations, strict=True) if c[place] == name}
            row[x[item, name]] = -1.0
            program.row(row, 0.0, 0.0)


class Costs(Protocol):
    """What `assign` needs of a latency model (`latency.LatencyModel` is one)."""

    def problem(self, noise: Mapping[str, float]) -> Problem:
        """Return the choice between `float` and `int8` for each layer of `noise`, costs in seconds."""
        ...

    def predict(self, int8: Iterable[str]) -> float:
        """Return the latency with these layers in int8, in seconds."""
        ...


@dataclass(frozen=True)
class Assignment:
    """Which layers run in int8.

    Attributes:
        int8: their labels; all others stay float.
        seconds: predicted latency of the whole model.
        noise: predicted noise power at the output, relative to the signal.
        choice: how it was found.
    """

    int8: frozenset[str]
    seconds: float
    noise: float
    choice: Choice

    @property
    def sqnr(self) -> float:
        """Signal to noise at the output, in dB."""
        return -10.0 * math.log10(self.noise) if self.noise > 0.0 else math.inf


def assign(
    costs: Costs, noise: Mapping[str, float], max_noise: float = math.inf, *, time_limit: float = TIME_LIMIT
) -> Assignment:
    """Return which layers to run in int8: least predicted latency, summed noise at most `max_noise`.

    Args:
        costs: the latency model.
        noise: layer -> noise power at the output, relative to the signal, when that layer alone is int8 (they add up);
            layers that are not in it stay float.
        max_noise: bound on the sum: 10 ** (-dB / 10) for an SQNR in dB.
        time_limit: seconds for the solver.

    Raises:
        DataError: noise that is no number.
    """
    choice = solve(costs.problem(noise), max_noise, time_limit=time_limit)
    int8 = choice.having("int8")
    return Assignment(int8, costs.predict(int8), choice.loss, choice)
