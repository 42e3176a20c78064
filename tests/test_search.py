"""Choices under a budget: the solver against trying everything, greedy never better, bounds kept, clear refusals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.errors import DataError, GateMissedError
from graphopt.search import Assignment, Choice, Option, Problem, Term, assign, greedy, least_loss, solve, uniform

# numbers with few digits: sums are compared with a tolerance that is far below their steps
COSTS = st.integers(-40, 80).map(lambda k: k / 8)
LOSSES = st.integers(0, 64).map(lambda k: k / 64)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    items = {
        f"i{n}": {f"o{k}": Option(draw(COSTS), draw(LOSSES)) for k in range(draw(st.integers(1, 3)))}
        for n in range(draw(st.integers(1, 5)))
    }
    terms = []
    for _ in range(draw(st.integers(0, 5))):
        names = draw(st.lists(st.sampled_from(sorted(items)), min_size=1, max_size=min(3, len(items)), unique=True))
        combinations = list(itertools.product(*(items[name] for name in names)))
        terms.append(Term(tuple(names), {c: draw(COSTS) for c in combinations if draw(st.booleans())}))
    return Problem(items, terms, constant=draw(COSTS))


def everything(problem: Problem) -> list[tuple[float, float]]:
    """Cost and loss of every choice."""
    found = []
    for names in itertools.product(*problem.items.values()):
        picks = dict(zip(problem.items, names, strict=True))
        found.append((problem.cost(picks), problem.loss(picks)))
    return found


@settings(max_examples=150, deadline=None)
@given(problems(), st.integers(0, 160).map(lambda k: k / 64))
def test_the_cheapest_within_the_bound(problem: Problem, bound: float) -> None:
    within = [cost for cost, loss in everything(problem) if loss <= bound]
    if not within:
        with pytest.raises(GateMissedError, match="no choice keeps the loss"):
            solve(problem, bound)
        return
    found = solve(problem, bound)
    assert found.loss <= bound
    assert found.cost == pytest.approx(min(within), abs=1e-9)
    assert problem.cost(found.picks) == found.cost


@settings(max_examples=150, deadline=None)
@given(problems(), st.integers(-60, 200).map(lambda k: k / 8))
def test_the_least_loss_at_a_cost(problem: Problem, bound: float) -> None:
    within = [loss for cost, loss in everything(problem) if cost <= bound]
    if not within:
        with pytest.raises(GateMissedError, match="the cheapest one found costs"):
            least_loss(problem, bound)
        return
    found = least_loss(problem, bound)
    assert found.cost <= bound
    assert found.loss == pytest.approx(min(within), abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(problems(), st.integers(0, 160).map(lambda k: k / 64))
def test_greedy_keeps_the_bound_and_never_wins(problem: Problem, bound: float) -> None:
    if min(loss for _, loss in everything(problem)) > bound:
        with pytest.raises(GateMissedError):
            greedy(problem, bound)
        return
    rough = greedy(problem, bound)
    assert rough.loss <= bound
    assert solve(problem, bound).cost <= rough.cost + 1e-9
    assert rough.cost <= problem.cost(problem.safest()) + 1e-9


def chain(count: int, gain: float, border: float, loss: float = 1.0) -> Problem:
    """Layers in a row: int8 saves `gain` each, every change of precision costs `border`; both ends are float."""
    names = [f"l{n}" for n in range(count)]
    items = {name: {"float": Option(1.0), "int8": Option(1.0 - gain, loss)} for name in names}
    terms = [Term(pair, {("float", "int8"): border, ("int8", "float"): border}) for pair in itertools.pairwise(names)]
    terms += [Term((end,), {("int8",): border}) for end in (names[0], names[-1])]
    return Problem(items, terms)


def test_borders_keep_islands_away_and_let_regions_pay() -> None:
    problem = chain(count=12, gain=0.5, border=0.8)
    assert solve(problem, 3.0).having("int8") == set()  # three layers gain 1.5, two borders take 1.6
    region = solve(problem, 6.0).having("int8")
    numbers = sorted(int(name[1:]) for name in region)
    assert numbers == list(range(numbers[0], numbers[0] + 6))
    assert greedy(problem, 6.0).having("int8") == set()  # no single layer pays for its borders


def test_a_long_chain_is_proved_best() -> None:
    found = solve(chain(count=300, gain=0.5, border=0.8, loss=0.01), 1.5)
    assert found.proved
    assert len(found.having("int8")) == 150


def test_scales_do_not_matter() -> None:
    problem = chain(count=9, gain=0.5, border=0.8)
    tiny = Problem(
        {
            i: {n: Option(o.cost * 1e-7, o.loss * 1e-9) for n, o in options.items()}
            for i, options in problem.items.items()
        },
        [Term(t.items, {k: v * 1e-7 for k, v in t.costs.items()}) for t in problem.terms],
    )
    assert len(solve(tiny, 6e-9).having("int8")) == len(solve(problem, 6.0).having("int8")) == 6


def test_losses_of_many_magnitudes_stay_within_the_bound() -> None:
    items = {f"l{n}": {"float": Option(1.0), "int8": Option(0.0, 10.0**-n)} for n in range(12)}
    found = solve(Problem(items), 1e-6)
    assert found.loss <= 1e-6
    assert found.having("int8") == {f"l{n}" for n in range(7, 12)}  # l6 alone would fill the bound


def test_without_time_the_greedy_choice_stands() -> None:
    problem = Problem(
        {f"l{n}": {"float": Option(1.0), "int8": Option(0.5 - n % 7 / 90, 1.0 + n % 5 / 9)} for n in range(60)},
        [
            Term((f"l{a}", f"l{b}"), {("float", "int8"): (a * b) % 11 / 40, ("int8", "float"): (a + b) % 13 / 40})
            for a, b in itertools.combinations(range(60), 2)
        ],
    )  # fmt: skip
    hurried = solve(problem, 20.0, time_limit=0.01)
    assert hurried.loss <= 20.0
    assert hurried.cost <= greedy(problem, 20.0).cost
    assert not hurried.proved


def test_all_of_one_option() -> None:
    problem = Problem({"a": {"float": Option(2.0), "int8": Option(1.0, 0.5)}, "b": {"float": Option(3.0)}})
    found = uniform(problem, "int8")
    assert found.picks == {"a": "int8", "b": "float"}
    assert (found.cost, found.loss) == (4.0, 0.5)


@pytest.mark.parametrize(
    ("items", "terms", "text"),
    [
        ({"a": {}}, [], "nothing to choose from"),
        ({"a": {"x": Option(math.nan)}}, [], "cannot be weighed"),
        ({"a": {"x": Option(1.0, -1.0)}}, [], "cannot be weighed"),
        ({"a": {"x": Option(1.0)}}, [Term(("b",), {})], "no item 'b'"),
        ({"a": {"x": Option(1.0)}}, [Term(("a", "a"), {})], "different items"),
        ({"a": {"x": Option(1.0)}}, [Term(("a",), {("y",): 1.0})], "cannot be weighed"),
    ],
)
def test_bad_problems_are_refused(items: dict[str, dict[str, Option]], terms: list[Term], text: str) -> None:
    with pytest.raises(DataError, match=text):
        Problem(items, terms)


def test_nothing_to_choose() -> None:
    assert solve(Problem({}, constant=2.0)).cost == 2.0


class Chain:
    """A latency model of layers in a row."""

    def predict(self, int8: Iterable[str]) -> float:
        chosen = set(int8)
        plain = chain(count=8, gain=0.5, border=0.8)
        return plain.cost({name: "int8" if name in chosen else "float" for name in plain.items})

    def problem(self, noise: Mapping[str, float]) -> Problem:
        plain = chain(count=8, gain=0.5, border=0.8)
        items = {
            name: {
                option: Option(one.cost, noise.get(name, math.inf) if option == "int8" else 0.0)
                for option, one in options.items()
                if option == "float" or name in noise
            }
            for name, options in plain.items.items()
        }
        return Problem(items, plain.terms)


def test_assignment() -> None:
    found = assign(Chain(), {f"l{n}": 0.001 for n in range(8)}, 0.0081)
    assert isinstance(found, Assignment)
    assert len(found.int8) == 8
    assert found.seconds == pytest.approx(8 * 0.5 + 1.6)
    assert found.sqnr == pytest.approx(10 * math.log10(1 / 0.008))


def test_choice_lists_the_items_of_an_option() -> None:
    assert Choice({"a": "x", "b": "y"}, 0.0, 0.0, "fixed").having("x") == {"a"}


def test_greedy_takes_the_best_rate_first() -> None:
    items = {
        "a": {"float": Option(10.0), "int8": Option(6.0, 4.0)},  # saves 1 per loss
        "b": {"float": Option(10.0), "int8": Option(7.0, 1.0)},  # saves 3 per loss
        "c": {"float": Option(10.0), "int8": Option(8.0, 1.0)},  # saves 2 per loss
    }
    assert greedy(Problem(items), 1.0).having("int8") == {"b"}
    assert greedy(Problem(items), 2.5).having("int8") == {"b", "c"}
    assert greedy(Problem(items), 6.0).having("int8") == {"a", "b", "c"}


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    for count in range(20, 60, 10):
        solve(chain(count=count, gain=0.5, border=0.8, loss=0.37), 5.0)
    assert capfd.readouterr().out == ""
