"""Minimum cuts: both ways to find them, and the definition, agree on random graphs."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.analysis import min_cut
from graphopt.analysis.min_cut import sink_side

NODES = 7
GRAPHS = st.dictionaries(
    st.tuples(st.integers(0, NODES - 1), st.integers(0, NODES - 1)).filter(lambda e: e[0] != e[1]),
    st.integers(0, 9),
    min_size=1,
    max_size=20,
)


def by_definition(edges: dict[tuple[int, int], int]) -> set[int]:
    """Return the smallest sink side among the cheapest cuts, by trying all."""

    def price(side: set[int]) -> int:
        return sum(c for (a, b), c in edges.items() if a not in side and b in side)

    inner = range(2, NODES)
    sides = [{1, *chosen} for k in range(len(inner) + 1) for chosen in itertools.combinations(inner, k)]
    least = min(map(price, sides))
    return set.intersection(*(side for side in sides if price(side) == least))


@given(GRAPHS)
@settings(max_examples=300, deadline=None)
def test_both_ways_find_the_smallest_side_of_the_cheapest_cuts(edges: dict[tuple[int, int], int]) -> None:
    expected = by_definition(edges)
    assert sink_side(edges, 0, 1) == expected
    assert min_cut._by_scipy(edges, 0, 1) == expected


def test_large_graphs_go_to_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def noted(edges: min_cut.Edges, *_: int) -> set[int]:
        asked.append(len(edges))
        return {1}

    monkeypatch.setattr(min_cut, "_by_scipy", noted)
    chain = {(i + 1, i + 2): 1 for i in range(1, min_cut.SMALL + 2)}
    assert sink_side({(0, 2): 5, **chain, (2, 1): 1}, 0, 1) == {1}
    assert asked == [len(chain) + 2]


def test_a_chain_is_cut_at_its_narrowest_last_place() -> None:
    assert sink_side({(0, 2): 3, (2, 3): 1, (3, 4): 1, (4, 1): 3}, 0, 1) == {1, 4}
